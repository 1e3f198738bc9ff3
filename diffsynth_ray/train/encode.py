"""Stage one: what is not in the cache is encoded by a pool of encoder actors, on Ray Data.

    units (one task) -> decode (CPU tasks) -> encode (actors, one a GPU) -> write (CPU tasks, a shard each)

A unit is some texts, some images of one size, or a row's extra inputs (units.py). Every step is idempotent: a lost task or
actor is run again by Ray, and what it wrote before is found under the same keys. A shard counts as soon as it is written, so
that a killed stage goes on where it was. A file that cannot be read travels as its error, so that all of them are told at
once, at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata

from diffsynth_ray.config.resolve import READ_CPUS, EncodeResources, ResolvedJob, available_cpus
from diffsynth_ray.config.schema import DatasetSection
from diffsynth_ray.data.cache import Cache, Entry, Kind, pack_entry, unpack_entry
from diffsynth_ray.data.samples import SampleRule
from diffsynth_ray.errors import DsrayError, RunError, first_line
from diffsynth_ray.run_dir import EncodeProgress
from diffsynth_ray.train.split import SampleEncoder, load_encoders
from diffsynth_ray.train.units import ImageItem, Item, Unreadable, decode_unit, extra_item, units_of, unpack_extra

WRITE_CPUS = 0.1
"""CPUs of a task that writes a shard."""
_MIN_WRITERS = 2
_SHARD_ENTRIES = 64
"""Entries of a shard: 130 MB of texts, 34 MB of 1024x1024 images. A killed stage loses a shard at most."""
_MIN_SHARDS = 16
"""Fewer entries a shard where there are few, so that progress is seen and kept."""
_SAY_S = 1.0


def encode_missing(
    resolved: ResolvedJob,
    items: Mapping[Kind, Sequence[Item]],
    *,
    rule: SampleRule,
    components: Sequence[str],
    encoders: dict[Kind, str],
    board: Any,
    report: Callable[[EncodeProgress], None],
) -> list[Unreadable]:
    """Encode these items into the job's cache with `components`; `encoders` are their digests, for the index.

    Returns those that could not be read. A DsrayError in an encoder goes to the board, which ends the run.
    """
    assert resolved.encode is not None  # resolve has made it
    cache = Cache(str(resolved.job.split.cache_path))
    total = sum(len(found) for found in items.values())
    index_files: list[str] = []
    errors: list[Unreadable] = []
    done = 0
    progress = _Progress(total, report)
    board.await_encoders.remote()
    dataset = _build_dataset(
        resolved,
        units_of(items),
        rule=rule,
        shard_entries=min(max(-(-total // _MIN_SHARDS), 1), _SHARD_ENTRIES),
        components=tuple(components),
        encoders=encoders,
        board=board,
    )
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for name, count, found in zip(*(block[column].to_pylist() for column in _WRITTEN.names), strict=True):
            index_files += [name] if name else []
            errors += [Unreadable(**json.loads(text)) for text in found]
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


def _build_dataset(
    resolved: ResolvedJob,
    units: list[dict[str, Any]],
    *,
    rule: SampleRule,
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
                _decode_units,
                fn_kwargs={"dataset_json": resolved.job.dataset.model_dump_json(), "rule": rule},
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=_unlike(stage.decode_cpus, READ_CPUS, _cpus(stage)),
                compute=TaskPoolStrategy(size=stage.decode_tasks * stage.num_workers),
            )
            .map_batches(
                _EncodeUnit,
                fn_constructor_kwargs=arguments,
                batch_size=1,  # as many as a block has; Ray wants a number where there are GPUs
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
                # Writers ask for next to no CPU: without a bound Ray starts a process for each block that is ready.
                concurrency=max(_MIN_WRITERS, stage.num_workers),
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


_DECODED = pa.schema(
    [
        ("unit", pa.string()),
        ("pixels", pa.large_binary()),
        ("extra", pa.large_binary()),
        ("errors", pa.list_(pa.string())),
    ]
)
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


def _decode_units(block: pa.Table, *, dataset_json: str, rule: SampleRule) -> pa.Table:
    """Units with what their files hold, without those that cannot be read."""
    dataset = DatasetSection.model_validate_json(dataset_json)
    rows = []
    for text in block["unit"].to_pylist():
        unit, pixels, extra, errors = decode_unit(json.loads(text), dataset, rule)
        told = [json.dumps(asdict(each)) for each in errors]
        rows.append({"unit": json.dumps(unit), "pixels": pixels, "extra": extra, "errors": told})
    return pa.Table.from_pylist(rows, schema=_DECODED)


class _EncodeUnit:
    """The encoder actor."""

    def __init__(self, *, resolved_json: str, components: tuple[str, ...], board: Any) -> None:
        self.board = board
        board.note_encoder.remote()
        resolved = ResolvedJob.model_validate_json(resolved_json)
        assert resolved.encode is not None
        device = torch.device(resolved.encode.device)
        if device.type == "cpu":
            torch.set_num_threads(max(1, available_cpus() // resolved.encode.num_workers))
        self.extra_inputs = resolved.job.model.extra_inputs
        try:
            self.encoder = SampleEncoder(*load_encoders(resolved.job, device=device, components=components))
        except DsrayError as error:
            ray.get(board.fail.remote(None, error))
            raise

    def __call__(self, block: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = []
        columns = (block[name] for name in _DECODED.names)
        for text, pixels, extra, errors in zip(*columns, strict=True):
            unit = json.loads(text.as_py())
            rows += [{"kind": unit["kind"], "error": error} for error in errors.as_py()]
            try:
                rows += self._encode(unit, pixels, extra)
            except torch.OutOfMemoryError as error:
                failure = _out_of_memory(unit["items"][0], error)
                ray.get(self.board.fail.remote(None, failure))
                raise failure from error
            except DsrayError as error:
                ray.get(self.board.fail.remote(None, error))
                raise
        return pa.Table.from_pylist(rows, schema=_ENCODED)

    def _encode(self, unit: dict[str, Any], pixels: pa.Scalar, extra: pa.Scalar) -> Iterator[dict[str, Any]]:
        items = unit["items"]
        if not items:
            return
        if unit["kind"] == "text":
            entries = self.encoder.encode_texts([item["prompt"] for item in items])
        elif unit["kind"] == "extra":
            entries = [self._encode_extra(unit, pixels, extra)]
        else:
            first = ImageItem(**items[0])
            shape = (len(items), first.num_frames, first.height, first.width, 3)
            # A copy: the block's memory is read-only, and torch warns about that.
            entries = self.encoder.encode_images(np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape).copy())
        for item, entry in zip(items, entries, strict=True):
            layout, data = pack_entry(entry)
            yield {"kind": unit["kind"], "key": item["key"], "layout": layout, "data": data}

    def _encode_extra(self, unit: dict[str, Any], pixels: pa.Scalar, extra: pa.Scalar) -> Entry:
        item = extra_item(unit)
        shape = (1, *item.image.size, 3)
        if item.needs_frames:
            frames = torch.from_numpy(np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape).copy())
        else:
            # Only their shape is looked at.
            frames = torch.zeros(1, dtype=torch.uint8).expand(shape)
        given = unpack_extra(item, extra.as_py())
        return self.encoder.encode_extra(item.prompt, pixels=frames, given=given, names=self.extra_inputs)


def _out_of_memory(item: dict[str, Any], error: torch.OutOfMemoryError) -> RunError:
    item = item.get("image", item)
    what = f"{item['path']} ({item['width']}x{item['height']}, {item['num_frames']} frame(s))" if "path" in item else "a text"
    return RunError(
        f"stage encode: the GPU's memory is full with {what} alone: {first_line(error)}",
        hint="give every encoder a whole GPU (split.resources_per_worker = { GPU = 1, CPU = 1 }), or lower dataset.max_pixels",
    )


def _write_shard(block: pa.Table, *, cache_path: str, encoders: dict[Kind, str], board: Any) -> pa.Table:
    """One shard for each kind that a block holds."""
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
