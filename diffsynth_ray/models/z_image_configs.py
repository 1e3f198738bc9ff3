"""Z-Image's configurations: the tiny ones, and how the full ones follow from the tensors' shapes (names in memory)."""

from __future__ import annotations

from typing import Any

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import image_vae, qwen3
from diffsynth_ray.models.library_family import InferConfig, Shapes, count_blocks

# Rotary axes (text and frame, row, column) by width of a head; they leave no trace in the weights.
_ROPE_AXES = {128: [32, 48, 48], 32: [8, 12, 12]}
_AXES_LENS = [1536, 512, 512]

TINY: dict[str, dict[str, Any]] = {
    "dit": {
        "dim": 64,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 64,
        "axes_dims": _ROPE_AXES[32],
        "axes_lens": _AXES_LENS,
    },
    "text_encoder": qwen3.tiny_config(3),
    "vae": image_vae.config(image_vae.TINY_VAE_WIDTHS),
}


def _infer_dit(shapes: Shapes) -> dict[str, Any]:
    if "siglip_embedder.1.weight" in shapes:
        raise ModelError("z_image dit: these are the weights of Z-Image-Omni, which this version does not train")
    head_dim = shapes["layers.0.attention.norm_q.weight"][0]
    if head_dim not in _ROPE_AXES:
        raise ModelError(f"z_image dit: heads of width {head_dim} are not known; put its config.json beside the weights")
    inner, cap_feat_dim = shapes["cap_embedder.1.weight"]
    return {
        "in_channels": shapes["all_x_embedder.2-1.weight"][1] // 4,
        "dim": inner,
        "n_layers": count_blocks(shapes, "layers."),
        "n_refiner_layers": count_blocks(shapes, "noise_refiner."),
        "n_heads": inner // head_dim,
        "n_kv_heads": shapes["layers.0.attention.to_k.weight"][0] // head_dim,
        "cap_feat_dim": cap_feat_dim,
        "axes_dims": _ROPE_AXES[head_dim],
        "axes_lens": _AXES_LENS,
    }


INFER: dict[str, InferConfig] = {
    "dit": _infer_dit,
    "text_encoder": qwen3.infer_config,
    "vae": image_vae.infer_config,
}
