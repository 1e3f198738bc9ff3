"""A worker's decisions, without Ray: what it wants after a step, what it exports, what it says of its end."""

import errno
import time
from types import SimpleNamespace

import pytest
import torch
from held_saver import hold
from ray.train.v2.api.preemption import PreemptionInfo
from safetensors.torch import load_file
from tiny_trainer import build_job, build_trainer, micro, train, weights

from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.config.schema import OutputSection
from diffsynth_ray.errors import ModelError, RunError, SupersededError
from diffsynth_ray.run_dir import RunDir
from diffsynth_ray.train import worker as worker_module
from diffsynth_ray.train.checkpoint import TrainedOn, find_checkpoints
from diffsynth_ray.train.group import Group
from diffsynth_ray.train.storage import Storage
from diffsynth_ray.train.worker import _CHECKPOINT, _LOOK_FOR_PREEMPTION, _STOP, _Worker

NOW_S = 10_000.0
NUM_STEPS = 100


@pytest.fixture
def wishes(tmp_path, monkeypatch):
    """Build a worker after a step, `minutes` after its last checkpoint; what it wants."""
    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: NOW_S, time=lambda: NOW_S))
    said = []

    def of(step, *, minutes=0.0, in_flight=False, has_ended=False, looked_s=0.0, request=None, goes_in_s=None, **output):
        worker = object.__new__(_Worker)
        worker.job = SimpleNamespace(output=OutputSection.model_validate(output))
        worker.trainer = SimpleNamespace(step=step)
        worker.schedule = SimpleNamespace(num_steps=NUM_STEPS)
        worker.validation = SimpleNamespace(has_ended=has_ended)
        worker.saver = SimpleNamespace(in_flight=in_flight, took_s=3.0)
        worker.node_goes_at, worker.step_s = None if goes_in_s is None else NOW_S + goes_in_s, 2.0
        worker.run_dir, worker.say = RunDir(tmp_path), said.append
        worker.last_checkpoint, worker.last_look = NOW_S - 60 * minutes, NOW_S - looked_s
        if request is not None:
            request(worker.run_dir)
        wanted = worker._wishes()
        of.node_goes_at = worker.node_goes_at
        return wanted

    of.said = said
    return of


def test_between_checkpoints_nothing_is_wanted(wishes):
    assert wishes(7, minutes=14.9, checkpoint_steps=5) == 0


def test_checkpoints_by_steps_count_optimizer_steps_from_the_runs_start(wishes):
    due = [step for step in range(1, 16) if wishes(step, checkpoint_steps=5)]
    assert due == [5, 10, 15]
    assert wishes(5, checkpoint_steps=5, in_flight=True) == _CHECKPOINT, "it waits for the one before"


def test_checkpoints_by_time(wishes):
    assert wishes(7, minutes=15.0) == _CHECKPOINT  # the default
    assert wishes(7, minutes=2.0, checkpoint_minutes=2) == _CHECKPOINT
    assert wishes(7, minutes=1.9, checkpoint_minutes=2) == 0
    assert wishes(7, minutes=15.0, in_flight=True) == 0, "it can wait for the one that is still being written"


def test_a_checkpoint_on_request_waits_for_the_one_that_is_being_written(wishes):
    assert wishes(7, request=RunDir.request_checkpoint, in_flight=True) == 0
    assert wishes(7) == _CHECKPOINT


def test_before_a_node_goes_there_is_a_last_checkpoint(wishes):
    """In time for a step of 2 s, twice a checkpoint of 3 s and 5 s more."""
    assert wishes(7, goes_in_s=13.1) == 0
    assert wishes(7, goes_in_s=12.9, in_flight=True) == 0, "one is being written"
    assert wishes.node_goes_at is not None
    assert wishes(7, goes_in_s=12.9) == _CHECKPOINT
    assert wishes.node_goes_at is None, "once"
    assert wishes.said == ["a node goes in 13 s: checkpoint after step 7"]


def test_when_a_node_goes_is_what_ray_train_says(monkeypatch):
    worker = object.__new__(_Worker)
    worker.trainer, worker.preempted_nodes, worker.node_goes_at, worker.say = SimpleNamespace(step=7), set(), None, len
    for deadline_ms, nodes, expected in ((None, "a", None), (60_000, "ab", 60.0), (90_000, "ab", 60.0), (0, "abc", None)):
        info = PreemptionInfo(deadline_ms=deadline_ms, preempted_node_to_ranks={node: [0] for node in nodes})
        monkeypatch.setattr(worker_module.ray.train, "get_preemption_info", lambda info=info: info)
        assert worker._is_new_preemption() == (deadline_ms != 90_000)
        assert worker.node_goes_at == expected


