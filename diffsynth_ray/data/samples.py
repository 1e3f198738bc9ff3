"""A dataset ready to be read in any order: rows, target sizes and order, and how a micro batch is decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diffsynth_ray.data.batches import MicroBatch, SampleOrder, build_buckets, deal
from diffsynth_ray.data.media import Frames, decode, read_size, target_size
from diffsynth_ray.data.metadata import PROMPT_COLUMN, Metadata, read_metadata
from diffsynth_ray.errors import DataError

if TYPE_CHECKING:
    from diffsynth_ray.config.resolve import ResolvedJob

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class SampleIndex:
    """Everything needed to name and decode the samples of any step. Memory is O(rows)."""

    metadata: Metadata
    order: SampleOrder
    media_column: str
    """The column whose file is trained on."""

    def prompt(self, row: int) -> str:
        """The caption of a row; an empty cell is the empty prompt."""
        value = self.metadata.rows[row].get(PROMPT_COLUMN)
        return "" if value is None else str(value)

    def path(self, row: int) -> str:
        """The media file of a row."""
        return self.metadata.files(row, self.media_column)[0]

    def micro_batches(
        self, *, start_step: int, num_steps: int, rank: int, world_size: int
    ) -> Iterator[tuple[int, int, bool, MicroBatch]]:
        """(step, samples of the step over all workers, whether the step's last, micro batch) of one worker."""
        for step in range(start_step, num_steps):
            global_batch = self.order.step(step)
            hand = deal(global_batch, world_size)[rank]
            for number, micro_batch in enumerate(hand, start=1):
                yield step, global_batch.num_samples, number == len(hand), micro_batch

    def largest_micro_batch(self) -> MicroBatch:
        """The costliest micro batch of the run, for the probe before step 0."""
        number = max(range(len(self.order.buckets)), key=lambda n: self.order.buckets[n].tokens)
        bucket = self.order.buckets[number]
        size = min(self.order.batch_size, len(bucket.rows) * self.order.repeat)
        rows = tuple(int(bucket.rows[n % len(bucket.rows)]) for n in range(size))
        return MicroBatch(number, bucket.height, bucket.width, bucket.num_frames, rows, tuple(range(size)))

    def decode(self, micro_batch: MicroBatch) -> Frames:
        """uint8 [b, f, h, w, 3] of a micro batch; DataError names row, file and cause."""
        frames = []
        for row in micro_batch.rows:
            path = self.path(row)
            try:
                frames.append(
                    decode(path, height=micro_batch.height, width=micro_batch.width, num_frames=micro_batch.num_frames)
                )
            except DataError as error:
                raise DataError(
                    f"row {row + 1}, column {self.media_column}: {error.message}", hint=error.hint
                ) from error
        return np.stack(frames)


def build_sample_index(resolved: ResolvedJob, say: Callable[[str], None]) -> SampleIndex:
    """Read metadata and, under dynamic resolution, every file's header; raises DataError with all problems."""
    dataset = resolved.job.dataset
    assert dataset.base_path is not None  # resolve has checked it
    metadata = read_metadata(
        dataset.base_path, dataset.metadata_path, dataset.data_file_keys, required_columns=[PROMPT_COLUMN]
    )
    media_column = metadata.file_columns[0]
    for note in metadata.notes:
        say(note)
    if dataset.height is not None and dataset.width is not None:
        size = target_size(
            dataset.width,
            dataset.height,
            fixed_height=dataset.height,
            fixed_width=dataset.width,
            max_pixels=dataset.max_pixels,
        )
        sizes = [(*size, 1)] * len(metadata)
    else:
        say(f"reading the sizes of {len(metadata)} files")
        sizes = _read_target_sizes(metadata, media_column, max_pixels=dataset.max_pixels)
    order = SampleOrder(
        buckets=build_buckets(sizes),
        repeat=dataset.repeat,
        batch_size=dataset.batch_size,
        global_batch_size=resolved.global_batch_size,
        seed=resolved.job.seed,
    )
    return SampleIndex(metadata=metadata, order=order, media_column=media_column)


def _read_target_sizes(metadata: Metadata, column: str, *, max_pixels: int) -> list[tuple[int, int, int]]:
    def size_or_problem(row: int) -> tuple[int, int, int] | str:
        try:
            files = metadata.files(row, column)
            if not files:
                return f"row {row + 1}: the cell {column} is empty"
            width, height, _ = read_size(files[0])
            return (*target_size(width, height, fixed_height=None, fixed_width=None, max_pixels=max_pixels), 1)
        except DataError as error:
            return f"row {row + 1}: {error.message}"

    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        results = list(pool.map(size_or_problem, range(len(metadata)), chunksize=64))
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        shown = problems[:_SHOWN_PROBLEMS]
        more = [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise DataError("\n  ".join([f"{len(problems)} of {len(metadata)} files cannot be used:", *shown, *more]))
    return [result for result in results if not isinstance(result, str)]
