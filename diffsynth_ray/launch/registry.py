"""What this machine remembers between two commands: the state directory, and which run was submitted where.

`runs.jsonl` is a convenience, never the truth about a run: that is in the run's output directory and on the cluster.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from diffsynth_ray.errors import OutputError
from diffsynth_ray.run_dir import append_line, read_jsonl

_MAX_BYTES = 1 << 20
_CLOCK_S = 5.0
"""What the clock may be set by while a run goes on."""


def state_dir() -> Path:
    """Folder of local state, mode 0700; made where it is missing. Raises OutputError where that cannot be."""
    named = os.environ.get("DSRAY_STATE_DIR")
    if named:
        path = Path(named)
    else:
        base = os.environ.get("XDG_STATE_HOME")
        try:
            path = (Path(base) if base else Path.home() / ".local" / "state") / "dsray"
        except RuntimeError as error:  # a user without HOME and without an entry in passwd, as in containers
            raise _no_state("this user has no home folder") from error
    path = path.absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _no_state(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _no_state(cause: str) -> OutputError:
    message = f"no place for what dsray remembers of its runs: {cause}"
    return OutputError(message, hint="set DSRAY_STATE_DIR to a folder of your own that can be written")


@dataclass(frozen=True)
class Submission:
    """One line of runs.jsonl: a run that was started from here."""

    run: str
    output: str
    """Output path, as the nodes see it."""
    job_file: str
    """Absolute path of the job file."""
    address: str | None
    """Address of a named cluster; None: the local Ray, or in the foreground."""
    submission_id: str
    """Empty for a run in the foreground (`dsray run`)."""
    pid: int | None = None
    """Process of a run in the foreground."""
    host: str = ""
    """Machine of that process: the state directory may be shared between several."""
    time: float = field(default_factory=time.time)

    @property
    def is_elsewhere(self) -> bool:
        """Whether its process is one of another machine."""
        return self.pid is not None and self.host not in ("", socket.gethostname())

    def process(self) -> psutil.Process | None:
        """The process of a run in the foreground, where it is one of this machine and still lives."""
        if self.pid is None or self.is_elsewhere:
            return None
        try:
            process = psutil.Process(self.pid)
            # A process that has begun after the run was noted has got the number of one that is gone.
            is_same = process.create_time() <= self.time + _CLOCK_S
            return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def note(submission: Submission) -> None:
    """Append to runs.jsonl; its older half goes when it is large."""
    path = state_dir() / "runs.jsonl"
    if path.exists() and path.stat().st_size > _MAX_BYTES:
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[len(lines) // 2 :]) + "\n")
    append_line(path, json.dumps(asdict(submission)))


def submissions() -> list[Submission]:
    """All remembered submissions, oldest first; lines of other versions or cut by a crash are left out."""
    found = []
    for entry in read_jsonl(state_dir() / "runs.jsonl"):
        with suppress(TypeError):
            found.append(Submission(**entry))
    return found


def newest_by_output() -> list[Submission]:
    """The newest submission of each run and output path, newest first."""
    newest: dict[tuple[str, str], Submission] = {}
    for submission in submissions():
        newest.pop((submission.run, submission.output), None)
        newest[submission.run, submission.output] = submission
    return list(reversed(newest.values()))


def match(reference: str) -> Submission | None:
    """The newest submission whose run, submission id, job name, job file or output path is `reference`."""
    path = os.path.abspath(os.path.expanduser(reference))
    for submission in reversed(submissions()):
        names = {submission.run, submission.submission_id, re.sub(r"-[0-9a-f]{8}$", "", submission.run)}
        if reference in names or path in (submission.job_file, submission.output):
            return submission
    return None
