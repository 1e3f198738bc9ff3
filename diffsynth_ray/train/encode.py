"""Stage one: what is not in the cache is encoded by a pool of encoder actors, on Ray Data.

    units (one task) -> decode (CPU tasks) -> encode (actors, one a GPU) -> write (CPU tasks, a shard each)

A unit is some texts, or some images of one size. Every step is idempotent: a lost task or actor is run again by Ray, and what
it wrote before is found under the same keys. A shard counts as soon as it is written, so that a killed stage goes on where it
was. A file that cannot be read travels as its error, so that all of them are told at once, at the end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata

from diffsynth_ray.config.resolve import READ_CPUS, EncodeResources, ResolvedJob
from diffsynth_ray.data.cache import Cache, Kind, pack_entry, unpack_entry
from diffsynth_ray.data.digests import file_digest
from diffsynth_ray.data.media import decode
from diffsynth_ray.errors import DataError, DsrayError, RunError
from diffsynth_ray.run_dir import EncodeProgress
from diffsynth_ray.train.split import SampleEncoder, load_encoders

WRITE_CPUS = 0.1
"""CPUs of a task that writes a shard."""
_UNIT_PIXELS = 4 << 20
"""Pixels of a unit of images, over all frames: what is encoded at once on a GPU (on a CPU one is, whatever the unit)."""
_MAX_UNIT_IMAGES = 32
_UNIT_TEXTS = 16
_SHARD_ENTRIES = 64
"""Entries of a shard: 130 MB of texts, 34 MB of 1024x1024 images. A killed stage loses a shard at most."""
_MIN_SHARDS = 16
"""Fewer entries a shard where there are few, so that progress is seen and kept."""
_SAY_S = 1.0


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


def encode_missing(
    resolved: ResolvedJob,
    texts: Sequence[TextItem],
    images: Sequence[ImageItem],
    *,
    components: Sequence[str],
    encoders: dict[Kind, str],
    board: Any,
    report: Callable[[EncodeProgress], None],
) -> list[str]:
    """Encode these items into the job's cache with `components`; `encoders` are their digests, for the index.

    Returns an error for every file that could not be read. A DsrayError in an encoder goes to the board, which ends the run.
    """
    assert resolved.encode is not None  # resolve has made it
    cache = Cache(str(resolved.job.split.cache_path))
    total = len(texts) + len(images)
    index_files: list[str] = []
    errors: list[str] = []
    done = 0
    progress = _Progress(total, report)
    dataset = _build_dataset(
        resolved,
        [*_text_units(texts), *_image_units(images)],
        shard_entries=min(max(-(-total // _MIN_SHARDS), 1), _SHARD_ENTRIES),
        components=tuple(components),
        encoders=encoders,
        board=board,
    )
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for name, count, found in zip(*(block[column].to_pylist() for column in _WRITTEN.names), strict=True):
            index_files += [name] if name else []
            errors += found
            done += count + len(found)
        progress.show(done)
    cache.merge_index_files(index_files)
    return errors


class _Progress:
    """Speed and time left, reported at most once a second. They count from the first shard on: starting is not encoding."""

    def __init__(self, total: int, report: Callable[[EncodeProgress], None]) -> None:
        self.total, self.report = total, report
        self.first: tuple[float, int] | None = None
        self.said = time.monotonic()

    def show(self, done: int) -> None:
        """Called after every shard."""
        now = time.monotonic()
        began, before = self.first = self.first or (now, done)
        per_s = (done - before) / (now - began) if now > began else 0.0
        if done < self.total and (now - self.said < _SAY_S or not per_s):
            return
        self.said = now
        left_s = round((self.total - done) / per_s) if per_s else 0
        self.report(EncodeProgress(done=done, total=self.total, per_s=per_s, left_s=left_s))


def _text_units(texts: Sequence[TextItem]) -> Iterator[dict[str, Any]]:
    for first in range(0, len(texts), _UNIT_TEXTS):
        yield {"kind": "text", "items": [asdict(item) for item in texts[first : first + _UNIT_TEXTS]]}


def _image_units(images: Sequence[ImageItem]) -> Iterator[dict[str, Any]]:
    """Units of one size, the largest first: an image too large for the device is met at once, not after hours."""
    buckets: dict[tuple[int, int, int], list[ImageItem]] = {}
    for item in images:
        buckets.setdefault((item.num_frames, item.height, item.width), []).append(item)
    for size, items in sorted(buckets.items(), key=lambda bucket: -int(np.prod(bucket[0]))):
        count = min(max(_UNIT_PIXELS // int(np.prod(size)), 1), _MAX_UNIT_IMAGES)
        for first in range(0, len(items), count):
            yield {"kind": "image", "items": [asdict(item) for item in items[first : first + count]]}


def _build_dataset(
    resolved: ResolvedJob,
    units: list[dict[str, Any]],
    *,
    shard_entries: int,
    components: tuple[str, ...],
    encoders: dict[Kind, str],
    board: Any,
) -> ray.data.Dataset:
    stage = resolved.encode
    assert stage is not None
    arguments = {"resolved_json": resolved.model_dump_json(), "components": components, "board": board}
    context = DataContext.get_current()
    saved = context.target_max_block_size, context.execution_options, context.enable_progress_bars
    try:
        # Every row is a block of its own: a unit, or an encoded sample.
        context.target_max_block_size = 1
        context.enable_progress_bars = False
        context.execution_options = type(context.execution_options)(preserve_order=False)
        return (
            ray.data.read_datasource(_UnitSource(units), override_num_blocks=1, num_cpus=READ_CPUS)
            .map_batches(
                _decode_unit,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=_unlike(stage.decode_cpus, READ_CPUS, _cpus(stage)),
                compute=TaskPoolStrategy(size=stage.decode_tasks * stage.num_workers),
            )
            .map_batches(
                _EncodeUnit,
                fn_constructor_kwargs=arguments,
                batch_size=None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(min_size=1, max_size=stage.num_workers, initial_size=stage.num_workers),
                **_ray_resources(stage),
            )
            .map_batches(
                _write_shard,
                fn_kwargs={"cache_path": resolved.job.split.cache_path, "encoders": encoders, "board": board},
                batch_size=shard_entries,
                batch_format="pyarrow",
                num_cpus=WRITE_CPUS,
            )
        )
    finally:
        context.target_max_block_size, context.execution_options, context.enable_progress_bars = saved


def _unlike(cpus: float, *others: float) -> float:
    """Another share of a CPU than the neighbours' keeps Ray from fusing them into one task."""
    while cpus in others:
        cpus = round(cpus * 0.99, 4)
    return cpus


