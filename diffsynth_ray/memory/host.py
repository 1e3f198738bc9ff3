"""One block of host memory for the weights of a node: pinned for fast copies, shared by the node's workers, never left behind.

The memory is an anonymous file (memfd): it has no name that a killed worker could leave in /dev/shm, and goes with the last process
that maps it. The other workers of the node open it through /proc while the first one still runs.
"""

from __future__ import annotations

import mmap
import os
from typing import Protocol

import torch
from torch import Tensor

from diffsynth_ray.errors import RunError


class NodeGroup(Protocol):
    """The workers of one node."""

    is_first: bool
    """Exactly one worker of the node: it fills what all share."""

    def broadcast(self, value: list[int]) -> list[int]:
        """The first worker's value, on every worker of the node."""
        ...

    def barrier(self) -> None:
        """Wait for all workers of the node."""
        ...


class HostSegment:
    """`num_bytes` of zeroed host memory as the uint8 tensor `data`, the same memory in all workers of the group."""

    def __init__(self, num_bytes: int, *, device: torch.device, group: NodeGroup | None = None) -> None:
        self.is_first = group is None or group.is_first
        fd = self._open(num_bytes, group)
        try:
            self._map = mmap.mmap(fd, max(num_bytes, 1), flags=mmap.MAP_SHARED)
        finally:
            if group is not None:
                group.barrier()  # all have it mapped: the descriptor, its only name, may go
            os.close(fd)
        self.data: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:num_bytes]
        self._pinned = device.type == "cuda" and num_bytes > 0
        if self._pinned:
            self._check(torch.cuda.cudart().cudaHostRegister(self.data.data_ptr(), num_bytes, 0), num_bytes)

    @staticmethod
    def _open(num_bytes: int, group: NodeGroup | None) -> int:
        if group is not None and not group.is_first:
            pid, fd = group.broadcast([])
            return os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        fd = os.memfd_create("dsray-weights")
        os.ftruncate(fd, max(num_bytes, 1))
        if group is not None:
            group.broadcast([os.getpid(), fd])
        return fd

    @staticmethod
    def _check(status: object, num_bytes: int) -> None:
        code = int(status)  # type: ignore[call-overload]  # an enum of the CUDA runtime
        if code != 0:
            raise RunError(
                f"{num_bytes / 2**30:.1f} GiB of host memory cannot be pinned for the GPU (CUDA error {code})",
                hint="is there so much free memory? look at `ulimit -l` and the container's memory limit; "
                "model.fp8_models halves what is needed",
            )
