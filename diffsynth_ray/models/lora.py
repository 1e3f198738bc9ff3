"""LoRA adapters over peft: where they go, how they start, how they are read and written.

W' = W + (alpha / rank) B A with A [rank, in], B [out, rank]. peft supplies the layers; target names are resolved here,
so that a name that matches nothing is an error, and A is drawn per parameter name, so that all workers start the same.
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
from diffsynth_ray.models.names import lora_to_diffsynth
from diffsynth_ray.models.weight_source import WeightSource, seeded_generator
from diffsynth_ray.models.weights import load_tensors

ADAPTER = "default"
AUTOMATIC_MIN_WIDTH = 512
"""The automatic search takes Linear layers whose smaller side has at least this width."""


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _automatic_targets(module: nn.Module, linears: Mapping[str, nn.Linear]) -> list[str]:
    lists = tuple(
        f"{name}." if name else "" for name, child in module.named_modules() if isinstance(child, nn.ModuleList)
    )
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
    module: nn.Module, target_modules: Sequence[str] | None, *, default_targets: Sequence[str] = ()
) -> list[str]:
    """Full names of the Linear layers to adapt.

    `target_modules`: None = `default_targets` (the family's recipe), [] = automatic, else names or name endings
    (`to_q`, `to_out.0`), each of which must match a Linear.
    """
    linears = _linears(module)
    if target_modules is None:
        target_modules = default_targets
        if not target_modules:
            raise ModelError(
                f"this component has no default LoRA targets; set [lora] target_modules ({_leaf_names(linears)})"
            )
    if not target_modules:
        return _automatic_targets(module, linears)
    matches = {
        target: [name for name in linears if name == target or name.endswith("." + target)] for target in target_modules
    }
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
) -> list[str]:
    """Put adapters into `module`, in place; returns the adapted layers' names. Only the adapters are trainable then.

    `alpha` None = rank. A is kaiming uniform from (seed, parameter name), B is zero; both are `dtype` on `device`, None = their
    layer's.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = resolve_lora_targets(module, target_modules, default_targets=default_targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=0.0,
        # A regular expression is matched in full, a list by endings, which could reach other layers too.
        target_modules="|".join(re.escape(name) for name in names),
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
    return names


@cache
def _plain_lora_linear() -> type[nn.Module]:
    """peft's LoRA layer for Linear, with a forward of three matrix products and nothing else.

    The same numbers; peft's own casts, looks through its adapters and applies dropout, in Python and for every layer, which costs a
    compiled block a fifth of its time.
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


def lora_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The adapters under DiffSynth-Studio's key names, which have no alpha: B comes multiplied by alpha / rank.

    With alpha = rank the tensors are the parameters themselves, not copies.
    """
    state: dict[str, Tensor] = {}
    for name, layer in lora_layers(module).items():
        scaling = _scaling(layer)
        lora_b = layer.lora_B[ADAPTER].weight.detach()
        state[f"{name}.lora_A.{ADAPTER}.weight"] = layer.lora_A[ADAPTER].weight.detach()
        state[f"{name}.lora_B.{ADAPTER}.weight"] = lora_b if scaling == 1 else lora_b * scaling
    return state


def _scaling(layer: Any) -> float:
    return float(layer.scaling[ADAPTER])


def _read_lora(module: nn.Module, source: Path | str | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = source if isinstance(source, Mapping) else load_tensors(Path(source))
    modules = [name.removesuffix(".base_layer") for name in _linears(module)]
    try:
        return lora_to_diffsynth(state, modules=modules)
    except ModelError as error:
        where = "" if isinstance(source, Mapping) else f"{source}: "
        raise ModelError(f"{where}{error}") from error


def load_lora(module: nn.Module, source: Path | str | Mapping[str, Tensor]) -> None:
    """Fill the adapters that `add_lora` made from a file or state dict with any tool's key names (`names`)."""
    state = _read_lora(module, source)
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
    unexpected = [key for key in state if key not in parameters]
    if missing or unexpected:
        raise ModelError(
            f"{where}: its layers are not this job's LoRA targets: {len(missing)} keys missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} not targeted ({', '.join(unexpected[:3])}); "
            "adapt [lora] target_modules"
        )
    for key, (parameter, scaling) in parameters.items():
        if parameter.shape != state[key].shape:
            raise ModelError(
                f"{where}: {key} is {list(state[key].shape)}, this job's is {list(parameter.shape)}; "
                "is [lora] rank the file's?"
            )
        with torch.no_grad():
            parameter.copy_(state[key] if scaling == 1 else state[key] / scaling)


class MergedWeights:
    """A weight source with LoRAs' B A added to the weights that it reads."""

    def __init__(self, source: WeightSource, updates: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """`updates`: layer -> (A [rank, in], B [out, rank])."""
        self._source, self._updates = source, updates

    def read(self, name: str) -> Tensor:
        """See WeightSource."""
        weight = self._source.read(name)
        if name.removesuffix(".weight") not in self._updates:
            return weight
        down, up = self._updates[name.removesuffix(".weight")]
        return (weight.float() + up.float() @ down.float()).to(weight.dtype)


def merge_lora(module: nn.Module, source: Path | str | Mapping[str, Tensor]) -> int:
    """Add a LoRA's B A to the base weights that `module` will read (`[lora] preset_path`); returns the number of layers changed."""
    state = _read_lora(module, source)
    linears = {name.removesuffix(".base_layer") for name in _linears(module)}
    names = [key.removesuffix(f".lora_A.{ADAPTER}.weight") for key in state if ".lora_A." in key]
    for name in names:
        if name not in linears:
            raise ModelError(f"preset LoRA: layer {name!r} is not part of this component")
    updates = {name: (state[f"{name}.lora_A.{ADAPTER}.weight"], state[f"{name}.lora_B.{ADAPTER}.weight"]) for name in names}
    module.weight_source = MergedWeights(cast(WeightSource, module.weight_source), updates)  # type: ignore[assignment]
    return len(names)
