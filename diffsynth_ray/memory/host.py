"""One block of host memory for the weights of a node: pinned for fast copies, shared by the node's workers, never left behind.

What several workers share is an anonymous file (memfd): it has no name that a killed worker could leave in /dev/shm, and goes
with the last process that maps it. The other workers of the node open it through /proc while the first one still runs. A worker
that is alone takes memory of its own, which most kernels give in huge pages: a file's 4 KiB pages are pinned, and let go at the
end, one by one, ten million of them for 38 GiB.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffsynth_ray.errors import RunError

POPULATE_THREADS = 8
_POPULATE_BYTES = 64 << 20
_MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14; Python's mmap has no name for it


@dataclass(frozen=True)
class NodePlace:
    """Which of its node's workers this one is."""

    node: int = 0
    local_rank: int = 0
    local_world_size: int = 1


class NodeGroup(Protocol):
    """The workers of one node. The first one (local rank 0) fills what all share."""

    place: NodePlace

    def broadcast(self, value: list[int]) -> list[int]:
        """The first worker's value, on every worker of the node."""
        ...

    def barrier(self) -> None:
        """Wait for all workers of the node."""
        ...


class HostSegment:
    """`num_bytes` of zeroed host memory as the uint8 tensor `data`, the same memory in all workers of the group."""

    def __init__(self, num_bytes: int, *, device: torch.device, group: NodeGroup | None = None) -> None:
        self.is_first = group is None or group.place.local_rank == 0
        if group is None or group.place.local_world_size == 1:
            self._map = _Mapping(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE)
            # Pinned memory is copied when a process forks; nothing that this one starts has a use for it.
            self._map.madvise(mmap.MADV_DONTFORK)
        else:
            self._map = self._share(num_bytes, group)
        with suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.data: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:num_bytes]
        if device.type == "cuda" and num_bytes > 0:
            populate(self.data)
            self._check(torch.cuda.cudart().cudaHostRegister(self.data.data_ptr(), num_bytes, 0), num_bytes)
            self._map.pinned_at = self.data.data_ptr()

    @staticmethod
    def _share(num_bytes: int, group: NodeGroup) -> _Mapping:
        """The same memory in all workers of the group."""
        if group.place.local_rank == 0:
            fd = os.memfd_create("dsray-weights")
            os.ftruncate(fd, max(num_bytes, 1))
            group.broadcast([os.getpid(), fd])
        else:
            pid, fd_there = group.broadcast([])
            fd = os.open(f"/proc/{pid}/fd/{fd_there}", os.O_RDWR)
        try:
            return _Mapping(fd, max(num_bytes, 1), flags=mmap.MAP_SHARED)
        finally:
            group.barrier()  # all have it mapped: the descriptor, its only name, may go
            os.close(fd)

    @staticmethod
    def _check(status: object, num_bytes: int) -> None:
        code = int(status)  # type: ignore[call-overload]  # an enum of the CUDA runtime
        if code != 0:
            raise RunError(
                f"{num_bytes / 2**30:.1f} GiB of host memory cannot be pinned for the GPU (CUDA error {code})",
                hint="is there so much free memory? look at `ulimit -l` and the container's memory limit; "
                "model.fp8_models halves what is needed",
            )


class _Mapping(mmap.mmap):
    """Unpinned before it is unmapped: what is mapped at the same address later could not be pinned."""

    pinned_at: int | None = None

    def __del__(self) -> None:
        if self.pinned_at is not None and not sys.is_finalizing():  # the end of a process unpins, too
            torch.cuda.cudart().cudaHostUnregister(self.pinned_at)


def populate(data: Tensor) -> None:
    """Have the kernel provide the memory, with several threads: pinning provides it page by page with one.

    Where the kernel cannot (before 5.14) nothing happens.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def provide(start: int) -> None:
        madvise(data.data_ptr() + start, min(_POPULATE_BYTES, data.numel() - start), _MADV_POPULATE_WRITE)  # without the GIL

    with ThreadPoolExecutor(max_workers=POPULATE_THREADS) as pool:
        pool.map(provide, range(0, data.numel(), _POPULATE_BYTES))
