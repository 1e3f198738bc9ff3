"""What a job's model is made of, in bytes and operations: built on meta, a block of each kind traced on fake tensors.

Of every list of blocks two are built, so that the largest model takes seconds and no memory. The second one stands for all
others, and for the first one too where that has the same layers and as much part in the backward pass.
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
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffsynth_ray.config.schema import Job, as_list
from diffsynth_ray.errors import JobFileError, ModelError, Problem
from diffsynth_ray.memory.fake_pass import BlockCost, Growth, block_cost, fake_weights, kept_by_autograd, tensors_of
from diffsynth_ray.memory.fp8 import convert_to_fp8
from diffsynth_ray.memory.graph_cost import nbytes, storages
from diffsynth_ray.memory.peak import peak_in_rounds
from diffsynth_ray.memory.placement import split_units
from diffsynth_ray.models import sources
from diffsynth_ray.models.family import BatchShape, ModelFamily, get_family
from diffsynth_ray.models.fp8_entries import fp8_components, names_entries
from diffsynth_ray.models.full_size import released_components
from diffsynth_ray.models.library_family import LibraryFamily
from diffsynth_ray.models.weights import load_components
from diffsynth_ray.schedule import trained_components
from diffsynth_ray.train.residency import compiles
from diffsynth_ray.train.trainer import select_trained

Say = Callable[[str], object]

_MOST_SAMPLES = 16
"""Of a batch that is traced as it is."""


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

    component: str
    count: int
    weights: Weights
    """Of one block."""
    input_bytes: int
    """Of what a block gets from the one before, and keeps for backward; 0 where it has none."""
    shared_bytes: int
    """Of inputs that blocks share, without those that an earlier kind shares too."""
    handed_bytes: int
    """Of a block's results that others than the next one get: their gradients wait for this block's backward."""
    cost: BlockCost
    keeps_input: bool
    """Whether backward needs the block's own inputs without recomputation too."""
    has_backward: bool
    """Whether the block, or something before it, is trained."""
    is_compiled: bool


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
    blocks: tuple[BlockKind, ...]
    """In the order of the forward pass."""
    around: dict[str, Component]
    """The traced components without their blocks."""
    around_kept_bytes: int
    """Kept for backward by what is around the blocks."""
    others: dict[str, Component] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def traced(self) -> tuple[str, ...]:
        """The components of a prediction; the trained one is among them."""
        return tuple(self.around)

    @property
    def weights(self) -> Weights:
        """Of the traced components."""
        return sum(map(self.weights_of, self.traced), Weights())

    def weights_of(self, component: str) -> Weights:
        """Of one traced component."""
        blocks = (kind.weights * kind.count for kind in self.blocks if kind.component == component)
        return sum(blocks, self.around[component].weights)


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
    entries, notes = [list(map(Path, entry)) for entry in map(as_list, model.paths)], []
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


def _with_fp8_components(job: Job) -> Job:
    """The job with components in place of the entries in model.fp8_models."""
    if not names_entries(job):
        return job
    alone = [{"paths": [entry], "id_with_origin_paths": []} for entry in job.model.paths]
    alone += [{"paths": [], "id_with_origin_paths": [text]} for text in job.model.id_with_origin_paths]
    held = {number: find_configs(job.with_keys(model=keys))[1] for number, keys in enumerate(alone)}
    return job.with_keys(model={"fp8_models": fp8_components(job, held)})


def measure_model(job: Job, shape: BatchShape, *, capability: tuple[int, int] | None, say: Say) -> ModelCost:
    """Build and trace a job's model; seconds, on the CPU, without its weights.

    `capability`: of the GPU that it is for, see `residency.compiles`.

    Raises JobFileError or ModelError for what cannot be reckoned.
    """
    name, configs, notes = find_configs(job)
    job = _with_fp8_components(job)
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
    blocks, around_kept = traced.trace(shape, capability)
    others = {
        component: _measure_other(family, job, component, config, shape, dtype)
        for component, config in configs.items()
        if component not in parts and not job.split.enabled
    }
    return ModelCost(name, shape, tuple(blocks), traced.around(), around_kept, others, tuple(notes))


