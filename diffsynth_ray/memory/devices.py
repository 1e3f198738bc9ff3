"""What GPUs can do, for estimates: memory, and the speeds that training kernels reach there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_GIB = 2**30


FP8_INSTRUCTIONS = (8, 9)
"""Compute capability from which compiled code may contain float8 conversions."""


@dataclass(frozen=True)
class Device:
    """One kind of GPU. Speeds are those that kernels reach, not those of the data sheet."""

    name: str
    memory_bytes: int
    """That torch can see."""
    product_flops: float
    """bf16 matrix products, a second."""
    attention_flops: tuple[float, float]
    """Of attention forward and backward, a second."""
    traffic_bytes: float
    """Device memory that the remaining kernels read and write, a second."""
    link_bytes: float
    """From pinned host memory, a second."""
    capability: tuple[int, int]
    """Of CUDA."""
    is_measured: bool = False
    kernel_s: float = 4e-6
    """A kernel's beginning and end."""


def _scaled(name: str, *, gib: float, tflops: float, tb_s: float, link_gb_s: float, capability: tuple[int, int]) -> Device:
    """A device from its data sheet: dense bf16 TFLOP/s and memory TB/s, of which kernels reach what they do on an H100."""
    products = tflops / _H100_TFLOPS
    return Device(
        name,
        int(gib * _GIB),
        product_flops=H100.product_flops * products,
        attention_flops=(H100.attention_flops[0] * products, H100.attention_flops[1] * products),
        traffic_bytes=H100.traffic_bytes * tb_s / _H100_TB_S,
        link_bytes=link_gb_s * 1e9,
        capability=capability,
    )


_H100_TFLOPS, _H100_TB_S = 989.0, 3.35
H100 = Device(
    "h100",
    int(79.1 * _GIB),
    product_flops=800e12,
    attention_flops=(590e12, 520e12),
    traffic_bytes=1.6e12,
    link_bytes=53e9,
    capability=(9, 0),
    is_measured=True,
)
"""Measured on an H100 80GB SXM (tests/bench/results/memory_table.json and the kernels of one step): matrix products, cuDNN's
attention, copies. `traffic_bytes` is what makes the sum over a step's kernels agree with its time."""
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        H100,
        _scaled("h200", gib=139.8, tflops=989, tb_s=4.8, link_gb_s=53, capability=(9, 0)),
        _scaled("b200", gib=178, tflops=2250, tb_s=8.0, link_gb_s=53, capability=(10, 0)),
        _scaled("a100", gib=79.1, tflops=312, tb_s=2.04, link_gb_s=24, capability=(8, 0)),
        _scaled("a100-40", gib=39.4, tflops=312, tb_s=1.56, link_gb_s=24, capability=(8, 0)),
        _scaled("l40s", gib=44.4, tflops=362, tb_s=0.864, link_gb_s=24, capability=(8, 9)),
        _scaled("5090", gib=31.4, tflops=209, tb_s=1.79, link_gb_s=50, capability=(12, 0)),
        _scaled("4090", gib=23.5, tflops=165, tb_s=1.01, link_gb_s=24, capability=(8, 9)),
        _scaled("3090", gib=23.6, tflops=71, tb_s=0.936, link_gb_s=24, capability=(8, 6)),
    )
}
"""By the name that `--gpu` takes."""
_MARKS = {
    "h100": ("H100",), "h200": ("H200", "GH200"), "b200": ("B200",),
    "a100-40": ("A100-40G", "A100-SXM4-40GB", "A100-PCIE-40GB"),
    "a100": ("A100",), "l40s": ("L40S",), "5090": ("5090",), "4090": ("4090",), "3090": ("3090",),
}  # fmt: skip
"""Parts of the names that drivers and Ray (accelerator types) give them; the first match counts."""


def local_device() -> Device | None:
    """The GPU of this machine, as the driver names it; needs no torch."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE)
        if model and (found := find_device(model[1])):
            return found
    return None


def find_device(name: str) -> Device | None:
    """The device of a name that a driver, Ray or `--gpu` gives; None where it is not known."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    upper = name.upper()
    return next((DEVICES[key] for key, marks in _MARKS.items() if any(mark in upper for mark in marks)), None)
