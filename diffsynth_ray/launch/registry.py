"""What this machine remembers between two commands: the state directory, and which run was submitted where.

`runs.jsonl` is a convenience, never the truth about a run: that is in the run's output directory and on the cluster.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from diffsynth_ray.run_dir import append_line

_MAX_BYTES = 1 << 20


def state_dir() -> Path:
    """Folder of local state, mode 0700; made where it is missing."""
    named = os.environ.get("DSRAY_STATE_DIR")
    if named:
        path = Path(named)
    else:
        base = os.environ.get("XDG_STATE_HOME")
        path = (Path(base) if base else Path.home() / ".local" / "state") / "dsray"
    path = path.absolute()
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


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
    time: float = field(default_factory=time.time)


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
    try:
        lines = (state_dir() / "runs.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            found.append(Submission(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
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
