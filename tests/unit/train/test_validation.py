"""The validation loss: fixed numbers, nothing disturbed, the best and the end found."""

import math

import numpy as np
import pytest
import torch
from tiny_trainer import build_job, build_trainer, micro, train, weights

from diffsynth_ray.data.batches import SampleOrder, build_buckets
from diffsynth_ray.data.samples import SampleIndex
from diffsynth_ray.errors import DataError
from diffsynth_ray.run_dir import RunDir, ValidationEntry
from diffsynth_ray.train.group import Group
from diffsynth_ray.train.validation import Surroundings, Validation
from diffsynth_ray.train.validation_loss import ValidationLoss, judge, quantile_ids

torch.set_num_threads(1)


class Pictures(SampleIndex):
    """Samples whose pixels follow from their row; row `broken` cannot be read."""

    broken = None

    def decode(self, micro_batch, *, step, out=None):
        if micro_batch.rows[0] == self.broken:
            raise DataError("row 2: a broken file")
        found = micro(micro_batch.rows).batch
        return type("Decoded", (), {"pixels": found.pixels, "prompts": found.prompts, "rows": found.rows, "extra": {}})


def build_index(num_rows=3, *, holdout=None):
    order = SampleOrder(build_buckets([(32, 48, 1)] * num_rows), repeat=1, batch_size=1, global_batch_size=4, seed=0)
    return Pictures(metadata=None, order=order, dataset=None, holdout=holdout)


def build_loss(trainer, *, num_rows=3, rank=0, world_size=1, group=None):
    loss = ValidationLoss(
        trainer, build_index(num_rows), group=group or Group(1), rank=rank, world_size=world_size, enter=lambda what: None
    )
    loss.load(skip_bad=False)
    return loss


def test_twice_is_bit_equal_and_changes_nothing():
    plain, watched = build_trainer(build_job()), build_trainer(build_job())
    loss = build_loss(watched)
    first, second = loss.compute(0), loss.compute(0)
    assert (first.loss, first.quantiles) == (second.loss, second.quantiles)
    assert len(set(first.quantiles)) == 4
    expected, found = [], []
    for _ in range(3):
        expected += train(plain, [micro([0, 1])], steps=1)
        found += train(watched, [micro([0, 1])], steps=1)
        loss.compute(watched.step)
    assert found == expected
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, watched.strategy.full_masters()[name]), name
    assert loss.compute(3).loss != first.loss, "the weights have changed"


class OneOfTwo(Group):
    """What a worker of two gathers, when the other's values are known."""

    def __init__(self, *others):
        super().__init__(1)
        self.others = list(others)

    def gather(self, value):
        return [value, self.others.pop(0)]


@pytest.mark.parametrize("num_rows", [1, 3])
def test_two_workers_find_the_same(num_rows):
    trainer = build_trainer(build_job())
    alone = build_loss(trainer, num_rows=num_rows).compute(0)
    parts = []

    class Recorder(Group):
        def gather(self, value):
            parts.append(value)
            return [value]

    # The first worker's part of the losses is the third value that it gathers.
    first = build_loss(trainer, num_rows=num_rows, rank=0, world_size=2, group=Recorder(1))
    first.compute(0)
    second = build_loss(trainer, num_rows=num_rows, rank=1, world_size=2, group=OneOfTwo({}, len(first._samples), parts[2]))
    both = second.compute(0)
    assert (both.loss, both.quantiles) == (alone.loss, alone.quantiles)
    assert len(first._samples) + len(second._samples) == num_rows


def test_every_sample_has_its_own_noise_at_every_timestep(monkeypatch):
    names = []

    def draw(*name, shape):
        names.append(name)
        return torch.zeros(shape)

    monkeypatch.setattr("diffsynth_ray.train.validation_loss.draw_validation_noise", draw)
    build_loss(build_trainer(build_job(validation={"seed": 7}))).compute(0)
    assert names == [(7, sample, quantile) for sample in range(3) for quantile in range(4)]


def test_a_trained_encoder_is_run_every_time():
    trainer = build_trainer(build_job(training={"trainable_models": ["text_encoder"]}))
    loss = build_loss(trainer)
    assert all(sample.kept is None for sample in loss._samples)
    before = loss.compute(0).loss
    train(trainer, [micro([0, 1])], steps=1)
    assert loss.compute(1).loss != before


def test_a_broken_sample_is_named_or_left_out():
    trainer = build_trainer(build_job())
    index = build_index()
    object.__setattr__(index, "broken", 1)
    arguments = {"group": Group(1), "rank": 0, "world_size": 1, "enter": lambda what: None}
    with pytest.raises(DataError, match="a broken file"):
        ValidationLoss(trainer, index, **arguments).load(skip_bad=False)
    loss = ValidationLoss(trainer, index, **arguments)
    assert loss.load(skip_bad=True) == ["validation sample 2: row 2: a broken file"]
    assert loss.compute(0).num_samples == 2


def test_timesteps_are_the_middles_of_equal_parts_of_the_trained_range():
    assert quantile_ids((0, 1000)) == [125, 375, 625, 875]
    assert quantile_ids((0, 358)) == [44, 134, 223, 313]
    assert quantile_ids((7, 8)) == [7, 7, 7, 7]


