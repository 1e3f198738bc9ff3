"""What ended a worker, in one line, and which of several workers was the first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from diffsynth_ray.errors import DsrayError, is_lost_connection, last_line

_DIED, _RAISED, _FOLLOWED = 0, 1, 2
"""How likely a failure is the root: a process that died, an error of its own, a lost connection to another worker."""


@dataclass(frozen=True)
class WorkerPlace:
    """Where a worker is."""

    rank: int
    node: str
    """Address of its node."""
    pid: int
    log: str
    """File of its output, on its node; empty before it has said so."""

    def __str__(self) -> str:
        where = [f"pid {self.pid} on {self.node}"] if self.pid else []
        where += [f"log {self.log}"] if self.log else []
        return f"rank {self.rank}" + (f" ({', '.join(where)})" if where else "")


def pick_root(failures: Mapping[int, tuple[str, int]]) -> tuple[int, str]:
    """Rank and cause of the failure that the others followed from."""
    rank = min(failures, key=lambda rank: (failures[rank][1], rank))
    return rank, failures[rank][0]


def describe(error: BaseException) -> tuple[str, int]:
    """One line about a worker's error, and how likely it is the root (smaller is likelier)."""
    inner = getattr(error, "health_check_failure", None)  # Ray Train's wrapper around a death that it noticed
    if inner is not None:
        return _describe_death(str(inner)), _DIED
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):  # Ray's wrapper around an error of another process
        error = cause
    if isinstance(error, DsrayError):
        return with_hint(error), _RAISED
    return f"{type(error).__name__}: {last_line(error)}", _FOLLOWED if is_lost_connection(error) else _RAISED


def _describe_death(text: str) -> str:
    if "node" in text and re.search(r"node (has )?died|node was terminated|dead node|node is dead|node failure", text):
        return "its node died"
    if "SIGTERM" in text or "exit code 143" in text:
        return "its process died: SIGTERM"
    if "memory monitor" in text or ("OOM" in text and "killed due to" in text):
        return f"its process was killed because its node's memory was full: {_first_line(text)}"
    detail = re.search(r"exit detail: (.*?)(?:\. There are|\. Some|$)", text, re.DOTALL)
    return f"its process died ({(detail[1] if detail else _first_line(text)).strip()}); SIGKILL is usual where memory is full"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def with_hint(error: DsrayError) -> str:
    """An error and what to do about it."""
    return f"{error.message}\n  {error.hint}" if error.hint else error.message