def describe(shape: BatchShape) -> str:
    """For people."""
    frames = f" x {shape.num_frames} frames" if shape.num_frames > 1 else ""
    return f"{shape.num_samples} x {shape.height}x{shape.width}{frames}, {shape.text_tokens} text tokens"


@dataclass(frozen=True)
class _Call:
    """What a block was called with, and what it gave."""

    args: Any
    kwargs: Any
    results: list[Tensor]
    has_backward: bool

    @property
    def tensors(self) -> list[Tensor]:
        return tensors_of((self.args, self.kwargs))


class _Traced:
    """The components of a prediction with two blocks of each list, on fake weights."""

    def __init__(
        self, family: type[LibraryFamily], job: Job, configs: Mapping[str, Mapping[str, Any]], dtype: torch.dtype
    ) -> None:
        self.job = job
        modules: dict[str, nn.Module] = {}
        self.depths: dict[tuple[nn.Module, ...], tuple[str, int]] = {}
        """Blocks that were built of a list -> component, and how many the list has."""
        for name, given in configs.items():
            config = family.component_config(name, given, job.model.options)
            module = family.build_component(name, family.shallow_config(name, config, 2))
            nn.Module.to(module, dtype)  # diffusers' own warns of what it would do better itself
            defaults = inspect.signature(type(module).__init__).parameters
            for list_name, key in family.depth_keys.get(name, {}).items():
                depth = int(config[key] if key in config else defaults[key].default)
                self.depths[tuple(module.get_submodule(list_name).children())] = (name, depth)
            modules[name] = module
        self.family = family(modules, dtype=dtype, device="cpu", options=job.model.options)
        select_trained(self.family, job)
        for name in modules:
            if name in job.model.fp8_models:
                convert_to_fp8(self.family.repeated_blocks(name))
        self.module = nn.ModuleDict(modules)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def trace(self, shape: BatchShape, capability: tuple[int, int] | None) -> tuple[list[BlockKind], int]:
        """The kinds of blocks in the order of the forward pass, and what is kept around them."""
        fake_weights(self.module, self.mode)
        calls, around_kept = self._forward(shape)
        counted: dict[nn.Module, tuple[str, int]] = {}
        for (first, second), (component, depth) in self.depths.items():
            is_alike = (
                depth > 1 and _layers(first) == _layers(second) and calls[first].has_backward == calls[second].has_backward
            )
            alone = 0 if is_alike else min(depth, 1)
            counted |= {first: (component, alone), second: (component, depth - alone)}
        seen: set[int] = set()
        kinds = []
        for number, (block, call) in enumerate(calls.items()):
            component, count = counted[block]
            if count:
                later = storages(tensor for each in list(calls.values())[number + 1 :] for tensor in each.tensors)
                is_compiled = compiles(self.job, component, capability)
                kinds.append(self._kind(block, call, component, count, later=later, seen=seen, is_compiled=is_compiled))
        return kinds, around_kept

    def _kind(
        self,
        block: nn.Module,
        call: _Call,
        component: str,
        count: int,
        *,
        later: Mapping[int, int],
        seen: set[int],
        is_compiled: bool,
    ) -> BlockKind:
        """`later`: storages that blocks after this one are called with; `seen`: shared ones that earlier kinds have counted."""
        passed_on = {(tensor.shape, tensor.dtype) for tensor in call.results}
        own_numbers = {
            number
            for number, tensor in enumerate(call.tensors)
            if (tensor.shape, tensor.dtype) in passed_on and not later.keys() & storages([tensor]).keys()
        }
        own = [tensor for number, tensor in enumerate(call.tensors) if number in own_numbers]
        shared = storages(tensor for number, tensor in enumerate(call.tensors) if number not in own_numbers)
        cost = block_cost(block, call.args, call.kwargs, mode=self.mode, is_compiled=is_compiled)
        kept = call.has_backward
        shared_bytes = sum(size for storage, size in shared.items() if storage not in seen) if kept else 0
        if kept:
            seen.update(shared)
        return BlockKind(
            component=component,
            count=count,
            weights=weights_of([block]),
            input_bytes=nbytes(own) if kept else 0,
            shared_bytes=shared_bytes,
            handed_bytes=max(nbytes(call.results) - nbytes(own), 0) if kept else 0,
            cost=cost,
            keeps_input=bool(own_numbers & cost.kept_inputs),
            has_backward=kept,
            is_compiled=is_compiled,
        )

    def _forward(self, shape: BatchShape) -> tuple[Calls, int]:
        """The calls of the blocks, and what is kept for backward around them.

        Some models work sample by sample around their blocks: of a large batch two small ones tell all.
        """
        if shape.num_samples > _MOST_SAMPLES:
            two, three = (self._run(replace(shape, num_samples=num_samples)) for num_samples in (2, 3))
            growth = Growth(shape.num_samples - 3, self.mode)
            calls = {block: _grown(growth, two[0][block], call) for block, call in three[0].items()}
            if all(calls.values()):
                return {block: call for block, call in calls.items() if call}, growth.of(two[1], three[1])
        return self._run(shape)

    def _run(self, shape: BatchShape) -> tuple[Calls, int]:
        """See `_forward`."""
        family, job = self.family, self.job
        calls: Calls = {}
        blocks = [block for blocks in self.depths for block in blocks]
        for block in blocks:
            block.forward = _Recording(block, calls)
        with self.mode:
            batch = family.blank_batch(shape, extra_inputs=job.model.extra_inputs).with_reference()
            times = torch.zeros(shape.num_samples)

            def forward() -> Tensor:
                return family.predict(batch, batch.latents, times)

            saved = kept_by_autograd(forward)
        for block in blocks:
            del block.__dict__["forward"]
        known = storages(self.module.parameters())
        return calls, sum(size for storage, size in saved.items() if storage not in known)

    def around(self) -> dict[str, Component]:
        """The components without their blocks."""
        with_trained = self.job.offload.optimize_on_cpu
        return {
            name: _component(module, self.family.repeated_blocks(name), with_trained=with_trained)
            for name, module in self.family.components.items()
        }


