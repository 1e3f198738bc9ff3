"""What a worker waits for the others, measured: in gloo processes (communication_rank.py) of which one is late, and alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_trainer import build_job, build_trainer, micro, train

from diffsynth_ray.memory import timing
from diffsynth_ray.train.strategy.communication import CommunicationTimer, TimedCollectives

RANK = Path(__file__).parent / "communication_rank.py"
LATE_S = 0.5


def run_ranks(folder, cases):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(RANK.parents[3]), str(RANK.parents[2] / "support")])}
    logs = [folder / f"rank-{rank}.log" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-W", "ignore", str(RANK), str(rank), str(folder), str(LATE_S), *cases]
        with log.open("w") as output:
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=500) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def check(ranks, cases):
    on_time, late = ranks
    assert on_time.keys() == late.keys() == set(cases)
    for case in cases:
        absent = []
        for first, second in zip(on_time[case], late[case], strict=True):
            # The wait in which the other one's step begins lasts at least until then.
            absent.append(second["began"] - [wait for wait in first["waits"] if wait < second["began"]][-1])
            assert first["waited"] >= absent[-1], case
        assert min(absent) >= LATE_S, case
        # A busy machine makes the one or the other later still: the clearest of the steps is what counts.
        assert any(second["waited"] < 0.6 * first["waited"] for first, second in zip(on_time[case], late[case])), case


def test_a_late_worker_is_waited_for_by_the_other(tmp_path):
    cases = ["ddp, recomputed", "zero 3"]
    check(run_ranks(tmp_path, cases), cases)


@pytest.mark.slow
def test_under_every_strategy(tmp_path):
    ddp, host = ["ddp", "ddp, bf16", "ddp, unused"], ["host", "host, clipped"]
    cases = [*ddp, "zero 1", "zero 2", "zero 2, bf16", "zero 2, beside", "zero 3, beside", *host]
    check(run_ranks(tmp_path, cases), cases)


def test_one_worker_waits_for_nobody():
    trainer = build_trainer(build_job())
    train(trainer, [micro([0])], steps=1)
    trainer.strategy.sum_over_workers(torch.ones(()))
    assert trainer.strategy.communication.take_s() == 0


@pytest.fixture
def sleep(monkeypatch):
    """Lets the timer's clock go on."""
    now = [100.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.fixture
def timer():
    return CommunicationTimer(torch.device("cpu"), world_size=2)


class Slow(torch.autograd.Function):
    """An identity with an expensive gradient, at whose end the pass waits, as under DistributedDataParallel."""

    @staticmethod
    def forward(ctx, x, compute, wait):
        ctx.compute, ctx.wait = compute, wait
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.compute()
        torch.autograd.Variable._execution_engine.queue_callback(ctx.wait)
        return gradient, None, None


def test_of_a_backward_pass_the_wait_at_its_end_counts(timer, sleep):
    loss = Slow.apply(torch.ones((), requires_grad=True), lambda: sleep(3), lambda: sleep(1))
    with timer.after_backward(loss):
        loss.backward()
    assert timer.take_s() == 1


def test_a_backward_pass_that_fails_leaves_the_timer_usable(timer, sleep):
    loss = torch.ones((), requires_grad=True) * 1

    def fail(_):
        raise RuntimeError("no memory")

    loss.register_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"), timer.after_backward(loss):
        loss.backward()
    with timer.waiting():
        sleep(1)
    assert timer.take_s() == 1


def test_a_wait_in_a_wait_counts_once(timer, sleep):
    with timer.waiting(), timer.waiting():
        sleep(1)
    assert timer.take_s() == 1


def test_of_a_backend_the_blocking_calls_count_and_the_waits_for_the_others(timer, sleep):
    work = SimpleNamespace(wait=lambda: sleep(1), is_completed=lambda: "soon")
    backend = SimpleNamespace(
        all_reduce=lambda tensor, async_op=False: work if async_op else sleep(2), get_rank=lambda: sleep(3)
    )
    timed = TimedCollectives(backend, timer)
    timed.get_rank()
    assert timer.take_s() == 0
    timed.all_reduce(None)
    assert timer.take_s() == 2
    under_way = timed.all_reduce(None, async_op=True)
    sleep(2)  # hidden behind it
    assert under_way.is_completed() == "soon"
    under_way.wait()
    assert timer.take_s() == 1


def test_on_a_gpu_only_the_stream_that_computes_waits(monkeypatch):
    compute, beside = (SimpleNamespace(device="cuda", number=number) for number in range(2))
    current = [compute]

    def make_event(*, enable_timing):
        return SimpleNamespace(record=lambda: None, query=lambda: True, elapsed_time=lambda end: 250.0)

    monkeypatch.setattr(torch.cuda, "Event", make_event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    timer = CommunicationTimer(torch.device("cuda"), world_size=2)
    for stream in (compute, beside, compute):
        current[0] = stream
        with timer.waiting():
            pass
    assert timer.take_s() == pytest.approx(0.5)
