"""The validation loss: held-out samples at fixed timesteps with fixed noise, so that steps and runs can be compared.

Every worker computes whole samples, one at a time, and the losses are summed in the order of the samples: neither the number of
workers nor what was computed before changes a bit on a CPU. Nothing that the training uses is touched: no gradient, no random
generator, no position of the data stream. Encoded samples are kept in host memory where their encoders are frozen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diffsynth_ray.data.batches import MicroBatch
from diffsynth_ray.data.samples import SampleIndex
from diffsynth_ray.errors import DataError
from diffsynth_ray.models.family import EncodedBatch
from diffsynth_ray.models.flow_matching import draw_validation_noise
from diffsynth_ray.run_dir import ValidationEntry
from diffsynth_ray.train.cached_input import CachedInput
from diffsynth_ray.train.graph import AnyBatch, SampleBatch
from diffsynth_ray.train.group import Group
from diffsynth_ray.train.trainer import Trainer

NUM_QUANTILES = 4
"""Timesteps that a sample is tried at: the middles of equal parts of the trained timestep ids, the noisiest first."""
_KEPT_BYTES = 2 << 30
"""Encoded samples that a worker keeps; what is beyond is decoded and encoded again every time."""


def quantile_ids(id_range: tuple[int, int]) -> list[int]:
    """The timestep ids, within [low, high)."""
    low, high = id_range
    return [low + (high - low) * (2 * number + 1) // (2 * NUM_QUANTILES) for number in range(NUM_QUANTILES)]


@dataclass(frozen=True)
class _Sample:
    """One sample of this worker."""

    position: int
    """Among all samples of the validation: names its noise."""
    micro_batch: MicroBatch
    kept: EncodedBatch | None = None


class ValidationLoss:
    """One worker's part. All methods are called on all ranks after the same step."""

    def __init__(
        self,
        trainer: Trainer,
        index: SampleIndex,
        *,
        group: Group,
        rank: int,
        world_size: int,
        enter: Callable[[str], object],
        cached: CachedInput | None = None,
    ) -> None:
        """`enter` hears of every sample that is begun: a sign of life. `cached`: under split training, where they are."""
        self._trainer, self._index, self._group, self._enter = trainer, index, group, enter
        self._cached = cached
        self._rank, self._world_size = rank, world_size
        self._samples: list[_Sample] = []
        self._kept_bytes = 0

    def load(self, *, skip_bad: bool) -> list[str]:
        """Read the samples once; returns what is wrong with those left out. Without `skip_bad` that is a DataError."""
        singles = self._index.singles()
        bad: dict[int, str] = {}
        for position, micro in list(enumerate(singles))[self._rank :: self._world_size]:
            self._enter("reading the validation samples")
            try:
                self._samples.append(self._read(position, micro))
            except DataError as error:
                bad[position] = error.message
        all_bad = {position: cause for found in self._group.gather(bad) for position, cause in found.items()}
        causes = [f"validation sample {position + 1}: {cause}" for position, cause in sorted(all_bad.items())]
        if causes and not skip_bad:
            raise DataError(causes[0])
        if len(causes) == len(singles):
            raise DataError(f"none of the {len(singles)} validation samples can be read; {causes[0]}")
        self._most = max(self._group.gather(len(self._samples)))
        good = next(position for position in range(len(singles)) if position not in all_bad)
        self._filler = self._samples[-1] if self._samples else self._read(good, singles[good])
        return causes

    def _read(self, position: int, micro: MicroBatch) -> _Sample:
        batch = self._batch(micro)
        graph = self._trainer.graph
        if graph.text_is_trained or graph.image_is_trained or self._kept_bytes > _KEPT_BYTES:
            return _Sample(position, micro)
        kept = self._trainer.encode(batch).to("cpu")
        self._kept_bytes += sum(tensor.nbytes for tensor in (kept.latents, *kept.conditions.values()))
        return _Sample(position, micro, kept)

    def _batch(self, micro: MicroBatch) -> AnyBatch:
        if self._cached is not None:
            return self._cached.exactly(micro).batch
        decoded = self._index.decode(micro, step=0)
        return SampleBatch(decoded.pixels, decoded.prompts, decoded.rows, decoded.extra)

    def compute(self, step: int) -> ValidationEntry:
        """The loss of the weights as they are."""
        started = time.monotonic()
        own: dict[int, list[float]] = {}
        # As many samples on every worker: with ZeRO-3 a forward pass is one of all of them.
        for number in range(self._most):
            self._enter("computing the validation loss")
            sample = self._samples[number] if number < len(self._samples) else self._filler
            losses = self._losses(sample)
            if number < len(self._samples):
                own[sample.position] = losses
        gathered = {position: losses for found in self._group.gather(own) for position, losses in found.items()}
        ordered = [gathered[position] for position in sorted(gathered)]
        quantiles = [math.fsum(losses) / len(ordered) for losses in zip(*ordered, strict=True)]
        return ValidationEntry(
            step=step,
            loss=math.fsum(quantiles) / len(quantiles),
            quantiles=quantiles,
            num_samples=len(ordered),
            seconds=round(time.monotonic() - started, 3),
        )

    def _losses(self, sample: _Sample) -> list[float]:
        """One a quantile; weighted as in training."""
        trainer = self._trainer
        batch = self._batch(sample.micro_batch) if sample.kept is None else sample.kept.to(trainer.family.device)
        shape = trainer.graph.latents_shape(batch)
        losses = []
        for quantile, timestep_id in enumerate(quantile_ids(trainer.id_range)):
            noise = draw_validation_noise(trainer.job.validation.seed, sample.position, quantile, shape=shape)
            inputs = noise[None].to(trainer.family.device), torch.tensor([timestep_id])
            losses.append(trainer.evaluate(batch, *inputs))
        return [float(loss) for loss in torch.cat(losses).tolist()]


@dataclass(frozen=True)
class Verdict:
    """What the newest validation loss says."""

    is_best: bool
    ends_training: bool


def judge(history: Sequence[ValidationEntry], *, early_stopping: int | None) -> Verdict:
    """The newest of a run's validations among those before. A loss that is no number is never the best."""
    best = math.inf
    since_best = 0
    for entry in history:
        since_best = 0 if entry.loss < best else since_best + 1
        best = min(best, entry.loss) if math.isfinite(entry.loss) else best
    return Verdict(
        is_best=bool(history) and since_best == 0,
        ends_training=early_stopping is not None and since_best >= early_stopping,
    )


def figures_of(entry: ValidationEntry) -> dict[str, float]:
    """As loss.csv and the trackers have them."""
    parts = {f"validation_loss/q{number}": loss for number, loss in enumerate(entry.quantiles)}
    averaged = {} if entry.ema_loss is None else {"validation_loss_ema": entry.ema_loss}
    return {"validation_loss": entry.loss, **averaged, **parts}


def describe(entry: ValidationEntry) -> str:
    """One line for the log."""
    parts = ", ".join(f"{loss:.4g}" for loss in entry.quantiles)
    return (
        f"validation after step {entry.step}: loss {entry.loss:.6g}"
        + ("" if entry.ema_loss is None else f", of the averaged weights {entry.ema_loss:.6g}")
        + f" (from most to least noise {parts}) "
        f"on {entry.num_samples} samples in {entry.seconds:.1f} s"
    )
