"""What a run's own figures say about it: the course of the loss, its last checkpoint, and what its steps wait for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from diffsynth_ray.run_dir import RunDir

_TAIL_BYTES = 4 << 20
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_POINTS = 40
_RECENT = 20
"""Logged steps whose times are looked at."""
_NOTABLE = 0.1
"""Share of a step from which on waiting for something is worth a word."""

_PARTS = {
    "data_wait_s": (
        "data",
        "reading and decoding: more CPUs (dataset.num_workers, CPU nodes), smaller files, or split training",
    ),
    "encode_s": ("the encoders", "split training encodes each sample once (split.enabled)"),
    "transfer_s": ("transfer to the GPU", "less offload (offload.vram_budget_gib), or FP8 (model.fp8_models)"),
    "communication_s": (
        "communication",
        "look for a worker that the others wait for (data waits by rank); else a faster network, fewer nodes, or more samples "
        "a step (gradient.accumulation_steps)",
    ),
}
"""Figure -> what a step waits for, and what helps. What is left of a step is the model's computation."""


@dataclass(frozen=True)
class Diagnosis:
    """The figures of a run in short."""

    losses: list[float] = field(default_factory=list)
    """Course of the loss, means of equal stretches, oldest first."""
    bottleneck: str | None = None
    """One sentence; None before the first figures."""
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None
    """Seconds since 1970."""


def diagnose(run_dir: RunDir) -> Diagnosis:
    """Read what the run has written so far."""
    series = _read_series(run_dir.loss_path)
    step, when = _last_checkpoint(run_dir.checkpoints_dir)
    return Diagnosis(
        losses=_means([*series.get("loss", {}).values()], _CURVE_POINTS),
        bottleneck=find_bottleneck(_recent_times(series)),
        checkpoint_step=step,
        checkpoint_time=when,
    )


def find_bottleneck(figures: Mapping[str, float]) -> str | None:
    """One plain sentence on what most of a step is spent on, from measured seconds; None without them."""
    step_s = figures.get("step_s", 0.0)
    if not step_s > 0:
        return None
    shares = {key: figures[key] / step_s for key in _PARTS if key in figures}
    if not shares:
        return None
    worst = max(shares, key=lambda key: shares[key])
    name, cure = _PARTS[worst]
    if shares[worst] < _NOTABLE:
        # Without other workers, or with all of it hidden behind the computation, there is nothing to tell.
        told = {key: share for key, share in shares.items() if share > 0 or key == "data_wait_s"}
        measured = ", ".join(f"{_PARTS[key][0]} {share:.0%}" for key, share in told.items())
        return f"the model's computation takes {1 - sum(shares.values()):.0%} of a step ({measured}): nothing holds it up"
    rest = "the bottleneck is" if shares[worst] >= max(1 - sum(shares.values()), 0.0) else "some time is lost on"
    return f"{rest} {name}: {shares[worst]:.0%} of a step ({figures[worst]:.2f} of {step_s:.2f} s); {cure}"


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of bars, lowest to highest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    span = high - low
    bars = []
    for value in values:
        level = 0.0 if span == 0 else (value - low) / span if math.isfinite(value) else 1.0
        bars.append(_BARS[min(int(level * len(_BARS)), len(_BARS) - 1)])
    return "".join(bars)


def _recent_times(series: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Means over the last logged steps of the seconds of a step and of its parts; a part that a step lacks took none of it."""
    steps = [*series.get("step_s", {})][-_RECENT:]
    found = {key: [series.get(key, {}).get(step) for step in steps] for key in ("step_s", *_PARTS)}
    return {
        key: sum(value or 0.0 for value in values) / len(steps)
        for key, values in found.items()
        if any(value is not None for value in values)
    }


def _read_series(path: Path) -> dict[str, dict[int, float]]:
    """Figure -> its values by step, in their order, from the end of loss.csv (step,key,value)."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            start = max(0, file.tell() - _TAIL_BYTES)
            file.seek(start)
            lines = file.read().decode(errors="replace").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    series: dict[str, dict[int, float]] = {}
    # The first line is the header or half a line; what follows the last line end is still being written.
    for line in lines[1:-1]:
        parts = line.split(",")
        if len(parts) == 3:
            try:
                series.setdefault(parts[1], {})[int(parts[0])] = float(parts[2])
            except ValueError:
                continue
    return series


def _means(values: Sequence[float], count: int) -> list[float]:
    """At most `count` means of stretches of nearly equal length."""
    number = min(count, len(values))
    edges = [len(values) * index // number for index in range(number + 1)] if number else []
    return [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges)]


def _last_checkpoint(folder: Path) -> tuple[int | None, float | None]:
    """Step and time of the newest whole checkpoint: its manifest is written last."""
    found = []
    for manifest in folder.glob("step-*/manifest.json"):
        number = manifest.parent.name.removeprefix("step-")
        if number.isdigit():
            found.append((int(number), manifest.stat().st_mtime))
    return max(found, default=(None, None))
