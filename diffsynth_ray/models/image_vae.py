"""The VAE that FLUX.1 and Z-Image have in common: diffusers' `AutoencoderKL` with 16 latent channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.layer_names import LayerNames, NameTable
from diffsynth_ray.models.library_family import Shapes

VAE_FACTOR = 8
"""Pixels to a latent pixel, each way."""
LATENT_CHANNELS = 16
TINY_VAE_WIDTHS = (32, 32, 32, 32)
_LEVELS = 4


def _names() -> dict[str, str]:
    """ae.safetensors -> diffusers; the decoder's levels are counted from the other end."""
    resnet = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    blocks = {f"{side}.mid.block_{n + 1}": f"{side}.mid_block.resnets.{n}" for side in ("encoder", "decoder") for n in (0, 1)}
    names = {}
    for level in range(_LEVELS):
        up = f"decoder.up_blocks.{_LEVELS - 1 - level}"
        blocks |= {f"encoder.down.{level}.block.{n}": f"encoder.down_blocks.{level}.resnets.{n}" for n in range(2)}
        blocks |= {f"decoder.up.{level}.block.{n}": f"{up}.resnets.{n}" for n in range(3)}
        names[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        names[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    for side in ("encoder", "decoder"):
        names[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        mid = f"{side}.mid_block.attentions.0"
        names |= {f"{side}.mid.attn_1.{name}": f"{mid}.{inner}" for name, inner in attention.items()}
    return names | {f"{block}.{name}": f"{own}.{inner}" for block, own in blocks.items() for name, inner in resnet.items()}


NAMES = LayerNames(NameTable(_names()), NameTable(_names()))


def as_linear(name: str, tensor: Tensor) -> Tensor:
    """The weights of the attention, which are 1x1 convolutions in ae.safetensors, as the linear layers in memory."""
    return tensor[:, :, 0, 0] if "mid_block.attentions" in name and tensor.ndim == 4 else tensor


def as_convolution(key: str, tensor: Tensor) -> Tensor:
    """The inverse of `as_linear`, by the file's key."""
    return tensor[:, :, None, None] if ".mid.attn_1." in key and tensor.ndim == 2 else tensor


def config(block_out_channels: Sequence[int]) -> dict[str, Any]:
    """The configuration of such a VAE."""
    return {
        "down_block_types": ["DownEncoderBlock2D"] * _LEVELS,
        "up_block_types": ["UpDecoderBlock2D"] * _LEVELS,
        "block_out_channels": list(block_out_channels),
        "layers_per_block": 2,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 32,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration from the shapes under the names in memory."""
    channels = shapes["decoder.conv_in.weight"][1]
    if channels != LATENT_CHANNELS:
        raise ModelError(f"vae: {channels} latent channels; FLUX.1 and Z-Image have {LATENT_CHANNELS}")
    return config([shapes[f"encoder.down_blocks.{n}.resnets.0.conv2.weight"][0] for n in range(_LEVELS)])


def build(given: Mapping[str, Any]) -> nn.Module:
    """The module; call it under `meta_parameters`."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(dict(given))


def encode(vae: Any, pixels: Tensor, *, dtype: torch.dtype, device: torch.device, family: str) -> Tensor:
    """uint8 [b, 1, H, W, 3] -> [b, 16, H/8, W/8]: the posterior's mode, shifted and scaled."""
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    modes = posterior_modes(vae, pixels, dtype=dtype, device=device, family=family)
    return torch.cat([((mode - shift) * scale).to(dtype) for mode in modes])


def posterior_modes(vae: Any, pixels: Tensor, *, dtype: torch.dtype, device: torch.device, family: str) -> Iterator[Tensor]:
    """uint8 [b, 1, H, W, 3] -> the VAE's latents as they are, float32 [b', c, H/8, W/8], some samples at a time."""
    if pixels.ndim != 5 or pixels.shape[1] != 1 or pixels.shape[-1] != 3:
        raise ModelError(f"{family} takes images, uint8 [b, 1, height, width, 3], got {list(pixels.shape)}")
    check_size(pixels.shape[2], pixels.shape[3], 1, family=family)
    # On the CPU one at a time: convolutions there may choose another algorithm for another batch size.
    size = 1 if device.type == "cpu" else pixels.shape[0]
    for chunk in pixels.to(device).split(size):
        scaled = chunk[:, 0].permute(0, 3, 1, 2).float() / 127.5 - 1
        yield vae.encode(scaled.to(dtype)).latent_dist.mode().float()


def latents_shape(height: int, width: int, num_frames: int, *, family: str) -> tuple[int, ...]:
    """(16, height / 8, width / 8)."""
    check_size(height, width, num_frames, family=family)
    return (LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)


def check_size(height: int, width: int, num_frames: int, *, family: str) -> None:
    """ModelError for what is no picture of whole tokens, 16 pixels each way."""
    multiple = VAE_FACTOR * 2
    if num_frames != 1 or height % multiple or width % multiple or min(height, width) < 1:
        raise ModelError(
            f"{family} takes single images with sides that are multiples of {multiple}, got {width}x{height} and "
            f"{num_frames} frame(s)"
        )
