"""What Ray Train's controller tells the board, with a controller's objects as Ray Train makes them."""

import time
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2.api.config import RunConfig

from diffsynth_ray.launch import watch as watch_module
from diffsynth_ray.launch.watch import Watch
from diffsynth_ray.run_dir import RunDir


class FakeBoard:
    """Records what is sent to it, as an actor handle would take it."""

    def __init__(self):
        self.sent = []
        self.silence = 0.0

    def __getattr__(self, name):
        def remote(*arguments):
            self.sent.append((name, *arguments))
            return self.silence

        return SimpleNamespace(remote=remote)


def worker(rank):
    return SimpleNamespace(
        actor=f"handle {rank}", distributed_context=SimpleNamespace(world_rank=rank),
        metadata=SimpleNamespace(node_ip="10.0.0.1", pid=70 + rank),
    )  # fmt: skip


@pytest.fixture
def board():
    return FakeBoard()


@pytest.fixture
def watch(board, tmp_path, monkeypatch):
    monkeypatch.setattr(watch_module.ray, "get", lambda value: value)
    watch = Watch(board, tmp_path)
    watch.after_worker_group_start(SimpleNamespace(get_workers=lambda: [worker(1), worker(0)]))
    return watch


def test_ray_train_takes_it_as_a_callback(tmp_path):
    RunConfig(name="x", storage_path=str(tmp_path), callbacks=[Watch(None, tmp_path)])


def test_workers_are_announced_with_their_places(watch, board):
    name, places, handles = board.sent[0]
    assert name == "begin_group"
    assert [(place.rank, place.node, place.pid) for place in places] == [(1, "10.0.0.1", 71), (0, "10.0.0.1", 70)]
    assert [ray.cloudpickle.loads(handle) for handle in handles] == ["handle 1", "handle 0"]


def test_the_first_errors_of_a_group_are_told_once(watch, board):
    healthy = {rank: WorkerStatus(running=True) for rank in range(2)}
    watch.after_worker_group_poll_status(WorkerGroupPollStatus(healthy))
    dead = WorkerHealthCheckFailedError("failed", ActorDiedError())
    broken = WorkerGroupPollStatus(healthy | {1: WorkerStatus(running=False, error=dead)})
    for _ in range(3):
        watch.after_worker_group_poll_status(broken)
    [(_, causes, is_preemption)] = [each for each in board.sent if each[0] == "lose"]
    assert list(causes) == [1]
    assert "process died" in causes[1][0]
    assert is_preemption is False
    watch.after_worker_group_start(SimpleNamespace(get_workers=lambda: [worker(0)]))
    watch.after_worker_group_poll_status(broken)
    assert [each[0] for each in board.sent].count("lose") == 2, "a new group is told of anew"


def test_a_checkpoint_comes_before_another_number_of_workers(watch, board, tmp_path, monkeypatch):
    run_dir = RunDir(tmp_path)
    waits = []

    def commit_after_three_waits(seconds):
        waits.append(seconds)
        request = run_dir.checkpoint_request()
        assert request is not None
        if len(waits) == 3:
            run_dir.answer_checkpoint_request(request)

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=commit_after_three_waits)
    monkeypatch.setattr(watch_module, "time", clock)
    watch.before_controller_execute_resize_decision(SimpleNamespace(num_workers=4))
    assert len(waits) == 3
    assert ("say", "going on with 4 worker(s): a checkpoint first") in board.sent


def test_no_checkpoint_is_awaited_from_workers_that_are_gone(watch, board, tmp_path):
    board.silence = 100.0
    watch.before_controller_execute_resize_decision(SimpleNamespace(num_workers=4))  # returns
    watch.before_worker_group_shutdown(None)
    assert board.sent[-1] == ("end_group",)
    board.sent.clear()
    watch.before_controller_execute_resize_decision(SimpleNamespace(num_workers=4))
    assert board.sent == [], "the first start, and a start after a failure, are no change"
