"""Everything that a run's folder says about it, read once. Files that are not there yet are no error."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.errors import RunNotFoundError
from diffsynth_ray.run_dir import RunDir, ValidationEntry

Series = list[tuple[int, float]]
"""(step, value), ascending."""


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt, as attempts.jsonl has it."""

    number: int
    started: float
    """Seconds since the epoch."""
    num_workers: int = 0
    device: str = "?"
    ended: float | None = None
    state: str = "RUNNING"
    step: int | None = None
    cause: str | None = None
    losses: list[dict[str, Any]] = field(default_factory=list)
    """Workers lost: `step`, `cause`, `rank`, `is_preemption`."""

    def ended_by(self, loss: dict[str, Any]) -> bool:
        """Whether this loss was one too many; after any other the attempt went on."""
        is_last = self.state == "FAILED" and loss is self.losses[-1]
        return is_last and str(loss.get("cause")) in (self.cause or "")

    @property
    def num_recoveries(self) -> int:
        """Losses that it went on after."""
        return sum(not self.ended_by(loss) for loss in self.losses)


@dataclass(frozen=True)
class RunRecord:
    """A run, ready to be shown."""

    resolved: ResolvedJob
    figures: dict[str, Series]
    """loss.csv by key."""
    validations: list[ValidationEntry]
    attempts: list[AttemptRecord]
    error: dict[str, Any] | None
    environment: dict[str, Any]
    contact_sheet: bytes | None
    clips: dict[str, bytes]
    """The newest samples that are clips, by prompt."""
    exports: list[tuple[str, int]]
    """Name and size in bytes."""
    num_steps: int | None

    @property
    def state(self) -> str:
        """Of the newest attempt."""
        return self.attempts[-1].state if self.attempts else "PENDING"

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as the files say."""
        known = [series[-1][0] for series in self.figures.values() if series]
        return max([*known, *(attempt.step or 0 for attempt in self.attempts)], default=0)

    @property
    def best_validation(self) -> ValidationEntry | None:
        """The lowest validation loss."""
        usable = [entry for entry in self.validations if math.isfinite(entry.loss)]
        return min(usable, key=lambda entry: entry.loss, default=None)

    @property
    def seconds(self) -> float:
        """Time of all attempts; of one that has no end, up to what is known of it."""
        return sum(attempt.ended - attempt.started for attempt in self.attempts if attempt.ended is not None)


_MOST_CLIP_BYTES = 8 << 20


def read_record(run_dir: RunDir) -> RunRecord:
    """Read a run's folder. Raises RunNotFoundError where there is no run."""
    resolved = run_dir.owner()
    if resolved is None:
        raise RunNotFoundError(f"{run_dir.path} is not the folder of a run: it has no job.json")
    steps = run_dir.sample_steps()
    progress = run_dir.progress()
    return RunRecord(
        resolved=resolved,
        figures=_read_figures(run_dir.loss_path),
        validations=run_dir.validations(),
        attempts=_read_attempts(run_dir),
        error=_read_json(run_dir.error_path),
        environment=_read_json(run_dir.environment_path) or {},
        contact_sheet=run_dir.contact_sheet_path.read_bytes() if run_dir.contact_sheet_path.exists() else None,
        clips=_read_clips(run_dir, steps[-1], resolved.job.validation.prompts) if steps else {},
        exports=[(str(path.relative_to(run_dir.path)), path.stat().st_size) for path in _exports(run_dir)],
        num_steps=progress.num_steps if progress is not None else None,
    )


def _read_figures(path: Path) -> dict[str, Series]:
    figures: dict[str, Series] = {}
    try:
        with path.open(newline="", errors="replace") as file:
            for row in csv.DictReader(file):
                try:
                    figures.setdefault(row["key"], []).append((int(row["step"]), float(row["value"])))
                except (TypeError, ValueError, KeyError):
                    continue  # a row that a crash has cut
    except FileNotFoundError:
        return {}
    return figures


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _read_attempts(run_dir: RunDir) -> list[AttemptRecord]:
    found: dict[int, dict[str, Any]] = {}
    for entry in run_dir.attempts():
        one = found.setdefault(entry["attempt"], {"number": entry["attempt"], "started": entry["time"], "losses": []})
        if entry["event"] == "started":
            one |= {"started": entry["time"], "num_workers": entry["num_workers"], "device": entry["device"]}
        elif entry["event"] == "ended":
            one |= {"ended": entry["time"], "state": entry["state"], "step": entry["step"], "cause": entry.get("cause")}
        elif entry["event"] == "workers lost":
            one["losses"].append(entry)
    newest = max(found, default=0)
    records = []
    for number, values in sorted(found.items()):
        unknown: dict[str, Any] = {} if number == newest or "state" in values else {"state": "ENDED WITHOUT A WORD"}
        records.append(AttemptRecord(**(unknown | values)))
    return records


def _read_clips(run_dir: RunDir, step: int, prompts: list[str]) -> dict[str, bytes]:
    clips = {}
    left = _MOST_CLIP_BYTES
    for number, prompt in enumerate(prompts):
        path = run_dir.find_sample(step, number)
        if path is not None and path.suffix == ".mp4" and path.stat().st_size <= left:
            clips[prompt] = path.read_bytes()
            left -= len(clips[prompt])
    return clips


def _exports(run_dir: RunDir) -> list[Path]:
    found = [path for path in run_dir.path.glob("**/*.safetensors") if not path.name.startswith(".")]
    inner = ("checkpoints", "previous", ".ray")
    own = [path for path in found if path.relative_to(run_dir.path).parts[0] not in inner]
    return sorted(own, key=lambda path: (path.stat().st_mtime, path.name))
