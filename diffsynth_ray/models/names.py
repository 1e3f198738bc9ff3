"""LoRA key names of other tools.

| format | key of module M |
| --- | --- |
| diffsynth | `M.lora_A.default.weight`, `M.lora_B.default.weight`; no alpha, which means alpha = rank |
| diffusers | `transformer.M.lora_A.weight`, ...: what pipelines' `load_lora_weights` and `load_lora_adapter` read |
| comfyui | `diffusion_model.M.lora_A.weight`, ... |
| kohya | `lora_unet_M.lora_down.weight`, `.lora_up.weight`, `.alpha`, with M's dots written as underscores |

diffusers loads nothing, and says nothing, when the names do not fit it; hence one place that knows them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from torch import Tensor

from diffsynth_ray.errors import ModelError

LoraFormat = Literal["diffsynth", "diffusers", "comfyui", "kohya"]
LORA_FORMATS: tuple[str, ...] = get_args(LoraFormat)

_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<letter>[AB])(?:\.default)?\.weight|lora_(?P<word>down|up)\.weight|(?P<alpha>alpha))"
)
_PREFIXES = re.compile(r"^(?:base_model\.model\.|pipe\.\w+\.|diffusion_model\.|transformer\.|text_encoder\.)")
_KOHYA_PREFIX = "lora_unet_"
_PART_OF_WORD = {"down": "A", "up": "B"}


def _split_key(key: str) -> tuple[str, str]:
    """(module, part), part one of A, B, alpha; the module still as the file writes it, prefixes taken off."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ModelError(f"{key!r} is no LoRA key known here (formats: {', '.join(LORA_FORMATS)})")
    part = match["letter"] or (_PART_OF_WORD[match["word"]] if match["word"] else "alpha")
    return _PREFIXES.sub("", match["module"]), part


def _kohya_modules(modules: Iterable[str] | None) -> dict[str, str]:
    flat: dict[str, str] = {}
    for module in modules or ():
        name = _KOHYA_PREFIX + module.replace(".", "_")
        if name in flat:
            raise ModelError(f"modules {flat[name]!r} and {module!r} have the same kohya name {name!r}")
        flat[name] = module
    return flat


def lora_to_diffsynth(state: Mapping[str, Tensor], *, modules: Iterable[str] | None = None) -> dict[str, Tensor]:
    """A LoRA with any tool's key names -> DiffSynth-Studio's.

    `modules`: the model's module names, needed for kohya only, whose underscores are ambiguous. Where a file's alpha is
    not its rank, B is scaled by alpha / rank, as the result has no place for it.
    """
    flat = _kohya_modules(modules)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, part = _split_key(key)
        if module.startswith(_KOHYA_PREFIX):
            if module not in flat:
                raise ModelError(
                    f"{key!r}: no module of this model has that name; kohya names need the model's module names"
                )
            module = flat[module]
        parts.setdefault(module, {})[part] = tensor
    result: dict[str, Tensor] = {}
    for module, tensors in parts.items():
        if not {"A", "B"} <= tensors.keys():
            raise ModelError(
                f"LoRA of module {module!r} has only {', '.join(sorted(tensors))}; both A and B are needed"
            )
        lora_b = tensors["B"]
        if "alpha" in tensors:
            scale = float(tensors["alpha"]) / tensors["A"].shape[0]
            lora_b = lora_b if scale == 1 else lora_b * scale
        result[f"{module}.lora_A.default.weight"] = tensors["A"]
        result[f"{module}.lora_B.default.weight"] = lora_b
    return result


def lora_from_diffsynth(state: Mapping[str, Tensor], *, target: LoraFormat) -> dict[str, Tensor]:
    """DiffSynth-Studio's LoRA key names -> another tool's; `lora_to_diffsynth` gives the same tensors back."""
    if target not in LORA_FORMATS:
        raise ModelError(f"no LoRA format {target!r}; there are {', '.join(LORA_FORMATS)}")
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, part = _split_key(key)
        if target == "kohya":
            name = _KOHYA_PREFIX + module.replace(".", "_")
            result[f"{name}.lora_{'down' if part == 'A' else 'up'}.weight"] = tensor
            if part == "A":
                result[f"{name}.alpha"] = tensor.new_tensor(float(tensor.shape[0]))
            continue
        prefix, infix = {
            "diffsynth": ("", ".default"),
            "diffusers": ("transformer.", ""),
            "comfyui": ("diffusion_model.", ""),
        }[target]
        result[f"{prefix}{module}.lora_{part}{infix}.weight"] = tensor
    return result


def rename_lora(
    state: Mapping[str, Tensor], *, target: LoraFormat, modules: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """A LoRA from any tool's key names to `target`'s."""
    return lora_from_diffsynth(lora_to_diffsynth(state, modules=modules), target=target)
