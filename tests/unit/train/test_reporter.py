"""What a worker tells of its steps, beside the loss: where their time goes, and how much they compute."""

import time
from types import SimpleNamespace

import pytest
import torch
from tiny_trainer import build_job, build_trainer, micro

from diffsynth_ray.config.schema import LoggingSection
from diffsynth_ray.errors import RunError
from diffsynth_ray.run_dir import RunDir
from diffsynth_ray.train import reporter as reporter_module
from diffsynth_ray.train.feed import FedStep
from diffsynth_ray.train.figures import FigureWriter
from diffsynth_ray.train.reporter import Reporter
from diffsynth_ray.train.strategy.communication import CommunicationTimer


class Shown(dict):
    """Gauges by name, and what they show."""

    def __missing__(self, name):
        return type("Gauge", (), {"set": lambda _, value: self.__setitem__(name, value)})()

    def __getitem__(self, name):
        return self.__missing__(name)


def report(trainer, tmp_path, steps=2):
    run_dir, shown, said = RunDir(tmp_path), Shown(), []
    logging = LoggingSection(tensorboard=False, every_steps=2)
    reporter = Reporter(
        trainer=trainer, run_dir=run_dir, rank=0, gauges=shown, may_commit=lambda: True, say=said.append,
        figures=FigureWriter(run_dir, logging, start_step=0),
    )  # fmt: skip
    for _ in range(steps):
        started = time.monotonic()
        micro_inputs = [micro([0, 1]), micro([2]), micro([3], is_dummy=True)]
        result = trainer.train_step(micro_inputs, num_samples=3)
        reporter.after_step(result, FedStep(micro_inputs, 3, (0, 1, 2), ()), started=started, data_wait_s=0.01)
    rows = [line.split(",") for line in run_dir.loss_path.read_text().splitlines()[1:]]
    return dict(shown.items()), {key: float(value) for step, key, value in rows if int(step) == steps}, said


def test_parts_of_a_step_and_its_tokens(tmp_path):
    trainer = build_trainer(build_job(logging={"every_steps": 2}))
    trainer.graph.encoding._done_s = 100.0  # of the micro batch that is tried before the first step
    shown, written, said = report(trainer, tmp_path)
    # 32x48 pixels are 4x6 latents, 2x3 patches; the dummy counts nothing.
    assert shown["tokens_per_s"] == pytest.approx(3 * 6 / shown["step_s"])
    assert 0 < written["encode_s"] < written["step_s"]
    assert "transfer_s" not in written, "nothing is offloaded"
    assert written["communication_s"] == shown["communication_s"] == 0, "one worker waits for nobody"
    assert shown["moved_gib"] == 0
    assert shown["stage_progress"] == pytest.approx(2 / 10)
    assert len(said) == 1, "the first step is not logged"


