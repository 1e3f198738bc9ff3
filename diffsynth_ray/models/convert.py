"""A LoRA file from any tool's key names to any other's, without the model: the family is told from the names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.family import family_names, get_family
from diffsynth_ray.models.layer_names import LoraFormat, name_template
from diffsynth_ray.models.names import lora_modules, lora_to_memory, rename_lora
from diffsynth_ray.models.weights import load_tensors

COMPONENT = "dit"


def convert_lora(path: Path, *, target: LoraFormat, family: str | None = None) -> tuple[dict[str, Tensor], str]:
    """(the file's LoRA under `target`'s key names, its family). Raises ModelError where the family cannot be told."""
    state = load_tensors(path)
    if not state:
        raise ModelError(f"{path}: no tensors inside")
    try:
        name = _find_family(state, family)
        names = get_family(name).layer_names(COMPONENT)
        return rename_lora(state, target=target, names=names, modules=_layers(name)), name
    except ModelError as error:
        raise ModelError(f"{path}: {error}", hint=error.hint) from error


@cache
def _layers(family: str) -> dict[str, tuple[int, int]]:
    """Names in memory of the linear layers, of a model with few blocks, and their widths (in, out)."""
    tiny = get_family(family).build_tiny(0, components=[COMPONENT], device="meta", dtype=torch.float32)
    linears = ((name, module) for name, module in tiny.components[COMPONENT].named_modules() if isinstance(module, nn.Linear))
    return {name: (linear.in_features, linear.out_features) for name, linear in linears}


def _has_shapes_of(state: Mapping[str, Tensor], family: str) -> bool:
    """Whether the blocks' layers are as many times as wide at their end as at their beginning as the family's."""
    try:
        memory = lora_to_memory(state, names=get_family(family).layer_names(COMPONENT), modules=_layers(family))
    except (ModelError, RuntimeError):  # rows that cannot be divided among the layers that the file has as one
        return False
    widths = {name_template(name): pair for name, pair in _layers(family).items()}
    for key, lora_a in memory.items():
        layer, letter, _ = key.partition(".lora_A.")
        template = name_template(layer)
        if letter and "{}" in template:
            wide_in, wide_out = widths[template]
            if memory[f"{layer}.lora_B.default.weight"].shape[0] * wide_in != lora_a.shape[1] * wide_out:
                return False
    return True


def _find_family(state: Mapping[str, Tensor], family: str | None) -> str:
    """The family whose layers the LoRA's names are, and, where several have them (FLUX.1, FLUX.2), whose shapes."""
    modules = lora_modules(state)
    asked = [family] if family else family_names()
    found = [name for name in asked if all(_is_known(module, name) for module in modules)]
    if len(found) > 1:
        found = [name for name in found if _has_shapes_of(state, name)] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(
            f"these layers' names are those of several families ({', '.join(found)})", hint="say which with --family"
        )
    unknown = sorted(module for module in modules if not any(_is_known(module, name) for name in asked))
    example = unknown[0] if unknown else sorted(modules)[0]
    raise ModelError(f"a LoRA for no family known here ({', '.join(asked)}); a layer of it is {example!r}")


def _is_known(module: str, family: str) -> bool:
    templates = get_family(family).layer_names(COMPONENT).templates(_layers(family))
    if module.startswith("lora_unet_"):
        flat = {f"lora_unet_{template.replace('.', '_')}" for template in templates}
        parts = module.split("_")
        numbers = [index for index, part in enumerate(parts) if part.isdigit()]
        return module in flat or any("_".join([*parts[:index], "{}", *parts[index + 1 :]]) in flat for index in numbers)
    return name_template(module) in templates
