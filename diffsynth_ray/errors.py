"""The error tree, the exit codes, and how messages are cut. Standard library only: every module may import it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `dsray`; 100-103 describe how a run ended."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    CLUSTER = 3
    RUN_FAILED = 100
    NOT_FINISHED = 101
    NOT_FOUND = 102
    STOPPED = 103
    INTERRUPTED = 130


class DsrayError(Exception):
    """A problem that the user can understand and mend: shown as its message, without a traceback."""

    exit_code: ExitCode = ExitCode.USAGE

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[DsrayError], message: str, hint: str | None) -> DsrayError:
    # Errors cross process boundaries; keyword arguments are lost by the default pickling of exceptions.
    error = kind.__new__(kind)
    DsrayError.__init__(error, message, hint=hint)
    return error


@dataclass(frozen=True)
class Problem:
    """One problem of a job file."""

    key: str
    """Dotted key, or a file's name."""
    message: str
    """What was got, what is allowed, what to do."""

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class JobFileError(DsrayError):
    """All problems of one job file at once."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)]))
        self.source = source
        self.problems = problems

    def __reduce__(self) -> tuple[object, ...]:
        return (JobFileError, (self.source, self.problems))


class DataError(DsrayError):
    """Metadata or media that cannot be used."""


class ModelError(DsrayError):
    """Weights, components or LoRA targets that cannot be used."""


class OutputError(DsrayError):
    """An output path that cannot be used, or belongs to another run."""


class ClusterError(DsrayError):
    """The cluster does not answer, refuses us, or lacks the resources."""

    exit_code = ExitCode.CLUSTER


class HubError(DsrayError):
    """A model hub does not answer, or refuses us."""

    exit_code = ExitCode.CLUSTER


class RunError(DsrayError):
    """The run failed."""

    exit_code = ExitCode.RUN_FAILED


class SupersededError(RunError):
    """This attempt, or this group of its workers, may no longer write."""

    def __init__(self) -> None:
        super().__init__("a newer attempt of this run has taken over; this one writes nothing and ends")


class RunNotFoundError(DsrayError):
    """No such run."""

    exit_code = ExitCode.NOT_FOUND


_LOST_CONNECTION = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|socket timeout|gloo|nccl", re.IGNORECASE
)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error of a collective operation says no more than that another worker is gone."""
    return isinstance(error, RuntimeError) and bool(_LOST_CONNECTION.search(str(error)))


MOST_LISTED = 10
"""Of many problems, those that a message has."""


def listed(problems: Sequence[object], *, total: int | None = None) -> list[str]:
    """The first of many problems, a line each, and how many more there are; `total`: of all, where fewer are given."""
    shown = [str(problem) for problem in problems[:MOST_LISTED]]
    left = (len(problems) if total is None else total) - len(shown)
    return [*shown, f"... and {left} more"] if left > 0 else shown


def first_line(error: BaseException) -> str:
    """Of an error's text; the name of its class where it has none."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """As `first_line`: where an error's text begins with another process's traceback."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]
