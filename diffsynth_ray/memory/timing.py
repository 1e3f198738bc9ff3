"""Seconds that a stretch of work takes on the device, measured without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceTimer:
    """Sums up stretches: of the device's present stream on a GPU, of the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._done_s = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stretch(self) -> Iterator[None]:
        """What is inside counts."""
        if not self._is_cuda:
            started = time.perf_counter()
            yield
            self._done_s += time.perf_counter() - started
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._pairs.append((begin, end))

    def take_s(self) -> float:
        """Seconds since the last call; a stretch that the device has not passed yet counts the next time."""
        waiting = []
        for begin, end in self._pairs:
            if end.query():
                self._done_s += begin.elapsed_time(end) / 1000
            else:
                waiting.append((begin, end))
        self._pairs = waiting
        taken, self._done_s = self._done_s, 0.0
        return taken

    def forget(self) -> None:
        """Stretches that have ended count no more, also those that the device has not passed yet."""
        self._done_s = 0.0
        self._pairs.clear()
