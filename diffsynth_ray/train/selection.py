"""`gradient.checkpointing = "auto"`: after the probe, how many blocks keep their activations, the same on all workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffsynth_ray.memory.selective import MARGIN, BlockUse, RecomputationMeter, choose
from diffsynth_ray.train.optim import state_bytes
from diffsynth_ray.train.trainer import Trainer


@dataclass(frozen=True)
class DeviceMemory:
    """Of one worker's device, in bytes."""

    available: int
    """That this process can have in all."""
    peak: int
    """Of the probe, with every block recomputed."""


def watch(trainer: Trainer) -> None:
    """Measure the blocks while the probe runs."""
    torch.cuda.reset_peak_memory_stats()
    for call in trainer.residency.selectable:
        call.meter = RecomputationMeter(torch.cuda.memory_allocated)


def read_memory() -> DeviceMemory:
    """After the probe."""
    free, _ = torch.cuda.mem_get_info()
    return DeviceMemory(free + torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated())


def keep_what_fits(
    trainer: Trainer,
    memory: DeviceMemory,
    *,
    gather: Callable[[Any], list[Any]],
    say: Callable[[str], object],
) -> int:
    """Let as many blocks keep their activations as fit every worker's device; returns how many.

    Rank 0's times and the largest sizes and smallest budget of all ranks decide.
    """
    calls = trainer.residency.selectable
    uses = [call.meter.use if call.meter is not None else None for call in calls]
    for call in calls:
        call.meter = None
    budget = int((1 - MARGIN) * memory.available) - memory.peak - _still_to_come(trainer)
    found = gather((budget, uses))
    budgets = [each for each, _ in found]
    if not calls or any(use is None for _, given in found for use in given):
        return 0  # a block that took no part in the probe's backward
    agreed = _agreed([given for _, given in found])
    kept = choose(agreed, budget_bytes=max(min(budgets), 0))
    for position, call in enumerate(calls):
        call.recompute = position not in kept
    gib = sum(agreed[position].kept_bytes for position in kept) / 2**30
    say(
        f'gradient.checkpointing = "auto": {len(kept)} of {len(calls)} blocks keep their activations ({gib:.1f} GiB), '
        f"{len(calls) - len(kept)} are recomputed"
    )
    return len(kept)


def _agreed(by_rank: Sequence[Sequence[BlockUse]]) -> list[BlockUse]:
    """Per block the largest size of all ranks; rank 0's time, of the fastest block of the same size."""
    sizes = [max(given[n].kept_bytes for given in by_rank) for n in range(len(by_rank[0]))]
    # The first block of a kind is compiled while it is measured.
    fastest = {size: min(by_rank[0][n].seconds for n, each in enumerate(sizes) if each == size) for size in sizes}
    return [BlockUse(size, fastest[size]) for size in sizes]


def _still_to_come(trainer: Trainer) -> int:
    """What the first step allocates beside the probe's peak: the optimizer's state, and gradients in float32."""
    job = trainer.job
    elements = sum(getattr(param, "ds_numel", param.numel()) for param in trainer.trained.values())
    if job.updates_on_host:
        return 4 * elements
    return int(elements * (4 + state_bytes(job.training)))
