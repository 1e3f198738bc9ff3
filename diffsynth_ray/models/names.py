"""LoRA key names of other tools.

| format | key of layer M |
| --- | --- |
| diffsynth | `M.lora_A.default.weight`, `M.lora_B.default.weight`, M as DiffSynth-Studio calls it; no alpha: alpha = rank |
| diffusers | `transformer.M.lora_A.weight`, M as diffusers calls it: what pipelines' `load_lora_weights` reads |
| comfyui | `diffusion_model.M.lora_A.weight`, M as the model's first release calls it |
| kohya | `lora_unet_M.lora_down.weight`, `.lora_up.weight`, `.alpha`, the first release's M with underscores for dots |

In memory a LoRA has diffsynth's form with diffusers' M. diffusers loads nothing, and says nothing, when the names do not
fit it; hence one place that knows them all. Where a tool keeps several layers as one (FLUX's qkv), A is theirs in common
and B's rows are theirs one after the other; layers with different A become one of the ranks' sum.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import get_args

import torch
from torch import Tensor

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.layer_names import LayerNames, LoraFormat, Part, swap_halves

LORA_FORMATS: tuple[LoraFormat, ...] = get_args(LoraFormat)

_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<letter>[AB])(?:\.default)?\.weight|lora_(?P<word>down|up)\.weight|(?P<alpha>alpha))"
)
_PREFIXES = re.compile(r"^(?:base_model\.model\.|pipe\.\w+\.|diffusion_model\.|transformer\.|text_encoder\.)")
_KOHYA_PREFIX = "lora_unet_"
_PART_OF_WORD = {"down": "A", "up": "B"}
Pair = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank] of one layer."""


