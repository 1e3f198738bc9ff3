"""`dsray doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsynth_ray.cli import render
from diffsynth_ray.cli.options import Json, Overrides
from diffsynth_ray.errors import ClusterError, ExitCode, JobFileError

if TYPE_CHECKING:
    from diffsynth_ray.config.resolve import ResolvedJob, Resources
    from diffsynth_ray.launch.node_checks import Finding, State

_ORDER = ("failed", "warning", "ok", "skipped")
"""A check is as bad as its worst finding."""


def doctor(
    job_file: Annotated[
        str | None, typer.Argument(metavar="[JOB.toml]", help="A job file or recipe, whose needs are checked too.")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Dashboard of a cluster; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, local."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Check this machine, the cluster and all its nodes, and say how to cure what is wrong.

    Exit code: 0 where nothing failed (warnings are allowed), 1 where something did, 3 where no cluster answers.
    """
    findings, code = _examine(job_file, overrides, address)
    checks = _by_check(findings)
    if code == ExitCode.DONE and any(check["state"] == "failed" for check in checks):
        code = ExitCode.UNEXPECTED
    if as_json:
        render.result_json({"checks": checks, "exit_code": int(code)})
    else:
        render.doctor(checks)
    return code


def _examine(job_file: str | None, overrides: list[str] | None, address: str | None) -> tuple[list[Finding], ExitCode]:
    from diffsynth_ray.config.resolve import local_resources
    from diffsynth_ray.launch import client
    from diffsynth_ray.launch.doctor import build_request, check_authentication, follow_checks, submit_checks
    from diffsynth_ray.launch.node_checks import Finding

    findings: list[Finding] = []
    resolved = None
    try:
        with client.open_cluster(address, local_resources(), say=render.say) as cluster:
            findings.append(check_authentication(cluster))
            resources = client.cluster_resources(cluster)
            resolved, found = _resolve(job_file, overrides, resources, remote=client.named_address(address) is not None)
            findings += found
            submission_id = submit_checks(cluster, build_request(resolved))
        findings += follow_checks(cluster, submission_id, say=render.say)
    except ClusterError as error:
        findings.append(Finding("cluster", "cluster", "failed", error.message, error.hint or ""))
        if not any(finding.check == "job" for finding in findings):
            findings += _resolve(job_file, overrides, local_resources(), remote=False)[1][:1]
        return findings, ExitCode.CLUSTER
    return findings, ExitCode.DONE


def _resolve(
    job_file: str | None, overrides: list[str] | None, resources: Resources, *, remote: bool
) -> tuple[ResolvedJob | None, list[Finding]]:
    """The resolved job where there is one, and findings about the file and the resources that it asks for."""
    from diffsynth_ray.config.load import load_job
    from diffsynth_ray.config.resolve import resolve, show_amounts
    from diffsynth_ray.launch.node_checks import Finding

    have = f"{resources.cpus:g} CPUs, {resources.gpus:g} GPUs"
    if job_file is None:
        return None, [Finding("job", "here", "skipped", "no job"), Finding("resources", "cluster", "ok", have)]
    try:
        job = load_job(job_file, overrides)
        resolved = resolve(job, resources, source=job_file, remote=remote)
    except JobFileError as error:
        findings = []
        for problem in error.problems:
            check = "resources" if problem.key.startswith("distributed.") else "job"
            where = "cluster" if check == "resources" else "here"
            findings.append(Finding(check, where, "failed", str(problem), f"change {problem.key or job_file}"))
        return None, findings
    per_worker = show_amounts(resolved.resources_per_worker)
    needs = f"{have}; {resolved.num_workers} worker(s) x ({per_worker}) and {resolved.decode_tasks} decoding task(s) each"
    return resolved, [Finding("job", "here", "ok", resolved.run), Finding("resources", "cluster", "ok", needs)]


def _by_check(findings: list[Finding]) -> list[dict[str, Any]]:
    """Every check with its number, state and findings, in order; those without a finding are skipped."""
    from diffsynth_ray.launch.node_checks import CHECKS

    checks = []
    for number, (name, title) in enumerate(CHECKS.items(), start=1):
        own = [finding for finding in findings if finding.check == name]
        states: set[State] = {finding.state for finding in own}
        state = next((each for each in _ORDER if each in states), "skipped")
        checks.append(
            {
                "number": number,
                "name": name,
                "title": title,
                "state": state,
                "findings": [finding.as_dict() for finding in own],
            }
        )
    return checks
