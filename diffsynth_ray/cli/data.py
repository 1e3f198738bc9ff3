"""`dsray data check`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from diffsynth_ray.cli import render, starting
from diffsynth_ray.cli.options import JobFile, Json, Overrides
from diffsynth_ray.errors import ClusterError, DsrayError

if TYPE_CHECKING:
    from diffsynth_ray.config.resolve import ResolvedJob
    from diffsynth_ray.launch.client import Cluster
    from diffsynth_ray.launch.data_check import CheckReport

app = typer.Typer(help="Look at a job's data.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Look at a job's data."""


@app.command("check")
def check(
    job_file: JobFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Dashboard of a cluster; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, here."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Decode every file of a job's data, in parallel, and say which cannot be used.

    Exit code 0 where a run of the job would not be ended by its data, else 2.
    """
    from diffsynth_ray.config.resolve import local_resources, resolve
    from diffsynth_ray.launch import client
    from diffsynth_ray.launch.data_check import check_locally

    job = starting.load_jobs([job_file], overrides)[0]
    named = client.named_address(address)
    if named is None:
        report = check_locally(resolve(job, local_resources(), source=job_file), say=render.say)
    else:
        cluster = client.connect(named)
        resolved = resolve(job, client.cluster_resources(cluster), source=job_file, remote=True)
        report = _check_on(cluster, resolved)
    if as_json:
        render.result_json(report.as_dict())
    else:
        for line in report.lines():
            render.result(line)
    return report.exit_code


def _check_on(cluster: Cluster, resolved: ResolvedJob) -> CheckReport:
    from diffsynth_ray.launch import client, follow
    from diffsynth_ray.launch.data_check import parse_report

    submission_id = f"{resolved.run}-check-{time.time_ns() // 1_000_000:x}"
    client.submit_entrypoint(
        cluster,
        submission_id=submission_id,
        command=client.entrypoint_of("data_check"),
        job_json=resolved.model_dump_json(indent=2),
        metadata={"job": resolved.job.name},
    )
    render.say(f"submitted {submission_id} to {cluster.url}")
    found: list[CheckReport] = []
    failures: list[DsrayError] = []

    def on_line(line: str) -> None:
        try:
            report = parse_report(line)
        except DsrayError as error:
            failures.append(error)
            return
        if report is None:
            render.say(line)
        else:
            found.append(report)

    try:
        end = follow.follow(cluster, submission_id, on_line, say=render.say)
    except KeyboardInterrupt:
        client.request_end(cluster, submission_id)
        raise
    if failures:
        raise failures[0]
    if not found:
        raise ClusterError(f"the check {submission_id} ended without a report ({end.state}): {end.message or 'see its log'}")
    return found[0]