def _cpus(stage: EncodeResources) -> float:
    return stage.resources_per_worker.get("CPU", 0.0)


def _ray_resources(stage: EncodeResources) -> dict[str, Any]:
    others = {name: amount for name, amount in stage.resources_per_worker.items() if name not in ("CPU", "GPU")}
    gpus = stage.resources_per_worker.get("GPU", 0.0)
    return {"num_cpus": _cpus(stage), "num_gpus": gpus or None, **({"resources": others} if others else {})}


class _UnitSource(Datasource):
    """The units, each a row and a block."""

    def __init__(self, units: list[dict[str, Any]]) -> None:
        super().__init__()
        self.units = ray.put([json.dumps(unit) for unit in units])

    def get_name(self) -> str:
        """Shown by Ray's dashboard."""
        return "Units"

    def estimate_inmemory_data_size(self) -> None:
        """Unknown: None keeps Ray from planning with it."""
        return None

    def get_read_tasks(self, parallelism: int, *args: object, **kwargs: object) -> list[ReadTask]:
        """One task that yields a table a unit."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        units = self.units
        return [ReadTask(lambda: (pa.table({"unit": [unit]}) for unit in ray.get(units)), metadata)]


_DECODED = pa.schema([("unit", pa.string()), ("pixels", pa.large_binary()), ("errors", pa.list_(pa.string()))])
_ENCODED = pa.schema(
    [
        ("kind", pa.string()),
        ("key", pa.string()),
        ("layout", pa.string()),
        ("data", pa.large_binary()),
        ("error", pa.string()),
    ]
)
_WRITTEN = pa.schema([("index_file", pa.string()), ("count", pa.int64()), ("errors", pa.list_(pa.string()))])


def _decode_unit(block: pa.Table) -> pa.Table:
    """Units with the pixels of their images, without those that cannot be read."""
    rows = []
    for text in block["unit"].to_pylist():
        unit = json.loads(text)
        frames, errors, items = [], [], []
        for fields in unit["items"] if unit["kind"] == "image" else []:
            item = ImageItem(**fields)
            try:
                frames.append(_decode_item(item))
                items.append(fields)
            except DataError as error:
                errors.append(f"row {item.row + 1}: {error.message}")
        if unit["kind"] == "image":
            unit["items"] = items
        pixels = np.stack(frames).tobytes() if frames else None
        rows.append({"unit": json.dumps(unit), "pixels": pixels, "errors": errors})
    return pa.Table.from_pylist(rows, schema=_DECODED)


def _decode_item(item: ImageItem) -> np.ndarray:
    frames = decode(
        item.path, height=item.height, width=item.width, num_frames=item.num_frames, frame_rate=item.frame_rate
    )
    # After decoding, so that what was decoded is what the key names.
    if file_digest(item.path) != item.digest:
        raise DataError(f"{item.path}: the file changed while the data set was encoded; submit the job again")
    return frames


class _EncodeUnit:
    """The encoder actor."""

    def __init__(self, *, resolved_json: str, components: tuple[str, ...], board: Any) -> None:
        self.board = board
        resolved = ResolvedJob.model_validate_json(resolved_json)
        assert resolved.encode is not None
        device = torch.device(resolved.encode.device)
        if device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // resolved.encode.num_workers))
        try:
            self.encoder = SampleEncoder(*load_encoders(resolved.job, device=device, components=components))
        except DsrayError as error:
            ray.get(board.fail.remote(None, error))
            raise

    def __call__(self, block: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for text, pixels, errors in zip(block["unit"], block["pixels"], block["errors"], strict=True):
            unit = json.loads(text.as_py())
            rows += [{"kind": unit["kind"], "error": error} for error in errors.as_py()]
            try:
                rows += self._encode(unit, pixels)
            except torch.OutOfMemoryError as error:
                failure = _out_of_memory(unit["items"][0], error)
                ray.get(self.board.fail.remote(None, failure))
                raise failure from error
        return pa.Table.from_pylist(rows, schema=_ENCODED)

    def _encode(self, unit: dict[str, Any], pixels: pa.Scalar) -> Iterator[dict[str, Any]]:
        items = unit["items"]
        if not items:
            return
        if unit["kind"] == "text":
            entries = self.encoder.encode_texts([item["prompt"] for item in items])
        else:
            first = ImageItem(**items[0])
            shape = (len(items), first.num_frames, first.height, first.width, 3)
            # A copy: the block's memory is read-only, and torch warns about that.
            entries = self.encoder.encode_images(np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape).copy())
        for item, entry in zip(items, entries, strict=True):
            layout, data = pack_entry(entry)
            yield {"kind": unit["kind"], "key": item["key"], "layout": layout, "data": data}


def _out_of_memory(item: dict[str, Any], error: torch.OutOfMemoryError) -> RunError:
    what = f"{item['path']} ({item['width']}x{item['height']}, {item['num_frames']} frame(s))" if "path" in item else "a text"
    return RunError(
        f"stage encode: the GPU's memory is full with {what} alone: {str(error).splitlines()[0]}",
        hint="give every encoder a whole GPU (split.resources_per_worker = { GPU = 1, CPU = 1 }), or lower dataset.max_pixels",
    )


def _write_shard(block: pa.Table, *, cache_path: str, encoders: dict[Kind, str], board: Any) -> pa.Table:
    """One shard for the texts and one for the images of a block."""
    cache = Cache(cache_path)
    encoded = [row for row in block.to_pylist() if row["error"] is None]
    rows: list[dict[str, Any]] = []
    for kind, encoder in encoders.items():
        entries = {row["key"]: unpack_entry(row["layout"], row["data"]) for row in encoded if row["kind"] == kind}
        if not entries:
            continue
        try:
            name = cache.write(kind, entries, encoder=encoder)
        except DsrayError as error:
            ray.get(board.fail.remote(None, error))
            raise
        rows.append({"index_file": name, "count": len(entries), "errors": []})
    if errors := [error for error in block["error"].to_pylist() if error is not None]:
        rows.append({"index_file": None, "count": 0, "errors": errors})
    return pa.Table.from_pylist(rows, schema=_WRITTEN)
