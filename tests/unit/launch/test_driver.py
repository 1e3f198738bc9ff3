"""What the driver makes of the board's news: lines, attempts.jsonl and error.json."""

import json
import os
import signal

import pytest
from ray.train import WorkerGroupError

from diffsynth_ray.config.resolve import EncodeResources, Resources, resolve
from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import ClusterError, ExitCode, RunError
from diffsynth_ray.launch import driver, runs
from diffsynth_ray.launch.board import Failure, Hung, Loss, News
from diffsynth_ray.launch.driver import _Watcher
from diffsynth_ray.launch.failures import WorkerPlace
from diffsynth_ray.launch.registry import Submission
from diffsynth_ray.run_dir import Progress, RunDir

PLACE = WorkerPlace(rank=1, node="10.0.0.2", pid=77, log="/logs/one.err")


def news(**changes):
    calm = {"lines": [], "failure": None, "losses": [], "bad": [], "hung": None, "idle_s": 0.0, "waits_for": None}
    return News(**(calm | {"has_turn": False, "no_encoder_s": 0.0} | changes))


@pytest.fixture
def watcher(tmp_path):
    job = Job.model_validate({
        "name": "t", "dataset": {"base_path": "/data"}, "model": {"family": "qwen_image", "tiny": True},
        "lora": {"base_model": "dit"}, "output": {"path": str(tmp_path)}, "distributed": {"max_failures": 2},
    })  # fmt: skip
    resolved = resolve(job, Resources(cpus=4, gpus=0))
    attempt = RunDir(tmp_path).begin_attempt(resolved, "t-a1")
    said = []
    watcher = _Watcher(resolved, attempt, said.append)
    watcher.said = said
    return watcher


def test_a_loss_is_told_and_kept_with_rank_node_step_and_log(watcher):
    watcher.tell_news(news(lines=["step 4/9"], losses=[Loss(PLACE, "its process died", 4, False)]))
    assert watcher.said[0] == "step 4/9"
    assert watcher.said[1].startswith("lost rank 1 (pid 77 on 10.0.0.2, log /logs/one.err) at step 4: its process died")
    assert "loss 1, max_failures = 2" in watcher.said[1]
    entry = watcher.run_dir.attempts()[-1]
    assert (entry["event"], entry["rank"], entry["node"], entry["step"]) == ("workers lost", 1, "10.0.0.2", 4)
    assert (entry["log"], entry["cause"]) == ("/logs/one.err", "its process died")


def test_a_preempted_node_is_no_failure(watcher):
    watcher.tell_news(news(losses=[Loss(PLACE, "its node died", 4, True), Loss(PLACE, "its process died", 5, False)]))
    assert "taken away with its node" in watcher.said[0]
    assert "loss 1, max_failures = 2" in watcher.said[1]


def test_an_attempt_that_was_taken_over_notes_nothing(watcher):
    RunDir(watcher.run_dir.path).begin_attempt(watcher.resolved, "t-a2")
    before = watcher.run_dir.attempts_path.read_text()
    watcher.tell_news(news(losses=[Loss(PLACE, "its process died", 4, False)]))
    assert watcher.run_dir.attempts_path.read_text() == before


def test_the_error_after_the_last_loss_names_it_and_those_before(watcher):
    watcher.tell_news(news(losses=[Loss(PLACE, "first", 3, False), Loss(PLACE, "second", 5, False)]))
    error = watcher.explain(WorkerGroupError("x", {1: ValueError("x")}))
    assert (error["rank"], error["step"], error["log"]) == (1, 5, "/logs/one.err")
    assert error["cause"].startswith("rank 1 (pid 77 on 10.0.0.2, log /logs/one.err) failed at step 5: second")
    assert "loss 2 of this attempt, more than distributed.max_failures = 2 allows" in error["cause"]
    assert [loss["cause"] for loss in error["losses"]] == ["first", "second"]
    json.dumps(error)


def test_an_error_that_no_restart_mends_is_its_own_cause(watcher):
    failure = Failure(RunError("the disk is full", hint="make room"), PLACE)
    watcher.tell_news(news(failure=failure, losses=[Loss(PLACE, "its process died", 4, False)]))
    error = watcher.explain(failure.error)
    assert error["cause"] == "the disk is full\n  make room"
    assert error["rank"] == 1
    assert error["losses"] == [], "what follows from the failure is no loss"


def test_another_error_after_a_loss_is_not_the_loss(watcher):
    watcher.tell_news(news(losses=[Loss(PLACE, "its process died", 4, False)]))
    assert watcher.explain(KeyError("a bug"))["cause"] == "KeyError: 'a bug'"


def test_hanging_and_waiting_are_told(watcher):
    watcher.tell_news(news(hung=Hung([], "rank 1 hung")))
    assert watcher.said == ["ending what hangs: rank 1 hung"]
    for idle_s in (10.0, 31.0, 40.0, 62.0, 0.0, 31.0):
        watcher.tell_news(news(idle_s=idle_s))
    assert [line.split(";")[0] for line in watcher.said[1:]] == [
        "no training worker for 31 s", "no training worker for 62 s", "no training worker for 31 s"
    ]  # fmt: skip
    watcher.said.clear()
    watcher.run_dir.write_progress(Progress(4, 4, 0.1, 1e-4, 1.0, 1.0, 1.0, 0.0, 0))
    for idle_s in (0.0, 31.0):
        watcher.tell_news(news(idle_s=idle_s))
    assert watcher.said == [], "after the last step nobody waits for a worker"


