"""LoRA adapters over peft: where they go, how they start, how they are read and written.

W' = W + (alpha / rank) B A with A [rank, in], B [out, rank]. peft supplies the layers; target names are resolved here,
so that a name that matches nothing is an error, and A is drawn per parameter name, so that all workers start the same.
Layers that DiffSynth-Studio keeps as one (FLUX's qkv) have their A in common, as there.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.layer_names import LayerNames
from diffsynth_ray.models.names import lora_to_memory
from diffsynth_ray.models.weight_source import WeightSource, seeded_generator
from diffsynth_ray.models.weights import load_tensors

ADAPTER = "default"
AUTOMATIC_MIN_WIDTH = 512
"""The automatic search takes Linear layers whose smaller side has at least this width."""


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _automatic_targets(module: nn.Module, linears: Mapping[str, nn.Linear]) -> list[str]:
    lists = tuple(f"{name}." if name else "" for name, child in module.named_modules() if isinstance(child, nn.ModuleList))
    names = [
        name
        for name, linear in linears.items()
        if lists and name.startswith(lists) and min(linear.in_features, linear.out_features) >= AUTOMATIC_MIN_WIDTH
    ]
    if not names:
        raise ModelError(
            f"[lora] target_modules = []: the automatic search takes every Linear of at least {AUTOMATIC_MIN_WIDTH} on "
            f"both sides inside a ModuleList, and this model has none; name the targets ({_leaf_names(linears)})"
        )
    return names


def _leaf_names(linears: Mapping[str, nn.Linear]) -> str:
    """The linear layers' names after the block number, each once."""
    leaves = {re.split(r"\.\d+\.", name, maxsplit=1)[-1] for name in linears}
    return ", ".join(sorted(leaves)[:40])


def resolve_lora_targets(
    module: nn.Module,
    target_modules: Sequence[str] | None,
    *,
    default_targets: Sequence[str] = (),
    names: LayerNames | None = None,
) -> list[str]:
    """Full names of the Linear layers to adapt.

    `target_modules`: None = `default_targets` (the family's recipe), [] = automatic, else names or name endings
    (`to_q`, `to_out.0`), each of which must match a Linear: by the names of DiffSynth-Studio where one fits, else by those
    in memory, else by the first release's.
    """
    linears = _linears(module)
    if target_modules is None:
        target_modules = default_targets
        if not target_modules:
            raise ModelError(f"this component has no default LoRA targets; set [lora] target_modules ({_leaf_names(linears)})")
    if not target_modules:
        return _automatic_targets(module, linears)
    aliases = [
        {name: (names or LayerNames()).part(name, tool).module for name in linears}
        for tool in ("diffsynth", "diffusers", "comfyui")
    ]
    matches = {target: _matching(target, aliases) for target in target_modules}
    unmatched = [target for target, names in matches.items() if not names]
    if unmatched:
        endings = {".".join(name.split(".")[start:]) for name in linears for start in range(name.count(".") + 1)}
        near = {close for target in unmatched for close in difflib.get_close_matches(target, endings, n=3, cutoff=0.7)}
        hint = f"did you mean {', '.join(sorted(near))}? " if near else ""
        raise ModelError(
            f"[lora] target_modules: {', '.join(map(repr, unmatched))} match no Linear of this component; "
            f"{hint}Linear layers here: {_leaf_names(linears)}"
        )
    chosen = {name for names in matches.values() for name in names}
    return [name for name in linears if name in chosen]


def _matching(target: str, aliases: Sequence[Mapping[str, str]]) -> list[str]:
    """The layers that a name or ending means, by the first kind of names that has it."""
    for names in aliases:
        found = [layer for layer, name in names.items() if name == target or name.endswith("." + target)]
        if found:
            return found
    return []


