"""Families at their real sizes with random weights, for the benches: nothing is downloaded, every shape is the real one."""

from collections.abc import Sequence

import torch

from diffsynth_ray.models.family import BatchShape, EncodedBatch, get_family
from diffsynth_ray.models.full_size import RELEASED
from diffsynth_ray.models.library_family import LibraryFamily


class RandomWeights:
    """Weights of std 0.02 made on the device: the shapes are the real ones, the values cost no disk."""

    def __init__(self, component: torch.nn.Module, device: torch.device) -> None:
        self.shapes = {name: param.shape for name, param in component.named_parameters()}
        self.device = device

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """See placement.WeightSource."""
        return torch.empty(self.shapes[name], dtype=torch.bfloat16, device=self.device).normal_(0, 0.02)


MODELS = {
    "qwen-image": "Qwen/Qwen-Image",
    "wan2.1-14b": "Wan-AI/Wan2.1-T2V-14B",
    "wan2.1-1.3b": "Wan-AI/Wan2.1-T2V-1.3B",
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
    "z-image": "Tongyi-MAI/Z-Image",
    "flux.2-klein-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux.2-klein-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "flux.2-dev": "black-forest-labs/FLUX.2-dev",
}
"""Short names -> repositories."""


def build(
    model: str, components: Sequence[str] = ("dit",), *, device: str | torch.device, num_layers: int | None = None
) -> LibraryFamily:
    """The family with its weights still to be read by `settle`, in bf16."""
    name, configs = RELEASED[MODELS[model]]
    family, modules = get_family(name), {}
    assert issubclass(family, LibraryFamily)
    for component in components:
        config = configs[component]
        if component == "dit" and num_layers is not None:
            config = {**config, "num_layers": num_layers}
        module = family.build_component(component, config)
        module.requires_grad_(False).eval()
        for param in module.parameters():  # not the rotary tables, which are buffers
            param.data = param.data.to(torch.bfloat16)
        module.weight_source = RandomWeights(module, torch.device(device))
        modules[component] = module
    return family(modules, dtype=torch.bfloat16, device=device, tokenizer_paths=family.tiny_tokenizers)


def encoded_batch(family: LibraryFamily, shape: BatchShape, *, generator: torch.Generator | None = None) -> EncodedBatch:
    """Latents and conditions as stage two of split training reads them."""

    def noise(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(tensor.shape, device=family.device, dtype=dtype, generator=generator)

    blank = family.blank_batch(shape)
    conditions = {name: noise(tensor, torch.bfloat16) for name, tensor in blank.conditions.items()}
    return EncodedBatch(noise(blank.latents, torch.float32), conditions)
