"""FLUX.1's configurations: the tiny ones, and how the full ones follow from the tensors' shapes (names in memory)."""

from __future__ import annotations

from typing import Any

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import image_vae, t5
from diffsynth_ray.models.library_family import InferConfig, Shapes, count_blocks

# Rotary axes (nothing, row, column) by width of a head; they leave no trace in the weights.
_ROPE_AXES = {128: (16, 56, 56), 32: (8, 12, 12)}

TINY: dict[str, dict[str, Any]] = {
    "dit": {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": _ROPE_AXES[32],
    },
    "text_encoder_1": {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": 382,
        "eos_token_id": 2,
    },
    "text_encoder_2": t5.TINY,
    "vae": image_vae.config(image_vae.TINY_VAE_WIDTHS),
}


def _infer_dit(shapes: Shapes) -> dict[str, Any]:
    inner, in_channels = shapes["x_embedder.weight"]
    if in_channels != 64:
        what = {384: "Fill", 128: "Canny or Depth", 196: "Flex.2"}.get(in_channels, "a variant with control inputs")
        raise ModelError(
            f"flux dit: {in_channels} input channels are those of FLUX.1 {what}, which this version does not train; "
            "it trains FLUX.1-dev and -schnell (64)"
        )
    head_dim = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    if head_dim not in _ROPE_AXES:
        raise ModelError(f"flux dit: heads of width {head_dim} are not known; put its config.json beside the weights")
    return {
        "in_channels": in_channels,
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "num_single_layers": count_blocks(shapes, "single_transformer_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": inner // head_dim,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": _ROPE_AXES[head_dim],
    }


def _infer_clip(shapes: Shapes) -> dict[str, Any]:
    vocab_size, hidden = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count_blocks(shapes, "encoder.layers."),
        # CLIP ViT-L/14, FLUX.1's, has heads of 64.
        "num_attention_heads": hidden // 64 if hidden % 64 == 0 else TINY["text_encoder_1"]["num_attention_heads"],
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,  # the pooled state is that of the highest token id, the end of the text
    }


INFER: dict[str, InferConfig] = {
    "dit": _infer_dit,
    "text_encoder_1": _infer_clip,
    "text_encoder_2": t5.infer_config,
    "vae": image_vae.infer_config,
}

SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
"""Of FLUX.1-dev's sampling."""
