"""Stage two's way to its samples: from the cache, by random access, in the order of every other run.

Threads read ahead of the training; a sample is one read of one or two MB and its check, some milliseconds, against hundreds
that the step takes (tests/bench/split.py measures both). So neither Ray Data nor the object store stands between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from diffsynth_ray.data.bad_samples import BadSample
from diffsynth_ray.data.batches import MicroBatch
from diffsynth_ray.data.cache import Cache, Entry, Index, Kind, Positions
from diffsynth_ray.data.holdout import held_out
from diffsynth_ray.data.manifest import Manifest, holdout_of, read_manifest
from diffsynth_ray.data.metadata import PROMPT_COLUMN, Metadata
from diffsynth_ray.data.order import IntArray
from diffsynth_ray.data.samples import SampleIndex, SampleRule, build_order, build_sample_index, for_validation, hold_out
from diffsynth_ray.errors import DataError

if TYPE_CHECKING:
    from diffsynth_ray.config.resolve import ResolvedJob

PLURAL: dict[Kind, str] = {"text": "texts", "image": "images", "extra": "extra inputs"}
_NUM_READERS = 4
_READ_AHEAD = 16
"""Micro batches that are read before they are asked for."""


@dataclass(frozen=True)
class CachedRows:
    """Where the rows of a data set are in a cache. Memory is O(rows); pickles as tables."""

    cache_path: str
    index: Index
    """The entries of this data set alone."""
    bad: dict[int, BadSample]
    """Rows that cannot be used, and why; only where images are cached."""
    places: dict[Kind, Positions]
    """Kind -> [num_rows] place in `index`, -1 for bad rows; a kind that is not cached is not there."""
    sample_texts: dict[str, int] = field(default_factory=dict)
    """Prompt -> place in `index`, of the samples that the run makes to show what it trains."""
    holdout: CachedRows | None = None
    """Those of the validation samples where they have metadata of their own; else they are among these rows."""

    def has(self, kind: Kind) -> bool:
        """Whether this kind is cached."""
        return kind in self.places


@dataclass(frozen=True)
class CachedBatch:
    """One micro batch as the worker gets it from the cache; the fields of a `StreamedBatch`, without pixels."""

    step: int
    num_samples: int
    """Real samples of the step over all workers."""
    is_last: bool
    """The worker's last micro batch of the step."""
    micro_batch: MicroBatch
    """As planned."""
    rows: tuple[int, ...]
    """[b] rows that are really there."""
    images: tuple[Entry, ...]
    """[b]."""
    texts: tuple[Entry, ...]
    """[b], empty where texts are not cached."""
    extras: tuple[Entry, ...]
    """[b], empty without extra inputs."""

    @property
    def bad(self) -> tuple[BadSample, ...]:
        """Nothing new: stage one has told all of them."""
        return ()


def locate_rows(cache: Cache, manifest: Manifest, *, kinds: Sequence[Kind], prompts: Sequence[str] = ()) -> CachedRows:
    """Find every row's entries of these kinds, and those of the prompts of samples.

    Raises DataError with the number of those that are not there.
    """
    index = cache.index()
    if unknown := [prompt for prompt in prompts if prompt not in manifest.sample_texts]:
        raise DataError(
            f"{cache.path}: the data set {manifest.id} was cached without {len(unknown)} of the {len(prompts)} texts of "
            f"validation.prompts (first {unknown[0]!r})",
            hint="submit the job where the media are, with [dataset]",
        )
    samples = [manifest.sample_texts[prompt] for prompt in prompts]
    bad = _bad_rows(manifest) if "image" in kinds else {}
    names = {kind: [row.key(kind) for row in manifest.rows] for kind in kinds}
    if lacking := [kind for kind, found in names.items() if {n for n, key in enumerate(found) if key is None} - bad.keys()]:
        raise DataError(
            f"{cache.path}: the data set {manifest.id} has no encoded {' and '.join(PLURAL[kind] for kind in lacking)}",
            hint="submit the job where the media are, with [dataset]",
        )
    keys = list(dict.fromkeys([*(key for found in names.values() for key in found if key is not None), *samples]))
    if missing := index.missing(keys):
        raise DataError(
            f"{cache.path}: {len(missing)} of {len(keys)} entries of the data set {manifest.id} are missing "
            f"(first {missing[0]})",
            hint="submit the job where the media are, with [dataset]: what is missing is encoded anew",
        )
    own = index.select(index.positions(keys))
    places = {kind: own.positions([key or "" for key in found]) for kind, found in names.items()}
    sample_texts = dict(zip(prompts, own.positions(samples).tolist(), strict=True))
    return CachedRows(cache_path=cache.path, index=own, bad=bad, places=places, sample_texts=sample_texts)


def _bad_rows(manifest: Manifest) -> dict[int, BadSample]:
    return {
        number: BadSample(number, len(manifest.rows), path=row.bad[0], cause=row.bad[1])
        for number, row in enumerate(manifest.rows)
        if row.bad is not None
    }