def lora_to_memory(
    state: Mapping[str, Tensor], *, names: LayerNames | None = None, modules: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """A LoRA with any tool's key names -> with the names in memory.

    `modules`: the model's layers in memory, needed for kohya only, whose underscores are ambiguous. Where a file's alpha
    is not its rank, B is scaled by alpha / rank, as the result has no place for it.
    """
    names = names or LayerNames()
    flat = _FlatNames(names, modules)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, part = _split_lora_key(key)
        if module.startswith(_KOHYA_PREFIX):
            module = flat.find(module, key)
        parts.setdefault(module, {})[part] = tensor
    result: dict[str, Tensor] = {}
    for module, tensors in parts.items():
        if not {"A", "B"} <= tensors.keys():
            raise ModelError(f"LoRA of module {module!r} has only {', '.join(sorted(tensors))}; both A and B are needed")
        lora_b = tensors["B"]
        if "alpha" in tensors:
            scale = float(tensors["alpha"]) / tensors["A"].shape[0]
            lora_b = lora_b if scale == 1 else lora_b * scale
        for layer, (own_a, own_b) in _split(names, module, (tensors["A"], lora_b)).items():
            result[f"{layer}.lora_A.default.weight"] = own_a
            result[f"{layer}.lora_B.default.weight"] = own_b
    return result


def lora_from_memory(state: Mapping[str, Tensor], *, target: LoraFormat, names: LayerNames | None = None) -> dict[str, Tensor]:
    """A LoRA with the names in memory -> a tool's; `lora_to_memory` gives the same tensors back."""
    if target not in LORA_FORMATS:
        raise ModelError(f"no LoRA format {target!r}; there are {', '.join(LORA_FORMATS)}")
    result: dict[str, Tensor] = {}
    for module, (lora_a, lora_b) in _fuse(names or LayerNames(), state, target).items():
        if target == "kohya":
            name = _KOHYA_PREFIX + module.replace(".", "_")
            result[f"{name}.lora_down.weight"] = lora_a
            result[f"{name}.lora_up.weight"] = lora_b
            result[f"{name}.alpha"] = lora_a.new_tensor(float(lora_a.shape[0]))
            continue
        prefix, infix = {
            "diffsynth": ("", ".default"),
            "diffusers": ("transformer.", ""),
            "comfyui": ("diffusion_model.", ""),
        }[target]
        result[f"{prefix}{module}.lora_A{infix}.weight"] = lora_a
        result[f"{prefix}{module}.lora_B{infix}.weight"] = lora_b
    return _apart(result)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each in memory of its own where layers have their A in common: else they cannot be saved."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in state.items():
        apart[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart


def rename_lora(
    state: Mapping[str, Tensor],
    *,
    target: LoraFormat,
    names: LayerNames | None = None,
    modules: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """A LoRA from any tool's key names to `target`'s."""
    return lora_from_memory(lora_to_memory(state, names=names, modules=modules), target=target, names=names)


def lora_modules(keys: Iterable[str]) -> set[str]:
    """The layers of a LoRA as its file writes them, prefixes taken off; ModelError for a key that is no LoRA's."""
    return {_split_lora_key(key)[0] for key in keys}


def _split_lora_key(key: str) -> tuple[str, str]:
    """(module, part), part one of A, B, alpha; the module still as the file writes it, prefixes taken off."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ModelError(f"{key!r} is no LoRA key known here (formats: {', '.join(LORA_FORMATS)})")
    part = match["letter"] or (_PART_OF_WORD[match["word"]] if match["word"] else "alpha")
    return _PREFIXES.sub("", match["module"]), part


class _FlatNames:
    """kohya's names, whose dots are underscores, back to dots. The modules given may be those of another size."""

    def __init__(self, names: LayerNames, modules: Iterable[str] | None) -> None:
        self._templates: dict[str, str] = {}
        for template in sorted(names.templates(modules or ())):
            flat = _KOHYA_PREFIX + template.replace(".", "_")
            if self._templates.setdefault(flat, template) != template:
                raise ModelError(f"{self._templates[flat]!r} and {template!r} have the same kohya name {flat!r}")

    def find(self, flat: str, key: str) -> str:
        """The name with dots."""
        if flat in self._templates:
            return self._templates[flat]
        for number in re.finditer(r"(?<=_)\d+(?=_)", flat):
            template = self._templates.get(f"{flat[: number.start()]}{{}}{flat[number.end() :]}")
            if template is not None:
                return template.replace("{}", number[0])
        raise ModelError(f"{key!r}: no module of this model has that name; kohya names need the model's module names")


def _split(names: LayerNames, module: str, pair: Pair) -> dict[str, Pair]:
    """A file's layer as the layers in memory."""
    layers = names.layers(module)
    lora_a, lora_b = pair
    part = names.table_of(module).from_memory(layers[0])
    if len(layers) == 1:
        return {layers[0]: (lora_a, swap_halves(lora_b) if part.swapped else lora_b)}
    pieces = lora_b.split(part.rows(lora_b.shape[0]))
    if _is_block_diagonal(pieces):
        blocks_a = lora_a.chunk(len(layers))
        blocks_b = [piece.chunk(len(layers), dim=1)[index] for index, piece in enumerate(pieces)]
        return {layer: (own_a.clone(), own_b.clone()) for layer, own_a, own_b in zip(layers, blocks_a, blocks_b, strict=True)}
    # Copies: a file has each tensor once, and tensors that share memory cannot be saved.
    return {layer: (lora_a.clone(), piece.clone()) for layer, piece in zip(layers, pieces, strict=True)}


def _is_block_diagonal(pieces: tuple[Tensor, ...]) -> bool:
    """Whether each layer uses ranks of its own: then the layers had different A before they were fused."""
    rank = pieces[0].shape[1]
    if rank % len(pieces) or not all(piece.any() for piece in pieces):
        return False
    return not any(
        block.any()
        for index, piece in enumerate(pieces)
        for other, block in enumerate(piece.chunk(len(pieces), dim=1))
        if other != index
    )


def _fuse(names: LayerNames, state: Mapping[str, Tensor], target: LoraFormat) -> dict[str, Pair]:
    """The layers in memory as a tool's layers."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        layer, letter = _split_lora_key(key)
        pairs.setdefault(layer, {})[letter] = tensor
    groups: dict[str, dict[int, Pair]] = {}
    parts: dict[str, Part] = {}
    for layer, pair in pairs.items():
        part = names.part(layer, target)
        parts[part.module] = part
        groups.setdefault(part.module, {})[part.index] = (
            pair["A"],
            swap_halves(pair["B"]) if part.swapped else pair["B"],
        )
    return {
        module: next(iter(group.values())) if len(parts[module].shares) == 1 else _fuse_group(parts[module], group)
        for module, group in groups.items()
    }


def _fuse_group(part: Part, group: Mapping[int, Pair]) -> Pair:
    """One A and B for fused layers; those without a LoRA get zeros, which change nothing."""
    index, (first_a, first_b) = next(iter(group.items()))
    rows = part.rows(first_b.shape[0] * sum(part.shares) // part.shares[index])
    if all(torch.equal(lora_a, first_a) for lora_a, _ in group.values()):
        zeros = [first_b.new_zeros(height, first_b.shape[1]) for height in rows]
        return first_a, torch.cat([group[index][1] if index in group else zero for index, zero in enumerate(zeros)])
    ranks = {index: lora_a.shape[0] for index, (lora_a, _) in group.items()}
    lora_b = first_b.new_zeros(sum(rows), sum(ranks.values()))
    top = left = 0
    for index, height in enumerate(rows):
        if index in group:
            lora_b[top : top + height, left : left + ranks[index]] = group[index][1]
            left += ranks[index]
        top += height
    return torch.cat([group[index][0] for index in sorted(group)]), lora_b
