"""Every row of a data set by the keys of its entries: what it is called in the cache, and what would have to be encoded."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.data.cache import Kind
from diffsynth_ray.data.manifest import Manifest, ManifestRow
from diffsynth_ray.data.metadata import Value
from diffsynth_ray.data.samples import SampleIndex
from diffsynth_ray.models.family import ModelFamily
from diffsynth_ray.train.split import extra_key, image_key, text_key
from diffsynth_ray.train.units import ExtraItem, ImageItem, Item, TextItem


class Digest(Protocol):
    """Hashes files."""

    def __call__(self, paths: Sequence[str], places: Sequence[str]) -> list[str]:
        """Hash of each; `places` say where in the metadata it is, for errors."""
        ...


@dataclass
class NamedRows:
    """The rows of a data set, and what each would be encoded from. Memory is O(rows)."""

    rows: list[ManifestRow] = field(default_factory=list)
    found: dict[Kind, dict[str, Item]] = field(default_factory=dict)
    """By kind every item once, by key."""

    def manifest(self, resolved: ResolvedJob, family: type[ModelFamily], encoders: Mapping[Kind, str]) -> Manifest:
        """What stage two needs to know."""
        dataset = resolved.job.dataset
        return Manifest(
            rows=tuple(self.rows),
            source={
                "base_path": dataset.base_path,
                "metadata_path": dataset.metadata_path,
                "size": [dataset.height, dataset.width, dataset.max_pixels, dataset.num_frames, dataset.frame_rate],
            },
            family=family.name,
            dtype=resolved.job.training.precision,
            encoders={str(kind): digest for kind, digest in encoders.items()},
            created=time.time(),
        )


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
    media = [""] * len(numbers)
    if "image" in encoders or ("extra" in encoders and needs_frames):
        media = digest([index.path(row) for row in numbers], [f"row {row + 1}" for row in numbers])
    files = _extra_files(index, digest) if "extra" in encoders else []
    for row in numbers:
        prompt, (height, width, num_frames) = index.prompt(row), sizes[row]
        rate = index.dataset.frame_rate if num_frames > 1 else None
        text = image = extra = None
        if "text" in encoders:
            text = text_key(encoders["text"], prompt)
            named.found["text"].setdefault(text, TextItem(text, prompt))
        key = image_key(
            encoders.get("image", ""), media[row], height=height, width=width, num_frames=num_frames, frame_rate=rate
        )
        pixels = ImageItem(key, index.path(row), media[row], row, height, width, num_frames, rate)
        if "image" in encoders:
            image = key
            named.found["image"].setdefault(image, pixels)
        if "extra" in encoders:
            item = _extra_item(family, index, pixels, needs_frames=needs_frames, files=files[row], encoder=encoders["extra"])
            extra = item.key
            named.found["extra"].setdefault(extra, item)
        named.rows.append(ManifestRow(prompt, text, image, height, width, num_frames, extra))
    return named


def _extra_files(index: SampleIndex, digest: Digest) -> list[dict[str, list[tuple[str, str]]]]:
    """[num_rows] by column of files: path and hash of each."""
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
    files: dict[str, list[tuple[str, str]]],
    encoder: str,
) -> ExtraItem:
    values: dict[str, Value] = {
        column: index.metadata.rows[pixels.row][column] for column in index.extra_columns if column not in files
    }
    prompt = index.prompt(pixels.row)
    key = extra_key(
        encoder,
        prompt=prompt if family.text_reads_extra else None,
        image=pixels.key if needs_frames else None,
        size=pixels.size,
        inputs={column: [digest for _, digest in named] for column, named in files.items()} | values,
        dataset=index.dataset,
        rule=index.rule,
    )
    return ExtraItem(key, prompt, pixels, needs_frames, files, values)
