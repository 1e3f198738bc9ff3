"""A dataset ready to be read in any order: rows, target sizes and order, and how a micro batch is decoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from diffsynth_ray.config.distillation import DIRECT_DISTILL
from diffsynth_ray.config.schema import DatasetSection
from diffsynth_ray.config.sizes import check_clip_length
from diffsynth_ray.data.bad_samples import BadSample, check_limit
from diffsynth_ray.data.batches import Bucket, MicroBatch, SampleOrder, build_buckets, deal
from diffsynth_ray.data.decoded import MAX_BYTES, DecodedFiles
from diffsynth_ray.data.holdout import held_out_rows, holdout_errors
from diffsynth_ray.data.media import (
    SIDE_MULTIPLE,
    STATIC_IMAGE_EXTENSIONS,
    Frames,
    MediaInfo,
    clip_length,
    decode,
    media_extension,
    read_info,
    target_size,
)
from diffsynth_ray.data.metadata import PROMPT_COLUMN, Metadata, Value, media_column, media_path, read_metadata
from diffsynth_ray.data.order import IntArray, KeyedPermutation, derive_key
from diffsynth_ray.data.sizes import index_places, read_media_infos
from diffsynth_ray.data.teacher import check_teacher_runs
from diffsynth_ray.errors import DataError, JobFileError, Problem, listed

if TYPE_CHECKING:
    from diffsynth_ray.config.resolve import ResolvedJob

Extra = tuple[Frames, ...] | Value
"""A further input of one sample: its files decoded, or the cell's value where the column holds no files."""

# A bad sample is replaced by the first of so many that can be read: where none can, the data are no data.
_CANDIDATES = 16


@dataclass(frozen=True)
class SampleRule:
    """What a model family demands of its samples."""

    size_multiple: int = SIDE_MULTIPLE
    """Pixels; heights and widths are multiples of it."""
    clip_step: int | None = None
    """Clips have a multiple of this many frames and one more; None: the family takes images, of a video the first frame."""


@dataclass(frozen=True)
class DecodedBatch:
    """A micro batch, decoded."""

    pixels: Frames
    """uint8 [b, f, h, w, 3]."""
    rows: tuple[int, ...]
    """[b] positions in the metadata, of the replacements where there are any."""
    prompts: tuple[str, ...]
    extra: dict[str, tuple[Extra, ...]]
    """By column of `model.extra_inputs`: [b]."""
    bad: tuple[BadSample, ...] = ()
    """What was replaced."""


