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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffsynth_ray.config.resolve import ResolvedJob, available_cpus, show_amounts
from diffsynth_ray.data.bad_samples import BadSample, BadSampleList
from diffsynth_ray.errors import ClusterError, DataError, DsrayError, ExitCode
from diffsynth_ray.launch.board import Board, Failure, Loss, News
from diffsynth_ray.launch.environment import ELASTIC_ENV, WITHOUT_DASHBOARD_ENV, WORKER_ENV, inherited, leave_out_runtime_env
from diffsynth_ray.launch.failures import WorkerPlace, describe, with_hint
from diffsynth_ray.launch.queue import RENEW_EVERY_S, QueuePlace, join_queue, need_to_encode, need_to_train
from diffsynth_ray.launch.stages import encode_stage, train_stage
from diffsynth_ray.launch.visibility import check_visible
from diffsynth_ray.plan import build_plan
from diffsynth_ray.run_dir import Attempt, RunDir, write_whole

_STATE_OF_EXIT = {ExitCode.DONE: "SUCCEEDED", ExitCode.STOPPED: "STOPPED", ExitCode.RUN_FAILED: "FAILED"}
_POLL_S = 0.2
_IDLE_S = 5.0
"""Seconds without workers after which a wish to stop is not left to them."""
_TELL_IDLE_S = 30.0

Say = Callable[[str], None]


def run_job(
    resolved: ResolvedJob, *, submission_id: str, say: Say, asked: Sequence[str] = (), is_shared: bool = False
) -> ExitCode:
    """Run one attempt on the Ray that this process is connected to; never raises for a failed run.

    `asked` holds why this process was asked to stop, if it was; see `stopping_on`. `is_shared`: other runs may be on the same
    Ray, so that this one takes its turn.
    """
    run_dir = RunDir(resolved.output_path)
    try:
        attempt = run_dir.begin_attempt(resolved, submission_id)
    except DsrayError as error:
        say(f"error: {with_hint(error)}")
        return error.exit_code
    if asked:  # before the attempt, whose begin takes earlier requests back
        run_dir.request_stop(reason=asked[0])
    with (run_dir.path / "log.txt").open("a") as log:
        tell = _tee(say, log)
        tell(f"run {resolved.run}, attempt {attempt.number}, output {run_dir.path}")
        for line in build_plan_lines(resolved):
            tell(line)
        outcome: dict[str, Any] = {"step": 0, "num_steps": 0}
        watcher = _Watcher(resolved, attempt, tell)
        failed: dict[str, Any] | None = None
        try:
            outcome = _run_stages(resolved, attempt, watcher, is_shared=is_shared)
            code = ExitCode.STOPPED if outcome["state"] == "STOPPED" else ExitCode.DONE
        except KeyboardInterrupt:
            _record_end(run_dir, attempt, code=ExitCode.STOPPED, outcome=outcome, error=None, tell=tell)
            raise
        except Exception as raised:  # noqa: BLE001  the process boundary: however the run ends, it is recorded
            code, failed = ExitCode.RUN_FAILED, watcher.explain(raised)
        _record_end(run_dir, attempt, code=code, outcome=outcome, error=failed, tell=tell)
        if failed is not None:
            tell(f"error: {failed['cause']}")
            if run_dir.holds_token(attempt.token):
                tell(f"the whole error is in {run_dir.error_path}")
        tell(f"run {resolved.run} {_STATE_OF_EXIT[code]}")
    return code


def build_plan_lines(resolved: ResolvedJob) -> list[str]:
    """The plan for the log; problems of the data are told by the stage that meets them."""
    try:
        return build_plan(resolved, check_files=False).lines()
    except DsrayError:
        return []


def _run_stages(resolved: ResolvedJob, attempt: Attempt, watcher: _Watcher, *, is_shared: bool) -> dict[str, Any]:
    check_visible(resolved, watcher.tell)
    place = join_queue(attempt.submission_id) if is_shared else None
    try:
        return _chain_stages(resolved, attempt, watcher, place)
    finally:
        if place is not None:
            place.leave()


