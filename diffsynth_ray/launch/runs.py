"""What is known about a run, from its output path first and its cluster second; and how it is stopped."""

from __future__ import annotations

import difflib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import ResolvedJob, paths_below
from diffsynth_ray.errors import ClusterError, DsrayError, ExitCode, JobFileError, OutputError, RunNotFoundError
from diffsynth_ray.launch import client, registry
from diffsynth_ray.launch.client import ACTIVE, Cluster, Ended
from diffsynth_ray.launch.diagnosis import Diagnosis, diagnose
from diffsynth_ray.launch.registry import Submission
from diffsynth_ray.run_dir import EncodeProgress, Progress, RunDir

_EXIT_OF_STATE = {"SUCCEEDED": ExitCode.DONE, "FAILED": ExitCode.RUN_FAILED, "STOPPED": ExitCode.STOPPED}
_KILL_S = 30.0
_ANSWER_S = 10.0
_POLL_S = 0.1
_NOTHING_THERE = "nothing of it is in its output path"
_DIED = "its process ended without a word (killed, or the machine went down); submit the job again to continue it"


@dataclass(frozen=True)
class RunView:
    """A run as `status` and `list` show it."""

    run: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; in a list also UNKNOWN, where its folder cannot be read."""
    output: str
    attempt: int = 0
    submission_id: str = ""
    address: str | None = None
    """Dashboard of the cluster, where it answers."""
    step: int = 0
    num_steps: int = 0
    started: float | None = None
    ended: float | None = None
    cause: str | None = None
    """Why it failed."""
    note: str | None = None
    """What limits this view, as an unreachable cluster."""
    progress: Progress | None = None
    encode: EncodeProgress | None = None
    """Of stage one of split training, where the newest attempt encoded anything."""
    files: list[str] = field(default_factory=list)
    """Exported weights, relative to `output`."""
    diagnosis: Diagnosis | None = None
    """What its figures say."""

    @property
    def exit_code(self) -> ExitCode:
        """Exit code of `dsray status`."""
        return _EXIT_OF_STATE.get(self.state, ExitCode.NOT_FINISHED)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def find_run(reference: str) -> Submission:
    """A run by its name, submission id, job file or output path. Raises RunNotFoundError."""
    # The empty path is the working directory: an unset $RUN must not stop the run that happens to be there.
    found = None
    if reference:
        found = registry.match(reference) or _in_folder(reference) or _of_job_file(reference) or _on_cluster(reference)
    if found is not None:
        return found
    names = sorted({submission.run for submission in registry.submissions()})
    near = difflib.get_close_matches(reference, names, n=1)
    hint = f"did you mean {near[0]}?" if near else "`dsray list` shows the runs that are known here"
    raise RunNotFoundError(f"no run {reference!r}: neither a run's name, nor a job file or output path of a run", hint=hint)


def _in_folder(reference: str) -> Submission | None:
    path = Path(os.path.abspath(os.path.expanduser(reference)))
    owner = RunDir(path).owner() if path.is_dir() else None
    if owner is None:
        return None
    known = registry.match(owner.run)
    if known is not None and known.output == str(path):
        return known
    address = client.named_address(None)
    return Submission(run=owner.run, output=str(path), job_file="", address=address, submission_id="")


def _of_job_file(reference: str) -> Submission | None:
    try:
        job = load_job(reference)
    except JobFileError:
        return None
    return _in_folder(job.output.path.replace("{name}", job.name))


def _on_cluster(reference: str) -> Submission | None:
    address = client.named_address(None)
    cluster = client.connect(address) if address else client.connect_local()
    for job in cluster.jobs() if cluster else []:
        metadata = job.get("metadata") or {}
        if reference in (metadata.get("run"), job["submission_id"]):
            return Submission(
                run=metadata.get("run", reference), output=metadata.get("output", ""), job_file="", address=address,
                submission_id=job["submission_id"],
            )  # fmt: skip
    return None


def cluster_of(submission: Submission) -> tuple[Cluster | None, str | None]:
    """The run's cluster where it answers, else None and why."""
    if submission.pid is not None:
        return None, None
    try:
        return (client.connect(submission.address) if submission.address else client.connect_local()), None
    except ClusterError as error:
        return None, error.message


def run_dir_of(submission: Submission) -> RunDir | None:
    """The run's output directory where it is visible here and still belongs to the run."""
    path = Path(submission.output) if submission.output else None
    for candidate in (path, path / "previous" / submission.run) if path else ():
        run_dir = RunDir(candidate)
        owner = run_dir.owner()
        if owner is not None and owner.run == submission.run:
            return run_dir
    return None


def view(submission: Submission, *, cluster: Cluster | None = None) -> RunView:
    """Everything that is known about a run."""
    note = None
    if cluster is None:
        cluster, note = cluster_of(submission)
    run_dir = run_dir_of(submission)
    jobs = client.job_states(cluster, submission.run) if cluster else {}
    view_of_files = _from_files(submission, run_dir, note) if run_dir else None
    newest = jobs.get(max(jobs, default=0))
    if view_of_files is None or (newest and _is_newer(newest, run_dir)):
        return _from_cluster(submission, cluster, newest, note)
    changes = _liveness(submission, view_of_files, jobs, note) if view_of_files.state in ACTIVE else {}
    return replace(view_of_files, address=cluster.url if cluster else None, **changes)


