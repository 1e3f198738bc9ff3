"""Direct distillation: the student draws a sample's picture in few steps, and is trained through all of them.

The loss is the mean squared error between the latents that the last step leaves and those of the teacher's picture, as
DiffSynth-Studio's task of that name has it. Sigmas are those of inference at that number of steps, noise that of the teacher's
seed; guidance there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffsynth_ray.data.teacher import TeacherRun, read_teacher_run
from diffsynth_ray.errors import DataError
from diffsynth_ray.models.family import FIRST_FRAME, EncodedBatch, ModelFamily
from diffsynth_ray.models.flow_matching import inference_sigmas
from diffsynth_ray.train.graph import AnyBatch, SampleBatch, TrainGraph


class DistillGraph(TrainGraph):
    """Samples -> losses through every step of inference."""

    def forward(self, batch: AnyBatch, noise: Tensor, num_steps: Tensor) -> Tensor:
        """Losses [b], float32; noise is shaped like the latents, num_steps [b] are those of inference."""
        encoded = self.encode_timed(batch)
        counts = num_steps.tolist()
        if len(set(counts)) == 1:
            return self._losses(encoded, noise, counts[0])
        each = zip(encoded.samples(), noise.split(1), counts, strict=True)
        return torch.cat([self._losses(one, start, count) for one, start, count in each])

    def _losses(self, encoded: EncodedBatch, noise: Tensor, num_steps: int) -> Tensor:
        sigmas = [*inference_sigmas(self.family.scheduler_table, num_steps).tolist(), 0.0]
        latents = noise.to(encoded.latents.device, torch.float32)
        given = encoded.conditions.get(FIRST_FRAME)
        for sigma, following in pairwise(sigmas):
            if given is not None:
                latents = torch.cat([given.to(latents), latents[:, :, 1:]], dim=2)
            timesteps = torch.full((len(latents),), 1000 * sigma, device=latents.device)
            velocity = self.family.predict(encoded, latents.to(self.family.dtype), timesteps)
            latents = latents + (following - sigma) * velocity.float()
        clean = encoded.latents.float()
        if given is not None:
            latents, clean = latents[:, :, 1:], clean[:, :, 1:]
        return (latents - clean).square().flatten(1).mean(dim=1)


def teacher_runs(batch: SampleBatch) -> list[TeacherRun]:
    """[b]: how each sample was drawn."""
    return [read_teacher_run(dict(zip(batch.extra, cells, strict=True))) for cells in zip(*batch.extra.values(), strict=True)]


def draw_noise(runs: Sequence[TeacherRun], shape: tuple[int, ...], *, family: ModelFamily) -> Tensor:
    """The teacher's noise [b, *shape] on the family's device, in the family's number format."""
    return torch.stack([_noise(run, shape, family) for run in runs])


def _noise(run: TeacherRun, shape: tuple[int, ...], family: ModelFamily) -> Tensor:
    if run.rand_device == "cuda" and family.device.type != "cuda":
        raise DataError("rand_device: got 'cuda', but this worker has no GPU; only a GPU draws again what a GPU drew")
    drawn_on = family.device if run.rand_device == "cuda" else torch.device("cpu")
    drawn_in = torch.float32 if family.draws_noise_in_float32 else family.dtype
    generator = torch.Generator(drawn_on).manual_seed(run.seed)
    return torch.randn((1, *shape), generator=generator, device=drawn_on, dtype=drawn_in)[0].to(family.device, family.dtype)
