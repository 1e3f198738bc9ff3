"""Distribution strategies behind one protocol; the job's key picks one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from diffsynth_ray.config.schema import Job
from diffsynth_ray.models.family import ModelFamily
from diffsynth_ray.train.strategy.base import Strategy

if TYPE_CHECKING:
    from diffsynth_ray.train.optim import MasterOptimizer
    from diffsynth_ray.train.residency import Residency


def trained_parameters(graph: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by "component.parameter"."""
    return {name.removeprefix("components."): param for name, param in graph.named_parameters() if param.requires_grad}


def build_strategy(
    job: Job,
    family: ModelFamily,
    graph: nn.Module,
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
    from diffsynth_ray.train.strategy.ddp import DDPStrategy

    return DDPStrategy(graph, optimizer, find_unused_parameters=job.training.find_unused_parameters, probe=probe)
