"""Configurations of released models by repository, so that a job can be reckoned before anything is downloaded.

Keys that are not here have the defaults of diffusers' and transformers' classes. tests/unit/models/test_full_size.py holds the
same configurations against the released files' digests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffsynth_ray.config.origins import Origin
from diffsynth_ray.models.layouts import KEY_LAYOUTS
from diffsynth_ray.models.qwen_image_configs import TEXT_ENCODER_7B

Configs = Mapping[str, dict[str, Any]]

_GATED = {"relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu"}
_T5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64} | _GATED
_CLIP = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "use_quant_conv": False,
    "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
_CLIP_VISION = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "image_size": 224,
    "patch_size": 14, "hidden_act": "gelu",
}  # fmt: skip
_WAN_22_VAE = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12,
    "out_channels": 12, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
_QWEN3 = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip

_QWEN: Configs = {"dit": {}, "text_encoder": TEXT_ENCODER_7B, "vae": {}}
_WAN: Configs = {"dit": {}, "text_encoder": _T5 | {"vocab_size": 256384}, "vae": {}}
_WAN_IMAGE: Configs = {
    **_WAN,
    "dit": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "image_encoder": _CLIP_VISION,
}
_SMALL_WAN = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_VACE = {"attention_head_dim": 128, "num_attention_heads": 40, "ffn_dim": 13824, "num_vace_blocks": 8}
_SMALL_VACE = {"attention_head_dim": 128, "num_attention_heads": 12, "ffn_dim": 8960, "num_vace_blocks": 15}
_TI2V = {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
_FLUX: Configs = {"dit": {"guidance_embeds": True}, "text_encoder_1": _CLIP, "text_encoder_2": _T5, "vae": _VAE}
_Z: Configs = {"dit": {}, "text_encoder": _QWEN3, "vae": _VAE}
_MISTRAL = {
    "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
    "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
_FLUX2: Configs = {"dit": {}, "text_encoder": _MISTRAL, "vae": {}}
_KLEIN_4B: Configs = {
    "dit": {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    "text_encoder": _QWEN3,
    "vae": {},
}  # fmt: skip
_KLEIN_9B: Configs = {
    "dit": {"num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False},
    "text_encoder": _QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288},
    "vae": {},
}

RELEASED: dict[str, tuple[str, Configs]] = {
    **{f"Qwen/Qwen-Image{variant}": ("qwen_image", _QWEN) for variant in ("", "-2512", "-Edit", "-Edit-2509", "-Edit-2511")},
    "Wan-AI/Wan2.1-T2V-1.3B": ("wan", {**_WAN, "dit": _SMALL_WAN}),
    "Wan-AI/Wan2.1-T2V-14B": ("wan", _WAN),
    "Wan-AI/Wan2.2-T2V-A14B": ("wan", _WAN),
    "Wan-AI/Wan2.1-I2V-14B-480P": ("wan", _WAN_IMAGE),
    "Wan-AI/Wan2.1-I2V-14B-720P": ("wan", _WAN_IMAGE),
    "Wan-AI/Wan2.1-FLF2V-14B-720P": ("wan", {**_WAN_IMAGE, "dit": _WAN_IMAGE["dit"] | {"pos_embed_seq_len": 514}}),
    "Wan-AI/Wan2.2-I2V-A14B": ("wan", {**_WAN, "dit": {"in_channels": 36}}),
    **dict.fromkeys(
        ("Wan-AI/Wan2.1-VACE-1.3B", "iic/VACE-Wan2.1-1.3B-Preview"),
        ("wan", {**_WAN, "dit": _SMALL_WAN, "vace": _SMALL_VACE}),
    ),
    **dict.fromkeys(("Wan-AI/Wan2.1-VACE-14B", "PAI/Wan2.2-VACE-Fun-A14B"), ("wan", {**_WAN, "vace": _VACE})),
    "Wan-AI/Wan2.2-TI2V-5B": ("wan", {**_WAN, "dit": _TI2V, "vae": _WAN_22_VAE}),
    "black-forest-labs/FLUX.1-dev": ("flux", _FLUX),
    "black-forest-labs/FLUX.1-Kontext-dev": ("flux", _FLUX),
    "black-forest-labs/FLUX.1-schnell": ("flux", {**_FLUX, "dit": {}}),
    "black-forest-labs/FLUX.2-dev": ("flux2", _FLUX2),
    **{f"black-forest-labs/FLUX.2-klein-{base}4B": ("flux2", _KLEIN_4B) for base in ("", "base-")},
    **{f"black-forest-labs/FLUX.2-klein-{base}9B": ("flux2", _KLEIN_9B) for base in ("", "base-")},
    "Tongyi-MAI/Z-Image": ("z_image", _Z),
    "Tongyi-MAI/Z-Image-Turbo": ("z_image", _Z),
}
"""Repository -> family and its components' configurations."""

_NAMES = (
    ("text_encoder_2", ("text_encoder_2/",)),
    ("text_encoder", ("text_encoder/", "models_t5")),
    ("image_encoder", ("image_encoder/", "models_clip")),
    ("vae", ("vae/", "ae.safetensors", "Wan2.1_VAE", "Wan2.2_VAE")),
    (
        "dit",
        ("transformer/", "high_noise_model/", "low_noise_model/", "diffusion_pytorch_model", "flux1-", "flux2-", "flux-2-"),
    ),
)
"""How paths in these repositories begin, by component."""


def released_components(origin: Origin) -> tuple[str, Configs] | None:
    """(family, component -> configuration) of an id, from its name alone; None where it is not known."""
    if origin.repo not in RELEASED:
        return None
    family, configs = RELEASED[origin.repo]
    component = next((name for name, starts in _NAMES if origin.pattern.startswith(starts)), None)
    if family == "flux" and component == "text_encoder":
        component = "text_encoder_1"
    if component not in configs:
        return None
    layouts = KEY_LAYOUTS[family]
    return family, {name: config for name, config in configs.items() if component in (name, layouts[name].lies_in)}