def test_figures_are_means_without_the_step_that_waits_for_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(reporter_module, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    trainer = build_trainer(build_job())
    run_dir, shown = RunDir(tmp_path), Shown()
    reporter = Reporter(
        trainer=trainer, run_dir=run_dir, rank=0, gauges=shown, may_commit=lambda: True, say=print,
        figures=FigureWriter(run_dir, LoggingSection(tensorboard=False), start_step=0),
    )  # fmt: skip
    for spent_s, data_wait_s in ((100.0, 50.0), (1.0, 0.2), (3.0, 0.4)):
        micro_inputs = [micro([0, 1]), micro([2])]
        result = trainer.train_step(micro_inputs, num_samples=3)
        fed = FedStep(micro_inputs, 3, (0, 1, 2), ())
        reporter.after_step(result, fed, started=1000.0 - spent_s, data_wait_s=data_wait_s)
    rows = [line.split(",") for line in run_dir.loss_path.read_text().splitlines()[1:]]
    written = {key: float(value) for step, key, value in rows if int(step) == 3}
    assert written["loss"] == pytest.approx(result.loss_sum.item() / 3)
    assert written["lr"] == result.lr
    assert written["grad_norm"] == pytest.approx(result.grad_norm.item())
    assert written["step_s"] == pytest.approx(2.0)
    assert written["samples_per_s"] == pytest.approx(3 / written["step_s"])
    assert written["data_wait_s"] == pytest.approx(0.3)
    assert {key: pytest.approx(value) for key, value in written.items() if key in shown}.items() <= shown.items()


def wait_in_each_step(trainer, timer, waits):
    """The timer measures these in the next steps."""
    train_step = type(trainer).train_step
    left = iter(waits)

    def wait_and_train(*args, **kwargs):
        timer._done_s += next(left)
        return train_step(trainer, *args, **kwargs)

    trainer.train_step = wait_and_train


def test_waits_for_other_workers_are_told_a_step(tmp_path):
    trainer = build_trainer(build_job(logging={"every_steps": 2}))
    timer = trainer.strategy.communication = CommunicationTimer(torch.device("cpu"), world_size=2)
    wait_in_each_step(trainer, timer._timer, [7.0, 1.0, 0.5, 0.25])
    shown, written, _ = report(trainer, tmp_path, steps=4)
    assert written["communication_s"] == shown["communication_s"] == 0.375, "of two steps"


def test_the_first_step_waits_for_the_start(tmp_path):
    trainer = build_trainer(build_job(logging={"every_steps": 2}))
    timer = trainer.strategy.communication = CommunicationTimer(torch.device("cpu"), world_size=2)
    wait_in_each_step(trainer, timer._timer, [7.0, 1.0])
    shown, written, _ = report(trainer, tmp_path)
    assert written["communication_s"] == shown["communication_s"] == 1.0


def test_offloaded_weights_are_counted_and_waited_for(tmp_path):
    trainer = build_trainer(build_job(offload={"cpu_offload": True}, logging={"every_steps": 2}))
    trainer.residency.offload.stalls._done_s = 100.0  # of the micro batch that is tried before the first step
    wait_in_each_step(trainer, trainer.residency.offload.stalls, [7.0, 0.5])
    shown, written, _ = report(trainer, tmp_path)
    assert written["transfer_s"] == 0.5
    moved = shown["moved_gib"] * 2**30
    blocks = [unit for unit in trainer.residency.offload.units if "transformer_blocks" in unit.name]
    assert blocks
    assert moved >= sum(unit.num_bytes for unit in blocks), "each is loaded at least once"


def spoil_gradients(trainer):
    """The backward passes of the next step overflow: finite losses, infinite gradients, and weights that are no numbers."""
    for param in trainer.trained.values():
        param.register_hook(lambda gradient: None if gradient is None else gradient * float("inf"))


def test_a_step_without_usable_weights_ends_the_run_where_it_is_logged(tmp_path):
    trainer = build_trainer(build_job())
    spoil_gradients(trainer)
    with pytest.raises(RunError, match=r"the gradient norm of step 1 is (nan|inf); rank 0 trained on the metadata rows"):
        report(trainer, tmp_path)


def test_a_step_without_usable_weights_ends_the_run_before_they_are_kept(tmp_path):
    trainer = build_trainer(build_job(logging={"every_steps": 100}))
    reporter = Reporter(
        trainer=trainer, run_dir=RunDir(tmp_path), rank=1, gauges=Shown(), may_commit=lambda: True, say=print, figures=None
    )  # fmt: skip

    def step():
        started, micro_inputs = time.monotonic(), [micro([0, 1])]
        fed = FedStep(micro_inputs, 2, (0, 1), ())
        result = trainer.train_step(micro_inputs, num_samples=2)
        reporter.after_step(result, fed, started=started, data_wait_s=0.0)
        return result, fed

    reporter.before_checkpoint(*step())
    spoil_gradients(trainer)
    unseen = step()
    with pytest.raises(RunError, match="the gradient norm of step 2 is"):
        reporter.before_checkpoint(*unseen)
    with pytest.raises(RunError, match="the gradient norm of step 3 is"):
        reporter.before_checkpoint(*step())
