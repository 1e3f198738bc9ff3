"""Latents of an image <-> tokens of 2x2 latent pixels."""

from __future__ import annotations

from torch import Tensor

PATCH = 2
"""Latent pixels to an image token, each way."""


def pack_latents(latents: Tensor) -> Tensor:
    """[b, c, h, w] -> tokens [b, h/2 * w/2, c * 4], channel first within a token."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack_latents(tokens: Tensor, *, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents` for latents of this height and width."""
    b, _, width_of_token = tokens.shape
    c = width_of_token // (PATCH * PATCH)
    patches = tokens.reshape(b, height // PATCH, width // PATCH, c, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c, height, width)
