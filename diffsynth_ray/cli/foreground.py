"""`dsray run`: the same stages in this process, without a job server."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from diffsynth_ray.cli import render, starting
from diffsynth_ray.cli.options import JobFile, Json, New, Overrides
from diffsynth_ray.errors import DsrayError

if TYPE_CHECKING:
    from diffsynth_ray.run_dir import RunDir


def run(job_file: JobFile, overrides: Overrides = None, new: New = False, as_json: Json = False) -> int:
    """Train in the foreground, without a job server.

    Ctrl-C stops after the running step, with a checkpoint, as do SIGTERM and the end of the terminal; a Ctrl-C after that
    ends at once.
    """
    from diffsynth_ray.config.resolve import local_resources, resolve
    from diffsynth_ray.launch import client, registry, runs
    from diffsynth_ray.models import page_cache
    from diffsynth_ray.run_dir import RunDir

    job = starting.load_jobs([job_file], overrides)[0]
    resolved = resolve(job, local_resources(), source=job_file)
    plan = starting.show_plan(resolved, remote=False)
    local = client.connect_local()
    if local is not None and client.active_job(local, resolved.run):
        raise DsrayError(f"{resolved.run} is running as a job", hint=f"`dsray logs -f {resolved.run}` follows it")
    moved = runs.claim_output(resolved, local, new=new)
    if moved is not None:
        render.say(f"moved the old content to {moved}")
    elif finished := starting.finished_outcome(resolved, plan):
        return starting.report([finished], as_json=as_json)
    RunDir(resolved.output_path).check_writable()  # before Ray starts, which takes seconds
    submission = registry.Submission(
        run=resolved.run,
        output=str(resolved.output_path),
        job_file=starting.job_path(job_file),
        address=None,
        submission_id="",
        pid=os.getpid(),
        host=socket.gethostname(),
    )
    registry.note(submission)
    page_cache.read_ahead(resolved.job.model)
    from diffsynth_ray.launch.driver import run_locally

    with render.LogView() as log, _two_interrupts(RunDir(resolved.output_path)) as asked:
        code = run_locally(resolved, say=log.line, asked=asked)
    view = runs.view(submission)
    if view.exit_code != code:  # this process has not begun an attempt, or another has taken over
        view = replace(view, state="FAILED")
    outcome = starting.outcome_of(view)
    starting.report([outcome], as_json=as_json)
    return code


@contextmanager
def _two_interrupts(run_dir: RunDir) -> Iterator[list[str]]:
    """Ctrl-C asks the run to stop, and interrupts where that was asked already; yields the list that holds the reason."""
    asked: list[str] = []

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append("Ctrl-C")
        render.say("\nstopping after the running step, with a checkpoint; Ctrl-C again ends at once")
        if run_dir.path.is_dir():
            run_dir.request_stop(reason=asked[0])

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
