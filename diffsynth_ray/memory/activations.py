"""Block inputs in pinned host memory between forward and backward, copied while the device computes.

Backward needs them in the opposite order, so that the input of the block before is on its way while this block runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_BYTES = 1 << 20
"""Smaller tensors, and those that all blocks share, stay on the device."""


@dataclass(eq=False)
class _Stored:
    """One tensor that was moved to the host."""

    host: Tensor
    written: torch.cuda.Event | None
    device_copy: Tensor | None = None
    ready: torch.cuda.Event | None = None


class ActivationStore:
    """A stack of saved block inputs, in host memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moved_bytes = 0
        """Bytes copied to the host since the start."""
        self._stack: list[_Stored] = []
        self._free: dict[int, list[Tensor]] = {}
        is_cuda = device.type == "cuda"
        # One stream a direction: the link carries both at once.
        self._out = torch.cuda.Stream(device) if is_cuda else None
        self._back = torch.cuda.Stream(device) if is_cuda else None

    def clear(self) -> None:
        """Forget what a forward without its backward has left."""
        for stored in self._stack:
            self._recycle(stored)
        self._stack.clear()

    def save(self, tensors: Sequence[Tensor]) -> list[Tensor | _Stored]:
        """Move what is large and belongs to this block alone; the rest is kept as it is."""
        return [self._write(tensor) if self._is_moved(tensor) else tensor for tensor in tensors]

    def restore(self, saved: Sequence[Tensor | _Stored]) -> list[Tensor]:
        """The tensors on the device; starts to fetch the ones below on the stack."""
        mine = [entry for entry in saved if isinstance(entry, _Stored)]
        for entry in mine:
            self._fetch(entry)
            self._stack.remove(entry)
        if self._stack:
            self._fetch(self._stack[-1])
        return [self._take(entry) if isinstance(entry, _Stored) else entry for entry in saved]

    def _is_moved(self, tensor: Tensor) -> bool:
        # What carries a gradient was made by the block before; the others (rotary tables, a frozen text) are shared by all blocks.
        return tensor.requires_grad and tensor.numel() * tensor.element_size() >= MIN_BYTES

    def _write(self, tensor: Tensor) -> _Stored:
        tensor = tensor.detach().contiguous()
        num_bytes = tensor.numel() * tensor.element_size()
        pool = self._free.setdefault(num_bytes, [])
        raw = pool.pop() if pool else torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._out is not None)
        stored = _Stored(raw.view(tensor.dtype).view(tensor.shape), None)
        if self._out is None:
            stored.host.copy_(tensor)
        else:
            self._out.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._out):
                stored.host.copy_(tensor, non_blocking=True)
                stored.written = torch.cuda.Event()
                stored.written.record(self._out)
            tensor.record_stream(self._out)
        self.moved_bytes += num_bytes
        self._stack.append(stored)
        return stored

    def _fetch(self, stored: _Stored) -> None:
        if stored.device_copy is not None:
            return
        if self._back is None or stored.written is None:
            stored.device_copy = stored.host.clone()
            return
        self._back.wait_event(stored.written)
        with torch.cuda.stream(self._back):
            stored.device_copy = stored.host.to(self.device, non_blocking=True)
            stored.ready = torch.cuda.Event()
            stored.ready.record(self._back)

    def _take(self, stored: _Stored) -> Tensor:
        assert stored.device_copy is not None
        if stored.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(stored.ready)
            stored.device_copy.record_stream(stream)
        self._recycle(stored)
        return stored.device_copy

    def _recycle(self, stored: _Stored) -> None:
        raw = stored.host.view(-1).view(torch.uint8)
        self._free.setdefault(raw.numel(), []).append(raw)
