"""What stage one encodes: texts, images and extra inputs, cut into units that are decoded and encoded at once.

A unit is JSON, so that it travels in a block: {"kind", "items"}; its items are the fields of the classes below.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diffsynth_ray.config.schema import DatasetSection
from diffsynth_ray.data.cache import Kind
from diffsynth_ray.data.digests import file_digest
from diffsynth_ray.data.media import Frames, decode
from diffsynth_ray.data.metadata import Value
from diffsynth_ray.data.samples import Extra, SampleRule, decode_extra
from diffsynth_ray.errors import DataError

_UNIT_PIXELS = 4 << 20
"""Pixels of a unit of images, over all frames: what is encoded at once on a GPU (on a CPU one is, whatever the unit)."""
_MAX_UNIT_IMAGES = 32
_UNIT_TEXTS = 16


@dataclass(frozen=True)
class TextItem:
    """A text to encode."""

    key: str
    prompt: str


@dataclass(frozen=True)
class ImageItem:
    """An image or clip to encode."""

    key: str
    path: str
    digest: str
    """Of the file's content, as the key has it."""
    row: int
    """A row of the metadata that has it, for messages."""
    height: int
    width: int
    num_frames: int
    frame_rate: float | None = None
    """Frames a second that a clip is sampled at; None = the file's own."""

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return self.num_frames, self.height, self.width


@dataclass(frozen=True)
class ExtraItem:
    """A row's extra inputs, and its prompt where the family reads both together."""

    key: str
    prompt: str
    image: ImageItem
    """What the row is trained on: its size always, its frames where `needs_frames`."""
    needs_frames: bool
    files: dict[str, list[tuple[str, str]]]
    """By column of files: path and hash of each."""
    values: dict[str, Value]
    """By column without files."""


Item = TextItem | ImageItem | ExtraItem


@dataclass(frozen=True)
class Unreadable:
    """An item whose files cannot be read."""

    key: str
    where: str
    """In the metadata."""
    cause: str

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}"


def text_units(texts: Sequence[TextItem]) -> Iterator[dict[str, Any]]:
    """Units of texts."""
    for first in range(0, len(texts), _UNIT_TEXTS):
        yield {"kind": "text", "items": [asdict(item) for item in texts[first : first + _UNIT_TEXTS]]}


def image_units(images: Sequence[ImageItem]) -> Iterator[dict[str, Any]]:
    """Units of one size, the largest first: an image too large for the device is met at once, not after hours."""
    buckets: dict[tuple[int, int, int], list[ImageItem]] = {}
    for item in images:
        buckets.setdefault(item.size, []).append(item)
    for size, items in sorted(buckets.items(), key=lambda bucket: -int(np.prod(bucket[0]))):
        count = min(max(_UNIT_PIXELS // int(np.prod(size)), 1), _MAX_UNIT_IMAGES)
        for first in range(0, len(items), count):
            yield {"kind": "image", "items": [asdict(item) for item in items[first : first + count]]}


def extra_units(extras: Sequence[ExtraItem]) -> Iterator[dict[str, Any]]:
    """A unit a row, the largest first: their files are of any size."""
    for item in sorted(extras, key=lambda item: -int(np.prod(item.image.size))):
        yield {"kind": "extra", "items": [asdict(item)]}


def units_of(items: Mapping[Kind, Sequence[Any]]) -> list[dict[str, Any]]:
    """All units of all kinds."""
    return [
        *text_units(items.get("text", ())),
        *image_units(items.get("image", ())),
        *extra_units(items.get("extra", ())),
    ]


def decode_unit(
    unit: dict[str, Any], dataset: DatasetSection, rule: SampleRule
) -> tuple[dict[str, Any], bytes | None, bytes | None, list[Unreadable]]:
    """(the unit without what cannot be read, its pixels, its extra files packed, and that)."""
    if unit["kind"] == "text":
        return unit, None, None, []
    if unit["kind"] == "extra":
        return _decode_extra_unit(unit, dataset, rule)
    frames, errors, items = [], [], []
    for fields in unit["items"]:
        item = ImageItem(**fields)
        try:
            frames.append(_decode_image(item))
            items.append(fields)
        except DataError as error:
            errors.append(Unreadable(item.key, f"row {item.row + 1}", error.message))
    return {**unit, "items": items}, np.stack(frames).tobytes() if frames else None, None, errors


def _decode_image(item: ImageItem) -> Frames:
    frames = decode(item.path, height=item.height, width=item.width, num_frames=item.num_frames, frame_rate=item.frame_rate)
    if len(frames) != item.num_frames:
        raise DataError(f"{item.path}: {len(frames)} frames, {item.num_frames} expected; the file is shorter than it was")
    _check_unchanged(item.path, item.digest)
    return frames


def _check_unchanged(path: str, digest: str) -> None:
    """Called after decoding, so that what was decoded is what the key names."""
    if file_digest(path) != digest:
        raise DataError(f"{path}: the file changed while the data set was encoded; submit the job again")


def _decode_extra_unit(
    unit: dict[str, Any], dataset: DatasetSection, rule: SampleRule
) -> tuple[dict[str, Any], bytes | None, bytes | None, list[Unreadable]]:
    item = extra_item(unit)
    files: dict[str, Frames] = {}
    column = ""
    try:
        frames = _decode_image(item.image) if item.needs_frames else None
        for column, named in item.files.items():
            for number, (path, digest) in enumerate(named):
                files[f"{column}/{number}"] = decode_extra(path, dataset, rule)
                _check_unchanged(path, digest)
    except DataError as error:
        where = f"row {item.image.row + 1}" + (f", column {column}" if column else "")
        return {**unit, "items": []}, None, None, [Unreadable(item.key, where, error.message)]
    packed = io.BytesIO()
    np.savez(packed, **files)  # type: ignore[arg-type]  # a name of numpy's own has no slash
    return unit, frames.tobytes() if frames is not None else None, packed.getvalue(), []


def extra_item(unit: dict[str, Any]) -> ExtraItem:
    """The one item of a unit of extra inputs."""
    fields = unit["items"][0]
    return ExtraItem(**{**fields, "image": ImageItem(**fields["image"])})


def unpack_extra(item: ExtraItem, packed: bytes) -> dict[str, tuple[Extra, ...]]:
    """By column, for one sample: what `decode_unit` has packed, and the values."""
    with np.load(io.BytesIO(packed), allow_pickle=False) as files:
        found: dict[str, tuple[Extra, ...]] = {
            column: (tuple(files[f"{column}/{number}"] for number in range(len(named))),)
            for column, named in item.files.items()
        }
    return found | {column: (value,) for column, value in item.values.items()}