def add_lora(
    module: nn.Module,
    *,
    target_modules: Sequence[str] | None,
    rank: int,
    seed: int,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    default_targets: Sequence[str] = (),
    names: LayerNames | None = None,
) -> list[str]:
    """Put adapters into `module`, in place; returns the adapted layers' names. Only the adapters are trainable then.

    `alpha` None = rank. A is kaiming uniform from (seed, parameter name), B is zero; both are `dtype` on `device`, None = their
    layer's.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = resolve_lora_targets(module, target_modules, default_targets=default_targets, names=names)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=0.0,
        # A regular expression is matched in full, a list by endings, which could reach other layers too.
        target_modules="|".join(re.escape(name) for name in layers),
    )
    config._register_custom_module({nn.Linear: _plain_lora_linear()})
    # On the meta device, so that peft's own initialisation neither costs time nor draws from the global generator.
    inject_adapter_in_model(config, module, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    for name, layer in lora_layers(module).items():
        where = device or layer.get_base_layer().weight.device
        for part in ("lora_A", "lora_B"):
            linear = getattr(layer, part)[ADAPTER]
            value = torch.zeros(linear.weight.shape)
            if part == "lora_A":
                bound = 1 / math.sqrt(value.shape[1])  # kaiming uniform with a = sqrt(5), as nn.Linear and peft
                value.uniform_(-bound, bound, generator=seeded_generator(seed, f"{name}.lora_A.{ADAPTER}.weight"))
            linear.weight = nn.Parameter(value.to(device=where, dtype=dtype))
    for group in _fused_groups(module, names or LayerNames()):
        for layer in group[1:]:
            layer.lora_A[ADAPTER] = group[0].lora_A[ADAPTER]
    return layers


@cache
def _plain_lora_linear() -> type[nn.Module]:
    """peft's LoRA layer for Linear, with a forward of three matrix products and nothing else.

    The same numbers; peft's own casts, looks through its adapters and applies dropout, in Python and for every layer, which
    costs a compiled block a fifth of its time.
    """
    from peft.tuners.lora import Linear

    class PlainLoraLinear(Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.disable_adapters or self.merged:
                return super().forward(x)
            base, down = self.base_layer(x), self.lora_A[ADAPTER].weight
            update = F.linear(F.linear(x.to(down.dtype), down), self.lora_B[ADAPTER].weight)
            scaling = self.scaling[ADAPTER]
            return (base + (update if scaling == 1 else update * scaling)).to(base.dtype)

    return PlainLoraLinear


def lora_layers(module: nn.Module) -> dict[str, Any]:
    """Adapted layers by name; each has `lora_A`, `lora_B`, `scaling` by adapter and `get_base_layer()`."""
    return {name: child for name, child in module.named_modules() if ADAPTER in getattr(child, "lora_A", ())}


def _fused_groups(module: nn.Module, names: LayerNames) -> list[list[Any]]:
    """The adapted layers that DiffSynth-Studio has as one, by group; groups of which all layers are adapted only."""
    groups: dict[str, list[Any]] = {}
    sizes = {}
    for name, layer in lora_layers(module).items():
        part = names.part(name, "diffsynth")
        groups.setdefault(part.module, []).append(layer)
        sizes[part.module] = len(part.shares)
    return [group for name, group in groups.items() if len(group) == sizes[name] > 1]


def lora_state_dict(module: nn.Module, *, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapters in the form that `names` converts from. It has no alpha: B comes multiplied by alpha / rank.

    `values` by parameter name replace the module's own, which may be partitioned over processes. With alpha = rank the
    tensors are the parameters (or values) themselves, not copies.
    """
    state: dict[str, Tensor] = {}
    # An A that layers have in common is a parameter of one name.
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    for name, layer in lora_layers(module).items():
        scaling = _scaling(layer)
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part)[ADAPTER].weight
            value = weight.detach() if values is None else values[name_of[id(weight)]]
            state[f"{name}.{part}.{ADAPTER}.weight"] = value * scaling if part == "lora_B" and scaling != 1 else value
    return state


def _scaling(layer: Any) -> float:
    return float(layer.scaling[ADAPTER])


