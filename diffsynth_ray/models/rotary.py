"""Rotary position embedding in real arithmetic, and Qwen-Image's joint attention with it.

diffusers multiplies complex numbers there, which no compiler fuses with its neighbours: on the GPU the rotation then costs five
passes over queries and keys in float32. The same products and sums of real numbers become part of the kernel around them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels: x [b, s, heads, d] by angles [s, d / 2, 2] of (cos, sin), in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.unsqueeze(1).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class RealRope(nn.Module):
    """A module that returns rotary tables as complex numbers [s, d / 2], made to return [s, d / 2, 2] of (cos, sin)."""

    def __init__(self, complex_rope: nn.Module) -> None:
        super().__init__()
        self.complex_rope = complex_rope

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The inner module's tables in real numbers."""
        return tuple(torch.view_as_real(table) for table in self.complex_rope(*args, **kwargs))


class JointAttention:
    """Qwen-Image's attention over text and image tokens together; a processor of diffusers' Attention.

    The text's queries, keys and values have projections and norms of their own. Order of the joint sequence: text, image.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_mask: None = None,  # diffusers' Attention passes it always
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [b, s, d] and text tokens [b, n, d], mask [b, n] bool -> the same shapes."""
        image_angles, text_angles = image_rotary_emb if image_rotary_emb is not None else (None, None)
        image = (
            self._heads(attn, attn.to_q(hidden_states), attn.norm_q, image_angles),
            self._heads(attn, attn.to_k(hidden_states), attn.norm_k, image_angles),
            self._heads(attn, attn.to_v(hidden_states)),
        )
        text = (
            self._heads(attn, attn.add_q_proj(encoder_hidden_states), attn.norm_added_q, text_angles),
            self._heads(attn, attn.add_k_proj(encoder_hidden_states), attn.norm_added_k, text_angles),
            self._heads(attn, attn.add_v_proj(encoder_hidden_states)),
        )
        query, key, value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(text, image, strict=True))
        mask = None
        if encoder_hidden_states_mask is not None:
            all_image = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2])
            mask = torch.cat([encoder_hidden_states_mask, all_image], dim=1)[:, None, None, :]
        joint = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2, 3)
        num_text = encoder_hidden_states.shape[1]
        image_out = attn.to_out[0](joint[:, num_text:].contiguous())
        return image_out, attn.to_add_out(joint[:, :num_text].contiguous())

    @staticmethod
    def _heads(attn: Any, x: Tensor, norm: nn.Module | None = None, angles: Tensor | None = None) -> Tensor:
        """[b, s, heads * d] -> [b, s, heads, d], normalised and turned."""
        x = x.unflatten(-1, (-1, attn.inner_dim // attn.heads))
        x = x if norm is None else norm(x)
        return x if angles is None else rotate(x, angles)