def test_the_end_is_kept_however_it_comes(wishes):
    assert wishes(NUM_STEPS, in_flight=True) == _CHECKPOINT
    assert wishes(7, has_ended=True, in_flight=True) == _CHECKPOINT
    assert wishes(7, request=lambda run_dir: run_dir.request_stop(reason="Ctrl-C"), in_flight=True) == _STOP | _CHECKPOINT
    assert wishes.said == ["stopping after step 7: Ctrl-C"]
    # A run that is through its steps was not stopped.
    assert wishes(NUM_STEPS) == _CHECKPOINT
    assert len(wishes.said) == 1


def test_the_cluster_is_looked_at_every_two_seconds(wishes):
    assert wishes(7, looked_s=1.9) == 0
    assert wishes(7, looked_s=2.0) == _LOOK_FOR_PREEMPTION


# Exports


def exporting(tmp_path, *, rank=0, may_commit=True, **training):
    """A worker that has done one step."""
    worker = object.__new__(_Worker)
    worker.job = build_job(training={"ema_decay": 0.9} | training)
    worker.trainer = build_trainer(worker.job)
    worker.trainer.train_step([micro([0])], num_samples=1)
    worker.rank, worker.run_dir = rank, RunDir(tmp_path)
    worker.heartbeat = SimpleNamespace(enter=lambda *told: None)
    worker.may_commit = lambda: may_commit
    worker.said = []
    worker.say = worker.said.append
    return worker


@pytest.mark.parametrize(
    ("device", "keys", "threads"),
    [
        ("cpu", {}, 8),
        ("cuda", {}, None),
        ("cuda", {"offload": {"cpu_offload": True, "optimize_on_cpu": True}}, 8),
        ("cuda", {"distributed": {"strategy": "deepspeed", "offload_optimizer_device": "cpu"}}, 8),
    ],
)
def test_updates_on_the_host_take_a_workers_share_of_the_cpus(monkeypatch, device, keys, threads):
    """32 CPUs and four workers: Ray would leave one thread to each."""
    taken = []
    monkeypatch.setattr(worker_module, "available_cpus", lambda: 32)
    monkeypatch.setattr(worker_module.torch, "set_num_threads", taken.append)
    worker = object.__new__(_Worker)
    worker.device, worker.job, worker.local_world_size = torch.device(device), build_job(**keys), 4
    worker._take_threads()
    assert taken == ([] if threads is None else [threads])


def test_moving_averages_are_exported_beside_the_weights(tmp_path):
    worker = exporting(tmp_path)
    worker._export_as("step-1")
    assert worker.said == ["wrote step-1.safetensors, step-1.ema.safetensors"]
    weights, averages = load_file(tmp_path / "step-1.safetensors"), load_file(tmp_path / "step-1.ema.safetensors")
    # B begins with 0, so that after one step of decay 0.9 its average is a tenth of it.
    keys = [key for key in weights if ".lora_B." in key and weights[key].any()]
    assert keys
    assert weights.keys() == averages.keys()
    assert all(torch.allclose(averages[key], weights[key] / 10, atol=1e-8) for key in keys)


def test_without_moving_averages_there_is_one_file(tmp_path):
    exporting(tmp_path, ema_decay=None)._export_as("epoch-0")
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0.safetensors"]


def test_of_a_schedule_free_optimizer_the_averaged_weights_are_exported(tmp_path):
    worker = exporting(tmp_path, optimizer="schedule_free.AdamW", learning_rate=1e-2, ema_decay=None)
    train(worker.trainer, [micro([0, 1])], steps=2)
    with worker.trainer.strategy.eval_weights():
        expected = sorted(float(tensor.norm()) for tensor in weights(worker.trainer).values())
    worker._export_as("step-3")
    found = sorted(float(tensor.float().norm()) for tensor in load_file(tmp_path / "step-3.safetensors").values())
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(sorted(float(tensor.norm()) for tensor in weights(worker.trainer).values()), rel=1e-5)


def test_only_rank_0_of_the_newest_attempt_writes(tmp_path):
    exporting(tmp_path, rank=1, may_commit=False)._export_as("step-1")
    with pytest.raises(SupersededError):
        exporting(tmp_path, may_commit=False)._export_as("step-1")
    assert list(tmp_path.iterdir()) == []


