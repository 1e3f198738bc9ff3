"""`dsray stop`."""

from __future__ import annotations

from typing import Annotated

import typer

from diffsynth_ray.cli import render
from diffsynth_ray.cli.options import Json, Run
from diffsynth_ray.errors import ExitCode


def stop(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="End it and wait, instead of asking it to.")] = False,
    as_json: Json = False,
) -> int:
    """Stop a run after its running step.

    It writes a checkpoint; submitting the job again continues it.
    """
    from diffsynth_ray.launch import runs

    submission = runs.find_run(run)
    end = runs.stop(submission, now=now, say=render.say)
    state = end.state if end else "STOPPING"
    if as_json:
        render.result_json({"run": submission.run, "state": state})
    elif end is None:
        render.result(f"{submission.run} was asked to stop; it writes a checkpoint and ends after the running step")
        render.say(f"see it end: dsray logs -f {submission.run}")
    else:
        render.result(f"{submission.run} {state}")
    return ExitCode.DONE
