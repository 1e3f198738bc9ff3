"""What happens between steps to see what is being trained: validation loss, best weights, early end, sample pictures.

Before the first step, every `validation.every_steps` and at the end. All workers take part; rank 0 writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffsynth_ray.config.schema import Job
from diffsynth_ray.data.samples import SampleIndex
from diffsynth_ray.run_dir import RunDir, ValidationEntry
from diffsynth_ray.train.cached_input import CachedInput
from diffsynth_ray.train.group import Group
from diffsynth_ray.train.pictures import Samples
from diffsynth_ray.train.sample_file import SampleFile
from diffsynth_ray.train.sampler import Errand, Spare
from diffsynth_ray.train.trainer import Trainer
from diffsynth_ray.train.validation_loss import ValidationLoss, describe, figures_of, judge

BEST_STEM = "best"
"""Name of the export with the lowest validation loss."""


@dataclass(frozen=True)
class Surroundings:
    """What a worker gives its validation."""

    run_dir: RunDir
    group: Group
    rank: int
    world_size: int
    enter: Callable[[str], object]
    """Hears what is begun: a sign of life."""
    say: Callable[[str], object]
    """Silent on ranks but 0."""
    publish: Callable[[int, Mapping[str, float]], object]
    """Called on rank 0 with figures of a step; raises where this worker may no longer write."""
    export: Callable[[str], object]
    """Exports the weights under a name; called on all ranks."""
    show: Callable[[int, Sequence[SampleFile]], object]
    """Called on rank 0 with the samples of a step."""
    may_write: Callable[[], bool]
    """Whether no newer attempt has taken over."""
    spare: Spare | None = None
    """Where rank 0 may have samples made while the training goes on."""
    cached: CachedInput | None = None
    """Under split training, where the validation samples are."""
    errand: Callable[[int, Path], Errand] | None = None
    """What is sent there for the samples of a step, with its weights in a file."""


class Validation:
    """One worker's side. All methods are called on all ranks after the same step."""

    def __init__(self, job: Job, trainer: Trainer, index: SampleIndex, around: Surroundings) -> None:
        self._job, self._trainer, self._around = job, trainer, around
        self._loss: ValidationLoss | None = None
        if index.holdout is not None:
            self._loss = ValidationLoss(
                trainer,
                index.holdout,
                group=around.group,
                rank=around.rank,
                world_size=around.world_size,
                enter=around.enter,
                cached=around.cached,
            )
        self._samples: Samples | None = None
        if job.validation.prompts:
            self._samples = Samples(
                job,
                trainer,
                run_dir=around.run_dir,
                rule=index.rule,
                group=around.group,
                rank=around.rank,
                world_size=around.world_size,
                enter=around.enter,
                say=around.say,
                show=around.show,
                may_write=around.may_write,
                spare=around.spare,
                errand=around.errand,
            )
        self._history: list[ValidationEntry] = []
        self.has_ended = False
        """Whether the training is over before its last step (validation.early_stopping)."""

    def start(self) -> None:
        """Called before the first step of an attempt."""
        if self._loss is not None:
            self._load(self._loss)
        if self._samples is not None:
            self._samples.start()
        if self._trainer.step == 0:
            self._validate()
        elif self._loss is not None:
            self._judge()

    def _load(self, loss: ValidationLoss) -> None:
        around = self._around
        around.say("reading the validation samples")
        for cause in loss.load(skip_bad=self._job.dataset.bad_sample == "skip"):
            around.say(f"warning: left out of the validation loss: {cause}")
        if around.rank == 0:
            around.run_dir.forget_validations(after_step=self._trainer.step)
        self._history = around.group.from_rank_zero(around.run_dir.validations() if around.rank == 0 else None)

    def after_step(self) -> None:
        """Validate where it is due; show what has been made elsewhere."""
        if self._samples is not None:
            self._samples.take_late()
        if self._is_due(self._trainer.step):
            self._validate()

    def finish(self) -> None:
        """Wait for what is still made elsewhere, when the training has ended."""
        if self._samples is not None:
            self._samples.finish(timeout_s=self._job.distributed.timeout_s)

    def _is_due(self, step: int) -> bool:
        every, schedule = self._job.validation.every_steps, self._trainer.schedule
        if step == schedule.num_steps:
            return True
        return step % every == 0 if every is not None else schedule.export_stem(step) is not None

    def _validate(self) -> None:
        assert self._trainer.strategy is not None  # built by start()
        self._trainer.strategy.release_memory()
        if self._loss is not None:
            self._compute(self._loss)
        if self._samples is not None:
            # At the end the workers have nothing else to do.
            is_last = self.has_ended or self._trainer.step == self._trainer.schedule.num_steps
            with self._trainer.strategy.eval_weights():
                self._samples.make(self._trainer.step, is_last=is_last)

    def _compute(self, loss: ValidationLoss) -> None:
        around = self._around
        assert self._trainer.strategy is not None  # built by start()
        with self._trainer.strategy.eval_weights():
            entry = loss.compute(self._trainer.step)
        if self._job.training.ema_decay is not None:
            with self._trainer.strategy.averaged():
                entry = replace(entry, ema_loss=loss.compute(self._trainer.step).loss)
        self._history.append(entry)
        if around.rank == 0:
            around.publish(entry.step, figures_of(entry))
            around.run_dir.note_validation(entry)
        around.say(describe(entry))
        if self._judge() and self._job.validation.keep_best and entry.step > 0:
            around.enter("exporting")
            around.export(BEST_STEM)

    def _judge(self) -> bool:
        """Whether the newest loss is the lowest."""
        patience = self._job.validation.early_stopping
        verdict = judge(self._history, early_stopping=patience)
        self.has_ended = verdict.ends_training and self._trainer.step < self._trainer.schedule.num_steps
        if self.has_ended:
            self._around.say(
                f"ending after step {self._trainer.step} of {self._trainer.schedule.num_steps}: validation.early_stopping = "
                f"{patience}, and the lowest loss is {patience} validations ago; raise or remove it to go on"
            )
        return verdict.is_best
