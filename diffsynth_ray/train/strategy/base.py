"""What the trainer asks of a distribution strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class Strategy(Protocol):
    """How forward, backward and the update are spread over the workers."""

    rank: int
    world_size: int

    def forward(self, *inputs: Any, last: bool) -> Tensor:
        """Losses [b] of one micro batch; `last`: its backward completes the step's gradients."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backward of one micro batch's share of the step's mean loss (the shares of all workers sum up to it)."""
        ...

    def step(self, lr: float) -> Tensor:
        """Update the weights; returns the gradient norm before clipping (0-d, not synchronised)."""
        ...

    def sum_over_workers(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all workers, on every worker."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Float32 masters ("master/NAME") and optimizer state ("KEY/NAME") by full parameter name."""
        ...

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave."""
        ...