def _chain_stages(resolved: ResolvedJob, attempt: Attempt, watcher: _Watcher, place: QueuePlace | None) -> dict[str, Any]:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    resolved_json, name = resolved.model_dump_json(), f"attempt-{attempt.number}"
    stages = []
    if resolved.encode is not None:
        stages.append(encode_stage.options(scheduling_strategy=here).remote(resolved_json, board, place))
    # Stage two takes what stage one returns, so that Ray starts it when that is there.
    environment = {"runtime_env": {"env_vars": ELASTIC_ENV}} if resolved.is_elastic else {}
    train = train_stage.options(scheduling_strategy=here, **environment)
    stages.append(train.remote(resolved_json, attempt.token, name, board, place, *stages))
    kept = time.monotonic()
    while True:
        done, _ = ray.wait(stages[-1:], timeout=_POLL_S)
        news: News = ray.get(board.take.remote(resolved.job.distributed.timeout_s))
        is_encoding = len(stages) > 1 and not ray.wait(stages[:1], timeout=0)[0]
        failure = watcher.tell_news(news, is_encoding=is_encoding)
        if failure is not None:
            # Ray Train would restart the workers; a user's mistake, or a full device, stays what it is.
            _cancel(stages)
            raise failure.error
        if done:
            return ray.get(stages[-1])
        if (reason := watcher.run_dir.stop_reason(now=True)) is not None:
            # Nobody is asked or waited for: workers end with the job, whatever they are in.
            watcher.tell(f"stopping at once: {reason}")
            _cancel(stages)
            return {"state": "STOPPED", "step": 0, "num_steps": 0}
        if news.hung is not None:
            for handle in news.hung.handles:
                ray.kill(ray.cloudpickle.loads(handle))
        if place is not None and news.has_turn and time.monotonic() - kept > RENEW_EVERY_S:
            kept = time.monotonic()
            place.keep(need_to_encode(resolved) if is_encoding else need_to_train(resolved))
        if news.idle_s > _IDLE_S and (reason := watcher.run_dir.stop_reason()) is not None:
            watcher.tell(f"stopping while no worker runs: {reason}")
            _cancel(stages)
            return {"state": "STOPPED", "step": 0, "num_steps": 0}


def _cancel(stages: list[ray.ObjectRef]) -> None:
    """The last one first: stage two must not begin with the end of stage one."""
    for stage in reversed(stages):
        ray.cancel(stage, recursive=True)


