"""Every row of a data set by the keys of its entries: what it is called in the cache, and what would have to be encoded."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.data.cache import Kind
from diffsynth_ray.data.manifest import HOLDOUT, IS_HOLDOUT, SAMPLE_TEXTS, Manifest, ManifestRow
from diffsynth_ray.data.metadata import Value
from diffsynth_ray.data.samples import SampleIndex, lenders
from diffsynth_ray.errors import DataError
from diffsynth_ray.models.family import ModelFamily
from diffsynth_ray.train.split import extra_key, image_key, text_key
from diffsynth_ray.train.units import ExtraItem, ImageItem, Item, TextItem


class Digest(Protocol):
    """Hashes files."""

    def __call__(self, paths: Sequence[str], places: Sequence[str]) -> list[str | DataError]:
        """Hash of each, or why it cannot be read; `places` say where in the metadata it is, for errors."""
        ...


@dataclass
class NamedRows:
    """The rows of a data set, and what each would be encoded from. Memory is O(rows)."""

    rows: list[ManifestRow] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    """[num_rows] what is trained on."""
    found: dict[Kind, dict[str, Item]] = field(default_factory=dict)
    """By kind every item once, by key."""

    def mark_bad(self, unreadable: Mapping[str, str]) -> None:
        """Mark the rows that need one of these keys as bad, for this cause."""
        for number, row in enumerate(self.rows):
            cause = unreadable.get(row.image_key or "") or unreadable.get(row.extra_key or "")
            if cause is not None:
                self.rows[number] = replace(row, image_key=None, extra_key=None, bad=(self.paths[number], cause))

    def bad(self) -> dict[int, str]:
        """Row -> cause."""
        return {number: row.bad[1] for number, row in enumerate(self.rows) if row.bad is not None}

    def lend_sizes(self, seed: int) -> None:
        """Give a bad row that alone has its size another one's: only rows of one size can take each other's place."""
        bad = self.bad()
        usable = {_size(row) for row in self.rows if row.bad is None}
        for number, lender in lenders(bad, num_rows=len(self.rows), seed=seed).items():
            if _size(self.rows[number]) not in usable:
                height, width, num_frames = _size(self.rows[lender])
                self.rows[number] = replace(self.rows[number], height=height, width=width, num_frames=num_frames)

    def manifest(
        self,
        resolved: ResolvedJob,
        family: type[ModelFamily],
        encoders: Mapping[Kind, str],
        *,
        metadata_path: str | None,
        holdout: Manifest | None = None,
        is_holdout: bool = False,
        texts: Mapping[str, str] | None = None,
    ) -> Manifest:
        """What stage two needs to know of the rows of these metadata.

        `holdout` = the manifest of their validation samples where these have metadata of their own; `is_holdout` = this is one;
        `texts` = keys of the texts of samples, by prompt.
        """
        dataset, numbers = resolved.job.dataset, {path: n for n, path in enumerate(dict.fromkeys(self.paths))}
        source: dict[str, object] = {
            "base_path": dataset.base_path,
            "metadata_path": metadata_path,
            "size": [dataset.height, dataset.width, dataset.max_pixels, dataset.num_frames, dataset.frame_rate],
        }
        if is_holdout:
            source[IS_HOLDOUT] = True
        if holdout is not None:
            source[HOLDOUT] = holdout.id
        if texts:
            source[SAMPLE_TEXTS] = dict(texts)
        return Manifest(
            rows=tuple(replace(row, file=numbers[path]) for row, path in zip(self.rows, self.paths, strict=True)),
            source=source,
            family=family.name,
            dtype=resolved.job.training.precision,
            encoders={str(kind): digest for kind, digest in encoders.items()},
            created=time.time(),
        )


def _size(row: ManifestRow) -> tuple[int, int, int]:
    return row.height, row.width, row.num_frames


def name_rows(
    resolved: ResolvedJob,
    family: type[ModelFamily],
    index: SampleIndex,
    *,
    encoders: Mapping[Kind, str],
    digest: Digest,
) -> NamedRows:
    """Name every row's entries of the kinds in `encoders`."""
    kinds: tuple[Kind, ...] = ("text", "image", "extra") if "extra" in encoders else ("text", "image")
    named = NamedRows(found={kind: {} for kind in kinds})
    sizes: dict[int, tuple[int, int, int]] = {}
    for bucket in index.order.buckets:
        sizes.update(dict.fromkeys(bucket.rows.tolist(), (bucket.height, bucket.width, bucket.num_frames)))
    numbers = range(len(index.metadata))
    # A first or last frame that is no column is one of what is trained on.
    needs_frames = set(resolved.job.model.extra_inputs) > set(index.extra_columns)
    media: list[str | DataError] = [""] * len(numbers)
    if "image" in encoders or ("extra" in encoders and needs_frames):
        media = digest([index.path(row) for row in numbers], [f"row {row + 1}" for row in numbers])
    files = _extra_files(index, digest) if "extra" in encoders else []
    for row in numbers:
        prompt, (height, width, num_frames) = index.prompt(row), sizes[row]
        named.paths.append(index.path(row))
        text = None
        if "text" in encoders:
            text = text_key(encoders["text"], prompt)
            named.found["text"].setdefault(text, TextItem(text, prompt))
        here = files[row] if files else {}
        if (cause := _cause(index, row, media[row], here)) is not None:
            named.rows.append(ManifestRow(prompt, text, None, height, width, num_frames, bad=(index.path(row), cause)))
            continue
        pixels = _image_item(index, row, str(media[row]), size=sizes[row], encoder=encoders.get("image", ""))
        image = extra = None
        if "image" in encoders:
            image = pixels.key
            named.found["image"].setdefault(image, pixels)
        if "extra" in encoders:
            item = _extra_item(family, index, pixels, needs_frames=needs_frames, files=here, encoder=encoders["extra"])
            extra = item.key
            named.found["extra"].setdefault(extra, item)
        named.rows.append(ManifestRow(prompt, text, image, height, width, num_frames, extra))
    return named