def test_waiting_in_the_queue_is_told_once_and_shown_by_status_and_list(watcher, monkeypatch):
    for reason in ("0 CPU free; held by other", "0 CPU free; held by other"):
        watcher.tell_news(news(waits_for=reason, idle_s=40.0))
    [line] = watcher.said
    assert line == "waiting for a place on the cluster: 0 CPU free; held by other"
    submission = Submission(
        run=watcher.resolved.run, output=str(watcher.run_dir.path), job_file="", address=None, submission_id=""
    )
    monkeypatch.setattr(runs, "cluster_of", lambda submission: (None, "it does not answer"))
    seen = runs.view(submission)
    assert seen.state == "PENDING"
    assert "held by other" in seen.note
    watcher.tell_news(news(has_turn=True))
    assert watcher.said[1:] == ["its turn has come"]
    assert runs.view(submission).state == "RUNNING"


def test_nobody_waits_for_training_workers_while_stage_one_encodes(watcher):
    for idle_s in (31.0, 62.0, 300.0):
        watcher.tell_news(news(idle_s=idle_s), is_encoding=True)
    assert watcher.said == []
    for idle_s in (320.0, 331.0, 0.0, 31.0):
        watcher.tell_news(news(idle_s=idle_s))
    assert [line.split(";")[0] for line in watcher.said] == ["no training worker for 31 s", "no training worker for 31 s"]


def test_encoders_that_find_no_place_are_told(watcher):
    encode = EncodeResources(
        num_workers=2, device="cuda", resources_per_worker={"GPU": 0.5, "CPU": 1.0}, decode_cpus=1.0, decode_tasks=1
    )
    watcher.resolved = watcher.resolved.model_copy(update={"encode": encode})
    for no_encoder_s in (10.0, 31.0, 40.0, 62.0, 0.0):
        watcher.tell_news(news(no_encoder_s=no_encoder_s), is_encoding=True)
    assert watcher.said == [f"no encoder for {seconds} s; needed: 2 x (0.5 GPU, 1 CPU)" for seconds in (31, 62)]


def test_a_full_disk_does_not_end_the_driver(watcher, monkeypatch):
    def full(*arguments, **details):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDir, "note_attempt", full)
    watcher.tell_news(news(losses=[Loss(PLACE, "its process died", 4, False)]))
    assert any("could not be written" in line for line in watcher.said)
    assert any(line.startswith("lost rank 1") for line in watcher.said)


def test_a_ray_that_does_not_come_up_in_time_is_no_bug_of_ours(monkeypatch):
    def late(**options):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(driver.ray, "init", late)
    with (
        pytest.raises(ClusterError, match=r"did not start in this process: The current node timed out") as caught,
        driver.local_ray(lambda line: None),
    ):
        pass
    assert "less busy" in caught.value.hint


def run_job(watcher, monkeypatch, stages, *, say=lambda line: None, asked=()):
    monkeypatch.setattr(driver, "_run_stages", stages)
    return driver.run_job(watcher.resolved, submission_id="t-a2", say=say, asked=list(asked))


def test_a_run_that_is_interrupted_was_stopped(watcher, monkeypatch):
    def interrupted(*_, **__):
        watcher.run_dir.write_progress(Progress(3, 9, 0.1, 1e-4, 1.0, 1.0, 1.0, 0.0, 0))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(watcher, monkeypatch, interrupted)
    last = watcher.run_dir.attempts()[-1]
    assert (last["event"], last["state"], last["step"], last["num_steps"]) == ("ended", "STOPPED", 3, 9)


def test_nobody_who_reads_the_log_is_worth_the_run(watcher, monkeypatch):
    def gone(line):
        raise BrokenPipeError(32, "Broken pipe")

    def stages(*_, **__):
        return {"state": "SUCCEEDED", "step": 9, "num_steps": 9}

    assert run_job(watcher, monkeypatch, stages, say=gone) == ExitCode.DONE
    assert (watcher.run_dir.path / "log.txt").read_text().endswith("SUCCEEDED\n")


@pytest.mark.usefixtures("a_terminal")
@pytest.mark.parametrize("is_early", [True, False])
def test_a_signal_asks_to_stop_also_before_the_attempt_begins(watcher, monkeypatch, is_early):
    reasons = []

    def stages(*_, **__):
        if not is_early:
            os.kill(os.getpid(), signal.SIGHUP)
        reasons.append(watcher.run_dir.stop_reason())
        return {"state": "STOPPED", "step": 1, "num_steps": 9}

    monkeypatch.setattr(driver, "_run_stages", stages)
    asked = []
    with driver.stopping_on({signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}, watcher.run_dir, asked):
        if is_early:
            os.kill(os.getpid(), signal.SIGTERM)
        code = driver.run_job(watcher.resolved, submission_id="t-a2", say=lambda line: None, asked=asked)
    assert code == ExitCode.STOPPED
    assert reasons == ["SIGTERM" if is_early else "SIGHUP"]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so(watcher):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    asked = []
    try:
        with driver.stopping_on({signal.SIGHUP: "SIGHUP"}, watcher.run_dir, asked):
            os.kill(os.getpid(), signal.SIGHUP)
        assert asked == []
    finally:
        signal.signal(signal.SIGHUP, before)
