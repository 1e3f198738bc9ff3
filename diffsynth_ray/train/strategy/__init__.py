"""Distribution strategies behind one protocol; the job's key picks one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from diffsynth_ray.config.distillation import DIRECT_DISTILL
from diffsynth_ray.config.schema import Job
from diffsynth_ray.models.family import ModelFamily
from diffsynth_ray.train.strategy.base import Strategy

if TYPE_CHECKING:
    from diffsynth_ray.train.graph import TrainGraph
    from diffsynth_ray.train.optim import MasterOptimizer
    from diffsynth_ray.train.residency import Residency

MOST_REPLAYED_BYTES = 2 << 30
"""Gradients that are kept beside those of a step that is replayed as a CUDA graph."""


def trained_parameters(graph: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by "component.parameter"."""
    return {name.removeprefix("components."): param for name, param in graph.named_parameters() if param.requires_grad}


def build_strategy(
    job: Job,
    family: ModelFamily,
    graph: TrainGraph,
    *,
    optimizer: MasterOptimizer | None,
    residency: Residency,
    probe: tuple[Any, ...] | None,
    say: Callable[[str], object],
) -> Strategy:
    """The strategy of `distributed.strategy`, over a graph of the family's components; `optimizer` None = the strategy's own.

    `probe`: inputs of the graph that are run once forward and backward and thrown away. They find parameters without a
    gradient, and an out-of-memory before the first step.
    """
    # Imported late: optim imports strategy.base, and DeepSpeed takes its time.
    if job.offload.optimize_on_cpu:
        from diffsynth_ray.train.strategy.host import HostStrategy

        assert residency.offload is not None  # resolve has checked it
        trained = trained_parameters(graph)
        return HostStrategy(job, graph, trained, residency.offload, place=residency.place, probe=probe)
    if optimizer is None:
        from diffsynth_ray.train.strategy.deepspeed import DeepSpeedStrategy

        return DeepSpeedStrategy(job, family, graph, probe=probe, say=say)
    from diffsynth_ray.memory.step_replay import StepReplay
    from diffsynth_ray.train.strategy.ddp import DDPStrategy

    return DDPStrategy(
        graph,
        optimizer,
        find_unused_parameters=job.training.find_unused_parameters,
        probe=probe,
        build_replay=partial(StepReplay, graph.from_tensors, say=say) if replays_steps(job, optimizer, residency) else None,
    )


def replays_steps(job: Job, optimizer: MasterOptimizer, residency: Residency) -> bool:
    """Whether steps are replayed as CUDA graphs: compiled blocks that stay where they are, and few trained parameters.

    The gradients then have a place of their own beside the step, which a LoRA's may take and a whole model's may not.
    """
    num_bytes = sum(param.numel() * param.element_size() for param in optimizer.params)
    is_plain = job.task != DIRECT_DISTILL and not job.training.trainable_models
    return residency.is_replayable and is_plain and optimizer.keeps_masters and num_bytes <= MOST_REPLAYED_BYTES
