"""Which samples make up which global batch, and which worker computes which of them.

Words: a *row* of the metadata times `repeat` gives the *samples* of an epoch; samples of one target size form a
*bucket*; a *micro batch* is at most `batch_size` samples of one bucket; a *global batch* is what one optimizer step
trains on.

An epoch's samples stand in one sequence: first the full micro batches of all buckets in keyed order, then the short
last micro batches of the buckets, in keyed order too. Global batches are cuts of that sequence every
`global_batch_size` samples; a micro batch across a cut becomes two. So an epoch has exactly
ceil(samples / global_batch_size) steps, whatever the buckets.

Nothing here depends on the number of workers, except `deal`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from diffsynth_ray.data.order import MAX_SIZE, IntArray, KeyedPermutation, derive_key


@dataclass(frozen=True, eq=False)
class Bucket:
    """The rows that share one target size."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_frames: int
    """1 for images."""
    rows: IntArray
    """[num_rows] positions in the metadata."""

    @property
    def tokens(self) -> int:
        """Latent tokens of one sample, approximately: what its time and memory grow with."""
        return count_tokens(self.height, self.width, self.num_frames)


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one size that one worker computes in one forward and backward."""

    bucket_index: int
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_frames: int
    rows: tuple[int, ...]
    """[num_samples] positions in the metadata."""
    indices: tuple[int, ...]
    """[num_samples] positions in the global batch, from 0: with the seed and the step they name a sample's noise."""
    is_dummy: bool = False
    """Computed only to keep collectives in step with the other workers; its loss has weight 0."""

    @property
    def tokens(self) -> int:
        """Latent tokens of all its samples, approximately."""
        return len(self.rows) * count_tokens(self.height, self.width, self.num_frames)

    @property
    def weight(self) -> int:
        """Samples that count in the mean loss of the step: 0 for a dummy."""
        return 0 if self.is_dummy else len(self.rows)


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimizer step trains on."""

    step: int
    """Global step, from 0 over all epochs."""
    epoch: int
    num_samples: int
    micro_batches: tuple[MicroBatch, ...]


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """The global batches of a run. Memory is O(rows), a step costs O(global_batch_size + buckets) at any position."""

    buckets: Sequence[Bucket]
    """Non-empty, each target size once."""
    repeat: int
    """How often an epoch has each row."""
    batch_size: int
    """Samples in a full micro batch."""
    global_batch_size: int
    """Samples in a step; the last step of an epoch has what is left."""
    seed: int

    def __post_init__(self) -> None:
        sizes = [(bucket.height, bucket.width, bucket.num_frames) for bucket in self.buckets]
        if not sizes or not all(len(bucket.rows) for bucket in self.buckets):
            raise ValueError("an order needs at least one bucket, and every bucket at least one row")
        if len(set(sizes)) != len(sizes):
            raise ValueError(f"a target size (height, width, num_frames) occurs in two buckets: {sizes}")
        for name in ("repeat", "batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_samples > MAX_SIZE:
            raise ValueError(f"rows x repeat must be at most {MAX_SIZE}, got {self.num_samples}")

    @cached_property
    def num_samples(self) -> int:
        """Samples of an epoch: rows x repeat."""
        return sum(len(bucket.rows) for bucket in self.buckets) * self.repeat

    @cached_property
    def rows(self) -> IntArray:
        """[num_rows] all rows, ascending."""
        return np.sort(np.concatenate([bucket.rows for bucket in self.buckets]))

    @cached_property
    def digest(self) -> str:
        """Hexadecimal, of which row is in which bucket: what of a data set the order depends on."""
        found = hashlib.blake2b(digest_size=16)
        for bucket in self.buckets:
            found.update(f"{bucket.height}x{bucket.width}x{bucket.num_frames}: {len(bucket.rows)} ".encode())
            found.update(np.asarray(bucket.rows, dtype="<i8").tobytes())
        return found.hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    @cached_property
    def _first_full(self) -> IntArray:
        """[num_buckets + 1] number of each bucket's first full micro batch; the last entry is how many there are."""
        num_full = [len(bucket.rows) * self.repeat // self.batch_size for bucket in self.buckets]
        return np.cumsum([0, *num_full], dtype=np.int64)

    @cached_property
    def _tail_buckets(self) -> IntArray:
        """[<= num_buckets] the buckets whose samples are not a multiple of batch_size."""
        short = [i for i, bucket in enumerate(self.buckets) if len(bucket.rows) * self.repeat % self.batch_size]
        return np.array(short, dtype=np.int64)

    def step(self, global_step: int) -> GlobalBatch:
        """Return the global batch of a step (from 0 over all epochs)."""
        if global_step < 0:
            raise ValueError(f"steps start at 0, got {global_step}")
        epoch, step_in_epoch = divmod(global_step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch_size
        stop = min(start + self.global_batch_size, self.num_samples)
        pieces = [*self._full_pieces(epoch, start, stop), *self._tail_pieces(epoch, start, stop)]
        return GlobalBatch(
            step=global_step,
            epoch=epoch,
            num_samples=stop - start,
            micro_batches=tuple(self._build_micro_batches(epoch, pieces)),
        )

    def _full_pieces(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut samples [start, stop) of the epoch, as far as they are in full micro batches.

        Yields (bucket index, first, end): positions in the bucket's keyed order.
        """
        num_full = int(self._first_full[-1])
        stop = min(stop, num_full * self.batch_size)
        if start >= stop:
            return
        first_micro = start // self.batch_size
        positions = np.arange(first_micro, -(-stop // self.batch_size), dtype=np.int64)
        micros = KeyedPermutation(num_full, derive_key(self.seed, epoch, "micro batches"))(positions)
        bucket_indices = np.searchsorted(self._first_full, micros, side="right") - 1
        in_bucket = micros - self._first_full[bucket_indices]
        for position, bucket_index, micro in zip(positions.tolist(), bucket_indices.tolist(), in_bucket.tolist(), strict=True):
            # Only the first and the last micro batch of a step can be cut.
            skipped = max(start - position * self.batch_size, 0)
            end = min(stop - position * self.batch_size, self.batch_size)
            yield bucket_index, micro * self.batch_size + skipped, micro * self.batch_size + end

    def _tail_pieces(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut samples [start, stop) of the epoch, as far as they are in short micro batches; as `_full_pieces`."""
        position = int(self._first_full[-1]) * self.batch_size
        if stop <= position:
            return
        num_tail = len(self._tail_buckets)
        shuffle = KeyedPermutation(num_tail, derive_key(self.seed, epoch, "short micro batches"))
        for bucket_index in self._tail_buckets[shuffle(np.arange(num_tail))].tolist():
            num_samples = len(self.buckets[bucket_index].rows) * self.repeat
            first = num_samples - num_samples % self.batch_size
            skipped, end = max(start - position, 0), min(stop - position, num_samples - first)
            if skipped < end:
                yield bucket_index, first + skipped, first + end
            position += num_samples - first

    def _build_micro_batches(self, epoch: int, pieces: Sequence[tuple[int, int, int]]) -> Iterator[MicroBatch]:
        positions: dict[int, list[IntArray]] = {}
        for bucket_index, first, end in pieces:
            positions.setdefault(bucket_index, []).append(np.arange(first, end, dtype=np.int64))
        # One call of the permutation a bucket, not one a micro batch: numpy's cost is in the calls.
        rows = {
            bucket_index: iter(self._rows(epoch, bucket_index, np.concatenate(parts)).tolist())
            for bucket_index, parts in positions.items()
        }
        index = 0
        for bucket_index, first, end in pieces:
            bucket, num_samples = self.buckets[bucket_index], end - first
            yield MicroBatch(
                bucket_index=bucket_index,
                height=bucket.height,
                width=bucket.width,
                num_frames=bucket.num_frames,
                rows=tuple(next(rows[bucket_index]) for _ in range(num_samples)),
                indices=tuple(range(index, index + num_samples)),
            )
            index += num_samples

    def _rows(self, epoch: int, bucket_index: int, positions: IntArray) -> IntArray:
        """Map positions [n] in a bucket's keyed order to metadata rows [n]."""
        bucket = self.buckets[bucket_index]
        # The key names the size and not the bucket's number, so that a new bucket leaves the others' order alone.
        key = derive_key(self.seed, epoch, "samples", bucket.height, bucket.width, bucket.num_frames)
        virtual_rows = KeyedPermutation(len(bucket.rows) * self.repeat, key)(positions)
        rows: IntArray = bucket.rows[virtual_rows % len(bucket.rows)]
        return rows


def count_tokens(height: int, width: int, num_frames: int) -> int:
    """Return the latent tokens of one sample: one for 16x16 pixels and 4 frames (the first alone), as most families."""
    return (height // 16) * (width // 16) * ((num_frames - 1) // 4 + 1)


def build_buckets(sizes: npt.ArrayLike) -> tuple[Bucket, ...]:
    """Group rows by target size, smallest first; sizes is [num_rows, 3] of (height, width, num_frames)."""
    table = np.asarray(sizes, dtype=np.int64).reshape(-1, 3)
    grouped = np.lexsort(table.T[::-1])
    ordered = table[grouped]
    is_first = np.ones(len(table), dtype=bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = np.flatnonzero(is_first)
    groups = np.split(grouped.astype(np.int64), firsts[1:]) if len(firsts) else []
    return tuple(
        Bucket(height, width, num_frames, rows)
        for (height, width, num_frames), rows in zip(ordered[firsts].tolist(), groups, strict=True)
    )


def deal(global_batch: GlobalBatch, num_workers: int) -> list[list[MicroBatch]]:
    """Deal the micro batches to workers: [num_workers][micro steps], every worker the same number of micro steps.

    The largest come first, so that in one micro step all workers compute similar sizes; within a micro step the worker
    with the least so far gets the largest, which keeps the sums even (with distinct sizes it is a snake: 0 1 2, 2 1 0).
    Missing micro batches of the last micro step are dummies, copies of the cheapest one.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
    ordered = sorted(global_batch.micro_batches, key=lambda micro_batch: -micro_batch.tokens)
    dummy = replace(ordered[-1], is_dummy=True)
    ordered += [dummy] * (-len(ordered) % num_workers)
    hands: list[list[MicroBatch]] = [[] for _ in range(num_workers)]
    loads = [0] * num_workers
    for first in range(0, len(ordered), num_workers):
        by_load = sorted(range(num_workers), key=lambda worker: loads[worker])
        for worker, micro_batch in zip(by_load, ordered[first : first + num_workers], strict=True):
            hands[worker].append(micro_batch)
            loads[worker] += micro_batch.tokens
    return hands
