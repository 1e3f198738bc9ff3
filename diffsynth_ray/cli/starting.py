"""What `submit` and `run` share: job files to resolved jobs, the plan, and the report of how a run ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth_ray.cli import render
from diffsynth_ray.errors import DataError, ExitCode, JobFileError, Problem

if TYPE_CHECKING:
    from diffsynth_ray.config.resolve import ResolvedJob
    from diffsynth_ray.config.schema import Job
    from diffsynth_ray.launch.runs import RunView
    from diffsynth_ray.plan import Plan


@dataclass(frozen=True)
class Outcome:
    """How one job file ended; one object of --json."""

    run: str
    state: str
    output: str
    exit_code: ExitCode
    submission_id: str = ""
    step: int = 0
    num_steps: int = 0
    cause: str | None = None
    files: list[str] = field(default_factory=list)
    already_finished: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**self.__dict__, "exit_code": int(self.exit_code)}


def load_jobs(references: list[str], overrides: list[str] | None) -> list[Job]:
    """All job files; the problems of all of them in one error."""
    from diffsynth_ray.config.load import load_job

    jobs, failures = [], []
    for reference in references:
        try:
            jobs.append(load_job(reference, overrides))
        except JobFileError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        problems = [
            Problem(": ".join(filter(None, (each.source, problem.key))), problem.message)
            for each in failures
            for problem in each.problems
        ]
        raise JobFileError(", ".join(each.source for each in failures), problems)
    return jobs


def show_plan(resolved: ResolvedJob, *, remote: bool, tell: Callable[[str], None] | None = None) -> Plan | None:
    """Build the plan and tell it. None where the data are on a cluster and not here."""
    from diffsynth_ray.plan import build_plan

    tell = tell or render.say
    try:
        built = build_plan(resolved, check_files=not remote, runs_here=not remote)
    except DataError:
        if not remote:
            raise
        tell(f"run       {resolved.run}")
        tell("data      not visible here: they are checked on the cluster before any GPU is taken")
        return None
    render.plan(built.lines(), tell)
    return built


def job_path(reference: str) -> str:
    """Absolute path of a job file or recipe."""
    from diffsynth_ray.config.load import find_job_file

    return str(find_job_file(reference).absolute())


def finished_outcome(resolved: ResolvedJob, plan: Plan | None) -> Outcome | None:
    """The outcome of a run that needs nothing more, or None."""
    from diffsynth_ray.launch.runs import exports, is_finished
    from diffsynth_ray.run_dir import RunDir

    run_dir = RunDir(resolved.output_path)
    if plan is None or run_dir.owner() is None or not is_finished(run_dir, num_steps=plan.num_steps):
        return None
    last = run_dir.attempts()[-1]
    return Outcome(
        run=resolved.run,
        state="SUCCEEDED",
        output=str(run_dir.path),
        exit_code=ExitCode.DONE,
        submission_id=last["submission_id"],
        step=last["step"],
        num_steps=last["num_steps"],
        files=[str(run_dir.path / name) for name in exports(run_dir)],
        already_finished=True,
    )


def outcome_of(view: RunView) -> Outcome:
    """The outcome of a run that was watched to its end."""
    return Outcome(
        run=view.run,
        state=view.state,
        output=view.output,
        exit_code=view.exit_code,
        submission_id=view.submission_id,
        step=view.step,
        num_steps=view.num_steps,
        cause=view.cause,
        files=[str(Path(view.output) / name) for name in view.files],
    )


def report(outcomes: list[Outcome], *, as_json: bool) -> int:
    """Tell how everything ended; returns the exit code of the last run."""
    if as_json:
        objects = [outcome.as_dict() for outcome in outcomes]
        render.result_json(objects[0] if len(objects) == 1 else {"runs": objects})
        return outcomes[-1].exit_code
    for outcome in outcomes:
        steps = f", {outcome.step} of {outcome.num_steps} steps" if outcome.num_steps else ""
        already = "already finished, " if outcome.already_finished else ""
        render.result(f"{outcome.run}: {already}{outcome.state}{steps}, output {outcome.output}")
        if outcome.state == "SUCCEEDED":
            for name in outcome.files:
                render.result(name)
        if outcome.cause:
            render.say(f"cause: {outcome.cause}")
        if outcome.state in ("FAILED", "STOPPED"):
            render.say("submitting the same job again continues from its last checkpoint, or begins where there is none")
        if outcome.already_finished:
            render.say("more training.num_epochs or training.max_steps continue it; --new starts afresh")
    return outcomes[-1].exit_code
