"""Adam's update of masters in host memory in one pass.

Memory limits the update, not arithmetic: 28 bytes a parameter have to move (master and two moments read and written in
float32, the gradient read and the weight written in bf16). torch's own fused step wants the gradient in float32 and leaves the
rounding to another pass: 40 bytes. Here one loop in C does all; it is compiled at the start for the processor that it runs on,
in less than a second. Masters and moments lie in huge pages, because in pages of 4 KiB address translation costs a walk through
gigabytes half of the memory's speed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

_HUGE_PAGE = 2 << 20
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_COMPILER_TIMEOUT_S = 120
_NAMES = {
    (torch.bfloat16, torch.bfloat16): "step_bf16_bf16",
    (torch.float32, torch.bfloat16): "step_float_bf16",
    (torch.bfloat16, torch.float32): "step_bf16_float",
    (torch.float32, torch.float32): "step_float_float",
}
"""By the number formats of gradient and home."""

Step = Callable[..., None]
Steps = Mapping[tuple[torch.dtype, torch.dtype], Step]


class MasterUpdate(NamedTuple):
    """One parameter's part in an update."""

    master: nn.Parameter
    gradient: Tensor
    """In bf16 or float32."""
    home: Tensor
    """Where the new value is rounded to."""


def in_huge_pages(values: Tensor) -> Tensor:
    """A copy on the CPU that lies in huge pages where the system has them; small tensors are copied as usual."""
    num_bytes = values.numel() * values.element_size()
    if num_bytes < _HUGE_PAGE:
        return values.to("cpu", copy=True)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE)  # a shared one gets none on most systems
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=values.dtype).view(values.shape).copy_(values)


def takes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `update_masters` stands for the optimizer's own step: its class and settings, not those of a subclass."""
    settings = optimizer.defaults
    return type(optimizer) in (torch.optim.AdamW, torch.optim.Adam) and not (
        settings["amsgrad"] or settings["maximize"] or settings["foreach"] or settings["differentiable"]
    )


@torch.no_grad()
def update_masters(steps: Steps, optimizer: torch.optim.Optimizer, updates: Iterable[MasterUpdate], *, scale: float) -> None:
    """One step of torch's AdamW or Adam with gradients times `scale`; state and settings stay in the torch optimizer.

    Kingma and Ba, Adam, algorithm 1, with Loshchilov and Hutter's decoupled decay. `steps`: what `compiled_steps` gave.
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
        step = steps[gradient.dtype, home.dtype]
        _run(step, master.detach(), gradient, state["exp_avg"], state["exp_avg_sq"], home, factors)


def _run(step: Step, master: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, home: Tensor, factors: Tensor) -> None:
    tensors = (master, gradient, mean, square, home)
    assert all(tensor.is_contiguous() and tensor.numel() == master.numel() for tensor in tensors)
    step(master.numel(), torch.get_num_threads(), *(tensor.data_ptr() for tensor in tensors), factors.data_ptr())


@cache
def compiled_steps() -> Steps | None:
    """The loop by the number formats of gradient and home; None where there is no C compiler that builds it."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "host_adam.so")
        source = Path(__file__).with_name("host_adam.c")
        command = [*shlex.split(compiler), *_FLAGS, "-o", str(library), str(source), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_COMPILER_TIMEOUT_S)
            loaded = ctypes.CDLL(str(library))  # stays mapped when its file is gone
        except (OSError, subprocess.SubprocessError):
            return None
    steps = {}
    for (gradient, home), name in _NAMES.items():
        step = getattr(loaded, name)
        step.argtypes = [ctypes.c_int64, ctypes.c_int, *[ctypes.c_void_p] * 6]
        step.restype = None
        steps[gradient, home] = step
    return steps