class _Watcher:
    """Tells what happens to the workers, keeps it in attempts.jsonl and remembers it for error.json."""

    def __init__(self, resolved: ResolvedJob, attempt: Attempt, tell: Say) -> None:
        self.resolved, self.attempt, self.tell = resolved, attempt, tell
        self.run_dir = RunDir(resolved.output_path)
        self.losses: list[Loss] = []
        self.told_idle_s = self.encoding_s = self.told_no_encoder_s = 0.0
        self.waits_for: str | None = None
        self.failure: Failure | None = None
        self.bad = BadSampleList(self.run_dir.bad_samples_path, limit=resolved.job.dataset.bad_sample_limit)

    def tell_news(self, news: News, *, is_encoding: bool = False) -> Failure | None:
        """Pass the board's news on; returns what ends the run, if anything."""
        for line in news.lines:
            self.tell(line)
        self._note_waiting(news.waits_for)
        if is_encoding or news.waits_for is not None:
            # Nobody waits for training workers yet.
            self.encoding_s = self.told_idle_s = news.idle_s
        if news.idle_s < self.told_idle_s:
            self.encoding_s = self.told_idle_s = 0.0
        progress = self.run_dir.progress()
        # Ray Train takes a while to end after the last step: nobody waits for a worker then.
        is_trained = progress is not None and progress.step >= progress.num_steps
        if news.idle_s - self.told_idle_s > _TELL_IDLE_S and not is_trained:
            self.told_idle_s = news.idle_s
            needed = f"{self.resolved.min_workers} x ({show_amounts(self.resolved.resources_per_worker)})"
            self.tell(f"no training worker for {news.idle_s - self.encoding_s:.0f} s; needed: {needed}")
        if news.no_encoder_s - self.told_no_encoder_s > _TELL_IDLE_S and self.resolved.encode is not None:
            self.told_no_encoder_s = news.no_encoder_s
            needed = f"{self.resolved.encode.num_workers} x ({show_amounts(self.resolved.encode.resources_per_worker)})"
            self.tell(f"no encoder for {news.no_encoder_s:.0f} s; needed: {needed}")
        self.failure = news.failure or self._note_bad(news.bad) or self.failure
        if news.hung is not None:
            self.tell(f"ending what hangs: {news.hung.text}")
        for loss in news.losses:
            if news.failure is None:
                self._note(loss)
        return self.failure

    def _note_bad(self, found: list[BadSample]) -> Failure | None:
        """List bad samples; a failure where there are too many."""
        try:
            if told := self.bad.add(found):
                self.tell(told)
        except DataError as error:
            return Failure(error, None)
        return None

    def _note_waiting(self, reason: str | None) -> None:
        """Keep for `status` and `list` what the run waits for in the queue."""
        if reason == self.waits_for:
            return
        self.waits_for = reason
        with _tolerating_full_disk(self.tell):
            self.run_dir.note_attempt(self.attempt, "waiting" if reason else "admitted", reason=reason)
        if reason is None:
            self.tell("its turn has come")
        else:
            self.tell(f"waiting for a place on the cluster: {reason}")

    def _note(self, loss: Loss) -> None:
        self.losses.append(loss)
        details = {"cause": loss.cause, **_where(loss.worker), "step": loss.step, "is_preemption": loss.is_preemption}
        with _tolerating_full_disk(self.tell):
            if self.run_dir.holds_token(self.attempt.token):
                self.run_dir.note_attempt(self.attempt, "workers lost", **details)
        count = sum(not each.is_preemption for each in self.losses)
        most = self.resolved.job.distributed.max_failures
        what = "taken away with its node" if loss.is_preemption else f"loss {count}, max_failures = {most}"
        self.tell(f"lost {loss.worker} at step {loss.step}: {loss.cause} ({what})")

    def explain(self, error: Exception) -> dict[str, Any]:
        """What error.json says: cause, rank, step and log of the worker that failed, and the losses before."""
        found: dict[str, Any] = {"attempt": self.attempt.number, "time": time.time()}
        last = self.losses[-1] if self.losses else None
        place = self.failure.worker if self.failure is not None else None
        if self.failure is not None:
            cause = with_hint(self.failure.error)
        elif last is not None and _is_of_workers(error):
            place = last.worker
            cause = f"{place} failed at step {last.step}: {last.cause}\n  " + (
                f"it was loss {len(self.losses)} of this attempt, more than distributed.max_failures = "
                f"{self.resolved.job.distributed.max_failures} allows; submitting it again continues from the last checkpoint"
            )
        else:
            cause = describe(error)[0]
        found["cause"] = cause
        if place is not None:
            progress = self.run_dir.progress()
            step = last.step if last is not None and self.failure is None else (progress.step if progress else 0)
            found |= _where(place) | {"step": step}
        found["losses"] = [{"cause": loss.cause, **_where(loss.worker), "step": loss.step} for loss in self.losses]
        return found | {"details": "".join(traceback.format_exception(error))}


def _is_of_workers(error: Exception) -> bool:
    from ray.train import WorkerGroupError  # seconds of imports that a run does not wait for

    return isinstance(getattr(error, "cause", error), WorkerGroupError)


def _where(place: WorkerPlace) -> dict[str, Any]:
    return {"rank": place.rank, "node": place.node, "pid": place.pid, "log": place.log}


@contextmanager
def _tolerating_full_disk(tell: Say) -> Iterator[None]:
    """What the driver keeps about a run is not worth the run."""
    try:
        yield
    except OSError as error:
        tell(f"warning: could not be written: {error}")


