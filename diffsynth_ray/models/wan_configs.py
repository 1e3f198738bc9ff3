"""Wan's configurations: the tiny ones, and how the full ones follow from the tensors' shapes (names in memory)."""

from __future__ import annotations

from typing import Any

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import t5
from diffsynth_ray.models.library_family import InferConfig, Shapes, count_blocks

LATENTS_22: dict[str, list[float]] = {
    "latents_mean": [
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
        *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
        *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ],
    "latents_std": [
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
        *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
        *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ],
}
"""Per channel of the latents of Wan2.2-TI2V-5B's VAE, as released."""

# Variants that change the transformer itself, by layers that only they have.
_OTHER_VARIANTS = {
    "control_adapter.": "Fun-Control-Camera",
    "ref_conv.": "Fun-Control (with a reference image)",
    "face_adapter.": "Animate",
    "pose_patch_embedding.": "Animate",
    "motion_encoder.": "Animate",
    "casual_audio_encoder.": "S2V",
    "audio_injector.": "S2V",
    "music_injector.": "WanToDance",
}

TINY_DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 128,
    "num_layers": 2,
}
TINY_IMAGE_DIT = TINY_DIT | {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 64}
TINY_VACE_DIT = TINY_DIT | {"num_layers": 4}
TINY_VACE: dict[str, Any] = {key: TINY_DIT[key] for key in ("num_attention_heads", "attention_head_dim", "ffn_dim")} | {
    "num_vace_blocks": 2
}
TINY_VAE: dict[str, Any] = {"base_dim": 4, "z_dim": 16}
TINY_TEXT_ENCODER = t5.TINY
TINY_IMAGE_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "gelu",
}


def _infer_dit(shapes: Shapes) -> dict[str, Any]:
    for prefix, variant in _OTHER_VARIANTS.items():
        if any(key.startswith(prefix) for key in shapes):
            raise ModelError(
                f"wan dit: these are the weights of {variant}, which this version does not train; it trains text to "
                "video, image to video (also InP), TI2V-5B and VACE"
            )
    inner, in_channels = shapes["patch_embedding.weight"][:2]
    out_channels = shapes["proj_out.weight"][0] // 4
    if (in_channels, out_channels) not in ((16, 16), (36, 16), (48, 48)):
        raise ModelError(
            f"wan dit: {in_channels} input channels are those of a control variant (Fun-Control, Camera), which this "
            "version does not train; it trains text to video (16), image to video (36) and TI2V-5B (48)"
        )
    image_norm = shapes.get("condition_embedder.image_embedder.norm1.weight")
    positions = shapes.get("condition_embedder.image_embedder.pos_embed")
    head_dim = _head_dim(inner)
    return {
        "num_attention_heads": inner // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": count_blocks(shapes, "blocks."),
        "image_dim": image_norm[0] if image_norm else None,
        "added_kv_proj_dim": inner if image_norm else None,
        "pos_embed_seq_len": positions[1] if positions else None,
    }


def _infer_vace(shapes: Shapes) -> dict[str, Any]:
    inner, in_channels = shapes["vace_patch_embedding.weight"][:2]
    if in_channels != 96:
        raise ModelError(
            f"wan vace: {in_channels} input channels; this version trains VACE of Wan2.1 and of Wan2.2-A14B, which have 96 "
            "(two clips' latents and a mask)"
        )
    head_dim = _head_dim(inner)
    return {
        "num_attention_heads": inner // head_dim,
        "attention_head_dim": head_dim,
        "ffn_dim": shapes["vace_blocks.0.ffn.net.0.proj.weight"][0],
        "vace_in_channels": in_channels,
        "num_vace_blocks": count_blocks(shapes, "vace_blocks."),
    }


def _head_dim(inner: int) -> int:
    """The width of a head leaves no trace in the weights; it is 128 in every release."""
    tiny = TINY_DIT["num_attention_heads"] * TINY_DIT["attention_head_dim"]
    if inner % 128 and inner != tiny:
        raise ModelError(f"wan dit: no release has width {inner}; put diffusers' config.json beside the weights")
    return 128 if inner % 128 == 0 else int(TINY_DIT["attention_head_dim"])


def _infer_vae(shapes: Shapes) -> dict[str, Any]:
    base_dim, in_channels = shapes["encoder.conv_in.weight"][:2]
    z_dim = shapes["post_quant_conv.weight"][0]
    if "encoder.down_blocks.0.resnets.0.norm1.gamma" not in shapes:
        # Latent mean and std are diffusers' defaults, which are those of 2.1.
        return {"base_dim": base_dim, "z_dim": z_dim}
    return {
        "base_dim": base_dim,
        "decoder_base_dim": shapes["decoder.conv_in.weight"][0] // 4,
        "z_dim": z_dim,
        "is_residual": True,
        "in_channels": in_channels,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "patch_size": 2,
        "scale_factor_spatial": 16,
        **LATENTS_22,
    }


def _infer_image_encoder(shapes: Shapes) -> dict[str, Any]:
    width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    tokens = shapes["embeddings.position_embedding.weight"][0]
    return {
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count_blocks(shapes, "encoder.layers."),
        # ViT-H/14, the encoder of every release, has heads of 80.
        "num_attention_heads": width // 80 if width % 80 == 0 else TINY_IMAGE_ENCODER["num_attention_heads"],
        "image_size": round((tokens - 1) ** 0.5) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }


INFER: dict[str, InferConfig] = {
    "dit": _infer_dit,
    "vace": _infer_vace,
    "vae": _infer_vae,
    "text_encoder": t5.infer_config,
    "image_encoder": _infer_image_encoder,
}