def _read_lora(module: nn.Module, source: Path | str | Mapping[str, Tensor], names: LayerNames | None) -> dict[str, Tensor]:
    state = source if isinstance(source, Mapping) else load_tensors(Path(source))
    modules = [name.removesuffix(".base_layer") for name in _linears(module)]
    try:
        return lora_to_memory(state, names=names, modules=modules)
    except ModelError as error:
        where = "" if isinstance(source, Mapping) else f"{source}: "
        raise ModelError(f"{where}{error}") from error


def load_lora(module: nn.Module, source: Path | str | Mapping[str, Tensor], *, names: LayerNames | None = None) -> None:
    """Fill the adapters that `add_lora` made from a file or state dict with any tool's key names (`names`)."""
    state = _read_lora(module, source, names)
    _part_groups(module, state, names or LayerNames())
    where = "LoRA" if isinstance(source, Mapping) else str(source)
    parameters = {
        f"{name}.{part}.{ADAPTER}.weight": (
            getattr(layer, part)[ADAPTER].weight,
            _scaling(layer) if part == "lora_B" else 1.0,
        )
        for name, layer in lora_layers(module).items()
        for part in ("lora_A", "lora_B")
    }
    missing = [key for key in parameters if key not in state]
    # A fused layer's file has zeros for the layers that were not trained.
    unexpected = [key for key in state if key not in parameters and state[key.replace(".lora_A.", ".lora_B.")].any()]
    if missing or unexpected:
        raise ModelError(
            f"{where}: its layers are not this job's LoRA targets: {len(missing)} keys missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} not targeted ({', '.join(unexpected[:3])}); "
            "adapt [lora] target_modules"
        )
    for key, (parameter, scaling) in parameters.items():
        if parameter.shape != state[key].shape:
            raise ModelError(
                f"{where}: {key} is {list(state[key].shape)}, this job's is {list(parameter.shape)}; is [lora] rank the file's?"
            )
        with torch.no_grad():
            parameter.copy_(state[key] if scaling == 1 else state[key] / scaling)


def _part_groups(module: nn.Module, state: Mapping[str, Tensor], names: LayerNames) -> None:
    """Give the layers of a group an A each where the LoRA to be loaded has different ones."""
    name_of = {id(layer): name for name, layer in lora_layers(module).items()}
    for group in _fused_groups(module, names):
        given = [state.get(f"{name_of[id(layer)]}.lora_A.{ADAPTER}.weight") for layer in group]
        first = given[0]
        if first is None or all(other is not None and torch.equal(first, other) for other in given[1:]):
            continue
        for layer in group[1:]:
            shared = layer.lora_A[ADAPTER]
            layer.lora_A[ADAPTER] = nn.Linear(shared.in_features, shared.out_features, bias=False, device="meta")
            layer.lora_A[ADAPTER].weight = nn.Parameter(shared.weight.detach().clone())


class MergedWeights:
    """A weight source with LoRAs' B A added to the weights that it reads."""

    def __init__(self, source: WeightSource, updates: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """`updates`: layer -> (A [rank, in], B [out, rank])."""
        self._source, self._updates = source, updates

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """See WeightSource."""
        weight = self._source.read(name, into)
        if name.removesuffix(".weight") not in self._updates:
            return weight
        down, up = self._updates[name.removesuffix(".weight")]
        return (weight.float() + up.float() @ down.float()).to(weight.dtype)


def merge_lora(module: nn.Module, source: Path | str | Mapping[str, Tensor], *, names: LayerNames | None = None) -> int:
    """Add a LoRA's B A to the base weights that `module` will read (`[lora] preset_path`); returns how many layers change."""
    state = _read_lora(module, source, names)
    linears = {name.removesuffix(".base_layer") for name in _linears(module)}
    layers = [key.removesuffix(f".lora_A.{ADAPTER}.weight") for key in state if ".lora_A." in key]
    for name in layers:
        if name not in linears:
            raise ModelError(f"preset LoRA: layer {name!r} is not part of this component")
    updates = {name: (state[f"{name}.lora_A.{ADAPTER}.weight"], state[f"{name}.lora_B.{ADAPTER}.weight"]) for name in layers}
    module.weight_source = MergedWeights(cast(WeightSource, module.weight_source), updates)  # type: ignore[assignment]
    return len(layers)
