"""What a job's model is made of, in bytes and operations: built on meta, a block of each kind traced on fake tensors.

Of every list of like blocks one is built and counted as often as the configuration says, so that the largest model takes
seconds and no memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import JobFileError, ModelError, Problem
from diffsynth_ray.memory.fake_pass import BlockCost, block_cost, fake_weights, kept_by_autograd, tensors_of
from diffsynth_ray.memory.fp8 import convert_to_fp8
from diffsynth_ray.memory.graph_cost import nbytes, storages
from diffsynth_ray.memory.peak import peak_bytes
from diffsynth_ray.memory.placement import split_units
from diffsynth_ray.models import sources
from diffsynth_ray.models.family import BatchShape, ModelFamily, get_family
from diffsynth_ray.models.full_size import released_components
from diffsynth_ray.models.library_family import LibraryFamily
from diffsynth_ray.models.weights import load_components
from diffsynth_ray.schedule import trained_components
from diffsynth_ray.train.trainer import select_trained

Say = Callable[[str], object]


@dataclass(frozen=True)
class Weights:
    """Parameters of some modules, in bytes as they are computed with."""

    frozen_bytes: int = 0
    trained_bytes: int = 0
    num_trained: int = 0
    """Elements."""
    frozen_linear_bytes: int = 0
    """Of the frozen bytes, what FP8 would halve."""

    def __add__(self, other: Weights) -> Weights:
        return Weights(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, count: int) -> Weights:
        return Weights(*(getattr(self, name) * count for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class BlockKind:
    """Like blocks: `count` of them."""

    count: int
    weights: Weights
    input_bytes: int
    """Of what a block gets from the one before."""
    shared_bytes: int
    """Of inputs that all blocks share."""
    cost: BlockCost
    keeps_input: bool
    """Whether backward needs the block's own inputs without recomputation too."""


@dataclass(frozen=True)
class Component:
    """A component beside the blocks that are traced."""

    weights: Weights
    largest_unit_bytes: int = 0
    loose_bytes: int = 0
    """Frozen weights that stay on the device under layer offload."""
    encode_bytes: int = 0
    """Most that encoding one micro batch takes beside the weights."""


@dataclass(frozen=True)
class ModelCost:
    """Everything that an estimate adds up."""

    family: str
    shape: BatchShape
    traced: tuple[str, ...]
    """The components of a prediction; the trained one is among them."""
    blocks: tuple[BlockKind, ...]
    around: Component
    """The traced components without their blocks."""
    around_kept_bytes: int
    """Kept for backward by what is around the blocks."""
    others: dict[str, Component] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> Weights:
        """Of the traced components."""
        return sum((kind.weights * kind.count for kind in self.blocks), self.around.weights)


def find_configs(job: Job) -> tuple[str, dict[str, dict[str, Any]], list[str]]:
    """(family, component -> configuration, notes), from the files that are here, else by the ids' names.

    Raises ModelError that says what is missing.
    """
    model = job.model
    if model.tiny:
        assert model.family is not None  # resolve has checked it
        family = get_family(model.family)
        if not issubclass(family, LibraryFamily):
            raise ModelError(f"the family {family.name} has no tiny configurations to reckon with")
        return model.family, family.tiny_configs(model.extra_inputs), []
    configs: dict[str, dict[str, Any]] = {}
    families: set[str] = set() if model.family is None else {model.family}
    entries, notes = [list(map(Path, entry)) for entry in map(_as_list, model.paths)], []
    for origin in sources.model_origins(model):
        found = sources.find(origin, model.base_path) if model.base_path is not None else None
        if found is not None and found.missing is None:
            entries.append(found.weights)
            continue
        released = released_components(origin)
        if released is None:
            raise ModelError(
                f"{origin} is not here, and its size is not known by its name", hint="`dsray download JOB.toml` fetches it"
            )
        families.add(released[0])
        configs |= released[1]
        names = " and ".join(released[1])
        notes.append(f"{names}: the released configuration of {origin.repo}; its files are not here yet")
    if entries:
        name, files = load_components(entries, family=model.family)
        families.add(name)
        configs |= {component: found.config for component, found in files.items()}
    if len(families) != 1:
        raise ModelError(f"[model] names files of several families: {', '.join(sorted(families))}")
    return families.pop(), configs, notes


def _as_list(entry: str | list[str]) -> list[str]:
    return [entry] if isinstance(entry, str) else entry


