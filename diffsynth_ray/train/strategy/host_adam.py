"""Adam's update of masters in host memory, a piece that fits the processor's caches at a time.

Memory limits the update, not arithmetic. Tensor by tensor, every pass over master, moments and gradient goes through main
memory: 40 bytes a parameter, 4 of them a float32 copy of the gradient in pages that the system has to clear first. Piece by
piece, only the first read and the last write do: 28 bytes (master and two moments read and written, gradient read and weight
written in bf16).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

PIECE = 1 << 20
"""Elements: 14 MiB of float32 master, moments and gradient, some hundred KiB for each of 16 cores."""


class MasterUpdate(NamedTuple):
    """One parameter's part in an update."""

    master: nn.Parameter
    gradient: Tensor
    """In any number format; a float32 one is scaled in place."""
    home: Tensor | None
    """Where the new value is rounded to."""


class PiecewiseAdam:
    """The update of torch's AdamW or Adam; state and settings stay in the torch optimizer."""

    def __init__(self) -> None:
        self._scratch = torch.empty(PIECE)

    @staticmethod
    def takes(optimizer: torch.optim.Optimizer) -> bool:
        """Whether this update stands for the optimizer's own: its class and settings, not those of a subclass."""
        settings = optimizer.defaults
        return type(optimizer) in (torch.optim.AdamW, torch.optim.Adam) and not (
            settings["amsgrad"] or settings["maximize"] or settings["foreach"] or settings["differentiable"]
        )

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer, updates: Iterable[MasterUpdate], *, scale: float) -> None:
        """One step with gradients times `scale`; the same numbers as the optimizer's fused step."""
        settings = optimizer.param_groups[0]
        decoupled = settings["decoupled_weight_decay"]
        kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
        beta1, beta2 = settings["betas"]
        for master, gradient, home in updates:
            state = optimizer.state[master]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            state["step"] += 1
            flat = [master.view(-1), gradient.view(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)]
            written = None if home is None else home.view(-1)
            for first in range(0, master.numel(), PIECE):
                piece = slice(first, min(first + PIECE, master.numel()))
                values, given, mean, square = (tensor[piece] for tensor in flat)
                kernel(
                    [values],
                    [self._scaled(given, scale)],
                    [mean],
                    [square],
                    [],
                    [state["step"]],
                    lr=settings["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=settings["weight_decay"],
                    eps=settings["eps"],
                    amsgrad=False,
                    maximize=False,
                )
                if written is not None:
                    written[piece].copy_(values)

    def _scaled(self, gradient: Tensor, scale: float) -> Tensor:
        if gradient.dtype != torch.float32:
            gradient = self._scratch[: gradient.numel()].copy_(gradient)
        return gradient if scale == 1.0 else gradient.mul_(scale)