def _record_end(
    run_dir: RunDir, attempt: Attempt, *, code: ExitCode, outcome: dict[str, Any], error: dict[str, Any] | None, tell: Say
) -> None:
    if not run_dir.holds_token(attempt.token):
        return  # a newer attempt owns the directory now
    progress = run_dir.progress()
    step = outcome["step"] or (progress.step if progress else 0)
    num_steps = outcome["num_steps"] or (progress.num_steps if progress else 0)
    cause = error["cause"] if error is not None else None
    with _tolerating_full_disk(tell):
        run_dir.note_attempt(attempt, "ended", state=_STATE_OF_EXIT[code], step=step, num_steps=num_steps, cause=cause)
        run_dir.stop_path.unlink(missing_ok=True)
        if error is not None:
            write_whole(run_dir.error_path, json.dumps(error, indent=2))


def _tee(say: Say, log: IO[str]) -> Say:
    def tell(line: str) -> None:
        # A disk may be full, a terminal closed, the reader of a pipe gone: the other one still has the line.
        with suppress(OSError):
            say(line)
        with suppress(OSError):
            log.write(f"{line}\n")
            log.flush()

    return tell


@contextmanager
def stopping_on(signals: Mapping[signal.Signals, str], run_dir: RunDir, asked: list[str]) -> Iterator[None]:
    """Take the first of these signals as a request to stop, for the reason that is given; the reason is kept in `asked`.

    A signal that is ignored, as SIGHUP under nohup, stays so.
    """

    def request(number: int, frame: object) -> None:
        asked.append(signals[signal.Signals(number)])
        if run_dir.path.is_dir():
            run_dir.request_stop(reason=asked[0])

    before = {number: signal.getsignal(number) for number in signals}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, request)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def local_ray(say: Say) -> Iterator[None]:
    """A Ray of this process, without a dashboard, while it lasts. Raises ClusterError where it does not come up."""
    cpus = available_cpus()
    say(f"starting Ray in this process ({cpus} CPUs)")
    with inherited(WITHOUT_DASHBOARD_ENV):
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # the boundary to the processes of Ray: a node that is late raises a bare Exception
            raise ClusterError(
                f"Ray did not start in this process: {error}",
                hint="Ray waits 30 s for its own processes: start the command again when the machine is less busy; "
                "their logs are in /tmp/ray/session_latest/logs",
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


def join_cluster() -> None:
    """Connect the entrypoint of a Ray job to its cluster."""
    runtime_env = None
    if not leave_out_runtime_env(os.environ):
        # Ray Train's actors ask the cluster that their environment names, else the one that last started on this machine,
        # which may be another or gone: then a run that ends waits for an answer. Ray Jobs gives the address to this process
        # only.
        address = {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]} if "RAY_ADDRESS" in os.environ else {}
        runtime_env = {"env_vars": WORKER_ENV | address}
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR", runtime_env=runtime_env)


def run_locally(resolved: ResolvedJob, *, say: Say, asked: list[str] | None = None) -> ExitCode:
    """`dsray run`: the same stages on a Ray of this process, without a job server; `asked` as in `run_job`."""
    asked = [] if asked is None else asked
    signals = {signal.SIGTERM: "this process got SIGTERM", signal.SIGHUP: "its terminal was closed (SIGHUP)"}
    # Inside: Ray would put a handler of its own in place of ours.
    with local_ray(say), stopping_on(signals, RunDir(resolved.output_path), asked):
        return run_job(resolved, submission_id=f"{resolved.run}-local-{os.getpid()}", say=say, asked=asked)


def main(arguments: list[str]) -> int:
    """Entry point of the Ray job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--submission-id", required=True)
    options = parser.parse_args(arguments)
    resolved = ResolvedJob.model_validate_json(options.job.read_text())
    join_cluster()
    asked: list[str] = []
    with stopping_on({signal.SIGTERM: "the driver got SIGTERM"}, RunDir(resolved.output_path), asked):
        return run_job(resolved, submission_id=options.submission_id, say=_say_stdout, asked=asked, is_shared=True)


def _say_stdout(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
