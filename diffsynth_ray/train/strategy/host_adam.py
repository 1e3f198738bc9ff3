"""Adam's update of masters in host memory in one pass.

Memory limits the update, not arithmetic: 28 bytes a parameter have to move (master and two moments read and written in
float32, the gradient read and the weight written in bf16). torch's own fused step wants the gradient in float32 and leaves the
rounding to another pass: 40 bytes. Here one compiled loop does all. Masters and moments lie in huge pages, because in pages of
4 KiB address translation costs a walk through gigabytes half of the memory's speed.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

_HUGE_PAGE = 2 << 20


class MasterUpdate(NamedTuple):
    """One parameter's part in an update."""

    master: nn.Parameter
    gradient: Tensor
    """In any number format."""
    home: Tensor
    """Where the new value is rounded to."""


def in_huge_pages(values: Tensor) -> Tensor:
    """A copy on the CPU that lies in huge pages where the system has them; small tensors are copied as usual."""
    num_bytes = values.numel() * values.element_size()
    if num_bytes < _HUGE_PAGE:
        return values.to("cpu", copy=True)
    memory = mmap.mmap(-1, num_bytes)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=values.dtype).view(values.shape).copy_(values)


def takes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `update_masters` stands for the optimizer's own step: its class and settings, not those of a subclass."""
    settings = optimizer.defaults
    return type(optimizer) in (torch.optim.AdamW, torch.optim.Adam) and not (
        settings["amsgrad"] or settings["maximize"] or settings["foreach"] or settings["differentiable"]
    )


@torch.no_grad()
def update_masters(
    step: Callable[..., object], optimizer: torch.optim.Optimizer, updates: Iterable[MasterUpdate], *, scale: float
) -> None:
    """One step of torch's AdamW or Adam with gradients times `scale`; state and settings stay in the torch optimizer.

    `step`: what `compiled_step` gave.
    """
    settings = optimizer.param_groups[0]
    lr, (beta1, beta2), decay = settings["lr"], settings["betas"], settings["weight_decay"]
    decoupled = settings["decoupled_weight_decay"]
    for master, gradient, home in updates:
        state = optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (in_huge_pages(torch.zeros(()).expand(master.shape)) for _ in range(2))
        state["step"] += 1
        count = int(state["step"])
        factors = torch.tensor(
            [
                scale,
                1 - lr * decay if decoupled else 1.0,
                0.0 if decoupled else decay,
                1 - beta1,
                1 - beta2,
                lr / (1 - beta1**count),
                (1 - beta2**count) ** -0.5,
                settings["eps"],
            ]
        )
        tensors = (master.detach(), gradient, state["exp_avg"], state["exp_avg_sq"], home)
        step(*(tensor.view(-1) for tensor in tensors), factors)


def _step(master: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, home: Tensor, factors: Tensor) -> None:
    """Kingma and Ba, Adam, algorithm 1, with Loshchilov and Hutter's decoupled decay, over vectors [n]."""
    scale, shrink, decay, mean_share, square_share, lr, square_scale, eps = factors.unbind()
    gradient = gradient.float() * scale + decay * master
    new_mean = mean + mean_share * (gradient - mean)
    new_square = square + square_share * (gradient * gradient - square)
    value = master * shrink - lr * new_mean / (new_square.sqrt() * square_scale + eps)
    mean.copy_(new_mean)
    square.copy_(new_square)
    master.copy_(value)
    home.copy_(value)


@cache
def compiled_step() -> Callable[..., object] | None:
    """The step as one loop in machine code; None where there is no C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    compiled = torch.compile(_step, dynamic=True)
    trial = torch.zeros(64)
    try:
        with torch.no_grad():
            compiled(trial, trial.bfloat16(), trial.clone(), trial.clone(), trial.bfloat16(), torch.ones(8))
    except (TorchDynamoException, CppCompileError, InvalidCxxCompiler):
        return None
    return compiled