Calls = dict[nn.Module, _Call]


def _grown(growth: Growth, two: _Call, three: _Call) -> _Call | None:
    """The call of a larger batch; None where other arguments than tensors follow from the batch."""
    given = (two.args, two.kwargs, two.results), (three.args, three.kwargs, three.results)
    (leaves_of_two, spec), (leaves, spec_of_three) = map(tree_flatten, given)
    pairs = list(zip(leaves_of_two, leaves, strict=False))
    same = (one == other for one, other in pairs if not isinstance(other, Tensor))
    if spec != spec_of_three or not all(same):
        return None
    grown = [growth.tensor(one, other) if isinstance(other, Tensor) else other for one, other in pairs]
    args, kwargs, results = tree_unflatten(grown, spec)
    return _Call(args, kwargs, results, three.has_backward)


def _layers(block: nn.Module) -> dict[str, tuple[torch.Size, bool]]:
    """What a block is made of: shape, and whether it is trained, by parameter."""
    return {name: (param.shape, param.requires_grad) for name, param in block.named_parameters()}


class _Recording:
    """A block's forward that notes its arguments and results, and keeps nothing for backward."""

    def __init__(self, block: nn.Module, calls: dict[nn.Module, _Call]) -> None:
        self.block, self.calls, self.inner = block, calls, block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            results = self.inner(*args, **kwargs)
        given = [*tensors_of((args, kwargs)), *self.block.parameters()]
        call = _Call(args, kwargs, tensors_of(results), any(tensor.requires_grad for tensor in given))
        self.calls[self.block] = call
        for tensor in call.results:
            tensor.requires_grad_(call.has_backward)
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

    def encoding(num_rounds: int) -> Callable[[], Tensor]:
        num_frames = 1 + (num_rounds - 1) * step
        pixels = torch.zeros(1, num_frames, shape.height, shape.width, 3, dtype=torch.uint8)
        return lambda: holder.encode_image(pixels)

    step = family.clip_step or 1
    with mode, torch.no_grad():
        # A clip is encoded in rounds: its first frame, and then as many as make one of the latents.
        peak = peak_in_rounds(encoding, 1 + (shape.num_frames - 1) // step)
    # Clips are encoded one at a time, pictures together.
    return replace(whole, encode_bytes=peak * (1 if shape.num_frames > 1 else shape.num_samples))
