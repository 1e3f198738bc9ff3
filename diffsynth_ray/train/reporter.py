"""What a step gave, told: loss and speed to the log, loss.csv, TensorBoard, Ray's metrics and progress.json."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import psutil
import torch

from diffsynth_ray.errors import RunError, SupersededError
from diffsynth_ray.run_dir import Progress, RunDir
from diffsynth_ray.train.feed import FedStep
from diffsynth_ray.train.figures import FigureWriter
from diffsynth_ray.train.sample_file import SampleFile
from diffsynth_ray.train.trainer import StepResult, Trainer

_SPEED_WINDOW = 20
"""Steps that the shown speed is averaged over."""


class Gauge(Protocol):
    """A number that is shown while the run lasts."""

    def set(self, value: float, /) -> object:
        """Show this one from now on."""
        ...


@dataclass(frozen=True)
class _StepTime:
    """Of one step."""

    spent_s: float
    data_wait_s: float
    num_samples: int
    """Of all workers."""
    num_tokens: int
    """Of this one."""


@dataclass
class Reporter:
    """Of one worker; rank 0's has `figures` and writes."""

    trainer: Trainer
    run_dir: RunDir
    rank: int
    gauges: Mapping[str, Gauge]
    figures: FigureWriter | None
    may_commit: Callable[[], bool]
    say: Callable[[str], object]
    was_data_bound: bool = False
    times: deque[_StepTime] = field(default_factory=lambda: deque(maxlen=_SPEED_WINDOW))
    untold_steps: int = 0
    """Steps since the parts of a step were last measured."""

    def __post_init__(self) -> None:
        self._forget_parts()  # those of the micro batch that was tried before the first step

    def after_step(self, result: StepResult, fed: FedStep, *, started: float, data_wait_s: float) -> None:
        """Called after every step; reads the device only where the step is logged, exported or the last."""
        trainer, step = self.trainer, self.trainer.step
        self.untold_steps += 1
        logged = step % trainer.job.logging.every_steps == 0 or trainer.schedule.export_stem(step) is not None
        if not logged:
            self._note_time(result, fed, started=started, data_wait_s=data_wait_s)
            if len(self.times) == 1:
                self._forget_parts()  # as its time, see _publish
            return
        assert trainer.strategy is not None  # built by start()
        loss_sum = trainer.strategy.sum_over_workers(result.loss_sum)
        loss, grad_norm = torch.stack([loss_sum, result.grad_norm.to(loss_sum)]).tolist()
        loss /= fed.num_samples
        self._note_time(result, fed, started=started, data_wait_s=data_wait_s)
        self._ensure_finite("loss", loss, fed)
        self._ensure_finite("gradient norm", grad_norm, fed)
        self._publish(step, loss=loss, lr=result.lr, grad_norm=grad_norm)

    def before_checkpoint(self, result: StepResult, fed: FedStep) -> None:
        """Called on all ranks before the state after this step is kept, whether or not the step was logged."""
        # Once weights are no numbers, every later gradient is none either.
        self._ensure_finite("gradient norm", float(result.grad_norm), fed)

    def _ensure_finite(self, name: str, value: float, fed: FedStep) -> None:
        """Raise RunError for a step whose weights nobody can use, before any of them are exported or kept."""
        if np.isfinite(value):
            return
        rows = [row + 1 for row in fed.rows]
        raise RunError(
            f"the {name} of step {self.trainer.step} is {value}; rank {self.rank} trained on the metadata rows {rows}",
            hint="lower training.learning_rate, or look at those rows; the last checkpoint and exports are from before",
        )

    def _note_time(self, result: StepResult, fed: FedStep, *, started: float, data_wait_s: float) -> None:
        self.times.append(_StepTime(time.monotonic() - started, data_wait_s, fed.num_samples, result.num_tokens))

    def _take_parts(self) -> dict[str, float]:
        """Seconds a step of waiting for other workers; that went to the encoders, and to waiting for offloaded weights, where
        there is such a thing."""
        trainer, steps = self.trainer, max(self.untold_steps, 1)
        assert trainer.strategy is not None  # built by start()
        encode_s, stall_s = trainer.graph.encoding.take_s() / steps, trainer.residency.take_stall_s() / steps
        self.untold_steps = 0
        parts = {"communication_s": trainer.strategy.communication.take_s() / steps}
        parts |= {"encode_s": encode_s} if encode_s > 0 else {}
        return parts | ({"transfer_s": stall_s} if trainer.residency.offload is not None else {})

    def _forget_parts(self) -> None:
        """What was measured up to here is no part of the steps to come."""
        trainer = self.trainer
        assert trainer.strategy is not None  # built by start()
        trainer.graph.encoding.forget()
        trainer.residency.forget_stalls()
        trainer.strategy.communication.forget()
        self.untold_steps = 0

    def publish_validation(self, step: int, figures: Mapping[str, float]) -> None:
        """Called on rank 0 after a validation."""
        if not self.may_commit():
            raise SupersededError
        assert self.figures is not None  # rank 0's
        self.figures.write(step, figures)
        self.gauges["validation_loss"].set(figures["validation_loss"])
        self._forget_parts()  # those of the validation

    def show_samples(self, step: int, samples: Sequence[SampleFile]) -> None:
        """Called on rank 0 after samples were made."""
        assert self.figures is not None  # rank 0's
        self.figures.write_samples(step, samples)

    def _publish(self, step: int, *, loss: float, lr: float, grad_norm: float) -> None:
        # The first step of an attempt waits for everything to start: it says nothing about speed once there are others.
        times = list(self.times)[1:] or list(self.times)
        spent_s = max(sum(each.spent_s for each in times), 1e-9)
        step_s = spent_s / len(times)
        figures = {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "step_s": step_s,
            "samples_per_s": sum(each.num_samples for each in times) / spent_s,
            "data_wait_s": sum(each.data_wait_s for each in times) / len(times),
        }
        parts = self._take_parts()
        num_steps = self.trainer.schedule.num_steps
        shown = figures | parts | {
            "step": step,
            "stage_progress": step / num_steps,
            "tokens_per_s": sum(each.num_tokens for each in times) / spent_s,
            "moved_gib": self.trainer.residency.moved_bytes / 2**30,
        }  # fmt: skip
        for name, value in shown.items():
            self.gauges[name].set(value)
        memory = {"host_memory_gib": psutil.Process().memory_info().rss / 2**30}
        if torch.cuda.is_available():
            memory["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self.gauges["gpu_memory_gib"].set(memory["gpu_memory_gib"])
        if self.figures is None:
            return
        if not self.may_commit():
            raise SupersededError
        self.figures.write(step, figures | parts | memory)
        progress = Progress(step=step, num_steps=num_steps, left_s=round((num_steps - step) * step_s), **figures)
        self.say(progress.line())
        is_data_bound = progress.data_note() is not None
        # Over a whole window, so that the start says nothing; and once, until it is over.
        if len(self.times) == _SPEED_WINDOW and is_data_bound != self.was_data_bound:
            self.say(progress.data_note() or "the job is no longer data-bound")
            self.was_data_bound = is_data_bound
        with suppress(OSError):  # a full disk: the log has the line too
            self.run_dir.write_progress(progress)
