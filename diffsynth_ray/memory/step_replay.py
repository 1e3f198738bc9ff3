"""Forward and backward of a micro batch as one CUDA graph.

A training step of a diffusion transformer is some ten thousand kernels of 30 microseconds. Launched one by one each is followed
by a gap, and where the host is slow or the pictures are small the device waits for it. Captured once, they are launched as one.

A graph holds for one set of shapes, and to capture it takes as long as some steps, of which each replay wins back a small part.
So only sets that come often are captured: with captions of a hundred lengths most steps are computed as usual. All graphs share
one pool of memory, and what is computed as usual has another: where both do not fit the device, the graphs go, and are captured
anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffsynth_ray.errors import first_line

USUAL_RUNS = 2
"""Runs of a set of shapes before it is captured: they compile what is compiled, and fill what caches by shape."""
MOST_GRAPHS = 8
"""A set of shapes is captured where at least every eighth run so far was of it."""
MOST_RELEASES = 2 * USUAL_RUNS * MOST_GRAPHS
"""Times that the graphs give way to what needs their memory before there are no more."""

Result = TypeVar("Result")
Losses = Callable[[Mapping[str, Tensor]], Tensor]
"""Losses [b] from named tensors."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    losses: Tensor


class StepReplay:
    """Losses of micro batches and the gradients of their sum, from graphs where there are any."""

    def __init__(self, losses: Losses, params: Sequence[nn.Parameter], *, say: Callable[[str], object]) -> None:
        """`params`: all of them get a gradient in every run."""
        self._losses, self._params, self._say = losses, params, say
        # One tensor behind all gradients: what is done with all of them is one kernel, or one message to other workers.
        self.flat = torch.zeros(sum(param.numel() for param in params), dtype=params[0].dtype, device=params[0].device)
        """The gradients of the last run."""
        sizes = [param.numel() for param in params]
        self._gradients = [part.view_as(param) for part, param in zip(self.flat.split(sizes), params, strict=True)]
        self._graphs: dict[tuple[object, ...], _Captured] = {}
        self._runs: Counter[tuple[object, ...]] = Counter()
        self._pool: Any = None
        self._stream = torch.cuda.Stream()
        self._releases = 0
        self.is_on = True
        """Until a graph could not be captured, or the graphs were in the way too often."""

    @property
    def num_graphs(self) -> int:
        """Sets of shapes that are captured now."""
        return len(self._graphs)

    def run(self, inputs: Mapping[str, Tensor], weight: float) -> Tensor:
        """Losses [b], detached; the gradients of their sum times `weight` replace those of the parameters.

        Inputs on the CPU are constants of a graph: others mean another graph.
        """
        given = {**inputs, "weight": torch.full((), weight, device=self.flat.device)}
        key = tuple(_kind(name, tensor) for name, tensor in given.items())
        self._runs[key] += 1
        if self.is_on and key not in self._graphs and self._comes_often(key):
            self._capture(key, given)
        if key not in self._graphs:
            losses = self.with_room(lambda: self._run(given))
        else:
            captured = self._graphs[key]
            torch._foreach_copy_([*captured.inputs.values()], [given[name] for name in captured.inputs])
            captured.graph.replay()
            losses = captured.losses.clone()  # the next run writes over it
        for param, gradient in zip(self._params, self._gradients, strict=True):
            param.grad = gradient
        return losses

    def _comes_often(self, key: tuple[object, ...]) -> bool:
        runs = self._runs[key]
        return runs > USUAL_RUNS and runs * MOST_GRAPHS >= self._runs.total() and len(self._graphs) < MOST_GRAPHS

    def release(self) -> None:
        """Give the graphs' memory back; those that are needed are captured anew."""
        self._graphs.clear()
        if self._runs:
            torch.cuda.empty_cache()

    def with_room(self, compute: Callable[[], Result]) -> Result:
        """The result; where there is no memory for it beside the graphs, they go first."""
        try:
            return compute()
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        self._give_way()  # outside of the handler, whose traceback keeps what was computed
        return compute()

    def _give_way(self) -> None:
        self.release()
        self._releases += 1
        if self._releases == MOST_RELEASES:
            self._turn_off("there is no memory for them beside other work")

    def _run(self, given: Mapping[str, Tensor]) -> Tensor:
        for param in self._params:
            param.grad = None
        losses = self._losses(given)
        (losses.sum() * given["weight"]).backward()
        found = [param.grad for param in self._params if param.grad is not None]
        torch._foreach_copy_(self._gradients, found)  # refuses lists of unequal length
        for param in self._params:
            param.grad = None
        return losses.detach()

    def _capture(self, key: tuple[object, ...], given: Mapping[str, Tensor]) -> None:
        """A graph of this set of shapes; nothing is computed yet."""
        inputs = self.with_room(lambda: {name: tensor.clone() for name, tensor in given.items() if tensor.is_cuda})
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()  # the allocator has dropped the pool with its last graph
        try:
            graph, losses = _recorded(lambda: self._run({**given, **inputs}), self._pool, self._stream)
        except torch.OutOfMemoryError:
            problem = "" if self._graphs else "there is no memory for one"
        except RuntimeError as error:  # a copy from unpinned memory, a look at a value
            problem = f"a step of this model cannot be captured ({first_line(error)})"
        else:
            self._graphs[key] = _Captured(graph, inputs, losses)
            return
        if problem:
            self._turn_off(problem)
        else:
            self._give_way()

    def _turn_off(self, reason: str) -> None:
        self.is_on = False
        self.release()
        self._say(f"CUDA graphs are off: {reason}")


def _recorded(compute: Callable[[], Tensor], pool: Any, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of what `compute` launches, and its result, which lies in the pool. An error leaves the device as it was."""
    state = _generator().clone_state()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    _clear_workspaces()
    torch.cuda.empty_cache()
    with torch.cuda.stream(stream):
        # Other threads copy the next samples to the device meanwhile.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            result = compute()
        except BaseException:
            with suppress(RuntimeError):
                _end_capture(graph, pool, state)
            raise
        _end_capture(graph, pool, state)
    return graph, result


def _end_capture(graph: torch.cuda.CUDAGraph, pool: Any, state: torch.Generator) -> None:
    """End a capture, also one that has failed.

    torch leaves all that such a capture has begun as it is: memory comes from the pool, and the next random number is an error.
    """
    try:
        graph.capture_end()
    except RuntimeError:
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
        _generator().graphsafe_set_state(state)
        raise
    finally:
        _clear_workspaces()


def _clear_workspaces() -> None:
    """cuBLAS keeps 32 MiB a stream for its products, in a capture from the graphs' pool, which they would hold on to."""
    torch._C._cuda_clearCublasWorkspaces()


def _generator() -> torch.Generator:
    return torch.cuda.default_generators[torch.cuda.current_device()]


def _kind(name: str, tensor: Tensor) -> tuple[object, ...]:
    value = "" if tensor.is_cuda else str(tensor.tolist())
    return (name, tuple(tensor.shape), tensor.dtype, value)
