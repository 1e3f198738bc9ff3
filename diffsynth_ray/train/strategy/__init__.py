"""Distribution strategies behind one protocol; the job's key picks one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from diffsynth_ray.config.schema import Job
from diffsynth_ray.models.family import ModelFamily
from diffsynth_ray.train.strategy.base import Strategy


def trained_parameters(graph: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by "component.parameter"."""
    return {
        name.removeprefix("components."): param for name, param in graph.named_parameters() if param.requires_grad
    }


def build_strategy(
    job: Job, family: ModelFamily, graph: nn.Module, *, probe: tuple[Any, ...] | None, say: Callable[[str], object]
) -> Strategy:
    """The strategy of `distributed.strategy`, over a graph of the family's components.

    `probe`: inputs of the graph that are run once forward and backward and thrown away. They find parameters without a
    gradient, and an out-of-memory before the first step.
    """
    # Imported late: optim imports strategy.base, and DeepSpeed takes its time.
    if job.distributed.strategy == "deepspeed":
        from diffsynth_ray.train.strategy.deepspeed import DeepSpeedStrategy

        return DeepSpeedStrategy(job, family, graph, probe=probe, say=say)
    from diffsynth_ray.train.optim import MasterOptimizer
    from diffsynth_ray.train.strategy.ddp import DDPStrategy

    trained: Mapping[str, nn.Parameter] = trained_parameters(graph)
    optimizer = MasterOptimizer(trained, job.training)
    return DDPStrategy(graph, optimizer, find_unused_parameters=job.training.find_unused_parameters, probe=probe)
