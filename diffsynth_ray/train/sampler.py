"""Samples of one step: made with a family's weights as they are, written as files. In a training worker, or in a process of
their own that loads the model as the workers have and takes the trained weights from a file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.config.schema import Job
from diffsynth_ray.config.validation import sample_size
from diffsynth_ray.data.media import Frames, decode, read_info
from diffsynth_ray.data.samples import SampleRule, target_of
from diffsynth_ray.errors import first_line
from diffsynth_ray.models.family import ModelFamily
from diffsynth_ray.models.sampling import SampleRequest
from diffsynth_ray.run_dir import RunDir, write_whole
from diffsynth_ray.train.loading import load_for_training
from diffsynth_ray.train.residency import Residency
from diffsynth_ray.train.sample_file import CLIP_FPS
from diffsynth_ray.train.split import job_of_stage
from diffsynth_ray.train.trainer import fastest_attention
from diffsynth_ray.train.video import write_video


@dataclass(frozen=True)
class Made:
    """What came of one prompt."""

    number: int
    """Of the prompt, from 0."""
    problem: str | None = None


class Sampler:
    """Makes the samples of a job. Whatever goes wrong with one is part of its result."""

    def __init__(
        self,
        job: Job,
        family: ModelFamily,
        residency: Residency,
        *,
        run_dir: RunDir,
        rule: SampleRule,
        may_write: Callable[[], bool],
    ) -> None:
        self._job, self._family, self._residency = job, family, residency
        self._run_dir, self._rule, self._may_write = run_dir, rule, may_write

    def make(self, step: int, number: int) -> Made:
        """The sample of a prompt (from 0) after a step, as a file of the run's folder."""
        try:
            frames = self._sample(number)
            if not self._may_write():
                return Made(number, "a newer attempt writes now")
            path = self._run_dir.sample_path(step, number, is_clip=len(frames) > 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            if len(frames) > 1:
                write_video(path, frames, fps=CLIP_FPS)
            else:
                write_whole(path, png(Image.fromarray(frames[0])))
        except Exception as error:  # noqa: BLE001  a boundary: no sample is worth the run
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            return Made(number, f"{type(error).__name__}: {first_line(error)}")
        return Made(number)

    def _sample(self, number: int) -> Frames:
        validation, family = self._job.validation, self._family
        height, width = sample_size(self._job, multiple=family.size_multiple)
        request = SampleRequest(
            prompt=validation.prompts[number],
            height=height,
            width=width,
            num_frames=1 if family.clip_step is None else self._job.dataset.num_frames,
            num_inference_steps=validation.num_inference_steps,
            guidance_scale=validation.guidance_scale,
            seed=validation.seed,
            inputs=self._inputs(number, height=height, width=width),
        )
        self._residency.begin("sample")
        with fastest_attention(), torch.no_grad():
            return family.sample(request)

    def _inputs(self, number: int, *, height: int, width: int) -> tuple[Image.Image, ...]:
        """The prompt's picture: a first frame at the clip's size, a picture to edit as in training."""
        inputs = self._job.validation.inputs
        if not inputs:
            return ()
        path = inputs[number % len(inputs)]
        if self._family.clip_step is None:
            height, width, _ = target_of(read_info(path), self._job.dataset, self._rule)
        return (Image.fromarray(decode(path, height=height, width=width, num_frames=1, frame_rate=None)[0]),)


def png(picture: Image.Image) -> bytes:
    """The content of its file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


@dataclass(frozen=True)
class Errand:
    """All samples of a step, to be made in a process of their own."""

    step: int
    resolved_json: str
    rule: SampleRule
    weights_path: Path
    """The trained weights after `step`, by "component.parameter"."""
    token: str
    writer: str
    """Of the workers that ask for it: once others have taken over, nothing is written."""
    num_threads: int
    """That these workers compute with on a CPU: with as many the pictures are the same to the last bit."""
    components: tuple[str, ...] | None = None
    """That these workers have loaded; None = all."""
    texts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Encoded prompts, as `ModelFamily.known_texts`."""


class Spare(Protocol):
    """Room on the cluster that the training does not use; one errand at a time. Only `start` raises."""

    def has_room(self) -> bool:
        """Whether there is room now."""
        ...

    def start(self, errand: Errand) -> None:
        """Begin it as soon as possible; returns at once."""
        ...

    @property
    def has_begun(self) -> bool:
        """Whether the errand has found its room, as the last `result` saw it."""
        ...

    def result(self) -> list[Made] | str | None:
        """What came of the errand, or what ended it; None while it goes on."""
        ...

    def give_up(self) -> None:
        """End the errand."""
        ...


def run_errand(errand: Errand) -> Iterator[Made]:
    """Load the model with the errand's weights and make the samples, one after the other."""
    resolved = ResolvedJob.model_validate_json(errand.resolved_json)
    torch.set_num_threads(errand.num_threads)
    # Blocks are compiled for thousands of steps; these are a few.
    job, components = resolved.job.with_keys(training={"compile": False}), errand.components
    if components is not None:
        job = job_of_stage(job, components)
    device = torch.device(resolved.device)
    family, residency = load_for_training(
        job, device=device, components=components, weights_path=errand.weights_path, say=lambda line: None
    )
    family.known_texts = errand.texts
    run_dir = RunDir(resolved.output_path)
    sampler = Sampler(
        job,
        family,
        residency,
        run_dir=run_dir,
        rule=errand.rule,
        may_write=lambda: run_dir.may_commit(errand.token, errand.writer),
    )
    for number in range(len(job.validation.prompts)):
        yield sampler.make(errand.step, number)
