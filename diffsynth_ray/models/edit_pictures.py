"""Pictures to edit: what a transformer sees behind the picture that it makes.

Shapes: b batch, s tokens over all pictures of a sample, k pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.family import EncodedBatch, real_values
from diffsynth_ray.models.packing import PATCH, pack_latents

EDIT_TOKENS, EDIT_SHAPES = "edit_tokens", "edit_shapes"
"""Conditions: [b, s, c] and [b, k, 3] (frames, rows, columns of tokens)."""
AREA, SIDE = 1024 * 1024, 32
"""Qwen-Image-Edit and FLUX.2 get pictures of about this many pixels, with sides that are multiples of this."""
_TOKEN_PIXELS = 16


def read_pictures(extra: Mapping[str, Any], name: str) -> list[list[Tensor]]:
    """The column's pictures by sample, uint8 [1, h, w, 3], each of its own size."""
    samples = []
    for files in extra[name]:
        if not isinstance(files, (tuple, list)) or not files:
            raise ModelError(f"model.extra_inputs: {name} takes pictures, got {files!r}; is it in dataset.data_file_keys?")
        samples.append([torch.as_tensor(file)[:1] for file in files])
    return samples


def scaled_to_area(picture: Image.Image, area: int, *, multiple: int) -> Image.Image:
    """The picture at about `area` pixels, its proportions kept, both sides multiples of `multiple`."""
    width = math.sqrt(area * picture.width / picture.height)
    height = width / (picture.width / picture.height)
    return picture.resize((round(width / multiple) * multiple, round(height / multiple) * multiple))


def as_picture(pixels: Tensor) -> Image.Image:
    """Of uint8 [1, h, w, 3]."""
    return Image.fromarray(np.asarray(pixels[0].cpu()))


def token_shape(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens of a picture of these proportions at about `AREA` pixels."""
    side_width = math.sqrt(AREA * width / height)
    side_height = side_width * height / width
    return round(side_height / SIDE) * SIDE // _TOKEN_PIXELS, round(side_width / SIDE) * SIDE // _TOKEN_PIXELS


def cropped(picture: Image.Image, *, height: int, width: int) -> Image.Image:
    """The picture made as large as covers height x width pixels, and its middle cut out; as the data set's pictures are."""
    scale = max(width / picture.width, height / picture.height)
    size = (round(picture.width * scale), round(picture.height * scale))
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return picture.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))


def pack_pictures(latents: Sequence[Tensor], *, patch: int = PATCH) -> tuple[Tensor, Tensor]:
    """Latents [1, c, h, w] of a sample's pictures -> their tokens one after the other [1, s, c * 4], and their shapes.

    The shapes [1, pictures, 3] (frames, rows and columns of tokens) stay on the CPU, where positions are made from them.
    """
    shapes = [(1, one.shape[2] // patch, one.shape[3] // patch) for one in latents]
    return torch.cat([pack_latents(one, patch=patch) for one in latents], dim=1), torch.tensor([shapes])


def predict_by_shape(
    predict: Callable[[EncodedBatch, Tensor, Tensor], Tensor],
    batch: EncodedBatch,
    noisy_latents: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """`predict` of the batch; of its samples one by one where their pictures differ in shape.

    A transformer takes one set of positions for the whole batch.
    """
    given = batch.conditions.get(EDIT_SHAPES)
    if given is None or len(set(map(str, real_values(given)))) == 1:
        return predict(batch, noisy_latents, timesteps)
    parts = zip(batch.samples(), noisy_latents.split(1), timesteps.split(1), strict=True)
    return torch.cat([predict(*part) for part in parts])
