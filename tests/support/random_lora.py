"""A tiny model with a LoRA that changes what it computes."""

import torch

from diffsynth_ray.models.lora import add_lora


def with_random_lora(family, component="dit", *, targets=None, rank=4, seed=0, **keys):
    """A component of the family's tiny size (`keys` as for `build_tiny`), with a LoRA whose B is random instead of 0."""
    module = family.build_tiny(0, components=[component], **keys).component(component)
    defaults, names = family.default_lora_targets[component], family.layer_names(component)
    add_lora(module, target_modules=targets, rank=rank, seed=seed, default_targets=defaults, names=names)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module
