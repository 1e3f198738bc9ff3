"""Where the processes of a run leave what the driver tells the user: lines of the log, bad samples,
and a failure that ends the run."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from diffsynth_ray.data.bad_samples import BadSample
from diffsynth_ray.errors import DsrayError


@dataclass(frozen=True)
class Failure:
    """An error that no restart mends."""

    rank: int | None
    error: DsrayError


@ray.remote(num_cpus=0, max_restarts=0)
class Board:
    """One actor a run, on the driver's node."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._failure: Failure | None = None
        self._bad: list[BadSample] = []

    def say(self, line: str) -> None:
        """Leave a line."""
        self._lines.append(line)

    def fail(self, rank: int | None, error: DsrayError) -> None:
        """Leave a failure; the first one counts, later ones follow from it."""
        self._failure = self._failure or Failure(rank, error)

    def note_bad(self, samples: list[BadSample]) -> None:
        """Leave samples that were replaced."""
        self._bad += samples

    def take(self) -> tuple[list[str], list[BadSample], Failure | None]:
        """The lines and the bad samples since the last call, and the failure if there is one."""
        (lines, self._lines), (bad, self._bad) = (self._lines, []), (self._bad, [])
        return lines, bad, self._failure
