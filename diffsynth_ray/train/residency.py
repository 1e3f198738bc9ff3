"""Where a job's weights and activations live: the job's keys turned into FP8, host memory, recomputation and compiled blocks.

The family's modules come with their weights on the meta device and adapters in place; `settle` fills them and gives every block
its BlockCall. The memory modules know nothing of jobs and families; the trainer knows nothing of where a weight is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import JobFileError, Problem
from diffsynth_ray.memory.activations import ActivationStore
from diffsynth_ray.memory.checkpointing import BlockCall, PartitionedBlockCall
from diffsynth_ray.memory.devices import FP8_INSTRUCTIONS
from diffsynth_ray.memory.fp8 import convert_to_fp8
from diffsynth_ray.memory.host import NodeGroup, NodePlace
from diffsynth_ray.memory.offload import LayerOffload, Unit
from diffsynth_ray.memory.placement import WeightSource, place, split_units
from diffsynth_ray.models.family import ModelFamily
from diffsynth_ray.schedule import partitioned_components

RECOMPILE_LIMIT = 64
"""Variants of a block that are compiled before it runs uncompiled: shapes, with and without graph, with and without mask."""

Say = Callable[[str], object]


@dataclass(frozen=True)
class Residency:
    """What moves while a step runs."""

    offload: LayerOffload | None = None
    activations: ActivationStore | None = None
    place: NodePlace = field(default_factory=NodePlace)
    selectable: tuple[BlockCall, ...] = ()
    """Blocks that may keep their activations instead of being recomputed; see `train.selection`."""
    is_replayable: bool = False
    """Blocks of a prediction are compiled and stay on a GPU: a step can be a CUDA graph."""

    @property
    def moved_bytes(self) -> int:
        """Bytes that offload has copied to the device, and activations to the host, since the start."""
        return sum(each.moved_bytes for each in (self.offload, self.activations) if each is not None)

    def take_stall_s(self) -> float:
        """Seconds since the last call that the computation waited for offloaded weights."""
        return self.offload.stalls.take_s() if self.offload is not None else 0.0

    def forget_stalls(self) -> None:
        """Waits for offloaded weights that have ended count no more."""
        if self.offload is not None:
            self.offload.stalls.forget()

    def begin(self, kind: str = "train") -> None:
        """A micro step begins, or what stands for one; those of a kind use the same weights in the same order."""
        if self.offload is not None:
            self.offload.begin(kind)
        if self.activations is not None:
            self.activations.clear()


def settle(family: ModelFamily, job: Job, *, group: NodeGroup | None = None, sizes_vary: bool = False, say: Say) -> Residency:
    """Read the family's weights to where the job wants them, and set up how its blocks are called.

    Components whose parameters are partitioned stay on the meta device: the strategy reads them. `sizes_vary`: samples differ
    in their numbers of tokens, so that blocks are compiled for all of them at once.
    """
    partitioned = partitioned_components(job)
    placed = {name: component for name, component in family.components.items() if name not in partitioned}
    blocks = {name: family.repeated_blocks(name) for name in family.components}
    for name in _fp8_components(family, job):
        if not convert_to_fp8(blocks[name]):
            say(f"model.fp8_models: {name} has no repeated blocks of Linear layers, and stays as it is")
    on_host = job.offload.optimize_on_cpu
    units: dict[str, dict[str, nn.Module]] = {}
    if job.offload.cpu_offload:
        threshold = job.offload.param_size_threshold
        max_bytes = None if threshold is None else int(threshold * 1e6)
        units = {
            name: split_units(component, blocks[name], max_bytes=max_bytes, with_trained=on_host)
            for name, component in placed.items()
        }
    sources = {name: cast(WeightSource, component.weight_source) for name, component in placed.items()}
    built = place(placed, sources, device=family.device, units=units, with_trained=on_host, group=group, say=say)
    for component in family.components.values():
        _move_buffers(component, family.device)
    budget = job.offload.vram_budget_gib
    offload = None
    if built:
        offload = LayerOffload(
            list(built.values()), device=family.device, budget_bytes=None if budget is None else int(budget * 2**30)
        )
        gib = sum(unit.num_bytes for unit in built.values()) / 2**30
        say(
            f"layer offload: {len(built)} units, {gib:.1f} GiB in host memory, "
            f"{offload.budget_bytes / 2**30:.1f} GiB of them on the device at a time"
        )
    activations = ActivationStore(family.device) if job.gradient.checkpointing_offload else None
    calls = _install(family, job, blocks, built, offload, activations, sizes_vary)
    place_on_node = group.place if group is not None else NodePlace()
    is_cuda = family.device.type == "cuda"
    return Residency(
        offload,
        activations,
        place_on_node,
        selectable=tuple(calls) if selects_blocks(job) and is_cuda else (),
        is_replayable=is_cuda and not (offload or activations) and all(call.is_compiled for call in calls) and bool(calls),
    )


def selects_blocks(job: Job) -> bool:
    """Whether "auto" chooses block by block: with offload, and where parameters are partitioned, all are recomputed."""
    is_fixed = job.offload.cpu_offload or job.gradient.checkpointing_offload or bool(partitioned_components(job))
    return job.gradient.checkpointing == "auto" and not is_fixed


def recomputes_at_first(job: Job, device: torch.device) -> bool:
    """Whether blocks begin as recomputed ones. "auto" on a CPU keeps everything: its memory is not a device's."""
    if job.gradient.checkpointing != "auto":
        return job.gradient.checkpointing
    is_fixed = job.offload.cpu_offload or job.gradient.checkpointing_offload
    return is_fixed or device.type == "cuda"


