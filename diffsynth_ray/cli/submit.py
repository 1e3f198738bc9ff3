"""`dsray submit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from diffsynth_ray.cli import estimating, render, starting
from diffsynth_ray.cli.options import Json, New, Overrides
from diffsynth_ray.cli.starting import Outcome
from diffsynth_ray.errors import ClusterError, DsrayError, ExitCode, JobFileError, Problem

if TYPE_CHECKING:
    from diffsynth_ray.config.resolve import ResolvedJob, Resources
    from diffsynth_ray.config.schema import Job
    from diffsynth_ray.launch.client import Cluster
    from diffsynth_ray.launch.registry import Submission
    from diffsynth_ray.launch.runs import RunView


@dataclass(frozen=True)
class _Wishes:
    address: str | None
    detach: bool
    new: bool
    estimates: bool


def submit(
    job_files: Annotated[
        list[str], typer.Argument(metavar="JOB.toml", help="Job files or shipped recipes, one after the other.")
    ],
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Dashboard of a cluster; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, local."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the run.")] = False,
    new: New = False,
    no_estimate: Annotated[
        bool, typer.Option("--no-estimate", help="Do not estimate whether the job fits the GPUs' memory.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show the plan only.")] = False,
    as_json: Json = False,
) -> int:
    """Train: submit a job to Ray and follow it.

    Checks the job, shows the plan, submits it to the named cluster, or to a Ray that it starts on this machine, and
    follows it. Submitting the same job again follows the running one or continues the stopped one.
    """
    if detach and len(job_files) > 1:
        raise DsrayError("--detach takes one job file: several run one after the other, which needs this command")
    jobs = starting.load_jobs(job_files, overrides)
    wishes = _Wishes(address=address, detach=detach, new=new, estimates=not no_estimate)
    if dry_run:
        return _dry_run(jobs, job_files, wishes, as_json=as_json)
    _check_apart([_resolve(job, reference, wishes)[0] for job, reference in zip(jobs, job_files, strict=True)], job_files)
    outcomes: list[Outcome] = []
    for job, reference in zip(jobs, job_files, strict=True):
        outcomes.append(_submit_one(job, reference, wishes))
        if outcomes[-1].exit_code not in (ExitCode.DONE, ExitCode.NOT_FINISHED):
            break
    code = starting.report(outcomes, as_json=as_json)
    return ExitCode.DONE if detach and code == ExitCode.NOT_FINISHED else code


def _check_apart(resolved: list[ResolvedJob], job_files: list[str]) -> None:
    """Raise JobFileError, before the first of several starts, where a later one could not because of an earlier one."""
    owners: dict[str, tuple[str, str]] = {}
    for one, reference in zip(resolved, job_files, strict=True):
        run, first = owners.setdefault(one.job.output.path, (one.run, reference))
        if run != one.run:
            message = f"{one.job.output.path} is that of {first} too; each run has one of its own"
            raise JobFileError(reference, [Problem("output.path", message)])


def _dry_run(jobs: list[Job], job_files: list[str], wishes: _Wishes, *, as_json: bool) -> int:
    plans = []
    for job, reference in zip(jobs, job_files, strict=True):
        resolved, _, remote = _resolve(job, reference, wishes)
        plans.append(starting.show_plan(resolved, remote=remote, tell=render.say if as_json else render.result))
    if as_json:
        objects = [plan.as_dict() if plan else None for plan in plans]
        render.result_json(objects[0] if len(objects) == 1 else {"plans": objects})
    return ExitCode.DONE


def _resolve(job: Job, reference: str, wishes: _Wishes) -> tuple[ResolvedJob, Resources, bool]:
    from diffsynth_ray.config.resolve import Resources, local_resources, resolve
    from diffsynth_ray.launch import client, embedded

    named = client.named_address(wishes.address)
    if named is not None:
        resources = client.cluster_resources(client.connect(named))
    else:
        local = embedded.find()
        resources = Resources(cpus=local.cpus, gpus=local.gpus) if local else local_resources()
    return resolve(job, resources, source=reference, remote=named is not None), resources, named is not None


def _submit_one(job: Job, reference: str, wishes: _Wishes) -> Outcome:
    from diffsynth_ray.launch import client, registry
    from diffsynth_ray.launch.runs import claim_output
    from diffsynth_ray.models import page_cache
    from diffsynth_ray.run_dir import RunDir

    resolved, resources, remote = _resolve(job, reference, wishes)
    plan = starting.show_plan(resolved, remote=remote)
    if not remote:
        RunDir(resolved.output_path).check_writable()
    if not wishes.new:
        claim_output(resolved, None, new=False)
        if finished := starting.finished_outcome(resolved, plan):
            return finished
    if not remote:
        page_cache.read_ahead(resolved.job.model)
    with client.open_cluster(wishes.address, resources, say=render.say) as cluster:
        if wishes.estimates and resolved.device == "cuda":
            estimating.warn_before_submit(resolved, client.accelerators(cluster), is_remote=remote)
        submission_id = _find_or_submit(resolved, cluster, new=wishes.new)
        submission = registry.Submission(
            run=resolved.run,
            output=str(resolved.output_path),
            job_file=starting.job_path(reference),
            address=client.named_address(wishes.address),
            submission_id=submission_id,
        )
        registry.note(submission)
    render.say(f"dashboard {cluster.url}")
    render.say(f"follow: dsray logs -f {resolved.run}    stop: dsray stop {resolved.run}")
    if wishes.detach:
        return Outcome(
            run=resolved.run, state="SUBMITTED", output=submission.output, exit_code=ExitCode.NOT_FINISHED,
            submission_id=submission_id,
        )  # fmt: skip
    return starting.outcome_of(_follow(cluster, submission))


def _find_or_submit(resolved: ResolvedJob, cluster: Cluster, *, new: bool) -> str:
    from diffsynth_ray.launch import client
    from diffsynth_ray.launch.runs import claim_output

    # The number before the look: of two submits at once, one either sees the other's job or is refused for its number.
    attempt = client.next_attempt(cluster, resolved)
    if not new and (active := _find_active(resolved, cluster)):
        return active
    moved = claim_output(resolved, cluster, new=new)
    if moved is not None:
        render.say(f"moved the old content to {moved}")
    sent = client.travelling(cluster, resolved.model_dump_json(indent=2))
    render.say(f"sending {sent}; data, weights and outputs stay where they are")
    try:
        submission_id = client.submit(resolved, cluster, attempt=attempt)
    except ClusterError:
        if active := _find_active(resolved, cluster):
            return active
        raise
    render.say(f"submitted {submission_id}; waiting for the cluster to start it ...")
    return submission_id


def _find_active(resolved: ResolvedJob, cluster: Cluster) -> str | None:
    """The run's job on the cluster, told to be followed, or None."""
    from diffsynth_ray.launch import client

    active = client.active_job(cluster, resolved.run)
    if active is None:
        return None
    render.say(f"{active['submission_id']} is already {active['status'].lower()}: following it")
    return str(active["submission_id"])


def _follow(cluster: Cluster, submission: Submission) -> RunView:
    from diffsynth_ray.launch import client, follow, runs

    try:
        with render.LogView() as log:
            end = follow.follow(cluster, submission.submission_id, log.line, say=render.say)
    except KeyboardInterrupt:
        render.say(
            f"\ndetached: {submission.run} goes on\n"
            f"follow it: dsray logs -f {submission.run}\nstop it:   dsray stop {submission.run}"
        )
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except ClusterError:
        # The cluster may have ended after the run did, as while this machine slept: the output path knows.
        view = runs.view(submission)
        if view.state in client.ACTIVE or view.submission_id != submission.submission_id:
            raise
        return view
    view = runs.view(submission, cluster=cluster)
    if view.state in client.ACTIVE or view.submission_id != submission.submission_id:
        view = runs.RunView(
            run=submission.run, state=end.state, output=submission.output, submission_id=submission.submission_id,
            address=cluster.url, cause=end.message,
        )  # fmt: skip
    return view
