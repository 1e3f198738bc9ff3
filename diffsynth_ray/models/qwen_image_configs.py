"""Qwen-Image's configurations: the tiny ones, and how the full ones follow from the tensors' shapes."""

from __future__ import annotations

from typing import Any

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.library_family import InferConfig, Shapes, count_blocks

# Rotary axes (frame, height, width) by width of a head; they leave no trace in the weights.
_ROPE_AXES = {128: (16, 56, 56), 32: (8, 12, 12)}

# Qwen2.5-VL-7B-Instruct, the text encoder of every released Qwen-Image.
TEXT_ENCODER_7B: dict[str, Any] = {
    "tie_word_embeddings": False,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
        "sliding_window": None,
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "model_type": "qwen2_5_vl_vision",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
    },
}

TINY: dict[str, dict[str, Any]] = {
    "dit": {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "axes_dims_rope": (8, 12, 12),
    },
    "vae": {"base_dim": 8, "z_dim": 16},
    "text_encoder": {
        **TEXT_ENCODER_7B,
        "image_token_id": 552,
        "video_token_id": 553,
        "vision_start_token_id": 549,
        "vision_end_token_id": 550,
        "text_config": {
            **TEXT_ENCODER_7B["text_config"],
            "vocab_size": 576,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": 540,
            "eos_token_id": 542,
        },
        "vision_config": {
            **TEXT_ENCODER_7B["vision_config"],
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
    },
}


SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""Of the released models' sampling."""


def _infer_dit(shapes: Shapes) -> dict[str, Any]:
    inner, in_channels = shapes["img_in.weight"]
    head_dim = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    if head_dim not in _ROPE_AXES:
        raise ModelError(f"qwen_image dit: heads of width {head_dim} are not known; put its config.json beside the weights")
    return {
        "patch_size": 2,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": inner // head_dim,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": _ROPE_AXES[head_dim],
    }


def _infer_vae(shapes: Shapes) -> dict[str, Any]:
    base_dim, input_channels = shapes["encoder.conv_in.weight"][:2]
    # Latent mean and std are diffusers' defaults, which are Qwen-Image's.
    return {"base_dim": base_dim, "z_dim": shapes["post_quant_conv.weight"][0], "input_channels": input_channels}


def _infer_text_encoder(shapes: Shapes) -> dict[str, Any]:
    text = TEXT_ENCODER_7B["text_config"]
    prefix = "model.language_model." if "model.language_model.embed_tokens.weight" in shapes else "model."
    embedding = shapes[f"{prefix}embed_tokens.weight"]
    if embedding != (text["vocab_size"], text["hidden_size"]):
        raise ModelError(
            f"qwen_image text_encoder: embeddings of shape {list(embedding)} are not Qwen2.5-VL-7B's "
            f"{[text['vocab_size'], text['hidden_size']]}; put its config.json beside the weights"
        )
    return TEXT_ENCODER_7B


INFER: dict[str, InferConfig] = {
    "dit": _infer_dit,
    "text_encoder": _infer_text_encoder,
    "vae": _infer_vae,
}
