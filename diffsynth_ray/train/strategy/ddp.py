"""Data parallel training with torch's DistributedDataParallel; plain training with one worker.

DistributedDataParallel gets the trained parameters only. Gradients of the micro steps of one step are summed in float32: in
fp32 by DDP's own accumulation without communication in between; in bf16 every micro step's gradients are averaged over the
workers and added to the float32 masters' gradients, because DDP cannot accumulate in another number format.

Where steps are replayed as CUDA graphs, the gradients of a micro step lie in one tensor, which is summed over the workers after
it: a LoRA's are small beside the step, so that nothing is lost by not sending them during backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffsynth_ray.errors import ModelError
from diffsynth_ray.memory.step_replay import StepReplay
from diffsynth_ray.train.graph import TrainGraph
from diffsynth_ray.train.optim import MasterOptimizer
from diffsynth_ray.train.shards import balanced_slices
from diffsynth_ray.train.strategy.base import GradientWatch, StateReader, StateSlice
from diffsynth_ray.train.strategy.communication import CommunicationTimer


class DDPStrategy:
    """Every worker has the whole model and the whole optimizer state."""

    def __init__(
        self,
        graph: TrainGraph,
        optimizer: MasterOptimizer,
        *,
        find_unused_parameters: bool | Literal["auto"],
        probe: tuple[Any, ...] | None = None,
        build_replay: Callable[[Sequence[nn.Parameter]], StepReplay] | None = None,
    ) -> None:
        """`build_replay`: steps are to be replayed as CUDA graphs, where every parameter gets a gradient."""
        self.optimizer = optimizer
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        has_unused = probe is None
        if probe is not None:
            unused = self._probe(graph, probe)
            has_unused = bool(unused)
            if has_unused and find_unused_parameters is False and self.world_size > 1:
                raise ModelError(
                    f"training.find_unused_parameters: got false, and {len(unused)} of {len(optimizer.names)} trained "
                    f'parameters get no gradient (first: {unused[0]}), which DDP has to look for; use "auto" or true'
                )
            find_unused_parameters = has_unused if find_unused_parameters == "auto" else find_unused_parameters
        self.communication = CommunicationTimer(optimizer.params[0].device, world_size=self.world_size)
        self.module = graph
        self.ddp: DistributedDataParallel | None = None
        self.replay = build_replay(optimizer.params) if build_replay is not None and not has_unused else None
        if self.world_size > 1 and self.replay is None:
            frozen = {name for name, param in graph.named_parameters() if not param.requires_grad}
            frozen |= {name for name, _ in graph.named_buffers()}
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(graph, frozen)
            self.ddp = DistributedDataParallel(
                graph,
                find_unused_parameters=find_unused_parameters is not False,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )

    def _probe(self, graph: nn.Module, inputs: tuple[Any, ...]) -> list[str]:
        """Run a micro batch and forget it; names of the trained parameters that got no gradient."""
        watch = GradientWatch(dict(zip(self.optimizer.names, self.optimizer.params, strict=True)))
        graph(*inputs).sum().backward()
        for param in self.optimizer.params:
            param.grad = None
        return watch.stop()

    def micro_step(self, *inputs: Any, weight: float, num_samples: int, last: bool) -> Tensor:
        """See Strategy. DDP averages over the workers, so that a share is scaled up by their number first."""
        if self.replay is not None:
            tensors = self.replay.with_room(lambda: self.module.to_tensors(*inputs))
            losses = self.replay.run(tensors, weight / num_samples)
            self.sum_over_workers(self.replay.flat)
        elif self.ddp is None:
            losses = self.module(*inputs)
            (losses.sum() * weight / num_samples).backward()
        else:
            with self._no_sync(last):
                losses = self.ddp(*inputs)
                share = losses.sum() * weight / num_samples * self.world_size
                with self.communication.after_backward(share):
                    share.backward()
        if not last:
            self.optimizer.collect_gradients()
        return losses.detach()

    def release_memory(self) -> None:
        """See Strategy."""
        if self.replay is not None:
            self.replay.release()

    def evaluate(self, *inputs: Any) -> Tensor:
        """See Strategy. The plain module: no worker waits for another."""
        losses: Tensor = self.module(*inputs)
        return losses

    def _no_sync(self, last: bool) -> Any:
        assert self.ddp is not None
        return nullcontext() if last or self.optimizer.keeps_masters else self.ddp.no_sync()

    def step(self, lr: float) -> Tensor:
        """See Strategy."""
        return self.optimizer.step(lr)

    def sum_over_workers(self, value: Tensor) -> Tensor:
        """See Strategy."""
        if self.world_size > 1:
            with self.communication.waiting():
                dist.all_reduce(value)
        return value

    def eval_weights(self) -> AbstractContextManager[None]:
        """See Strategy."""
        return self.optimizer.eval_weights()

    def full_masters(self) -> dict[str, Tensor]:
        """See Strategy. Every rank has them."""
        return self.optimizer.named_masters()

    def full_averages(self) -> dict[str, Tensor]:
        """See Strategy. Every rank has them."""
        return self.optimizer.named_averages()

    def averaged(self) -> AbstractContextManager[None]:
        """See Strategy."""
        return self.optimizer.averaged()

    def state_slices(self) -> dict[str, StateSlice]:
        """See Strategy. Every rank has the whole state and writes an even share of it."""
        return balanced_slices(self.optimizer.state_tensors(), rank=self.rank, world_size=self.world_size)

    def load_state(self, state: StateReader) -> None:
        """See Strategy."""
        self.optimizer.load_state(state)
