"""What a run was computed with: versions and machine, for its report."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import psutil
import torch

_PACKAGES = ("torch", "ray", "diffusers", "transformers", "peft", "deepspeed", "numpy")


def describe_environment(device: torch.device, *, world_size: int) -> dict[str, Any]:
    """Of the worker that this is; no names of machines and users."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "device": where,
        "workers": world_size,
        "CPUs of the node of rank 0": os.cpu_count(),
        "memory of that node": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        **({"CUDA": torch.version.cuda} if device.type == "cuda" else {}),
        **versions,
    }