def _is_newer(job: dict[str, Any], run_dir: RunDir | None) -> bool:
    """Whether a job on the cluster came after everything that the output path knows of."""
    attempts = run_dir.attempts() if run_dir else []
    if any(entry["submission_id"] == job["submission_id"] for entry in attempts):
        return False
    started = _seconds(job.get("start_time")) or 0
    return not attempts or job["status"] in ACTIVE or started > attempts[-1]["time"]


def _from_files(submission: Submission, run_dir: RunDir, note: str | None) -> RunView | None:
    attempts = run_dir.attempts()
    if not attempts:
        return None
    last = attempts[-1]
    starts = [entry for entry in attempts if entry["event"] == "started" and entry["attempt"] == last["attempt"]]
    progress = run_dir.progress()
    has_ended = last["event"] == "ended"
    waits_for = last.get("reason") if last["event"] == "waiting" else None
    parsed = client.run_of(last["submission_id"])
    return RunView(
        run=submission.run,
        state=last["state"] if has_ended else ("PENDING" if waits_for else "RUNNING"),
        output=str(run_dir.path),
        attempt=parsed[1] if parsed else last["attempt"],
        submission_id=last["submission_id"],
        step=last["step"] if has_ended else (progress.step if progress else 0),
        num_steps=last["num_steps"] if has_ended else (progress.num_steps if progress else 0),
        started=starts[-1]["time"] if starts else None,
        ended=last["time"] if has_ended else None,
        cause=last.get("cause"),
        note=f"waits for a place on the cluster: {waits_for}" if waits_for else note,
        progress=progress,
        encode=run_dir.encode_progress(),
        files=exports(run_dir),
        diagnosis=diagnose(run_dir),
    )