def usable_rows(samples: SampleIndex, rows: CachedRows, micro: MicroBatch, *, step: int) -> tuple[int, ...]:
    """[b] rows of a micro batch; in place of a bad one what combined training takes, as far as it has the same size.

    Raises DataError where none has.
    """
    if not any(row in rows.bad for row in micro.rows):
        return micro.rows
    same_size = samples.order.buckets[micro.bucket_index].rows
    found = []
    for row, index in zip(micro.rows, micro.indices, strict=True):
        candidates = (row,) if row not in rows.bad else samples.candidates(row, micro, step=step, index=index)
        usable = next((each for each in candidates if each not in rows.bad and each in same_size), None)
        if usable is None:
            raise DataError(f"{rows.bad[row]}; and none of the rows tried in its place can be used either")
        found.append(usable)
    return tuple(found)


def open_cached_samples(
    resolved: ResolvedJob,
    manifest_id: str,
    *,
    kinds: Sequence[Kind],
    rule: SampleRule,
    say: Callable[[str], None],
    prompts: Sequence[str] = (),
) -> tuple[SampleIndex, CachedRows]:
    """A data set of the cache for stage two. Media and metadata are read only where images are not among the cached kinds.

    `prompts`: of samples, whose encoded texts are needed too.
    """
    cache, holdout = Cache(resolved.job.split.cache_path), resolved.job.validation.holdout
    manifest = read_manifest(cache, manifest_id)
    rows = locate_rows(cache, manifest, kinds=kinds, prompts=prompts)
    held = holdout_of(cache, manifest) if isinstance(holdout, str) else None
    if held is not None:
        rows = replace(rows, holdout=locate_rows(cache, held, kinds=kinds))
    if "image" not in kinds:
        return build_sample_index(resolved, say, rule=rule), rows
    whole = _index_of(manifest, resolved, rule)
    if held is not None:
        return replace(whole, holdout=for_validation(_index_of(held, resolved, rule))), rows
    if isinstance(holdout, float):
        chosen = held_out(manifest.media, share=holdout, seed=resolved.job.seed)
        return hold_out(whole, chosen, resolved, _sizes_of(manifest), say), rows
    return whole, rows


def _sizes_of(manifest: Manifest) -> IntArray:
    return np.array([(row.height, row.width, row.num_frames) for row in manifest.rows], dtype=np.int64)


def _index_of(manifest: Manifest, resolved: ResolvedJob, rule: SampleRule) -> SampleIndex:
    metadata = Metadata(
        rows=[{PROMPT_COLUMN: row.prompt} for row in manifest.rows],
        columns=(PROMPT_COLUMN,),
        file_columns=(),
        base_path="",
        digest=manifest.id,
    )
    order = build_order(resolved, _sizes_of(manifest), np.arange(len(manifest.rows)))
    return SampleIndex(metadata=metadata, order=order, dataset=resolved.job.dataset, rule=rule)


class CacheReader:
    """Reads the entries of rows."""

    def __init__(self, rows: CachedRows) -> None:
        self.rows = rows
        self.cache = Cache(rows.cache_path)

    def entries(self, kind: Kind, rows: Sequence[int]) -> tuple[Entry, ...]:
        """The rows' entries of a kind, () where it is not cached. Raises DataError for damage, with the row."""
        if not self.rows.has(kind):
            return ()
        found = []
        for row in rows:
            location = self.rows.index.location(int(self.rows.places[kind][row]))
            try:
                found.append(self.cache.read(location))
            except DataError as error:
                raise DataError(f"row {row + 1}: {error.message}", hint=error.hint) from error
        return tuple(found)

    def sample_texts(self) -> dict[str, Entry]:
        """Of the run's samples, by prompt."""
        return {prompt: self.cache.read(self.rows.index.location(place)) for prompt, place in self.rows.sample_texts.items()}


def read_batches(
    samples: SampleIndex, rows: CachedRows, *, start_step: int, num_steps: int, rank: int, world_size: int
) -> Iterator[CachedBatch]:
    """The micro batches of worker `rank` from `start_step` on, in order, read ahead by threads.

    Raises DataError, when its turn comes, for an entry that is damaged.
    """
    reader = CacheReader(rows)

    def read(step: int, num_samples: int, is_last: bool, micro: MicroBatch) -> CachedBatch:
        used = usable_rows(samples, rows, micro, step=step)
        return CachedBatch(
            step=step,
            num_samples=num_samples,
            is_last=is_last,
            micro_batch=micro,
            rows=used,
            images=reader.entries("image", used),
            texts=reader.entries("text", used),
            extras=reader.entries("extra", used),
        )

    found = samples.micro_batches(start_step=start_step, num_steps=num_steps, rank=rank, world_size=world_size)
    pool = ThreadPoolExecutor(max_workers=_NUM_READERS, thread_name_prefix="cache")
    pending: deque[Future[CachedBatch]] = deque()
    try:
        pending.extend(pool.submit(read, *position) for position in islice(found, _READ_AHEAD))
        while pending:
            batch = pending.popleft().result()
            pending.extend(pool.submit(read, *position) for position in islice(found, 1))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