Files = dict[str, list[tuple[str, str | DataError]]]
"""By column: path and hash of each file, or why it cannot be read."""


def _cause(index: SampleIndex, row: int, media: str | DataError, files: Files) -> str | None:
    """Why a row cannot be used, as far as is known before decoding."""
    if row in index.unusable:
        return index.unusable[row]
    errors = [media, *(digest for found in files.values() for _, digest in found)]
    return next((error.message for error in errors if isinstance(error, DataError)), None)


def _image_item(index: SampleIndex, row: int, media: str, *, size: tuple[int, int, int], encoder: str) -> ImageItem:
    height, width, num_frames = size
    rate = index.dataset.frame_rate if num_frames > 1 else None
    key = image_key(encoder, media, height=height, width=width, num_frames=num_frames, frame_rate=rate)
    return ImageItem(key, index.path(row), media, row, height, width, num_frames, rate)


def _extra_files(index: SampleIndex, digest: Digest) -> list[Files]:
    """[num_rows]."""
    columns = [column for column in index.extra_columns if column in index.metadata.file_columns]
    paths, places = [], []
    for row in range(len(index.metadata)):
        for column in columns:
            found = index.metadata.files(row, column)
            paths += found
            places += [f"row {row + 1}, column {column}"] * len(found)
    digests = iter(digest(paths, places) if paths else [])
    return [
        {column: [(path, next(digests)) for path in index.metadata.files(row, column)] for column in columns}
        for row in range(len(index.metadata))
    ]


def _extra_item(
    family: type[ModelFamily],
    index: SampleIndex,
    pixels: ImageItem,
    *,
    needs_frames: bool,
    files: Files,
    encoder: str,
) -> ExtraItem:
    values: dict[str, Value] = {
        column: index.metadata.rows[pixels.row][column] for column in index.extra_columns if column not in files
    }
    hashes = {column: [(path, str(digest)) for path, digest in named] for column, named in files.items()}
    prompt = index.prompt(pixels.row)
    key = extra_key(
        encoder,
        prompt=prompt if family.text_reads_extra else None,
        image=pixels.key if needs_frames else None,
        size=pixels.size,
        inputs={column: [digest for _, digest in named] for column, named in hashes.items()} | values,
        dataset=index.dataset,
        rule=index.rule,
    )
    return ExtraItem(key, prompt, pixels, needs_frames, hashes, values)
