"""The steps of a stream, fetched ahead: waiting for data and copying them to the device overlap with the computation.

A thread takes step after step from the stream. For a GPU it copies the pixels (or what split training has cached) into pinned
memory and from there to the device on a stream of its own, so that the copy neither waits for the computation nor holds it up;
for a CPU it copies them out of the object store only.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffsynth_ray.data.bad_samples import BadSample
from diffsynth_ray.data.cached import CachedBatch
from diffsynth_ray.train.graph import SampleBatch, tensors_of
from diffsynth_ray.train.trainer import MicroInput

if TYPE_CHECKING:
    from diffsynth_ray.data.media import Frames
    from diffsynth_ray.data.stream import StreamedBatch
    from diffsynth_ray.train.cached_input import CachedInput

_STEPS_READY = 1
"""Steps that wait to be computed, besides the one that is being fetched: each holds device memory."""
_POLL_S = 0.2


@dataclass(frozen=True)
class FedStep:
    """One worker's part of a step."""

    micro_inputs: list[MicroInput]
    num_samples: int
    """Real samples of the step over all workers."""
    rows: tuple[int, ...]
    """Of this worker, for messages."""
    bad: tuple[BadSample, ...]
    """Samples of this worker that were replaced."""


@dataclass(frozen=True)
class _Fetched:
    """What the thread hands over: a step and the event of its copies, an error, or the end (nothing)."""

    step: FedStep | None = None
    copied: torch.cuda.Event | None = None
    error: BaseException | None = None


class DeviceFeed(Iterator[FedStep]):
    """Steps in order; the stream's error is raised where its step is asked for."""

    def __init__(
        self, stream: Iterator[StreamedBatch | CachedBatch], device: torch.device, *, cached: CachedInput | None = None
    ) -> None:
        self._device, self._cached = device, cached
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: queue.Queue[_Fetched] = queue.Queue(maxsize=_STEPS_READY)
        self._closed = threading.Event()
        # A daemon: a stream that waits for a cluster does not keep the process from ending.
        threading.Thread(target=self._fetch_all, args=(stream,), name="feed", daemon=True).start()

    def __next__(self) -> FedStep:
        fetched = self._ready.get()
        if fetched.step is None:
            self._ready.put(fetched)  # whoever asks again gets the same answer
            if fetched.error is not None:
                raise fetched.error
            raise StopIteration
        if fetched.copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(fetched.copied)
            tensors = [tensor for micro in fetched.step.micro_inputs for tensor in tensors_of(micro.batch)]
            for tensor in (tensor for tensor in tensors if tensor.is_cuda):
                # Its memory was handed out on the other stream: it must not be given away before this one is done with it.
                tensor.record_stream(current)
        return fetched.step

    def close(self) -> None:
        """End the thread after what it is fetching."""
        self._closed.set()

    def _fetch_all(self, stream: Iterator[StreamedBatch | CachedBatch]) -> None:
        last: _Fetched = _Fetched()
        try:
            for group in steps_of(stream):
                if not self._hand_over(self._fetch(group)):
                    return
        except BaseException as error:  # noqa: BLE001  a thread's boundary: raised again where the step is asked for
            last = _Fetched(error=error)
        self._hand_over(last)

    def _hand_over(self, fetched: _Fetched) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(fetched, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def _fetch(self, group: Sequence[StreamedBatch | CachedBatch]) -> _Fetched:
        if self._copies is None:
            return _Fetched(self._fed_step(group))
        copied = torch.cuda.Event()
        with torch.cuda.stream(self._copies):
            step = self._fed_step(group)
            copied.record()
        return _Fetched(step, copied)

    def _fed_step(self, group: Sequence[StreamedBatch | CachedBatch]) -> FedStep:
        return FedStep(
            micro_inputs=[self._micro_input(batch) for batch in group],
            num_samples=group[0].num_samples,
            rows=tuple(row for batch in group for row in batch.rows),
            bad=tuple(bad for batch in group for bad in batch.bad),
        )

    def _micro_input(self, batch: StreamedBatch | CachedBatch) -> MicroInput:
        if isinstance(batch, CachedBatch):
            assert self._cached is not None  # it comes from there
            return self._cached.from_cache(batch)
        decoded, micro = batch.decoded, batch.micro_batch
        pixels = _to_host(batch.pixels, pinned=self._copies is not None).to(self._device, non_blocking=True)
        if self._cached is not None:
            return self._cached.from_pixels(micro, decoded.rows, pixels)
        samples = SampleBatch(pixels, decoded.prompts, decoded.rows, decoded.extra)
        return MicroInput(samples, micro.indices, micro.is_dummy)


def steps_of(stream: Iterator[StreamedBatch | CachedBatch]) -> Iterator[list[StreamedBatch | CachedBatch]]:
    """The micro batches of one step after the other."""
    group: list[StreamedBatch | CachedBatch] = []
    for batch in stream:
        group.append(batch)
        if batch.is_last:
            yield group
            group = []


def _to_host(pixels: Frames, *, pinned: bool) -> Tensor:
    """A copy in memory of our own, so that the block in the object store is free."""
    host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=pinned)
    host.numpy()[...] = pixels
    return host