def _fp8_components(family: ModelFamily, job: Job) -> list[str]:
    problems = []
    for name in job.model.fp8_models:
        if name not in family.components:
            message = f"the family {family.name} has no loaded component {name!r}; it has {', '.join(family.components)}"
            problems.append(Problem("model.fp8_models", message))
    if problems:
        raise JobFileError(f"job {job.name}", problems)
    return list(job.model.fp8_models)


def _install(
    family: ModelFamily,
    job: Job,
    blocks: dict[str, list[nn.Module]],
    units: dict[nn.Module, Unit],
    offload: LayerOffload | None,
    activations: ActivationStore | None,
    sizes_vary: bool,
) -> list[BlockCall]:
    """Put a BlockCall around every block, and around every other module that is loaded by itself.

    Returns those of the blocks that are part of every prediction.
    """
    installed: set[nn.Module] = set()
    calls: list[BlockCall] = []
    recompute = recomputes_at_first(job, family.device)
    for name, found in blocks.items():
        is_compiled = name in family.predict_components and _compiles(job, family, name)
        if name in partitioned_components(job):
            for block in found:
                block.forward = PartitionedBlockCall(block, recompute=recompute, compile=is_compiled, sizes_vary=sizes_vary)
            continue
        for block in found:
            is_split = block not in units and any(inner in units for inner in block.modules())
            call = BlockCall(
                block,
                recompute=recompute,
                compile=is_compiled and not is_split,
                sizes_vary=sizes_vary,
                unit=units.get(block),
                offload=offload,
                activations=activations,
            )
            block.forward = call
            installed.add(block)
            if name in family.predict_components:
                calls.append(call)
    for module, unit in units.items():
        if module not in installed:
            module.forward = BlockCall(module, recompute=True, unit=unit, offload=offload)
    return calls


def compiles(job: Job, component: str, capability: tuple[int, int] | None) -> bool:
    """Whether a component's blocks are compiled on a GPU with Triton, of this compute capability (None = a new one)."""
    if job.training.compile is False:
        return False
    is_new = capability is None or capability >= FP8_INSTRUCTIONS
    return is_new or component not in job.model.fp8_models


def _compiles(job: Job, family: ModelFamily, component: str) -> bool:
    """`compiles` for the device that there is; sets up what compiling needs."""
    asked = job.training.compile
    if family.device.type != "cuda":
        asked = asked is True
    elif not compiles(job, component, torch.cuda.get_device_capability(family.device)):
        asked = False
    elif asked == "auto":
        from torch.utils._triton import has_triton

        asked = has_triton()
    if asked:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    return bool(asked)


def _move_buffers(component: nn.Module, device: torch.device) -> None:
    for module in component.modules():
        for name, buffer in list(module.named_buffers("", recurse=False)):
            setattr(module, name, buffer.to(device))
