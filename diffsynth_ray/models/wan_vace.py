"""VACE: blocks beside Wan's DiT that read a control clip, and whose results are added to the DiT's own blocks'.

diffusers has both in one class, and DiffSynth-Studio has two models, of which it trains one. Here they are two modules: the
DiT as for text to video, and `Vace`, which `controlled` runs inside of the DiT's forward pass.

Shapes: b batch, f latent frames, h/w latent height and width, c latent channels, s tokens, d width of the DiT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth_ray.errors import ModelError

MASK_PIXELS = 8
"""Pixels of a mask, each way, that become the channels of one latent pixel."""


class Vace(nn.Module):
    """The part of VACE's weights beside the DiT's, under the names of diffusers' class."""

    def __init__(
        self,
        *,
        num_attention_heads: int,
        attention_head_dim: int,
        ffn_dim: int,
        num_vace_blocks: int,
        vace_layers: list[int] | None = None,
        vace_in_channels: int = 96,
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
    ) -> None:
        """`vace_layers`: the DiT's blocks whose results are added to; None = evenly over all, as in every release."""
        from diffusers.models.transformers.transformer_wan_vace import WanVACETransformerBlock

        super().__init__()
        inner = num_attention_heads * attention_head_dim
        self.vace_layers = vace_layers
        self.vace_patch_embedding = nn.Conv3d(vace_in_channels, inner, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.vace_blocks = nn.ModuleList(
            WanVACETransformerBlock(
                inner,
                ffn_dim,
                num_attention_heads,
                qk_norm,
                cross_attn_norm,
                eps,
                apply_input_projection=number == 0,
                apply_output_projection=True,
            )
            for number in range(num_vace_blocks)
        )

    def forward(self, control: Tensor, hidden: Tensor, text: Tensor, time: Tensor, rotary: Any) -> list[Tensor]:
        """Control [b, 96, f, h, w] and what the DiT's first block gets -> what is added to its blocks, [b, s, d] each."""
        state = self.vace_patch_embedding(control).flatten(2).transpose(1, 2).contiguous()
        hints = []
        for block in self.vace_blocks:
            hint, state = block(hidden, text, state, time, rotary)
            hints.append(hint)
        return hints

    def layers_of(self, num_layers: int) -> list[int]:
        """The blocks of a DiT of so many to whose results is added."""
        if self.vace_layers is not None:
            return self.vace_layers
        count = len(self.vace_blocks)
        if num_layers % count:
            raise ModelError(
                f"wan vace: its {count} blocks do not go evenly into the dit's {num_layers}; are both of one release? Else put "
                "diffusers' config.json beside the weights"
            )
        return list(range(0, num_layers, num_layers // count))


@contextmanager
def controlled(dit: nn.Module, vace: Vace, control: Tensor) -> Iterator[None]:
    """The DiT's forward pass inside is VACE's, with this control [b, 96, f, h, w].

    By hooks around the DiT's blocks, so that however a block is called (recomputed, compiled, its weights loaded first) is
    how it is called here too.
    """
    blocks: Any = dit.blocks
    layers = vace.layers_of(len(blocks))
    hints: dict[int, Tensor] = {}

    def before_the_first(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        hints.update(zip(layers, vace(control, *arguments), strict=True))

    def after(number: int) -> Any:
        return lambda block, arguments, output: output + hints.pop(number)

    handles = [blocks[0].register_forward_pre_hook(before_the_first)]
    handles += [blocks[number].register_forward_hook(after(number)) for number in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class JoinedTransformer(nn.Module):
    """Both modules as diffusers' pipeline takes them."""

    def __init__(self, dit: Any, vace: Vace) -> None:
        super().__init__()
        self.dit, self.vace = dit, vace
        self.dtype = dit.dtype
        self.config = SimpleNamespace(**dit.config, vace_layers=vace.layers_of(len(dit.blocks)))

    def cache_context(self, name: str) -> Any:
        """The pipeline asks for it; nothing is cached."""
        return nullcontext()

    def forward(
        self,
        *,
        control_hidden_states: Tensor,
        control_hidden_states_scale: Tensor,
        attention_kwargs: Any,
        **arguments: Any,
    ) -> Any:
        """See diffusers' WanVACETransformer3DModel; the scale is 1."""
        with controlled(self.dit, self.vace, control_hidden_states):
            return self.dit(**arguments)


def fold_mask(mask: Tensor) -> Tensor:
    """[b, F, H, W] in 0..1 -> [b, 64, f, H / 8, W / 8]: a frame in four, and its pixels as channels."""
    b, num_frames, height, width = mask.shape
    p = MASK_PIXELS
    pixels = mask.view(b, num_frames, height // p, p, width // p, p).permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
    size = ((num_frames + 3) // 4, height // p, width // p)
    return nn.functional.interpolate(pixels, size=size, mode="nearest-exact")


def join_control(inactive: Tensor, reactive: Tensor, mask: Tensor, reference: Tensor | None) -> Tensor:
    """Latents of what stays and of what is made anew [b, c, f, h, w] and the folded mask -> [b, 2c + 64, (1 +) f, h, w].

    A reference's latents [b, c, 1, h, w] come before the clip's, as something that stays.
    """
    if reference is not None:
        inactive = torch.cat([reference, inactive], dim=2)
        reactive = torch.cat([torch.zeros_like(reference), reactive], dim=2)
        mask = torch.cat([torch.zeros_like(mask[:, :, :1]), mask], dim=2)
    return torch.cat([inactive, reactive, mask.to(inactive)], dim=1)