def entries(*losses):
    return [ValidationEntry(step, loss, quantiles=[loss], num_samples=1, seconds=0) for step, loss in enumerate(losses)]


def test_the_best_and_the_end():
    assert judge(entries(3.0), early_stopping=1).is_best
    assert not judge(entries(3.0, 3.0), early_stopping=None).is_best, "an equal loss is not lower"
    assert not judge(entries(3.0, 2.0, 2.5), early_stopping=2).ends_training
    assert judge(entries(3.0, 2.0, 2.5, 2.1), early_stopping=2).ends_training
    assert judge(entries(math.nan, 2.0), early_stopping=1).is_best
    assert not judge(entries(2.0, math.nan), early_stopping=None).is_best


def run(tmp_path, *, training=None, start_step=0, **keys):
    """(what was said, exports, published figures, the validation) of six steps, or of those after `start_step`."""
    job = build_job(validation={"holdout": "held.csv", "every_steps": 2, **keys}, training={"max_steps": 6} | (training or {}))
    trainer = build_trainer(job)
    trainer.step = start_step
    said, exported, published = [], [], {}
    around = Surroundings(
        run_dir=RunDir(tmp_path),
        group=Group(1),
        rank=0,
        world_size=1,
        enter=lambda what: None,
        say=said.append,
        publish=lambda step, figures: published.update({step: figures}),
        export=lambda stem: exported.append((stem, trainer.step)),
        show=lambda step, samples: None,
        may_write=lambda: True,
    )
    validation = Validation(job, trainer, build_index(holdout=build_index()), around)
    validation.start()
    while trainer.step < 6 and not validation.has_ended:
        train(trainer, [micro([0, 1, 2])], steps=1)
        validation.after_step()
    return said, exported, published, validation


def test_before_the_first_step_regularly_and_at_the_end(tmp_path):
    _, exported, published, _ = run(tmp_path, keep_best=True)
    assert sorted(published) == [0, 2, 4, 6]
    assert set(published[0]) == {"validation_loss", *(f"validation_loss/q{n}" for n in range(4))}
    losses = [figures["validation_loss"] for figures in published.values()]
    assert losses[-1] < losses[0], "it is trained on the same pictures"
    assert np.isclose(losses[0], np.mean([published[0][f"validation_loss/q{n}"] for n in range(4)]))
    assert exported[-1] == ("best", 2 * int(np.argmin(losses)))
    assert [entry.step for entry in RunDir(tmp_path).validations()] == [0, 2, 4, 6]


def test_early_stopping_survives_a_restart(tmp_path):
    run_dir = RunDir(tmp_path)
    for entry in entries(1e-9, 1.0, 1.0):
        run_dir.note_validation(entry)
    run_dir.forget_validations(after_step=1)
    assert [entry.step for entry in run_dir.validations()] == [0, 1]
    run_dir.forget_validations(after_step=0)
    assert run_dir.validations() == []


def test_a_run_that_goes_on_judges_by_the_validations_before_its_checkpoint(tmp_path):
    run_dir = RunDir(tmp_path)
    for step, loss in ((2, 1e-9), (4, 1.0), (6, 1e-10)):  # the last one was after the checkpoint of step 4
        run_dir.note_validation(ValidationEntry(step=step, loss=loss, quantiles=[loss], num_samples=1, seconds=0.1))
    _, exported, published, _ = run(tmp_path, start_step=4, keep_best=True)
    assert [entry.step for entry in run_dir.validations()] == [2, 4, 6]
    assert sorted(published) == [6]
    assert exported == [], "step 2 is the best"


def test_a_training_that_has_ended_early_does_not_go_on(tmp_path):
    for step, loss in ((2, 1e-9), (4, 1.0)):
        RunDir(tmp_path).note_validation(ValidationEntry(step=step, loss=loss, quantiles=[loss], num_samples=1, seconds=0.1))
    said, _, published, validation = run(tmp_path, start_step=4, early_stopping=1)
    assert validation.has_ended
    assert published == {}
    assert "ending after step 4 of 6" in said[-1]


def test_early_stopping_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("diffsynth_ray.train.trainer.Trainer.lr", lambda self, step: 0.0)
    said, exported, published, validation = run(tmp_path, early_stopping=2, keep_best=True)
    assert validation.has_ended
    assert sorted(published) == [0, 2, 4]
    assert "ending after step 4 of 6" in said[-1]
    assert exported == []


def test_of_a_schedule_free_optimizer_the_averaged_weights_are_validated(tmp_path):
    _, _, published, validation = run(tmp_path, training={"optimizer": "schedule_free.AdamW", "learning_rate": 1e-2})
    trained = validation._loss.compute(6).loss
    with validation._trainer.strategy.eval_weights():
        evaluated = validation._loss.compute(6).loss
    assert published[6]["validation_loss"] == evaluated != trained


def test_averaged_weights_are_validated_too(tmp_path):
    _, _, published, _ = run(tmp_path, training={"ema_decay": 0.9})
    assert published[0]["validation_loss_ema"] == published[0]["validation_loss"], "they begin alike"
    assert published[6]["validation_loss_ema"] != published[6]["validation_loss"]
    assert RunDir(tmp_path).validations()[-1].ema_loss == published[6]["validation_loss_ema"]
