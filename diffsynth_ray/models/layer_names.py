"""Layers and parameters under the names of other layouts: tables of names, read both ways.

In memory a component has the names of its diffusers or transformers class. A file may call the same layer otherwise, and
may keep as one what the class keeps apart: FLUX's `img_attn.qkv` is `to_q`, `to_k` and `to_v`, rows one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

LoraFormat = Literal["diffsynth", "diffusers", "comfyui", "kohya"]

# The first number between dots is the block's; "time_embedding.0" and "to_out.0" have theirs at the end.
_BLOCK_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_PARAMETERS = ("weight", "bias", "gamma")


@dataclass(frozen=True)
class Part:
    """Where a layer in memory lies in a file's layer."""

    module: str
    """The file's name of the layer."""
    index: int = 0
    """Which of the fused layers it is."""
    shares: tuple[int, ...] = (1,)
    """How the file's rows are divided among the fused layers; (1,) = nothing is fused."""
    swapped: bool = False
    """The file has the second half of the rows first."""

    def rows(self, total: int) -> tuple[int, ...]:
        """The rows of each fused layer, of `total` in the file."""
        return tuple(total * share // sum(self.shares) for share in self.shares)


class NameTable:
    """Names of a file's layers -> names in memory, and back.

    `templates`: file's name -> name in memory, or names of the layers that the file has fused, with `{}` for the number
    of a block. `shares` by file's name: the relative numbers of rows of fused layers, where they are unequal. `swapped`:
    file's names of the layers whose halves are the other way round. Names that the table does not have are the same in both.
    """

    def __init__(
        self,
        templates: Mapping[str, str | Sequence[str]],
        *,
        shares: Mapping[str, tuple[int, ...]] | None = None,
        swapped: Sequence[str] = (),
    ) -> None:
        self._to_memory = {name: (inner,) if isinstance(inner, str) else tuple(inner) for name, inner in templates.items()}
        self._from_memory: dict[str, Part] = {}
        for name, layers in self._to_memory.items():
            own = (shares or {}).get(name, (1,) * len(layers))
            self._from_memory |= {layer: Part(name, index, own, name in swapped) for index, layer in enumerate(layers)}

    def to_memory(self, name: str) -> tuple[str, ...]:
        """The layers in memory of a file's layer, in the order of its rows; () for a name that is not in the table."""
        if name in self._to_memory:
            return self._to_memory[name]
        template, number = _split_number(name)
        return tuple(layer.replace("{}", number) for layer in self._to_memory.get(template, ()))

    def from_memory(self, name: str) -> Part:
        """Where the file has a layer."""
        if name in self._from_memory:
            return self._from_memory[name]
        template, number = _split_number(name)
        part = self._from_memory.get(template)
        return Part(name) if part is None else replace(part, module=part.module.replace("{}", number))


def _split_number(name: str) -> tuple[str, str]:
    number = _BLOCK_NUMBER.search(name)
    return (_BLOCK_NUMBER.sub("{}", name, count=1), number[0]) if number else (name, "")


def name_template(name: str) -> str:
    """A layer's name with `{}` in place of the number of its block."""
    return _split_number(name)[0]


SAME_NAMES = NameTable({})


def split_key(key: str) -> tuple[str, str]:
    """(layer, ".weight" and the like) of a parameter's key; a parameter without a layer of its own is (key, "")."""
    layer, _, last = key.rpartition(".")
    return (layer, f".{last}") if layer and last in _PARAMETERS else (key, "")


def swap_halves(tensor: Tensor) -> Tensor:
    """The second half of the rows first."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def tensors_to_memory(table: NameTable, key: str, tensor: Tensor) -> dict[str, Tensor]:
    """A file's tensor as those of the layers in memory; fused rows become views."""
    layer, suffix = split_key(key)
    names = table.to_memory(layer)
    if not names:
        return {key: tensor}
    part = table.from_memory(names[0])
    if part.swapped:
        tensor = swap_halves(tensor)
    pieces = tensor.split(part.rows(tensor.shape[0])) if len(names) > 1 else (tensor,)
    return {name + suffix: piece for name, piece in zip(names, pieces, strict=True)}


def tensors_from_memory(table: NameTable, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `tensors_to_memory` for a whole component: fused layers must be there with all their parts."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        layer, suffix = (name, "") if table.from_memory(name).module != name else split_key(name)
        part = table.from_memory(layer)
        pieces.setdefault(part.module + suffix, {})[part.index] = swap_halves(tensor) if part.swapped else tensor
    return {
        key: parts[0] if len(parts) == 1 else torch.cat([parts[index] for index in sorted(parts)])
        for key, parts in pieces.items()
    }


@dataclass(frozen=True)
class LayerNames:
    """How the tools call a component's layers."""

    diffsynth: NameTable = SAME_NAMES
    """DiffSynth-Studio's own modules: its LoRA files and its full exports."""
    original: NameTable = SAME_NAMES
    """The model's first release, which ComfyUI and kohya's tools go by."""

    def part(self, layer: str, tool: LoraFormat) -> Part:
        """Where a tool's file has a layer; diffusers' names are those in memory."""
        if tool == "diffusers":
            return Part(layer)
        return (self.diffsynth if tool == "diffsynth" else self.original).from_memory(layer)

    def table_of(self, module: str) -> NameTable:
        """The table that has a layer of a tool's file."""
        return next((table for table in (self.diffsynth, self.original) if table.to_memory(module)), SAME_NAMES)

    def layers(self, module: str) -> tuple[str, ...]:
        """The layers in memory of a layer in any tool's file."""
        return self.table_of(module).to_memory(module) or (module,)

    def templates(self, layers: Iterable[str]) -> set[str]:
        """All tools' names of these layers, `{}` in place of the block's number: what a flattened name is looked up in."""
        names: set[str] = set()
        for layer in layers:
            for tool in ("diffsynth", "comfyui", "diffusers"):
                names.add(name_template(self.part(layer, tool).module))
        return names
