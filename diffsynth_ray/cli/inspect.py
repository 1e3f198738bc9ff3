"""`dsray plan`, `status`, `logs`, `list`: commands that change nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsynth_ray.cli import estimating, render
from diffsynth_ray.cli.options import JobFile, Json, Overrides, Run
from diffsynth_ray.errors import ClusterError, ExitCode, OutputError, RunNotFoundError

if TYPE_CHECKING:
    from diffsynth_ray.launch.registry import Submission
    from diffsynth_ray.launch.runs import RunView

_POLL_S = 0.5


def plan(
    job_file: JobFile,
    overrides: Overrides = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Estimate memory and step time of a worker; seconds, needs no GPU.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What to estimate for (4090, h100, 8xh100, ...); else this machine's GPUs."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Show what a job would run, without running it."""
    from diffsynth_ray.config.load import load_job
    from diffsynth_ray.config.resolve import local_resources, resolve
    from diffsynth_ray.plan import build_plan

    wants_estimate = estimate or gpu is not None
    device = estimating.device_of(gpu) if wants_estimate else None
    imagined = estimating.imagined(gpu)
    resolved = resolve(load_job(job_file, overrides), imagined or local_resources(), source=job_file)
    built = build_plan(resolved)
    found = estimating.estimate(resolved, device) if wants_estimate else None
    if as_json:
        render.result_json(built.as_dict() | ({"estimate": found.as_dict()} if found else {}))
    else:
        render.plan(built.lines() + (found.lines() if found else []), render.result)
    if found is not None and imagined is None:
        estimating.check_host(resolved, found)
    return ExitCode.DONE


def status(run: Run, as_json: Json = False) -> int:
    """Show how a run stands.

    The exit code says it too: 0 done, 100 failed, 101 not finished, 102 not found, 103 stopped.
    """
    from diffsynth_ray.launch import runs

    view = runs.view(runs.find_run(run))
    if as_json:
        render.result_json(view.as_dict() | {"exit_code": int(view.exit_code)})
    else:
        render.status(view)
    return view.exit_code


def list_runs(as_json: Json = False) -> int:
    """List the runs that were started from here."""
    from diffsynth_ray.launch import client, registry, runs

    local = client.connect_local()
    views = []
    for submission in registry.newest_by_output():
        is_local = submission.address is None and submission.pid is None
        try:
            views.append(runs.view(submission, cluster=local if is_local else None))
        except OutputError as error:  # one folder of another version must not hide the other runs
            views.append(runs.RunView(submission.run, "UNKNOWN", submission.output, note=error.message))
    if as_json:
        render.result_json({"runs": [view.as_dict() for view in views]})
    elif views:
        render.run_list(views)
    else:
        render.say("no runs yet; start one with `dsray submit JOB.toml`")
    return ExitCode.DONE


def logs(run: Run, follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run ends.")] = False) -> int:
    """Show a run's log.

    With -f the exit code is that of the run.
    """
    from diffsynth_ray.launch import client, runs

    submission = runs.find_run(run)
    cluster, note = runs.cluster_of(submission)
    view = runs.view(submission, cluster=cluster)
    run_dir = runs.run_dir_of(submission)
    path = run_dir.path / "log.txt" if run_dir else None
    if follow and view.state in client.ACTIVE:
        return _follow(submission, view, path)
    if path is not None and path.exists():
        for line in path.read_text(errors="replace").splitlines():
            render.result(line)
    elif cluster is not None and view.submission_id:
        render.result(str(cluster.request(f"/api/jobs/{view.submission_id}/logs")["logs"]).rstrip("\n"))
    else:
        raise RunNotFoundError(f"no log of {view.run}: {note or 'it has not written any, and its cluster is gone'}")
    return view.exit_code if follow else ExitCode.DONE


def _follow(submission: Submission, view: RunView, path: Path | None) -> int:
    from diffsynth_ray.launch import client, follow, runs

    cluster, note = runs.cluster_of(submission)
    if cluster is not None and view.submission_id:
        try:
            follow.follow(cluster, view.submission_id, render.result, say=render.say)
        except ClusterError as error:
            render.say(error.message)
        return runs.view(submission).exit_code
    if path is None or not path.exists():
        raise ClusterError(f"{view.run} cannot be followed from here: {note or 'it has no log yet'}")
    with path.open(errors="replace") as file:
        rest = ""
        while True:
            # The state first: what was written before the end is read after it.
            view = runs.view(submission)
            *lines, rest = (rest + file.read()).split("\n")
            for line in lines:
                render.result(line)
            if view.state not in client.ACTIVE:
                return view.exit_code
            time.sleep(_POLL_S)
