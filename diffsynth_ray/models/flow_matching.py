"""Flow matching: noise levels, targets, the loss.

x_s = (1 - s) x_0 + s noise, target = noise - x_0, timestep = 1000 s. In training s is one of 1000 table entries, and
the loss of a sample is weighted by the entry's weight. The tables are DiffSynth-Studio's, measured by running it, so
that losses are comparable; they are looked up by the integer id in float32 and only then cast, because a timestep
that is rounded to bf16 first can only hit 376 of Qwen-Image's 1000 entries.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from diffsynth_ray.errors import ModelError

NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class FlowMatchingTable:
    """What each timestep id stands for; ids run from pure noise (0) towards the clean sample (999)."""

    sigmas: Tensor
    """[1000] float32 in 0..1, descending."""
    timesteps: Tensor
    """[1000] float32, 1000 x sigmas: what the model is told."""
    weights: Tensor
    """[1000] float32, loss weights, sum 1000."""

    def to(self, device: torch.device) -> FlowMatchingTable:
        """The same table on another device."""
        return FlowMatchingTable(self.sigmas.to(device), self.timesteps.to(device), self.weights.to(device))


@dataclass(frozen=True)
class Targets:
    """What the model sees and what it should say."""

    noisy_latents: Tensor
    """Shape and dtype of the latents."""
    timesteps: Tensor
    """[b] float32 in 0..1000."""
    target: Tensor
    """Shape of the latents, float32."""
    loss_weight: Tensor
    """[b] float32."""


def _shifted(sigmas: Tensor, shift: float) -> Tensor:
    # s' = k s / (1 + (k - 1) s): more of the 1000 ids at high noise, as larger pictures need.
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _shifted_exponentially(sigmas: Tensor, mu: float) -> Tensor:
    scale = math.exp(mu)
    return scale / (scale + (1 / sigmas - 1))


def inference_sigmas(name: str, num_steps: int) -> Tensor:
    """[num_steps] float32, descending: a family's noise levels where a picture is drawn in so many steps."""
    even = torch.linspace(1.0, 0.0, num_steps + 1)[:-1]
    if name == "qwen_image":
        # Exponential shift with mu fixed at 0.8, then stretched so that the last sigma is 0.02.
        if num_steps == 1:
            return even  # the only sigma is 1, and cannot be the last one too
        sigmas = _shifted_exponentially(even, 0.8)
        return 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - 0.02))
    if name == "wan":
        return _shifted(even, 5)
    if name == "z_image":
        return _shifted(even, 3)
    if name == "flux":
        return _shifted(torch.linspace(1.0, 0.003 / 1.002, num_steps), 3)
    if name == "flux2":
        # mu fixed at 0.8 whatever the picture's size, which counts where pictures are drawn by the released pipeline.
        return _shifted_exponentially(torch.linspace(1.0, 1 / num_steps, num_steps), 0.8)
    raise ModelError(f"no sigma table {name!r}; there are {', '.join(TABLE_NAMES)}")


TABLE_NAMES = ("flux", "flux2", "qwen_image", "wan", "z_image")


@cache
def flow_matching_table(name: str) -> FlowMatchingTable:
    """The table of a family's `scheduler_table`."""
    sigmas = inference_sigmas(name, NUM_TIMESTEPS)
    timesteps = sigmas * NUM_TIMESTEPS
    # A bell around t = 500, moved down to zero at its lowest and scaled to mean 1.
    bell = torch.exp(-2 * ((timesteps - NUM_TIMESTEPS / 2) / NUM_TIMESTEPS) ** 2)
    lifted = bell - bell.min()
    return FlowMatchingTable(sigmas, timesteps, lifted * (NUM_TIMESTEPS / lifted.sum()))


def timestep_id_range(min_boundary: float, max_boundary: float) -> tuple[int, int]:
    """Timestep ids [low, high) of a training that covers this part of the table.

    The boundaries are fractions of the id range, not of the timesteps: 0 is the noisiest entry.
    """
    low, high = int(min_boundary * NUM_TIMESTEPS), int(max_boundary * NUM_TIMESTEPS)
    if not 0 <= low < high <= NUM_TIMESTEPS:
        raise ModelError(
            f"timestep boundaries {min_boundary}..{max_boundary} cover no timestep: they are fractions of the id "
            "range, 0 <= min_timestep_boundary < max_timestep_boundary <= 1"
        )
    return low, high


def draw_noise_and_timestep(
    seed: int, global_step: int, index: int, *, shape: Sequence[int], id_range: tuple[int, int]
) -> tuple[Tensor, int]:
    """Noise (float32 on the CPU, `shape`) and timestep id of sample `index` of the global batch of `global_step`.

    A pure function: which worker draws, in which order and in which run, makes no difference.
    """
    generator = _generator(f"sample {seed} {global_step} {index}")
    # The id first, so that it does not depend on the sample's size.
    timestep_id = int(torch.randint(*id_range, (1,), generator=generator))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32), timestep_id


def draw_validation_noise(seed: int, sample: int, quantile: int, *, shape: Sequence[int]) -> Tensor:
    """Noise (float32 on the CPU, `shape`) of a validation sample at one of its timesteps: alike at every step of every run."""
    return torch.randn(tuple(shape), generator=_generator(f"validation {seed} {sample} {quantile}"), dtype=torch.float32)


def _generator(name: str) -> torch.Generator:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def make_targets(latents: Tensor, noise: Tensor, timestep_ids: Tensor, table: FlowMatchingTable) -> Targets:
    """Noisy latents, target and weight for `timestep_ids` [b] int64.

    Computed in float32; the noisy latents are cast to the latents' dtype. Ids on the CPU cost no synchronisation with a
    device that holds the latents.
    """

    def look_up(values: Tensor) -> Tensor:
        return values.to(timestep_ids.device)[timestep_ids].to(latents.device, non_blocking=True)

    sigmas = look_up(table.sigmas).view(-1, *[1] * (latents.ndim - 1))
    clean, noise = latents.float(), noise.to(latents.device, torch.float32)
    return Targets(
        noisy_latents=((1 - sigmas) * clean + sigmas * noise).to(latents.dtype),
        timesteps=look_up(table.timesteps),
        target=noise - clean,
        loss_weight=look_up(table.weights),
    )


def per_sample_loss(pred: Tensor, target: Tensor, loss_weight: Tensor) -> Tensor:
    """[b] float32: mean squared error over each sample times its weight [b]."""
    squared = torch.nn.functional.mse_loss(pred.float(), target.float(), reduction="none")
    return squared.flatten(1).mean(dim=1) * loss_weight
