"""Estimates of memory and time for `plan --estimate` and `submit`: torch is imported only once one is made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth_ray.cli import render
from diffsynth_ray.errors import DsrayError

if TYPE_CHECKING:
    from diffsynth_ray.config.resolve import ResolvedJob, Resources
    from diffsynth_ray.memory.devices import Device
    from diffsynth_ray.train.estimate import Estimate


_CPUS_PER_GPU = 8.0
"""Of a machine that is only imagined."""


def device_of(name: str | None) -> Device | None:
    """The GPU of a name ("h100", "8xh100"), or this machine's; None where there is none. Raises DsrayError for others."""
    from diffsynth_ray.memory.devices import DEVICES, find_device, local_device

    if name is None:
        return local_device()
    count, kind = _split(name)
    found = find_device(kind)
    if found is None or count == 0:
        raise DsrayError(
            f"--gpu: got {name!r}; known are {', '.join(DEVICES)}", hint="several of one machine are written 8xh100"
        )
    return found


def imagined(name: str | None) -> Resources | None:
    """The machine of a name that says how many GPUs it has ("8xh100"); None: this one is meant."""
    from diffsynth_ray.config.resolve import Resources

    count = _split(name)[0] if name is not None else None
    return None if count is None else Resources(cpus=_CPUS_PER_GPU * count, gpus=count)


def _split(name: str) -> tuple[int | None, str]:
    """(number, name) of "8xh100"."""
    found = re.fullmatch(r"(\d+)\s*[xX*]\s*(.+)", name)
    return (int(found[1]), found[2]) if found else (None, name)


def estimate(resolved: ResolvedJob, device: Device | None, *, is_remote: bool = False) -> Estimate:
    """The estimate of one worker, on this machine's CPU."""
    render.say("estimating memory and time: a block of the model is traced, without its weights ...")
    from diffsynth_ray.train.fit import estimate_job

    return estimate_job(resolved, device=device, is_remote=is_remote, say=render.say)


def check_host(resolved: ResolvedJob, found: Estimate) -> None:
    """Refuse what this machine's memory cannot hold, where the job runs on this machine's GPUs."""
    if resolved.device != "cuda":
        return
    from diffsynth_ray.train import fit

    fit.check_host(resolved.job, found, host_bytes=_host_bytes())


def _host_bytes() -> int:
    """Memory of this machine, or of the container that we are in."""
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def warn_before_submit(resolved: ResolvedJob, accelerators: list[str], *, is_remote: bool) -> None:
    """Say so where the job cannot fit the GPUs that are there; raises where the weights alone exceed their memory."""
    from diffsynth_ray.memory.devices import find_device, local_device

    if resolved.device != "cuda" or resolved.job.model.tiny:
        return
    known = [device for name in accelerators if (device := find_device(name))]
    # Of several kinds the largest: the job may run there.
    device = max(known, key=lambda each: each.memory_bytes) if known else (None if is_remote else local_device())
    if device is None:
        return
    from diffsynth_ray.train.fit import cannot_fit, warning

    try:
        found = estimate(resolved, device, is_remote=is_remote)
    except DsrayError as problem:
        render.say(f"whether the job fits {device.name} is not known: {problem.message}")
        return
    text = warning(found)
    if text is not None and cannot_fit(found):
        raise DsrayError(text, hint="--no-estimate submits it all the same")
    if text is not None:
        render.say(text)
    if not is_remote:
        check_host(resolved, found)