def saving(tmp_path):
    """A worker that has done one step and can write checkpoints."""
    worker = exporting(tmp_path)
    worker.job = build_job(output={"keep_checkpoints": 3})
    worker.storage, worker.world_size = Storage.at(tmp_path / "checkpoints"), 1
    worker.token, worker.writer, worker.writers = "token", "writer", Group(1)
    worker.index = SimpleNamespace(metadata=[{}] * 5, order=SimpleNamespace(digest="digest"))
    worker.saver = worker._build_saver()
    return worker


def test_as_many_checkpoints_are_kept_as_the_job_says_and_a_request_is_taken_back(tmp_path):
    worker = saving(tmp_path)
    worker.run_dir.request_checkpoint()
    for step in range(1, 6):
        worker.trainer.step = step
        worker._checkpoint()
    worker.saver.finish()
    found = find_checkpoints(worker.storage)
    assert [each.step for each in found] == [5, 4, 3]
    assert found[0].trained_on == TrainedOn(5, "digest")
    assert worker.run_dir.checkpoint_request() is None


def test_a_request_is_not_answered_by_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    worker = saving(tmp_path)
    may_write = hold(monkeypatch, "write_shard")
    worker.trainer.step = 1
    worker._checkpoint()
    worker.run_dir.request_checkpoint()  # steps after it, which the requester would lose
    may_write.set()
    worker.saver.finish()
    assert worker.run_dir.checkpoint_request() is not None
    worker.trainer.step = 4
    worker._checkpoint()
    worker.saver.finish()
    assert worker.run_dir.checkpoint_request() is None
    assert [each.step for each in find_checkpoints(worker.storage)] == [4, 1]


# How a worker ends


@pytest.fixture
def end(tmp_path, monkeypatch):
    """Run the train function of a worker that ends with an error; what the board was told to be the run's own failure."""
    job = build_job(dataset={"base_path": str(tmp_path)}, output={"path": str(tmp_path / "out")})
    resolved = resolve(job, Resources(cpus=8, gpus=0))
    monkeypatch.setattr(worker_module.ray, "get", lambda value: value)
    monkeypatch.setattr(worker_module.ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 3))
    waited, failures, phases = [], [], []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=waited.append)  # its own: other threads sleep too
    monkeypatch.setattr(worker_module, "time", clock)

    def of(error):
        class Broken:
            def __init__(self, *arguments, **keywords):
                pass

            def run(self):
                raise error

            def out_of_memory(self, error):
                return RunError(f"told of {error}")

        def remote(call):
            return SimpleNamespace(remote=call)

        monkeypatch.setattr(worker_module, "_Worker", Broken)
        board = SimpleNamespace(
            enter=remote(lambda *told: None),
            beat=remote(lambda rank, phase, *rest: phases.append(phase)),
            fail=remote(lambda rank, failure: failures.append((rank, failure))),
        )
        arguments = {"token": "t", "index": None, "cached": None, "components": None, "spare": None}
        with pytest.raises(type(error)) as caught:
            worker_module.train_loop(resolved_json=resolved.model_dump_json(), board=board, **arguments)
        assert caught.value is error
        assert phases[-1] == "done"
        return failures

    of.waited = waited
    return of


def test_what_no_restart_mends_is_told_as_the_runs_failure(end):
    mistake = ModelError("no such layer")
    assert end(mistake) == [(3, mistake)]


def test_a_full_device_is_told_with_what_holds_it(end):
    [(rank, failure)] = end(torch.OutOfMemoryError("CUDA out of memory"))
    assert (rank, str(failure)) == (3, "told of CUDA out of memory")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_its_cure(end, number):
    [(rank, failure)] = end(OSError(number, "No space left on device", "/outputs/step-1.safetensors"))
    assert rank == 3
    assert failure.message == "/outputs/step-1.safetensors: No space left on device"
    assert "make room" in failure.hint


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("a bug"), KeyError("a bug")])
def test_what_a_restart_may_mend_is_left_to_ray_train(end, error):
    assert end(error) == []
    assert end.waited == []


def test_who_lost_another_worker_waits_so_that_the_cause_is_heard_first(end):
    assert end(RuntimeError("Connection closed by peer [10.0.0.2]:4711")) == []
    assert end.waited == [20.0]
