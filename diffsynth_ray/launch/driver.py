"""The driver: chains the stages of one attempt, tells what happens, and records how it ended.

As a Ray job: `python -m diffsynth_ray.launch.driver --job job.json --submission-id RUN-aN`. SIGTERM means stop: the run
checkpoints and ends after the running step. The exit code is that of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.errors import DsrayError, ExitCode
from diffsynth_ray.launch.board import Board
from diffsynth_ray.launch.stages import encode_stage, train_stage
from diffsynth_ray.plan import build_plan
from diffsynth_ray.run_dir import Attempt, RunDir, write_whole

WORKER_ENV = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Its actor only calls back code that we do not have yet (checkpoint before a node is taken away).
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
"""Environment of the driver and its workers: how Ray behaves, never a setting of the job."""

_STATE_OF_EXIT = {ExitCode.DONE: "SUCCEEDED", ExitCode.STOPPED: "STOPPED", ExitCode.RUN_FAILED: "FAILED"}
_POLL_S = 0.2

Say = Callable[[str], None]


def run_job(resolved: ResolvedJob, *, submission_id: str, say: Say) -> ExitCode:
    """Run one attempt on the Ray that this process is connected to; never raises for a failed run."""
    run_dir = RunDir(resolved.output_path)
    try:
        attempt = run_dir.begin_attempt(resolved, submission_id)
    except DsrayError as error:
        say(f"error: {_with_hint(error)}")
        return error.exit_code
    with (run_dir.path / "log.txt").open("a") as log:
        tell = _tee(say, log)
        tell(f"run {resolved.run}, attempt {attempt.number}, output {run_dir.path}")
        for line in build_plan_lines(resolved):
            tell(line)
        outcome: dict[str, Any] = {"step": 0, "num_steps": 0}
        cause = details = None
        try:
            outcome = _run_stages(resolved, attempt, tell)
            code = ExitCode.STOPPED if outcome["state"] == "STOPPED" else ExitCode.DONE
        except Exception as error:  # noqa: BLE001  the process boundary: however the run ends, it is recorded
            code, cause, details = ExitCode.RUN_FAILED, _cause(error), traceback.format_exc()
        _record_end(run_dir, attempt, code=code, outcome=outcome, cause=cause, details=details)
        if cause is not None:
            tell(f"error: {cause}")
            tell(f"the whole error is in {run_dir.error_path}")
        tell(f"run {resolved.run} {_STATE_OF_EXIT[code]}")
    return code


def build_plan_lines(resolved: ResolvedJob) -> list[str]:
    """The plan for the log; problems of the data are told by the stage that meets them."""
    try:
        return build_plan(resolved, check_files=False).lines()
    except DsrayError:
        return []


def _run_stages(resolved: ResolvedJob, attempt: Attempt, tell: Say) -> dict[str, Any]:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    resolved_json, name = resolved.model_dump_json(), f"attempt-{attempt.number}"
    stages = []
    if resolved.encode is not None:
        stages.append(encode_stage.options(scheduling_strategy=here).remote(resolved_json, board))
    # Stage two takes what stage one returns, so that Ray starts it when that is there.
    stages.append(
        train_stage.options(scheduling_strategy=here).remote(resolved_json, attempt.token, name, board, *stages)
    )
    while True:
        done, _ = ray.wait(stages[-1:], timeout=_POLL_S)
        lines, failure = ray.get(board.take.remote())
        for line in lines:
            tell(line)
        if failure is not None:
            # Ray Train would restart the workers; a user's mistake, or a full device, stays what it is.
            for stage in stages:
                ray.cancel(stage, recursive=True)
            raise failure.error
        if done:
            return ray.get(stages[-1])


def _record_end(
    run_dir: RunDir,
    attempt: Attempt,
    *,
    code: ExitCode,
    outcome: dict[str, Any],
    cause: str | None,
    details: str | None,
) -> None:
    if not run_dir.holds_token(attempt.token):
        return  # a newer attempt owns the directory now
    progress = run_dir.progress()
    step = outcome["step"] or (progress.step if progress else 0)
    num_steps = outcome["num_steps"] or (progress.num_steps if progress else 0)
    state = _STATE_OF_EXIT[code]
    run_dir.note_attempt(attempt, "ended", state=state, step=step, num_steps=num_steps, cause=cause)
    run_dir.stop_path.unlink(missing_ok=True)
    if cause is not None:
        error = {"attempt": attempt.number, "time": time.time(), "cause": cause, "details": details}
        write_whole(run_dir.error_path, json.dumps(error, indent=2))


def _with_hint(error: DsrayError) -> str:
    return f"{error.message}\n  {error.hint}" if error.hint else error.message


def _cause(error: BaseException) -> str:
    """One sentence from Ray's nested errors: a worker's own error where there is one."""
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, inner = min(failures.items())
        return f"rank {rank}: {_cause(inner)}"
    if isinstance(error, DsrayError):
        return _with_hint(error)
    last_line = (str(error).strip().splitlines() or [""])[-1]
    return f"{type(error).__name__}: {last_line}"


def _tee(say: Say, log: IO[str]) -> Say:
    def tell(line: str) -> None:
        say(line)
        log.write(f"{line}\n")
        log.flush()

    return tell


@contextmanager
def _stop_on_sigterm(run_dir: RunDir) -> Iterator[None]:
    def request(signum: int, frame: object) -> None:
        run_dir.request_stop(reason="the driver got SIGTERM")

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_locally(resolved: ResolvedJob, *, say: Say) -> ExitCode:
    """`dsray run`: the same stages on a Ray of this process, without a job server."""
    say(f"starting Ray in this process ({os.cpu_count()} CPUs)")
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": WORKER_ENV},
    )
    try:
        return run_job(resolved, submission_id=f"{resolved.run}-local-{os.getpid()}", say=say)
    finally:
        ray.shutdown()


def main(arguments: list[str]) -> int:
    """Entry point of the Ray job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--submission-id", required=True)
    options = parser.parse_args(arguments)
    resolved = ResolvedJob.model_validate_json(options.job.read_text())
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": WORKER_ENV})
    with _stop_on_sigterm(RunDir(resolved.output_path)):
        return run_job(resolved, submission_id=options.submission_id, say=_say_stdout)


def _say_stdout(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