@dataclass(frozen=True)
class SampleIndex:
    """Everything needed to name and decode the samples of any step. Memory is O(rows)."""

    metadata: Metadata
    order: SampleOrder
    dataset: DatasetSection
    rule: SampleRule = SampleRule()
    extra_columns: tuple[str, ...] = ()
    unusable: dict[int, str] = field(default_factory=dict)
    """Rows whose header shows that they cannot be trained on, and why; only under `bad_sample = "skip"`."""
    holdout: SampleIndex | None = None
    """Samples of the validation loss. A bad one is always an error there: another in its place would be another loss."""
    kept: DecodedFiles | None = None
    """What this process has decoded already; see `keeping_decoded`."""

    def keeping_decoded(self) -> SampleIndex:
        """The same for a process that decodes many steps: where all samples are small enough together, each once only."""
        num_bytes = sum(len(b.rows) * b.num_frames * b.height * b.width * 3 for b in self.order.buckets)
        return replace(self, kept=DecodedFiles()) if num_bytes <= MAX_BYTES else self

    def prompt(self, row: int) -> str:
        """The caption of a row; an empty cell is the empty prompt."""
        value = self.metadata.rows[row].get(PROMPT_COLUMN)
        return "" if value is None else str(value)

    def path(self, row: int) -> str:
        """The media file of a row."""
        return media_path(self.metadata, row)

    def bad_headers(self) -> list[BadSample]:
        """The unusable rows, as the list of a run has them."""
        return [BadSample(row, len(self.metadata), self.path(row), cause) for row, cause in sorted(self.unusable.items())]

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

    def singles(self) -> list[MicroBatch]:
        """Every row once, as a micro batch of one, in the order of the metadata."""
        rows = sorted((int(row), number) for number, bucket in enumerate(self.order.buckets) for row in bucket.rows)
        buckets = self.order.buckets
        return [
            MicroBatch(n, buckets[n].height, buckets[n].width, buckets[n].num_frames, (row,), (index,))
            for index, (row, n) in enumerate(rows)
        ]

    def decode(self, micro_batch: MicroBatch, *, step: int, out: Frames | None = None) -> DecodedBatch:
        """Decode a micro batch, into `out` (uint8 [b, f, h, w, 3]) where given.

        A sample that cannot be read is a DataError with row, column and cause; under `bad_sample = "skip"` it is replaced
        by another, which follows from the seed, the step and its place in the global batch.
        """
        micro = micro_batch
        if out is None:
            shape = (len(micro.rows), micro.num_frames, micro.height, micro.width, 3)
            out = np.empty(shape, dtype=np.uint8)
        rows, extras, bad = [], [], []
        for number, (row, index) in enumerate(zip(micro.rows, micro.indices, strict=True)):
            used, out[number], extra, replaced = self._decode_or_replace(row, micro, step=step, index=index)
            rows.append(used)
            extras.append(extra)
            if replaced is not None:
                bad.append(replaced)
        return DecodedBatch(
            pixels=out,
            rows=tuple(rows),
            prompts=tuple(self.prompt(row) for row in rows),
            extra={column: tuple(extra[column] for extra in extras) for column in self.extra_columns},
            bad=tuple(bad),
        )

    def problem(self, micro_batch: MicroBatch) -> str | None:
        """Why the row of a micro batch of one cannot be used, or None."""
        try:
            self._decode_row(micro_batch.rows[0], micro_batch)
        except DataError as error:
            return error.message
        return None

    def _decode_or_replace(
        self, row: int, micro: MicroBatch, *, step: int, index: int
    ) -> tuple[int, Frames, dict[str, Extra], BadSample | None]:
        """(row used, its frames, its extra inputs, what was replaced)."""
        try:
            return row, *self._decode_row(row, micro), None
        except DataError as error:
            if self.dataset.bad_sample == "error":
                raise DataError(f"row {row + 1}, column {self._column(row)}: {error.message}", hint=error.hint) from error
            cause = error.message
        for candidate in self.candidates(row, micro, step=step, index=index):
            try:
                frames, extra = self._decode_row(candidate, micro)
            except DataError:
                continue
            bad = BadSample(row, len(self.metadata), self.path(row), cause, step=step, replaced_by=candidate)
            return candidate, frames, extra, bad
        raise DataError(f"row {row + 1} is bad ({cause}), and none of the rows tried in its place can be read either")

    def candidates(self, row: int, micro: MicroBatch, *, step: int, index: int) -> Iterator[int]:
        """Rows to take instead: of the same bucket first, in an order that follows from seed, step and index."""
        key = derive_key(self.order.seed, step, "substitute", index)
        for pool in (self.order.buckets[micro.bucket_index].rows, self.order.rows):
            shuffled = KeyedPermutation(len(pool), key)
            for position in range(min(_CANDIDATES, len(pool))):
                candidate = int(pool[shuffled([position])[0]])
                if candidate != row:
                    yield candidate

    def _column(self, row: int) -> str:
        return media_column(self.metadata, row)

    def _decode_row(self, row: int, micro: MicroBatch) -> tuple[Frames, dict[str, Extra]]:
        if row in self.unusable:
            raise DataError(self.unusable[row])
        path = self.path(row)
        read = partial(
            decode,
            path,
            height=micro.height,
            width=micro.width,
            num_frames=micro.num_frames,
            frame_rate=self.dataset.frame_rate,
        )
        target = (micro.num_frames, micro.height, micro.width)
        frames = read() if self.kept is None else self.kept.get(path, target, read)
        if len(frames) != micro.num_frames:
            raise DataError(f"{path}: {len(frames)} frames, its batch has {micro.num_frames}; the file is shorter than it was")
        return frames, {column: self._decode_extra(row, column) for column in self.extra_columns}

    def _decode_extra(self, row: int, column: str) -> Extra:
        if column not in self.metadata.file_columns:
            return self.metadata.rows[row][column]
        return tuple(decode_extra(path, self.dataset, self.rule) for path in self.metadata.files(row, column))


