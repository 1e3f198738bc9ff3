"""Latents of an image <-> tokens of 2x2 latent pixels.

The latents of some families are 2x2 pixels as one already: `patch` is 1 there.
"""

from __future__ import annotations

from torch import Tensor

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
