"""Qwen-Image-Edit (also 2509, 2511): the pictures to edit, as the text encoder and the DiT get them.

A picture goes two ways: scaled to about 1024 x 1024 pixels through the VAE, whose latents the DiT sees behind those of the
picture that is made; and, in the prompt's template, through the text encoder's eyes.

Shapes: n text tokens after the template, s tokens of 2x2 latent pixels over all pictures of a sample, k pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import edit_pictures
from diffsynth_ray.models.layouts import EDIT_PROMPTS

TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), "
    "then explain how the user's text instruction should alter or modify the image. Generate a new image that meets the "
    "user's requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_TOKENS = 64
"""Tokens of the template before the pictures; their embeddings are dropped."""
PROMPT_STYLES = EDIT_PROMPTS
"""How the pictures stand before the prompt: "numbered" says "Picture 1: ..." as 2509 and 2511 were trained; "auto" does so for
several pictures only, and gives a single one as the first Edit model knows it: what DiffSynth-Studio does."""
_IMAGE_TOKEN = "<|image_pad|>"
_SEEN = f"<|vision_start|>{_IMAGE_TOKEN}<|vision_end|>"
_SEEN_AREA = 384 * 384


def scaled(picture: Image.Image, area: int) -> Image.Image:
    """The picture at about `area` pixels, both sides multiples of 32."""
    return edit_pictures.scaled_to_area(picture, area, multiple=edit_pictures.SIDE)


def for_the_vae(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The sample's pictures at the size that the VAE gets them."""
    return [scaled(picture, edit_pictures.AREA) for picture in pictures]


@cache
def build_image_processor(folder: Path | None) -> Any:
    """Qwen2.5-VL's, with the settings in a folder (`processor_path`) or, without one, those of the released models."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if folder is None:
        return Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16384)
    if not (folder / "preprocessor_config.json").is_file():
        raise ModelError(f"qwen_image: no preprocessor_config.json in {folder}; see [model] processor_path")
    return Qwen2VLImageProcessorPil.from_pretrained(str(folder), local_files_only=True)


def encoder_inputs(
    prompt: str, pictures: Sequence[Image.Image], *, tokenizer: Any, processor: Any, style: str
) -> dict[str, Tensor]:
    """What the text encoder gets of one sample, from the pictures as the VAE gets them; batch 1."""
    if style not in PROMPT_STYLES:
        raise ModelError(f"[model] options: edit_prompt is one of {', '.join(PROMPT_STYLES)}, got {style!r}")
    numbered = style == "numbered" or len(pictures) > 1
    seen = [scaled(picture, _SEEN_AREA) for picture in pictures] if numbered else list(pictures)
    text = "".join(f"Picture {number}: {_SEEN}" for number in range(1, len(seen) + 1)) if numbered else _SEEN
    vision = processor(images=seen, return_tensors="pt")
    parts = TEMPLATE.format(text + prompt).split(_IMAGE_TOKEN)
    merged = processor.merge_size**2
    filled = parts[0]
    # What the user writes is not searched: the pictures' tokens come first.
    for grid, part in zip(vision.image_grid_thw, parts[1 : len(seen) + 1], strict=True):
        filled += _IMAGE_TOKEN * (int(grid.prod()) // merged) + part
    filled += "".join(_IMAGE_TOKEN + part for part in parts[len(seen) + 1 :])
    ids = tokenizer(filled, return_tensors="pt").input_ids
    image_id = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": vision.pixel_values,
        "image_grid_thw": vision.image_grid_thw,
        # Without it transformers numbers the pictures' tokens as if they were words.
        "mm_token_type_ids": (ids == image_id).int(),
    }