def decode_extra(path: str, dataset: DatasetSection, rule: SampleRule) -> Frames:
    """A file of an extra input at its own target size, uint8 [frames, height, width, 3]."""
    height, width, num_frames = target_of(read_info(path), dataset, rule)
    return decode(path, height=height, width=width, num_frames=num_frames, frame_rate=dataset.frame_rate)


def target_of(info: MediaInfo, dataset: DatasetSection, rule: SampleRule) -> tuple[int, int, int]:
    """(height, width, frames) that a file is trained at. Raises DataError where it is too small."""
    height, width = target_size(
        info.width,
        info.height,
        fixed_height=dataset.height,
        fixed_width=dataset.width,
        max_pixels=dataset.max_pixels,
        multiple=rule.size_multiple,
    )
    if rule.clip_step is None or info.num_frames == 1:
        return height, width, 1
    length = clip_length(info, num_frames=dataset.num_frames, frame_rate=dataset.frame_rate, step=rule.clip_step)
    return height, width, length


def build_sample_index(resolved: ResolvedJob, say: Callable[[str], None], *, rule: SampleRule | None = None) -> SampleIndex:
    """Read metadata and, where sizes or lengths are not given, every file's header; raises DataError with all problems."""
    dataset, rule = resolved.job.dataset, rule or SampleRule()
    if dataset.base_path is None:  # split training may go without; whatever reads the media may not
        raise JobFileError("job", [Problem("dataset.base_path", "required: the folder of the media files")])
    if problems := check_clip_length(dataset, step=rule.clip_step):
        raise JobFileError("job", problems)
    metadata = read_metadata(
        dataset.base_path,
        dataset.metadata_path,
        dataset.data_file_keys,
        required_columns=[PROMPT_COLUMN],
        # Under "skip" a missing file is a bad sample like any other.
        check_files=dataset.bad_sample == "error",
    )
    if resolved.job.task == DIRECT_DISTILL:
        check_teacher_runs(metadata)
    for note in metadata.notes:
        say(note)
    _check_one_file(metadata)
    sizes, unusable = _target_sizes(metadata, resolved, rule, say)
    rows = np.arange(len(metadata))
    whole = SampleIndex(
        metadata=metadata,
        order=build_order(resolved, sizes, rows),
        dataset=dataset,
        rule=rule,
        extra_columns=tuple(name for name in resolved.job.model.extra_inputs if name in metadata.columns),
        unusable=unusable,
    )
    holdout = resolved.job.validation.holdout
    if isinstance(holdout, str):
        return replace(whole, holdout=_read_holdout(holdout, whole, resolved, say))
    if holdout is None:
        return whole
    return hold_out(whole, held_out_rows(metadata, share=holdout, seed=resolved.job.seed), resolved, sizes, say)


def hold_out(
    whole: SampleIndex, held: IntArray, resolved: ResolvedJob, sizes: IntArray, say: Callable[[str], None]
) -> SampleIndex:
    """The index without these rows, which are its validation samples then; `sizes` as for `build_order`."""
    rows = np.arange(len(whole.metadata))
    say(f"{len(held)} of {len(rows)} rows are held out for the validation loss")
    return replace(
        whole,
        order=build_order(resolved, sizes, np.setdiff1d(rows, held)),
        holdout=for_validation(replace(whole, order=build_order(resolved, sizes, held))),
    )


def build_order(resolved: ResolvedJob, sizes: IntArray, rows: IntArray) -> SampleOrder:
    """The order of these rows; `sizes` [num_rows, 3] are those of the whole metadata."""
    buckets = [Bucket(b.height, b.width, b.num_frames, rows[b.rows]) for b in build_buckets(sizes[rows])]
    dataset = resolved.job.dataset
    return SampleOrder(
        buckets=buckets,
        repeat=dataset.repeat,
        batch_size=dataset.batch_size,
        global_batch_size=resolved.global_batch_size,
        seed=resolved.job.seed,
    )


