"""Block inputs in pinned host memory between forward and backward, copied while the device computes.

Backward needs them in the opposite order, so that the inputs of the blocks before are on their way while this block runs. With
layer offload they share the link with weights, a block of which takes longer than this block runs: what is asked for only when
its block begins comes behind them, and the GPU stands still.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_BYTES = 1 << 20
"""Smaller tensors, and those that all blocks share, stay on the device."""


STILL_LEAVING = 2
"""Tensors on their way to the host that the device still holds."""
FETCH_AHEAD = 3
"""Blocks whose inputs are on their way back while another runs."""


@dataclass(eq=False)
class _Stored:
    """One tensor that was moved to the host."""

    raw: Tensor
    """uint8 host memory, of a power of two."""
    host: Tensor
    """The tensor's values there."""
    on_device: Tensor | None
    """The tensor itself while it leaves, or its copy on the way back."""
    event: torch.cuda.Event | None = None
    """The copy that runs, to the host or back."""


class ActivationStore:
    """A stack of saved block inputs, in host memory.

    All device memory here belongs to the computing stream, which waits for a copy before it drops what was copied: the memory
    is free for the next block in the stream's order, however far the host runs ahead of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moved_bytes = 0
        """Bytes copied to the host since the start."""
        self._stack: list[list[_Stored]] = []
        """What was moved, by block."""
        self._leaving: deque[_Stored] = deque()
        self._free: dict[int, list[Tensor]] = {}
        is_cuda = device.type == "cuda"
        # One stream a direction: the link carries both at once.
        self._out = torch.cuda.Stream(device) if is_cuda else None
        self._back = torch.cuda.Stream(device) if is_cuda else None

    def clear(self) -> None:
        """Forget what a forward without its backward has left."""
        self._let_go(0)
        for moved in self._stack:
            for stored in moved:
                self._wait(stored)  # one on its way back to a block that no gradient came to
                self._recycle(stored)
        self._stack.clear()

    def save(self, tensors: Sequence[Tensor]) -> list[Tensor | _Stored]:
        """Move what is large and belongs to this block alone; the rest is kept as it is."""
        saved = [self._write(tensor) if self._is_moved(tensor) else tensor for tensor in tensors]
        moved = [entry for entry in saved if isinstance(entry, _Stored)]
        if moved:
            self._stack.append(moved)
        return saved

    def restore(self, saved: Sequence[Tensor | _Stored]) -> list[Tensor]:
        """The tensors on the device; starts to fetch those of the blocks below on the stack."""
        mine = [entry for entry in saved if isinstance(entry, _Stored)]
        for entry in mine:
            if entry in self._leaving:
                self._leaving.remove(entry)  # the last ones of the forward pass have not left yet
            self._fetch(entry)
        if mine:
            place = self._stack.index(mine)
            # What lies above are blocks that no gradient comes to: a text encoder's last layers may not be read.
            for moved in reversed(self._stack[max(place - FETCH_AHEAD, 0) : place]):
                for entry in moved:
                    self._fetch(entry)
            del self._stack[place]
        return [self._take(entry) if isinstance(entry, _Stored) else entry for entry in saved]

    def _is_moved(self, tensor: Tensor) -> bool:
        # What carries a gradient was made by the block before; the others (rotary tables, a frozen text) all blocks share.
        return tensor.requires_grad and tensor.numel() * tensor.element_size() >= MIN_BYTES

    def _write(self, tensor: Tensor) -> _Stored:
        tensor = tensor.detach().contiguous()
        num_bytes = tensor.numel() * tensor.element_size()
        # Pinned memory is taken in powers of two anyway: so tensors of many sizes, of a data set's buckets, share it.
        taken_bytes = 1 << (num_bytes - 1).bit_length()
        pool = self._free.setdefault(taken_bytes, [])
        raw = pool.pop() if pool else torch.empty(taken_bytes, dtype=torch.uint8, pin_memory=self._out is not None)
        stored = _Stored(raw, raw[:num_bytes].view(tensor.dtype).view(tensor.shape), tensor)
        if self._out is None:
            stored.host.copy_(tensor)
        else:
            self._out.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._out):
                stored.host.copy_(tensor, non_blocking=True)
            stored.event = self._out.record_event()
        self.moved_bytes += num_bytes
        self._leaving.append(stored)
        self._let_go(STILL_LEAVING)
        return stored

    def _let_go(self, kept: int) -> None:
        """Drop the device's tensors that have left, but for the youngest `kept`."""
        while len(self._leaving) > kept:
            stored = self._leaving.popleft()
            self._wait(stored)
            stored.on_device = stored.event = None

    def _fetch(self, stored: _Stored) -> None:
        if stored.on_device is not None:
            return
        if self._back is None:
            stored.on_device = stored.host.clone()
            return
        stored.on_device = torch.empty_like(stored.host, device=self.device)
        # The memory may have been another tensor's until now.
        self._back.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._back):
            stored.on_device.copy_(stored.host, non_blocking=True)
        stored.event = self._back.record_event()

    def _take(self, stored: _Stored) -> Tensor:
        assert stored.on_device is not None
        self._wait(stored)
        self._recycle(stored)
        taken, stored.on_device = stored.on_device, None
        return taken

    def _wait(self, stored: _Stored) -> None:
        if stored.event is not None:
            torch.cuda.current_stream(self.device).wait_event(stored.event)

    def _recycle(self, stored: _Stored) -> None:
        self._free[stored.raw.numel()].append(stored.raw)