def measure_model(job: Job, shape: BatchShape, *, is_compiled: bool, say: Say) -> ModelCost:
    """Build and trace a job's model; seconds, on the CPU, without its weights.

    Raises JobFileError or ModelError for what cannot be reckoned.
    """
    name, configs, notes = find_configs(job)
    family = get_family(name)
    if not issubclass(family, LibraryFamily):
        raise ModelError(f"the family {name} of another package cannot be reckoned")
    trained = trained_components(job)
    if beside := [each for each in trained if each not in family.predict_components]:
        message = f"estimates cover training of {', '.join(family.predict_components)}; {', '.join(beside)} is trained too"
        raise JobFileError(f"job {job.name}", [Problem("training.trainable_models", message)])
    main = trained[0]
    if main not in configs:
        raise ModelError(f"[model] has no {main}, which is to be trained")
    dtype = torch.bfloat16 if job.training.precision == "bf16" else torch.float32
    parts = {part: configs[part] for part in family.predict_components if part in configs}
    say(f"tracing a block of {name}'s {' and '.join(parts)} at {describe(shape)}")
    traced = _Traced(family, job, parts, dtype)
    blocks, around_kept = traced.trace(shape, is_compiled=is_compiled)
    others = {
        component: _measure_other(family, job, component, config, shape, dtype)
        for component, config in configs.items()
        if component not in parts and not job.split.enabled
    }
    return ModelCost(name, shape, tuple(parts), tuple(blocks), traced.around(), around_kept, others, tuple(notes))


def describe(shape: BatchShape) -> str:
    """For people."""
    frames = f" x {shape.num_frames} frames" if shape.num_frames > 1 else ""
    return f"{shape.num_samples} x {shape.height}x{shape.width}{frames}, {shape.text_tokens} text tokens"


class _Traced:
    """The components of a prediction with one block of each list, on fake weights."""

    def __init__(
        self, family: type[LibraryFamily], job: Job, configs: Mapping[str, Mapping[str, Any]], dtype: torch.dtype
    ) -> None:
        self.job = job
        modules: dict[str, nn.Module] = {}
        self.counts: dict[nn.Module, int] = {}
        for name, given in configs.items():
            config = family.component_config(name, given, job.model.options)
            keys = family.depth_keys.get(name, {})
            module = family.build_component(name, {**config, **dict.fromkeys(keys.values(), 1)})
            nn.Module.to(module, dtype)  # diffusers' own warns of what it would do better itself
            defaults = inspect.signature(type(module).__init__).parameters
            for list_name, key in keys.items():
                depth = int(config[key] if key in config else defaults[key].default)
                self.counts |= dict.fromkeys(module.get_submodule(list_name).children(), depth)
            modules[name] = module
        self.family = family(modules, dtype=dtype, device="cpu", options=job.model.options)
        select_trained(self.family, job)
        for name in modules:
            if name in job.model.fp8_models:
                convert_to_fp8(self.family.repeated_blocks(name))
        self.module = nn.ModuleDict(modules)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def trace(self, shape: BatchShape, *, is_compiled: bool) -> tuple[list[BlockKind], int]:
        """The kinds of blocks in the order of the forward pass, and what is kept around them."""
        fake_weights(self.module, self.mode)
        calls: dict[nn.Module, tuple[Any, Any, Any]] = {}
        for block in self._blocks():
            block.forward = _Recording(block, calls)
        around_kept = self._run(shape)
        kinds = []
        for block, (args, kwargs, results) in calls.items():
            del block.__dict__["forward"]
            passed_on = {(tensor.shape, tensor.dtype) for tensor in results}
            own = [tensor for tensor in tensors_of((args, kwargs)) if (tensor.shape, tensor.dtype) in passed_on]
            shared = [tensor for tensor in tensors_of((args, kwargs)) if (tensor.shape, tensor.dtype) not in passed_on]
            for tensor in own:
                tensor.requires_grad_(True)
            cost = block_cost(block, args, kwargs, mode=self.mode, is_compiled=is_compiled)
            own_numbers = {n for n, tensor in enumerate(tensors_of((args, kwargs))) if any(tensor is each for each in own)}
            kinds.append(
                BlockKind(
                    count=self.counts[block],
                    weights=weights_of([block]),
                    input_bytes=nbytes(own),
                    shared_bytes=nbytes(shared),
                    cost=cost,
                    keeps_input=bool(own_numbers & cost.kept_inputs),
                )
            )
        return kinds, around_kept

    def _run(self, shape: BatchShape) -> int:
        """The forward pass around the blocks; returns what it keeps for backward."""
        family, job = self.family, self.job
        with self.mode:
            batch = family.blank_batch(shape, extra_inputs=job.model.extra_inputs).with_reference()
            times = torch.zeros(shape.num_samples)

            def forward() -> Tensor:
                return family.predict(batch, batch.latents, times)

            saved = kept_by_autograd(forward)
        known = storages(self.module.parameters())
        return sum(size for storage, size in saved.items() if storage not in known)

    def around(self) -> Component:
        """The components without their blocks."""
        return _component(self.module, self._blocks(), with_trained=self.job.offload.optimize_on_cpu)

    def _blocks(self) -> list[nn.Module]:
        return [block for name in self.family.components for block in self.family.repeated_blocks(name)]


