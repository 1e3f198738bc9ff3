"""What the board makes of the workers' signs of life, and which of several failures it takes for the root."""

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from diffsynth_ray.errors import DataError
from diffsynth_ray.launch import board as board_module
from diffsynth_ray.launch.failures import WorkerPlace, describe, pick_root

KILLED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\nThe actor is dead because its "
    "worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection "
    "error code 2. End of file. There are some potential root causes. (1) The process is killed by SIGKILL by OOM killer."
)
NODE_DIED = "The actor died because its node has died. Node Id: 12ab\n\tthe actor's node was terminated unexpectedly"


def death(text):
    error = ActorDiedError()
    error.error_msg = text
    return WorkerHealthCheckFailedError("A worker health check failed.", error)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(board_module, "time", clock)
    return clock


@pytest.fixture
def board(clock):
    board = board_module.Board.__ray_metadata__.modified_class()
    places = [WorkerPlace(rank=rank, node="10.0.0.1", pid=70 + rank, log="") for rank in range(2)]
    board.begin_group(places, ["handle 0", "handle 1"])
    board.enter(1, "/logs/one")
    return board


def test_the_process_that_died_is_the_root_and_not_the_one_that_followed():
    follower = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:61234")
    rank, cause = pick_root({0: describe(follower), 1: describe(death(KILLED))})
    assert rank == 1
    assert cause.startswith("its process died (Worker unexpectedly exits with a connection error code 2. End of file)")
    assert describe(death(NODE_DIED))[0] == "its node died"
    assert pick_root({0: describe(follower), 1: describe(ValueError("wrong"))}) == (1, "ValueError: wrong")
    assert describe(DataError("row 3 is bad", hint="mend it"))[0] == "row 3 is bad\n  mend it"


def test_a_loss_has_rank_place_log_and_step(board):
    board.beat(0, "training", 6, 0.1)
    board.beat(1, "training", 7, 0.1)
    board.lose({1: describe(death(KILLED))}, False)
    [loss] = board.take(30.0).losses
    assert (loss.worker.rank, loss.worker.log, loss.step) == (1, "/logs/one", 7)
    assert str(loss.worker) == "rank 1 (pid 71 on 10.0.0.1, log /logs/one)"
    assert board.take(30.0).losses == []


def test_a_silent_process_is_the_one_that_hangs(board, clock):
    board.beat(1, "training", 5, 0)
    clock.now += 20
    board.beat(0, "training", 5, 20)
    assert board.take(30.0).hung is None
    clock.now += 15
    board.beat(0, "training", 5, 35)
    hung = board.take(30.0).hung
    assert hung.handles == ["handle 1"]
    assert "rank 1 (pid 71 on 10.0.0.1, log /logs/one) hung" in hung.text
    assert "the process does not answer" in hung.text
    assert board.take(30.0).hung is None, "named once"
    board.lose({0: describe(RuntimeError("Connection closed by peer")), 1: describe(death(KILLED))}, False)
    [loss] = board.take(30.0).losses
    assert (loss.worker.rank, "hung" in loss.cause) == (1, True), "the kill is not the cause"


def test_workers_that_wait_for_ever_are_all_named(board, clock):
    clock.now += 31
    board.beat(0, "training", 5, 31)
    board.beat(1, "waiting for samples", 4, 31)
    hung = board.take(30.0).hung
    assert len(hung.handles) == 2
    assert "waiting for samples at step 4 for 31 s" in hung.text


def test_work_goes_on_so_nothing_hangs(board, clock):
    for step in range(10):
        clock.now += 20
        for rank in range(2):
            board.beat(rank, "training", step, 3.0)
        assert board.take(30.0).hung is None


def test_idle_is_the_time_without_workers(board, clock):
    assert board.take(30.0).idle_s == 0
    board.end_group()
    clock.now += 7
    assert board.take(30.0).idle_s == 7
    assert board.silence_s() == float("inf")


def test_loading_may_take_longer_than_a_step(board, clock):
    for age in (31, 119):
        clock.now = 100.0 + age
        for rank in range(2):
            board.beat(rank, "loading the model", 0, age)
        assert board.take(30.0).hung is None
    clock.now = 100.0 + 121
    for rank in range(2):
        board.beat(rank, "loading the model", 0, 121)
    assert "loading the model" in board.take(30.0).hung.text


def test_a_worker_that_is_done_is_not_missed(board, clock):
    board.beat(0, "done", 9, 0)
    board.beat(1, "exporting", 9, 0)
    board.beat(0, "training", 9, 0)  # sent before, arrived later
    clock.now += 25
    board.beat(1, "exporting", 9, 25)
    clock.now += 10
    hung = board.take(30.0).hung
    assert hung.handles == ["handle 1"]
