"""Latents of an image <-> tokens of 2x2 latent pixels; pictures that a transformer sees behind the one that it makes.

The latents of some families are 2x2 pixels as one already: `patch` is 1 there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.family import EncodedBatch, real_values

PATCH = 2
"""Latent pixels to an image token, each way."""


def pack_latents(latents: Tensor, *, patch: int = PATCH) -> Tensor:
    """[b, c, h, w] -> tokens [b, h/2 * w/2, c * 4], channel first within a token."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // patch, patch, w // patch, patch)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpack_latents(tokens: Tensor, *, height: int, width: int, patch: int = PATCH) -> Tensor:
    """The inverse of `pack_latents` for latents of this height and width."""
    b, _, width_of_token = tokens.shape
    c = width_of_token // (patch * patch)
    patches = tokens.reshape(b, height // patch, width // patch, c, patch, patch)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c, height, width)


def read_pictures(extra: Mapping[str, Any], name: str) -> list[list[Tensor]]:
    """The column's pictures by sample, uint8 [1, h, w, 3], each of its own size."""
    samples = []
    for files in extra[name]:
        if not isinstance(files, (tuple, list)) or not files:
            raise ModelError(f"model.extra_inputs: {name} takes pictures, got {files!r}; is it in dataset.data_file_keys?")
        samples.append([torch.as_tensor(file)[:1] for file in files])
    return samples


def scaled_to_area(picture: Image, area: int, *, multiple: int) -> Image:
    """The picture at about `area` pixels, its proportions kept, both sides multiples of `multiple`."""
    width = math.sqrt(area * picture.width / picture.height)
    height = width / (picture.width / picture.height)
    return picture.resize((round(width / multiple) * multiple, round(height / multiple) * multiple))


def cropped(picture: Image, *, height: int, width: int) -> Image:
    """The picture made as large as covers height x width pixels, and its middle cut out; as the data set's pictures are."""
    scale = max(width / picture.width, height / picture.height)
    size = (round(picture.width * scale), round(picture.height * scale))
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return picture.resize(size, Resampling.BILINEAR).crop((left, top, left + width, top + height))


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
    *,
    shapes: str,
) -> Tensor:
    """`predict` of the batch; of its samples one by one where their pictures differ in shape.

    A transformer takes one set of positions for the whole batch. `shapes` is the condition that holds the shapes.
    """
    given = batch.conditions.get(shapes)
    if given is None or len(set(map(str, real_values(given)))) == 1:
        return predict(batch, noisy_latents, timesteps)
    parts = zip(batch.samples(), noisy_latents.split(1), timesteps.split(1), strict=True)
    return torch.cat([predict(*part) for part in parts])
