"""How long a run is and when it exports: pure arithmetic shared by the plan and the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffsynth_ray.config.schema import Job


@dataclass(frozen=True)
class Schedule:
    """Steps and exports of a run over `num_samples` samples (rows x repeat) an epoch."""

    num_samples: int
    global_batch_size: int
    num_epochs: int
    max_steps: int | None
    save_steps: int | None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch: ceil(rows x repeat / global batch)."""
        return -(-self.num_samples // self.global_batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run; max_steps wins over num_epochs."""
        return self.max_steps or self.steps_per_epoch * self.num_epochs

    def export_stem(self, step: int) -> str | None:
        """Name without suffix of the export after optimizer step `step` (counted from 1), or None."""
        every = self.save_steps or self.steps_per_epoch
        return self.last_stem(step) if step == self.num_steps or step % every == 0 else None

    def last_stem(self, step: int) -> str:
        """Name of the export of a run that ends early after `step`."""
        return f"step-{step}" if self.save_steps is not None else f"epoch-{(step - 1) // self.steps_per_epoch}"

    def export_stems(self) -> Iterator[str]:
        """All names of the run, in order, without walking through every step."""
        every = self.save_steps or self.steps_per_epoch
        for step in range(every, self.num_steps + 1, every):
            if (stem := self.export_stem(step)) is not None:
                yield stem
        if self.num_steps % every and (stem := self.export_stem(self.num_steps)) is not None:
            yield stem


def build_schedule(job: Job, *, num_samples: int, global_batch_size: int) -> Schedule:
    """The schedule of a job."""
    training = job.training
    return Schedule(num_samples, global_batch_size, training.num_epochs, training.max_steps, job.output.save_steps)


def trained_components(job: Job) -> list[str]:
    """Trained components, the one whose export has the plain name first: the LoRA's, else dit, else the first."""
    full = job.training.trainable_models
    if job.lora.base_model is not None:
        return [job.lora.base_model, *full]
    return sorted(full, key=lambda component: component != "dit")


def partitioned_components(job: Job) -> list[str]:
    """Components whose parameters the workers share (ZeRO-3): those that hold trained ones."""
    distributed = job.distributed
    return trained_components(job) if distributed.strategy == "deepspeed" and distributed.zero_stage == 3 else []


def export_file_names(job: Job, stem: str) -> dict[str, str]:
    """File name of each trained component in the export `stem`."""
    components = trained_components(job)
    return {
        component: f"{stem}.safetensors" if index == 0 else f"{stem}.{component}.safetensors"
        for index, component in enumerate(components)
    }