def _from_cluster(submission: Submission, cluster: Cluster | None, job: dict[str, Any] | None, note: str | None) -> RunView:
    if job is None:
        alive = submission.process() is not None or submission.is_elsewhere
        unknown = "RUNNING" if alive or (note and not cluster) else "FAILED"
        return RunView(
            run=submission.run, state=unknown, output=submission.output, submission_id=submission.submission_id,
            cause=None if unknown == "RUNNING" else f"{_NOTHING_THERE}: it ended before it wrote anything, or was deleted",
            note=note,
        )  # fmt: skip
    parsed = client.run_of(job["submission_id"])
    end = None if job["status"] in ACTIVE else client.ended(job)
    return RunView(
        run=submission.run,
        state=end.state if end else job["status"],
        output=submission.output,
        attempt=parsed[1] if parsed else 0,
        submission_id=job["submission_id"],
        address=cluster.url if cluster else None,
        started=_seconds(job.get("start_time")),
        ended=_seconds(job.get("end_time")),
        cause=end.message if end else None,
        note=f"{_NOTHING_THERE}: deleted, or not visible here" if end and end.state == "SUCCEEDED" else note,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def _liveness(submission: Submission, seen: RunView, jobs: dict[int, dict[str, Any]], note: str | None) -> dict[str, Any]:
    """What changes of the view of an attempt without an end: whether it still runs."""
    if submission.is_elsewhere:
        return {"note": f"as its output path shows it; it was started on {submission.host}"}
    if submission.pid is not None:
        return {} if submission.process() is not None else {"state": "FAILED", "cause": _DIED}
    job = next((job for job in jobs.values() if job["submission_id"] == seen.submission_id), None)
    if job is not None:
        end = None if job["status"] in ACTIVE else client.ended(job)
        return {} if end is None else {"state": end.state, "cause": end.message}
    if note is not None:
        limit = f"as its output path shows it; {note}"
        return {"note": f"{seen.note}; {limit}" if seen.state == "PENDING" else limit}
    return {"state": "FAILED", "cause": _DIED}


def exports(run_dir: RunDir) -> list[str]:
    """Exported weights in the order in which they were written."""
    found = [path for path in run_dir.path.glob("*.safetensors") if not path.name.startswith(".")]
    return [path.name for path in sorted(found, key=lambda path: (path.stat().st_mtime, path.name))]


def is_finished(run_dir: RunDir, *, num_steps: int) -> bool:
    """Whether the run has done at least `num_steps` steps and ended well."""
    attempts = run_dir.attempts()
    if not attempts or attempts[-1]["event"] != "ended":
        return False
    return attempts[-1]["state"] == "SUCCEEDED" and int(attempts[-1]["num_steps"]) >= num_steps


def claim_output(resolved: ResolvedJob, cluster: Cluster | None, *, new: bool) -> Path | None:
    """Check that the run may use its output path; with `new`, move older content aside and return its folder."""
    run_dir = RunDir(resolved.output_path)
    name = run_dir.owner_name()
    if (writer := _in_the_foreground(run_dir)) is not None:
        raise OutputError(
            f"{run_dir.path} is being written by process {writer.pid} (`dsray run`)",
            hint=f"`dsray logs -f {writer.run}` follows it, `dsray stop {writer.run}` ends it",
        )
    if not new:
        if name is not None:
            run_dir.check_owner(resolved)
        return None
    # A job that has just been submitted has written nothing yet.
    for run in {name or resolved.run, resolved.run}:
        active = client.active_job(cluster, run) if cluster else None
        if active is not None:
            raise OutputError(f"{run_dir.path} is being written by {active['submission_id']}", hint=f"first `dsray stop {run}`")
    if name is None:
        return None
    _check_nothing_else_is_moved(resolved, run_dir)
    return run_dir.move_aside()


def _check_nothing_else_is_moved(resolved: ResolvedJob, run_dir: RunDir) -> None:
    """Raise OutputError where data, weights or other runs are in the folder whose content is to be moved aside."""
    kept = run_dir.path / "previous"
    found = [f"{key}: {path}" for key, path in paths_below(resolved.job, run_dir.path).items()]
    found += [
        f"another run: {path.parent}"
        for pattern in ("*/job.json", "*/*/job.json")
        for path in run_dir.path.glob(pattern)
    ]  # fmt: skip
    if Path.cwd().is_relative_to(run_dir.path):
        found.append(f"the working directory: {Path.cwd()}")
    if found := [each for each in found if not Path(each.partition(": ")[2]).is_relative_to(kept)]:
        raise OutputError(
            "\n".join([f"--new would move all of {run_dir.path} aside, and with it", *(f"  {each}" for each in found)]),
            hint="give the job an output.path of its own, or move the old run's files yourself",
        )


def _in_the_foreground(run_dir: RunDir) -> Submission | None:
    """The `dsray run` on this machine that writes to this folder, or is about to."""
    path = str(run_dir.path)
    others = [each for each in registry.submissions() if each.output == path and each.pid != os.getpid()]
    known = [each for each in others if each.process() is not None]
    if not known:
        return None
    last = run_dir.attempts()[-1:]
    has_ended = any(entry["event"] == "ended" and entry["time"] > known[-1].time for entry in last)
    return None if has_ended else known[-1]


def stop(submission: Submission, *, now: bool, say: Callable[[str], None]) -> Ended | None:
    """Ask a run to stop after the running step, or (`now`) end it and wait. None: asked, it is still running.

    Raises DsrayError where nothing of the run is active.
    """
    cluster, note = cluster_of(submission)
    seen = view(submission, cluster=cluster)
    if seen.state not in ACTIVE:
        raise DsrayError(f"{seen.run} is not running: it {_WORDS[seen.state]}")
    run_dir = run_dir_of(submission)
    has_started = run_dir is not None and any(
        entry["event"] == "started" and entry["submission_id"] == seen.submission_id for entry in run_dir.attempts()
    )
    if not now and run_dir is not None and has_started:
        run_dir.request_stop(reason="dsray stop")
        return None
    if submission.pid is not None:
        return _interrupt(submission, run_dir, now=now, say=say)
    if cluster is None:
        raise ClusterError(note or f"the local Ray of {seen.run} does not run")
    if now and run_dir is not None and has_started:
        # SIGTERM would ask it for a checkpoint after the running step.
        run_dir.request_stop(reason="dsray stop --now", now=True)
    else:
        client.request_end(cluster, seen.submission_id)
    return client.wait_until_ended(cluster, seen.submission_id, say=say) if now else None


def _interrupt(submission: Submission, run_dir: RunDir | None, *, now: bool, say: Callable[[str], None]) -> Ended | None:
    """Ctrl-C to a run in the foreground: once asks it to stop, twice (`now`) ends it at once, which is waited for."""
    if submission.is_elsewhere:
        raise DsrayError(f"{submission.run} runs on {submission.host}", hint="stop it there")
    ended = Ended("STOPPED", ExitCode.STOPPED)
    process = submission.process()
    if process is None:
        return ended
    try:
        process.send_signal(signal.SIGINT)
        if not now:
            return None
        # Two that come before it looks are one. It answers the first one in its folder, where it has begun that.
        deadline = time.monotonic() + _ANSWER_S
        while run_dir is not None and run_dir.stop_reason() is None and time.monotonic() < deadline:
            if submission.process() is None:
                return ended
            time.sleep(_POLL_S)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        say(f"waiting for process {process.pid} to end ...")
        deadline = time.monotonic() + _KILL_S
        # Not psutil's wait: to that, one whose parent has not asked after it yet is alive.
        while submission.process() is not None:
            if time.monotonic() > deadline:
                say(f"it does not end in {_KILL_S:g} s and is killed")
                process.kill()
                break
            time.sleep(_POLL_S)
    except psutil.NoSuchProcess:
        pass
    return ended


_WORDS = {"SUCCEEDED": "has finished", "FAILED": "has failed", "STOPPED": "was stopped"}
