"""Families at their real sizes with random weights, for the benches: nothing is downloaded, every shape is the real one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diffsynth_ray.models import qwen_image_configs
from diffsynth_ray.models.family import EncodedBatch
from diffsynth_ray.models.flux import Flux
from diffsynth_ray.models.library_family import LibraryFamily
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.models.wan import Wan
from diffsynth_ray.models.z_image import ZImage


class RandomWeights:
    """Weights of std 0.02 made on the device: the shapes are the real ones, the values cost no disk."""

    def __init__(self, component: torch.nn.Module, device: torch.device) -> None:
        self.shapes = {name: param.shape for name, param in component.named_parameters()}
        self.device = device

    def read(self, name: str) -> torch.Tensor:
        """See placement.WeightSource."""
        return torch.empty(self.shapes[name], dtype=torch.bfloat16, device=self.device).normal_(0, 0.02)


@dataclass(frozen=True)
class RealSize:
    """A released model: what its classes are built with, and the shapes of one sample's conditions."""

    family: type[LibraryFamily]
    conditions: dict[str, tuple[int, ...]]
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Where the classes' defaults are another size."""


MODELS = {
    "qwen-image": RealSize(QwenImage, {"prompt_embeds": (256, 3584)}, {"text_encoder": qwen_image_configs.TEXT_ENCODER_7B}),
    "wan2.1-14b": RealSize(Wan, {"prompt_embeds": (512, 4096)}),
    "wan2.1-1.3b": RealSize(
        Wan, {"prompt_embeds": (512, 4096)}, {"dit": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}}
    ),
    "flux.1-dev": RealSize(
        Flux, {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)}, {"dit": {"guidance_embeds": True}}
    ),
    "z-image": RealSize(ZImage, {"prompt_embeds": (256, 2560)}, {"dit": {"axes_lens": [1536, 512, 512]}}),
}


def build(
    model: str, components: Sequence[str] = ("dit",), *, device: str | torch.device, num_layers: int | None = None
) -> LibraryFamily:
    """The family with its weights still to be read by `settle`, in bf16."""
    size, modules = MODELS[model], {}
    for name in components:
        config = size.configs.get(name, {})
        if name == "dit" and num_layers is not None:
            config = {**config, "num_layers": num_layers}
        module = size.family.build_component(name, config)
        module.requires_grad_(False).eval()
        for param in module.parameters():  # not the rotary tables, which are buffers
            param.data = param.data.to(torch.bfloat16)
        module.weight_source = RandomWeights(module, torch.device(device))
        modules[name] = module
    return size.family(modules, dtype=torch.bfloat16, device=device, tokenizer_paths=size.family.tiny_tokenizers)


def encoded_batch(
    family: LibraryFamily,
    model: str,
    *,
    batch: int,
    height: int,
    width: int,
    num_frames: int = 1,
    generator: torch.Generator | None = None,
) -> EncodedBatch:
    """Latents and conditions as stage two of split training reads them."""
    device = family.device
    latents = torch.randn(batch, *family.latents_shape(height, width, num_frames), device=device, generator=generator)
    conditions = {
        name: torch.randn(batch, *shape, device=device, dtype=torch.bfloat16, generator=generator)
        for name, shape in MODELS[model].conditions.items()
    }
    return EncodedBatch(latents, conditions)
