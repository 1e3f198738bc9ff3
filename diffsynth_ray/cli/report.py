"""`dsray report`: a run on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffsynth_ray.cli import render
from diffsynth_ray.cli.options import Json, Run, writing_output
from diffsynth_ray.errors import ExitCode, RunNotFoundError


def report(
    run: Run,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page; default: report.html in the run's folder.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Write a run's curves, samples, recoveries, job and environment to one HTML page.

    The page needs no network and no other file. A run that still goes on, or failed, has one too.
    """
    from diffsynth_ray.launch import runs
    from diffsynth_ray.report.page import build_page
    from diffsynth_ray.report.record import read_record
    from diffsynth_ray.run_dir import write_whole

    submission = runs.find_run(run)
    run_dir = runs.run_dir_of(submission)
    if run_dir is None:
        raise RunNotFoundError(
            f"the folder of {submission.run} ({submission.output or 'unknown'}) is not visible here, or another run has it now",
            hint="run this where the output path can be seen",
        )
    record = read_record(run_dir)
    path = output or run_dir.path / "report.html"
    with writing_output(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, build_page(record))
    if as_json:
        render.result_json({"path": str(path), "run": record.resolved.run, "state": record.state, "step": record.step})
    else:
        render.result(str(path))
        render.say(f"open it in a browser: file://{path.resolve()}")
    return ExitCode.DONE
