"""Small values among all ranks, on the CPU, whatever the training's backend is."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(days=1)
"""The driver ends workers that hang; a slow disk under one of them is no reason to."""


class Group:
    """A process group of its own: its values never wait for the GPU, nor for other groups."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if world_size > 1 else None

    def from_rank_zero(self, value: Any) -> Any:
        """Rank 0's value."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def number_from_rank_zero(self, number: int) -> int:
        """Rank 0's number, without the cost of pickling."""
        if self._group is None:
            return number
        message = torch.tensor([number])
        dist.broadcast(message, src=0, group=self._group)
        return int(message)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self._world_size
        dist.all_gather_object(found, value, group=self._group)
        return found
