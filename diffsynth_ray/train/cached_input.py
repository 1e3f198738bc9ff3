"""Cached samples of stage two as what the trainer computes with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from diffsynth_ray.data.batches import MicroBatch
from diffsynth_ray.data.cache import Entry
from diffsynth_ray.data.cached import CachedBatch, CachedRows, CacheReader, usable_rows
from diffsynth_ray.data.samples import SampleIndex
from diffsynth_ray.errors import DataError
from diffsynth_ray.models.family import EncodedBatch, stack_conditions
from diffsynth_ray.train.graph import HalfEncodedBatch
from diffsynth_ray.train.split import LATENTS, bytes_tensor
from diffsynth_ray.train.trainer import MicroInput


class CachedInput:
    """Makes a micro step's input from what is cached, on the device, and from the pixels or prompts where a half is not."""

    def __init__(self, samples: SampleIndex, rows: CachedRows, *, device: torch.device) -> None:
        self.samples, self.rows, self.device = samples, rows, device
        self._reader = CacheReader(rows)

    def from_cache(self, batch: CachedBatch) -> MicroInput:
        """A micro batch whose images, at least, were read from the cache."""
        return self._micro_input(batch.micro_batch, batch.rows, self._latents(batch.images), batch.texts, batch.extras)

    def from_pixels(self, micro: MicroBatch, rows: tuple[int, ...], pixels: Tensor) -> MicroInput:
        """A micro batch with the decoded images of these rows, uint8 [b, f, h, w, 3]; its texts are read here."""
        return self._micro_input(micro, rows, pixels, self._reader.entries("text", rows))

    def probe(self, micro: MicroBatch) -> MicroInput:
        """The costliest micro batch; noise in place of images that are not cached."""
        rows = usable_rows(self.samples, self.rows, micro, step=0)
        if self.rows.has("image"):
            return self._read(micro, rows)
        shape = (len(rows), micro.num_frames, micro.height, micro.width, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return self.from_pixels(micro, rows, torch.from_numpy(noise))

    def exactly(self, micro: MicroBatch) -> MicroInput:
        """These rows and no others in their place: a DataError where one cannot be used. Images are decoded if not cached."""
        for row in micro.rows:
            if row in self.rows.bad:
                raise DataError(str(self.rows.bad[row]))
        if self.rows.has("image"):
            return self._read(micro, micro.rows)
        return self.from_pixels(micro, micro.rows, torch.as_tensor(self.samples.decode(micro, step=0).pixels))

    def sample_texts(self) -> dict[str, dict[str, Tensor]]:
        """Prompt -> conditions [1, ...] on the CPU, of the run's samples."""
        return {
            prompt: {name: bytes_tensor(stored)[None] for name, stored in entry.items()}
            for prompt, entry in self._reader.sample_texts().items()
        }

    def _read(self, micro: MicroBatch, rows: tuple[int, ...]) -> MicroInput:
        read = self._reader.entries
        return self._micro_input(micro, rows, self._latents(read("image", rows)), read("text", rows), read("extra", rows))

    def _micro_input(
        self,
        micro: MicroBatch,
        rows: tuple[int, ...],
        images: Tensor,
        texts: Sequence[Entry],
        extras: Sequence[Entry] = (),
    ) -> MicroInput:
        conditions = self._conditions(texts, extras) if texts or extras else None
        batch: EncodedBatch | HalfEncodedBatch
        if self.rows.has("image") and conditions is not None:
            batch = EncodedBatch(images, conditions, rows)
        else:
            prompts = tuple(self.samples.prompt(row) for row in rows)
            batch = HalfEncodedBatch(images, prompts if conditions is None else conditions, rows)
        return MicroInput(batch, micro.indices, micro.is_dummy)

    def _latents(self, entries: Sequence[Entry]) -> Tensor:
        return self._move(torch.stack([bytes_tensor(entry[LATENTS]) for entry in entries]))

    def _conditions(self, texts: Sequence[Entry], extras: Sequence[Entry]) -> dict[str, Tensor]:
        # The same function as in combined mode: the same padding, the same mask.
        nothing: Entry = {}
        entries = ({**text, **extra} for text, extra in zip_longest(texts, extras, fillvalue=nothing))
        singles = [{name: bytes_tensor(stored)[None] for name, stored in entry.items()} for entry in entries]
        return {name: self._move(tensor) for name, tensor in stack_conditions(singles).items()}

    def _move(self, tensor: Tensor) -> Tensor:
        # Whole numbers are shapes that the host computes with.
        if tensor.dtype == torch.int64:
            return tensor
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)