class _Recording:
    """A block's forward that notes its arguments and results, and keeps nothing for backward."""

    def __init__(self, block: nn.Module, calls: dict[nn.Module, tuple[Any, Any, Any]]) -> None:
        self.block, self.calls, self.inner = block, calls, block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            results = self.inner(*args, **kwargs)
        self.calls[self.block] = (args, kwargs, tensors_of(results))
        for tensor in tensors_of(results):
            tensor.requires_grad_(True)
        return results


def weights_of(modules: list[nn.Module], *, without: frozenset[int] = frozenset()) -> Weights:
    """Parameters of modules, each once; `without` those of these ids."""
    params = {id(param): param for module in modules for param in module.parameters() if id(param) not in without}
    frozen = [param for param in params.values() if not param.requires_grad]
    trained = [param for param in params.values() if param.requires_grad]
    linear = {id(inner.weight) for module in modules for inner in module.modules() if type(inner) is nn.Linear} & params.keys()
    return Weights(
        frozen_bytes=nbytes(frozen),
        trained_bytes=nbytes(trained),
        num_trained=sum(param.numel() for param in trained),
        frozen_linear_bytes=sum(nbytes(param) for param in frozen if id(param) in linear),
    )


def _component(module: nn.Module, blocks: list[nn.Module], *, with_trained: bool) -> Component:
    """What is around the blocks, and how layer offload cuts it up."""
    inside = frozenset(id(param) for block in blocks for param in block.parameters())
    weights = replace(weights_of([module], without=inside), frozen_linear_bytes=0)  # FP8 is for blocks
    units = split_units(module, blocks, max_bytes=None, with_trained=with_trained)
    sizes, claimed = [0], set(inside)
    for unit in units.values():
        mine = [p for p in unit.parameters() if id(p) not in claimed and (with_trained or not p.requires_grad)]
        claimed |= {id(param) for param in mine}
        sizes.append(nbytes(mine))
    total = weights.frozen_bytes + (weights.trained_bytes if with_trained else 0)
    return Component(weights, max(sizes), total - sum(sizes))


def _measure_other(
    family: type[LibraryFamily], job: Job, name: str, config: Mapping[str, Any], shape: BatchShape, dtype: torch.dtype
) -> Component:
    """A frozen component: its weights, and what encoding pictures takes."""
    encodes = name in family.image_components
    # What is not run needs no real table either, and a text encoder is built in a tenth of the time.
    with nullcontext() if encodes else torch.device("meta"):
        module = family.build_component(name, family.component_config(name, config, job.model.options))
    nn.Module.to(module, dtype).requires_grad_(False).eval()
    holder = object.__new__(family)
    ModelFamily.__init__(holder, {name: module}, dtype=dtype, device="cpu")
    blocks = holder.repeated_blocks(name)
    if name in job.model.fp8_models:
        convert_to_fp8(blocks)
    found = _component(module, blocks, with_trained=False)
    inside = weights_of(blocks) if blocks else Weights()
    largest = max([found.largest_unit_bytes, *(weights_of([block]).frozen_bytes for block in blocks)])
    whole = replace(found, weights=found.weights + inside, largest_unit_bytes=largest)
    if not encodes:
        return whole
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_weights(module, mode)
    with mode, torch.no_grad():
        pixels = torch.zeros(1, shape.num_frames, shape.height, shape.width, 3, dtype=torch.uint8)
        peak = peak_bytes(lambda: holder.encode_image(pixels))
    # Clips are encoded one at a time, pictures together.
    return replace(whole, encode_bytes=peak * (1 if shape.num_frames > 1 else shape.num_samples))
