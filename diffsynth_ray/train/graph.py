"""The way from a micro batch to its losses.

b batch of a micro step, c latent channels, f frames, h/w height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffsynth_ray.data.samples import Extra
from diffsynth_ray.errors import ModelError
from diffsynth_ray.memory.timing import DeviceTimer
from diffsynth_ray.models.family import FIRST_FRAME, MASK_SUFFIX, REFERENCE, EncodedBatch, ModelFamily, padded
from diffsynth_ray.models.flow_matching import FlowMatchingTable, flow_matching_table, make_targets, per_sample_loss


@dataclass(frozen=True)
class SampleBatch:
    """Decoded samples of one micro step on one worker."""

    pixels: np.ndarray | Tensor
    """uint8 [b, f, h, w, 3]."""
    prompts: tuple[str, ...]
    rows: tuple[int, ...]
    """Positions in the metadata."""
    extra: dict[str, tuple[Extra, ...]] = field(default_factory=dict)
    """By column of `model.extra_inputs`, [b]: a sample's files as uint8 [f, h, w, 3] each, or the cell's value."""

    @property
    def size(self) -> tuple[int, int, int]:
        """Height and width in pixels, number of frames."""
        _, num_frames, height, width, _ = self.pixels.shape
        return height, width, num_frames


@dataclass(frozen=True)
class HalfEncodedBatch:
    """Samples of which one half comes from a cache, and the other goes through an encoder that is trained."""

    images: Tensor
    """Latents [b, c, (f,) h, w] from the cache, or uint8 pixels [b, f, h, w, 3] to encode."""
    texts: dict[str, Tensor] | tuple[str, ...]
    """Conditions from the cache, or [b] prompts to encode."""
    rows: tuple[int, ...]
    """Positions in the metadata."""

    @property
    def has_pixels(self) -> bool:
        """Whether the images are still to be encoded."""
        return self.images.dtype == torch.uint8


AnyBatch = SampleBatch | EncodedBatch | HalfEncodedBatch
_CONDITION, _TEXT = "condition.", "prompt_embeds"


def tensors_of(batch: AnyBatch) -> list[Tensor]:
    """Everything of a batch that is already a tensor."""
    if isinstance(batch, SampleBatch):
        return [batch.pixels] if isinstance(batch.pixels, Tensor) else []
    images, texts = (batch.latents, batch.conditions) if isinstance(batch, EncodedBatch) else (batch.images, batch.texts)
    return [images, *(texts.values() if isinstance(texts, dict) else ())]


class TrainGraph(nn.Module):
    """The way from encoded or decoded samples to their losses, as one module for DDP and its like.

    Frozen encoders run without recording gradients; a trained one is part of the graph.
    """

    def __init__(self, family: ModelFamily, *, trained: Sequence[str], extra_inputs: Sequence[str] = ()) -> None:
        super().__init__()
        self.extra_inputs = tuple(extra_inputs)
        self.components = nn.ModuleDict(family.components)
        self.family = family
        self.table = flow_matching_table(family.scheduler_table)
        self.encoding = DeviceTimer(family.device)
        """The encoders' part of the steps."""
        self.text_is_trained = any(name in trained for name in family.text_components)
        self.image_is_trained = any(name in trained for name in family.image_components)
        self.has_reference = any(name in family.reference_inputs for name in extra_inputs)
        """Whether a picture is put before each clip's own frames."""

    def encode(self, batch: AnyBatch) -> EncodedBatch:
        """Decoded samples -> encoded ones, with their reference where they have one."""
        if isinstance(batch, EncodedBatch):
            return batch.with_reference()
        if isinstance(batch, HalfEncodedBatch):
            latents = self._encode_image(batch.images) if batch.has_pixels else batch.images
            conditions = batch.texts if isinstance(batch.texts, dict) else self._encode_text(batch.texts)
        else:
            pixels = torch.as_tensor(batch.pixels).to(self.family.device, non_blocking=True)
            latents = self._encode_image(pixels)
            with torch.set_grad_enabled(self.text_is_trained):
                conditions = self.family.encode_conditions(
                    batch.prompts, pixels=pixels, extra=extra_inputs(batch.extra, pixels, self.extra_inputs)
                )
        return EncodedBatch(latents=latents, conditions=conditions, sample_ids=batch.rows).with_reference()

    def latents_shape(self, batch: AnyBatch) -> tuple[int, ...]:
        """Of one sample, encoded or not: the shape of its noise."""
        if isinstance(batch, EncodedBatch):
            shape, added = batch.latents.shape[1:], REFERENCE in batch.conditions
        elif isinstance(batch, HalfEncodedBatch) and not batch.has_pixels:
            shape, added = batch.images.shape[1:], False
        else:
            pixels = batch.images if isinstance(batch, HalfEncodedBatch) else batch.pixels
            _, num_frames, height, width, _ = pixels.shape
            shape = torch.Size(self.family.latents_shape(height, width, num_frames))
            added = self.has_reference
        return (shape[0], shape[1] + 1, *shape[2:]) if added else tuple(shape)

    def encode_timed(self, batch: AnyBatch) -> EncodedBatch:
        """`encode`, whose time counts as the encoders' part of the step."""
        if isinstance(batch, EncodedBatch):
            return batch.with_reference()
        with self.encoding.stretch():
            return self.encode(batch)

    def _encode_image(self, pixels: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.image_is_trained):
            return self.family.encode_image(pixels.to(self.family.device, non_blocking=True))

    def _encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.text_is_trained):
            return self.family.encode_text(prompts)

    def forward(self, batch: AnyBatch, noise: Tensor, timestep_ids: Tensor) -> Tensor:
        """Weighted losses [b], float32; noise is shaped like the latents, timestep_ids [b] index the table."""
        encoded = self.encode_timed(batch)
        targets = make_targets(encoded.latents, noise, timestep_ids, self._table_on(timestep_ids.device))
        noisy_latents, target = targets.noisy_latents.to(self.family.dtype), targets.target
        first_frame = encoded.conditions.get(FIRST_FRAME)
        if first_frame is not None:
            noisy_latents = torch.cat([first_frame.to(noisy_latents), noisy_latents[:, :, 1:]], dim=2)
        pred = self.family.predict(encoded, noisy_latents, targets.timesteps)
        if first_frame is not None:
            pred, target = pred[:, :, 1:], target[:, :, 1:]
        return per_sample_loss(pred, target, targets.loss_weight)

    def _table_on(self, device: torch.device) -> FlowMatchingTable:
        if self.table.sigmas.device != device:
            self.table = self.table.to(device)
        return self.table

    def to_tensors(self, batch: AnyBatch, noise: Tensor, timestep_ids: Tensor) -> dict[str, Tensor]:
        """What `from_tensors` computes the losses from: the encoded batch and the rest, on the device.

        Conditions of whole numbers are shapes and stay on the CPU. Texts have one length where the family pads them anyway.
        """
        encoded = self.encode_timed(batch)
        given = dict(encoded.conditions)
        if self.family.padded_text_tokens is not None:
            given[_TEXT] = padded(given[_TEXT], self.family.padded_text_tokens)
            given.pop(_TEXT + MASK_SUFFIX, None)
        ids = timestep_ids.pin_memory() if self.family.device.type == "cuda" else timestep_ids
        conditions = {_CONDITION + name: tensor for name, tensor in given.items()}
        return {
            "latents": encoded.latents,
            "noise": noise,
            "timestep_ids": ids.to(self.family.device, non_blocking=True),
            **conditions,
        }

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Losses [b] of what `to_tensors` gave."""
        conditions = {name.removeprefix(_CONDITION): tensor for name, tensor in tensors.items() if name.startswith(_CONDITION)}
        batch = EncodedBatch(tensors["latents"], conditions)
        losses: Tensor = self(batch, tensors["noise"], tensors["timestep_ids"])
        return losses


def extra_inputs(given: Mapping[str, tuple[Any, ...]], pixels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """A batch's extra inputs; a video's own first and last frame where the metadata have no column for them."""
    own = {"input_image": pixels[:, :1], "end_image": pixels[:, -1:]}
    missing = [name for name in names if name not in given and name not in own]
    if missing:
        raise ModelError(f"model.extra_inputs: the metadata have no column {', '.join(missing)}")
    return {name: given[name] if name in given else tuple((frames,) for frames in own[name]) for name in names}


def probe_inputs(family: ModelFamily, names: Sequence[str], pixels: np.ndarray) -> dict[str, tuple[Any, ...]]:
    """Extra inputs for a batch that is only tried out: pictures of the samples' own size, or the samples themselves."""
    return {name: tuple((one if name in family.clip_inputs else one[:1],) for one in pixels) for name in names}
