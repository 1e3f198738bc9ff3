"""Real kills: whatever ends, the run goes on from its last checkpoint and trains the same numbers to the last bit.

The kill in the test command is the one of most parts; the others are run by hand (`pytest -m slow`), with
DSRAY_RECOVERY_JSON=tests/bench/results/recovery.json to keep their figures. tests/unit/train/test_kills.py kills without Ray.
"""

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from training_runs import Run, distance, note_recovery

from diffsynth_ray.errors import ExitCode
from diffsynth_ray.train.checkpoint import find_checkpoints
from diffsynth_ray.train.storage import Storage

pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("local_ray")]

TWO = ("distributed.num_workers=2", "output.checkpoint_steps=1")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, local_ray):
    """An undisturbed run on two workers: 40 samples, 10 steps."""
    run = Run(tmp_path_factory.mktemp("reference"), Path(__file__).resolve().parents[2] / "jobs/data/photos")
    assert run.start(*TWO) == ExitCode.DONE, run.said
    return run


def assert_same(run, reference):
    assert run.losses() == reference.losses()
    assert distance(reference.weights(), run.weights()) == 0


def kill_while_a_checkpoint_is_written(run, rank):
    """SIGKILL when the rank's shard is there and the manifest is not; returns the step."""
    seen = {path.name for path in run.dir.checkpoints_dir.glob("step-*") if (path / "manifest.json").exists()}
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for folder in run.dir.checkpoints_dir.glob("step-*"):
            if folder.name in seen:
                continue
            if any(f"state-{rank:05d}" in entry.name for entry in os.scandir(folder)):
                run.kill(rank)
                return int(folder.name.removeprefix("step-")), (folder / "manifest.json").exists()
        time.sleep(0.0005)
    raise AssertionError(run.said)


@pytest.mark.slow
def test_a_worker_killed_while_it_writes_a_checkpoint_and_one_after_a_report(reference, tmp_path, photos):
    run = Run(tmp_path, photos)
    run.begin(*TWO)
    run.wait_for("step 2/10")
    step, was_committed = kill_while_a_checkpoint_is_written(run, 1)
    run.wait_for("continuing after step")
    run.wait_for("step 7/10")
    run.kill(0)
    assert run.end() == ExitCode.DONE, run.said
    assert_same(run, reference)
    continued = [line for line in run.said if "continuing after step" in line]
    assert len(continued) == 2
    if not was_committed:
        assert f"continuing after step {step - 1} of 10" in continued[0]
    first, second = run.lost()
    assert (first["rank"], second["rank"]) == (1, 0), "the one that was killed is named, not the one that followed"
    assert "process died" in first["cause"]
    assert "ray" in first["log"]
    assert second["step"] >= 7
    assert any("lost rank 1 (pid" in line and "loss 1, max_failures = 3" in line for line in run.said)
    assert {path.name for path in run.dir.checkpoints_dir.iterdir()} == {"step-9", "step-10"}, "no leftovers"
    first, second = run.recoveries()
    note_recovery("a worker while it writes a checkpoint", [first])
    note_recovery("a worker after a report", [second])


@pytest.mark.slow
def test_max_failures_ends_the_run_with_rank_step_and_log_and_the_next_submit_continues(reference, tmp_path, photos):
    run = Run(tmp_path, photos)
    run.begin(*TWO, "distributed.max_failures=0")
    run.wait_for("step 4/10")
    run.kill(1)
    assert run.end() == ExitCode.RUN_FAILED
    error = json.loads(run.dir.error_path.read_text())
    assert error["rank"] == 1
    assert error["step"] >= 4
    assert error["log"].startswith("/")
    assert "max_failures = 0" in error["cause"]
    assert "submitting it again continues" in error["cause"]
    assert [loss["rank"] for loss in error["losses"]] == [1]
    assert run.start(*TWO) == ExitCode.DONE, run.said
    assert_same(run, reference)


@pytest.mark.slow
def test_of_two_attempts_the_older_commits_nothing(reference, tmp_path, photos):
    older, newer = (Run(tmp_path, photos) for _ in range(2))
    older.begin("output.checkpoint_steps=1")
    older.wait_for("step 3/10")
    newer.begin("output.checkpoint_steps=1")
    assert older.end() == ExitCode.RUN_FAILED
    assert any("newer attempt of this run has taken over" in line for line in older.said)
    assert newer.end() == ExitCode.DONE, newer.said
    assert any("continuing after step" in line for line in newer.said)
    assert newer.losses().keys() == reference.losses().keys()
    assert newer.losses() == pytest.approx(reference.losses(), abs=1e-5)
    ends = [entry for entry in newer.dir.attempts() if entry["event"] == "ended"]
    assert [entry["attempt"] for entry in ends] == [2], "the older one does not write the end either"


