"""FLUX.2's configurations: the tiny ones, and how the full ones follow from the tensors' shapes (names in memory)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import mistral, qwen3
from diffsynth_ray.models.library_family import InferConfig, Shapes, count_blocks

# Rotary axes (picture, row, column, word) by width of a head; they leave no trace in the weights.
_ROPE_AXES = {128: (32, 32, 32, 32), 32: (8, 8, 8, 8)}
_LEVELS = 4

TINY: dict[str, dict[str, Any]] = {
    "dit": {
        "in_channels": 128,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 192,
        "guidance_embeds": False,
        "axes_dims_rope": _ROPE_AXES[32],
    },
    "text_encoder": qwen3.tiny_config(4),
    "vae": {"block_out_channels": (32, 32, 32, 32)},
}
"""klein's; the defaults of the VAE's class are the released one's configuration."""


def _infer_dit(shapes: Shapes) -> dict[str, Any]:
    inner, in_channels = shapes["x_embedder.weight"]
    head_dim = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    if head_dim not in _ROPE_AXES:
        raise ModelError(f"flux2 dit: heads of width {head_dim} are not known; put its config.json beside the weights")
    return {
        "in_channels": in_channels,
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "num_single_layers": count_blocks(shapes, "single_transformer_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": inner // head_dim,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "timestep_guidance_channels": shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        "mlp_ratio": shapes["transformer_blocks.0.ff.linear_out.weight"][1] / inner,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": _ROPE_AXES[head_dim],
    }


def _infer_text_encoder(shapes: Shapes) -> dict[str, Any]:
    return qwen3.infer_config(shapes) if is_qwen3(shapes) else mistral.infer_config(shapes)


def is_qwen3(names: Iterable[str]) -> bool:
    """Whether a text encoder with these parameters is klein's; else it is that of FLUX.2-dev."""
    return any(name.endswith("self_attn.q_norm.weight") for name in names)


def _infer_vae(shapes: Shapes) -> dict[str, Any]:
    widths = tuple(shapes[f"encoder.down_blocks.{n}.resnets.0.conv2.weight"][0] for n in range(_LEVELS))
    decoder_widths = tuple(shapes[f"decoder.up_blocks.{n}.resnets.0.conv2.weight"][0] for n in reversed(range(_LEVELS)))
    return {
        "block_out_channels": widths,
        "decoder_block_out_channels": None if decoder_widths == widths else decoder_widths,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


INFER: dict[str, InferConfig] = {"dit": _infer_dit, "text_encoder": _infer_text_encoder, "vae": _infer_vae}
