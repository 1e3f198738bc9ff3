"""How long a worker waits for the others: the part of its communication that its own computation does not hide.

Gradients travel while backward goes on, so that the time of a message says little. What counts is where the computation can not
go on: on a CPU the clock runs around what blocks; on a GPU events lie around the wait in the stream that computes, and the host
waits for nothing. A worker that comes late is waited for by the others: its delay is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from diffsynth_ray.memory.timing import DeviceTimer

_COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "barrier", "all_to_all", "all_to_all_single"),
    *("all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced", "all_gather_object"),
    *("reduce_scatter", "reduce_scatter_tensor"),
)


class CommunicationTimer:
    """Sums up a worker's waits; with one worker there are none."""

    def __init__(self, device: torch.device, *, world_size: int) -> None:
        self._timer = DeviceTimer(device)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._counts = world_size > 1
        self._is_waiting = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is inside waits for other workers. A wait in a wait counts once, one beside the computing stream never."""
        beside = self._stream is not None and torch.cuda.current_stream(self._stream.device) != self._stream
        if not self._counts or self._is_waiting or beside:
            yield
            return
        self._is_waiting = True
        try:
            with self._timer.stretch():
                yield
        finally:
            self._is_waiting = False

    @contextmanager
    def after_backward(self, loss: Tensor) -> Iterator[None]:
        """Inside is a backward pass of `loss`: what it does after the last of its own computation waits for other workers."""
        if not self._counts:
            yield
            return
        with ExitStack() as wait:

            def begin(_: Tensor) -> None:
                # Callbacks run in this order at the end of the pass; DistributedDataParallel waits in one that it adds later.
                torch.autograd.Variable._execution_engine.queue_callback(lambda: wait.enter_context(self.waiting()))

            loss.register_hook(begin)
            yield

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, all of which waits; what it leaves to be waited for later counts there."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.waiting():
                result = function(*args, **kwargs)
            return _TimedWork(result, self) if hasattr(result, "wait") else result

        return call

    def take_s(self) -> float:
        """Seconds since the last call; a wait that the device has not passed yet counts the next time."""
        return self._timer.take_s()

    def forget(self) -> None:
        """Waits that have ended count no more."""
        self._timer.forget()


class TimedCollectives:
    """A backend whose collectives are timed; all else is the backend's."""

    def __init__(self, backend: Any, timer: CommunicationTimer) -> None:
        self._backend, self._timer = backend, timer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return self._timer.timed(found) if name in _COLLECTIVES else found


class _TimedWork:
    """A collective under way."""

    def __init__(self, work: Any, timer: CommunicationTimer) -> None:
        self._work, self.wait = work, timer.timed(work.wait)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