@pytest.mark.slow
def test_a_full_disk_costs_checkpoints_but_not_the_run(reference, tmp_path, photos):
    run = Run(tmp_path, photos)
    run.begin(*TWO)
    run.wait_for("checkpoint after step 2")
    process = psutil.Process(run.pids()[1])
    shard = next(run.dir.checkpoints_dir.glob("step-*/state-00001*"))
    process.rlimit(psutil.RLIMIT_FSIZE, (shard.stat().st_size // 2, resource.RLIM_INFINITY))
    run.wait_for("could not be written: rank 1: File too large")
    process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert run.end() == ExitCode.DONE, run.said
    assert_same(run, reference)
    assert not run.lost()
    assert find_checkpoints(Storage.at(run.dir.checkpoints_dir))[0].step == 10


@pytest.mark.slow
def test_a_disk_that_stays_full_fails_the_run_and_loses_nothing(reference, tmp_path, photos):
    run = Run(tmp_path, photos)
    run.begin(*TWO)
    run.wait_for("checkpoint after step 2")
    for pid in run.pids().values():
        psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    assert run.end() == ExitCode.RUN_FAILED
    assert "File too large" in json.loads(run.dir.error_path.read_text())["cause"]
    assert run.start(*TWO) == ExitCode.DONE, run.said
    assert_same(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the first checkpoint", "after the last report"])
def test_a_worker_killed_early_and_late(reference, tmp_path, photos, moment):
    run = Run(tmp_path, photos)
    run.begin(*TWO)
    if "before" in moment:
        run.wait_for("waiting for the first samples")
    else:
        run.wait_for_step(10)
    run.kill(0)
    assert run.end() == ExitCode.DONE, run.said
    assert_same(run, reference)
    assert [loss["rank"] for loss in run.lost()] == [0]
    note_recovery(f"a worker {moment}", run.recoveries())


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_hung_worker_is_ended_named_and_replaced(reference, tmp_path, photos, num_workers):
    run = Run(tmp_path, photos)
    run.begin(f"distributed.num_workers={num_workers}", "output.checkpoint_steps=1", "distributed.timeout_s=20")
    run.wait_for("step 4/10")
    hung = num_workers - 1
    os.kill(run.pids()[hung], signal.SIGSTOP)
    assert run.end(300) == ExitCode.DONE, run.said
    assert any(f"ending what hangs: rank {hung} (pid" in line and "does not answer" in line for line in run.said), run.said
    [loss] = run.lost()
    assert loss["rank"] == hung
    assert "hung" in loss["cause"]
    note_recovery("a worker that hangs (counted from its end after timeout_s)", run.recoveries())
    assert run.losses() == pytest.approx(reference.losses(), abs=0 if num_workers == 2 else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(reference, tmp_path, photos, damage):
    run = Run(tmp_path, photos)
    threading.Thread(target=lambda: (run.wait_for_step(5), run.dir.request_stop(reason="test"))).start()
    assert run.start(*TWO) == ExitCode.STOPPED, run.said
    newest, before = find_checkpoints(Storage.at(run.dir.checkpoints_dir))
    shard = run.dir.checkpoints_dir / newest.shards[1].name
    content = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(content[:-100])
    elif damage == "flipped":
        shard.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
    elif damage == "missing":
        shard.unlink()
    else:
        (shard.parent / "manifest.json").unlink()
    assert run.start(*TWO) == ExitCode.DONE, run.said
    if damage != "no manifest":
        assert any(f"step-{newest.step} is damaged" in line for line in run.said)
    assert any(f"continuing after step {before.step} of 10" in line for line in run.said)
    assert_same(run, reference)


ZERO_2 = ("distributed.strategy=deepspeed", "distributed.zero_stage=2")
ZERO_3 = ("distributed.strategy=deepspeed", "distributed.zero_stage=3")
CHAINS = [[((), 2), ((), 1), ((), 2)], [((), 2), (ZERO_2, 1), (ZERO_3, 2), ((), 1)]]
"""(settings, workers) of one attempt after the other."""


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_stopped_and_continued_on_other_workers(reference, tmp_path, photos, chain):
    run = Run(tmp_path, photos)
    for number, (settings, num_workers) in enumerate(chain):
        is_last = number == len(chain) - 1
        if not is_last:
            at = 2 * (number + 1)
            threading.Thread(target=lambda at=at: (run.wait_for_step(at), run.dir.request_stop(reason="test"))).start()
        # A checkpoint after each step: without, all ten take no longer than a busy machine needs to ask for the stop.
        slow = () if is_last else ("output.checkpoint_steps=1",)
        code = run.start(f"distributed.num_workers={num_workers}", *settings, *slow)
        assert code == (ExitCode.DONE if is_last else ExitCode.STOPPED), run.said
    assert run.losses() == pytest.approx(reference.losses(), abs=1e-5)
    assert distance(reference.weights(), run.weights()) < 1e-3
    assert sum("continuing after step" in line for line in run.said) == len(chain) - 1