def _read_holdout(path: str, trained: SampleIndex, resolved: ResolvedJob, say: Callable[[str], None]) -> SampleIndex:
    """The samples of a metadata file of their own."""
    held = resolved.with_keys(dataset={"metadata_path": path, "bad_sample": "error"}, validation={"holdout": None})
    with holdout_errors():
        index = build_sample_index(held, say, rule=trained.rule)
    files = {trained.path(row) for row in range(len(trained.metadata))}
    common = sum(index.path(row) in files for row in range(len(index.metadata)))
    if common:
        say(
            f"note: {common} of the {len(index.metadata)} validation samples are trained on too: their loss shows what is "
            "memorised, not what is learned in general"
        )
    return index


def for_validation(index: SampleIndex) -> SampleIndex:
    """The same as validation samples, of which a bad one is an error."""
    return replace(index, dataset=index.dataset.model_copy(update={"bad_sample": "error"}))


def _check_one_file(metadata: Metadata) -> None:
    """Several files in a cell are for extra inputs; of what is trained on a row has one."""
    several = [
        f"row {row + 1}: {media_column(metadata, row)!r} has {len(files)} files"
        for row in range(len(metadata))
        if len(files := metadata.files(row, media_column(metadata, row))) > 1
    ]
    if several:
        message = "\n  ".join(["a row is trained on one file:", *listed(several)])
        raise DataError(message, hint="give each file a row of its own; lists are for the columns of model.extra_inputs")


def _target_sizes(
    metadata: Metadata, resolved: ResolvedJob, rule: SampleRule, say: Callable[[str], None]
) -> tuple[IntArray, dict[int, str]]:
    """([num_rows, 3] height, width, frames; the unusable rows under "skip", which borrow the size of another row)."""
    dataset = resolved.job.dataset
    paths = [media_path(metadata, row) for row in range(len(metadata))]
    if dataset.height is not None and dataset.width is not None and _are_images(paths, rule):
        one = MediaInfo(dataset.width, dataset.height, 1, None)
        return np.tile(np.array(target_of(one, dataset, rule), dtype=np.int64), (len(paths), 1)), {}
    places = index_places(metadata.base_path, dataset.metadata_path, resolved.output_path)
    infos = read_media_infos(paths, places=places, say=say)
    sizes = np.zeros((len(paths), 3), dtype=np.int64)
    problems: dict[int, str] = {}
    for row, path in enumerate(paths):
        try:
            info = infos[path]
            if isinstance(info, DataError):
                raise info
            sizes[row] = target_of(info, dataset, rule)
        except DataError as error:
            cause = error.message
            problems[row] = cause if path in cause else f"{path}: {cause}"
    if problems:
        _check_problems(problems, dataset, num_rows=len(paths))
        for row, lender in lenders(problems, num_rows=len(paths), seed=resolved.job.seed).items():
            sizes[row] = sizes[lender]
    return sizes, problems


def lenders(bad: Collection[int], *, num_rows: int, seed: int) -> dict[int, int]:
    """For every bad row a usable one whose size it gets."""
    usable = np.setdiff1d(np.arange(num_rows), list(bad))
    pick = KeyedPermutation(len(usable), derive_key(seed, 0, "size of a bad sample"))
    return {row: int(usable[pick([row % len(usable)])[0]]) for row in bad}


def _are_images(paths: Sequence[str], rule: SampleRule) -> bool:
    return rule.clip_step is None or all(media_extension(path) in STATIC_IMAGE_EXTENSIONS for path in paths)


def _check_problems(problems: dict[int, str], dataset: DatasetSection, *, num_rows: int) -> None:
    """Raise DataError where the run cannot go on with these unusable rows."""
    causes = [f"row {row + 1}: {cause}" for row, cause in problems.items()]
    if dataset.bad_sample == "error" or len(problems) == num_rows:
        raise DataError(
            "\n  ".join([f"{len(problems)} of {num_rows} files cannot be used:", *listed(causes)]),
            hint="mend or remove them; `dsray data check` finds files that are damaged further inside too"
            + ("" if dataset.bad_sample == "skip" else ', and dataset.bad_sample = "skip" goes on without them'),
        )
    check_limit(causes, num_bad=len(problems), num_rows=num_rows, limit=dataset.bad_sample_limit)
