"""The Ray Data stream of one training worker: positions -> decoded micro batches, in exact order.

One Ray Data task computes positions (a pure function, O(1) a step, from any step on); others decode. What travels in a block is
one row that holds a *chunk*: several micro batches, as many as make a task worth its cost. Ray cuts blocks between rows
whatever their origin, so a row a micro batch would cost a task and an object each; one row cannot be cut. The micro batches
of a chunk are decoded straight into its one buffer, which the worker reads where it lies in the object store. A file that
cannot be decoded travels as its error, so that it is raised at its position, on the worker that needs it, and never retried.

Each rank has an executor of its own. Measured with 16 and 64 ranks on two cores (tests/bench/data_throughput.py, `ranks`)
beside one executor for the 8 ranks of a node, each executor with one decoding task: the start costs 9 times the CPU time with
one a rank, some 4 s of a CPU each. A step takes 0.2 of the time with two CPUs to a rank (but 16 tasks decode there instead
of 2), and 3.3 to 3.6 times with a quarter of one. So one a rank is right where a CPU a rank is free for decoding; where there
are fewer, it works, slowly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata

from diffsynth_ray.config.resolve import READ_CPUS
from diffsynth_ray.data.bad_samples import BadSample
from diffsynth_ray.data.batches import MicroBatch
from diffsynth_ray.data.media import Frames
from diffsynth_ray.data.samples import DecodedBatch, Extra, SampleIndex
from diffsynth_ray.errors import DataError

_CHUNK_BYTES = 16 << 20
"""Pixels of a chunk: about what makes Ray's cost per task small beside the decoding."""
_MAX_MICRO_BATCHES = 64
_PREFETCHED_CHUNKS = 2


@dataclass(frozen=True)
class StreamedBatch:
    """One micro batch as the worker gets it."""

    step: int
    num_samples: int
    """Real samples of the step over all workers."""
    is_last: bool
    """The worker's last micro batch of the step."""
    micro_batch: MicroBatch
    """As planned; `decoded` tells the rows that are really there."""
    decoded: DecodedBatch

    @property
    def pixels(self) -> Frames:
        """uint8 [b, f, h, w, 3], read-only: they lie in the object store."""
        return self.decoded.pixels

    @property
    def rows(self) -> tuple[int, ...]:
        """[b] rows that are really there."""
        return self.decoded.rows

    @property
    def bad(self) -> tuple[BadSample, ...]:
        """What was replaced."""
        return self.decoded.bad


class PositionSource(Datasource):
    """The micro batches of one worker, from a step on."""

    def __init__(self, index: ray.ObjectRef, *, start_step: int, num_steps: int, rank: int, world_size: int) -> None:
        super().__init__()
        self.index = index
        self.start_step, self.num_steps, self.rank, self.world_size = start_step, num_steps, rank, world_size

    def get_name(self) -> str:
        """Shown by Ray's dashboard."""
        return "Positions"

    def estimate_inmemory_data_size(self) -> None:
        """Unknown: None keeps Ray from planning with it."""
        return None

    def get_read_tasks(self, parallelism: int, *args: object, **kwargs: object) -> list[ReadTask]:
        """One task that yields a table of one row for every chunk."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        index, bounds = self.index, (self.start_step, self.num_steps, self.rank, self.world_size)
        return [ReadTask(lambda: _position_tables(ray.get(index), *bounds), metadata)]


def _position_tables(index: SampleIndex, start_step: int, num_steps: int, rank: int, world_size: int) -> Iterator[pa.Table]:
    chunk: list[list[Any]] = []
    num_bytes = 0
    found = index.micro_batches(start_step=start_step, num_steps=num_steps, rank=rank, world_size=world_size)
    for step, num_samples, is_last, micro in found:
        chunk.append([step, num_samples, is_last, asdict(micro)])
        num_bytes += _num_bytes(micro)
        # The first chunk is small, so that the first step need not wait for a whole one.
        if num_bytes >= _CHUNK_BYTES or len(chunk) == _MAX_MICRO_BATCHES or (step == start_step and is_last):
            yield pa.table({"chunk": [json.dumps(chunk)]})
            chunk, num_bytes = [], 0
    if chunk:
        yield pa.table({"chunk": [json.dumps(chunk)]})


def _num_bytes(micro: MicroBatch) -> int:
    return int(np.prod(_shape(micro)))


def _shape(micro: MicroBatch) -> tuple[int, int, int, int, int]:
    return len(micro.rows), micro.num_frames, micro.height, micro.width, 3


@lru_cache(maxsize=1)
def load_index(reference: ray.ObjectRef) -> SampleIndex:
    """The SampleIndex of a reference, read back once a process.

    Once a task would not do: reading back the rows of a large dataset takes longer than decoding a chunk.
    """
    index: SampleIndex = ray.get(reference)
    return index.keeping_decoded()


def _decode_chunk(block: pa.Table, index: ray.ObjectRef) -> pa.Table:
    """One row in, one row out: the chunk, all its pixels, all its extra inputs' bytes, and for each micro batch what it is
    made of, or its error."""
    samples = load_index(index)
    chunk = _parse_chunk(block["chunk"][0].as_py())
    pixels = np.empty(sum(_num_bytes(micro) for _, _, _, micro in chunk), dtype=np.uint8)
    facts: list[dict[str, Any]] = []
    extras: list[bytes] = []
    start = 0
    for step, _, _, micro in chunk:
        out = pixels[start : start + _num_bytes(micro)].reshape(_shape(micro))
        start += _num_bytes(micro)
        try:
            decoded = samples.decode(micro, step=step, out=out)
        except DataError as error:
            facts.append({"error": error.message, "hint": error.hint})
            continue
        layout, content = _pack_extra(decoded.extra)
        extras.append(content)
        facts.append(
            {
                "rows": decoded.rows,
                "prompts": decoded.prompts,
                "bad": [asdict(bad) for bad in decoded.bad],
                "extra": layout,
            }
        )
    return pa.table(
        {
            "chunk": block["chunk"],
            "pixels": _one_binary(pixels),
            "extra": pa.array([b"".join(extras)], type=pa.large_binary()),
            "facts": [json.dumps(facts, default=str)],
        }
    )


def _one_binary(content: npt.NDArray[np.uint8]) -> pa.LargeBinaryArray:
    """An array of one value around a buffer as it is: Arrow would copy it."""
    ends = np.array([0, len(content)], dtype=np.int64)
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(content)])


def _parse_chunk(text: str) -> list[tuple[int, int, bool, MicroBatch]]:
    chunk = []
    for step, num_samples, is_last, fields in json.loads(text):
        fields["rows"], fields["indices"] = tuple(fields["rows"]), tuple(fields["indices"])
        chunk.append((step, num_samples, is_last, MicroBatch(**fields)))
    return chunk


def _pack_extra(extra: dict[str, tuple[Extra, ...]]) -> tuple[dict[str, list[Any]], bytes]:
    """Extra inputs as (column -> per sample the shapes of its files, or {"value": the cell}, all files' bytes)."""
    layout: dict[str, list[Any]] = {}
    content = []
    for column, samples in extra.items():
        layout[column] = []
        for sample in samples:
            if isinstance(sample, tuple):
                layout[column].append([frames.shape for frames in sample])
                content += [frames.tobytes() for frames in sample]
            else:
                layout[column].append({"value": sample})
    return layout, b"".join(content)


def _unpack_extra(layout: dict[str, list[Any]], content: Frames) -> tuple[dict[str, tuple[Extra, ...]], int]:
    """What `_pack_extra` packed, from bytes that may go on after it; and how many of them it took."""
    extra: dict[str, tuple[Extra, ...]] = {}
    start = 0
    for column, samples in layout.items():
        found: list[Extra] = []
        for sample in samples:
            if isinstance(sample, dict):
                found.append(sample["value"])
                continue
            files = []
            for shape in sample:
                size = int(np.prod(shape))
                files.append(content[start : start + size].reshape(shape))
                start += size
            found.append(tuple(files))
        extra[column] = tuple(found)
    return extra, start


def build_stream(
    index: ray.ObjectRef,
    *,
    start_step: int,
    num_steps: int,
    rank: int,
    world_size: int,
    decode_cpus: float,
    decode_tasks: int,
) -> Iterator[StreamedBatch]:
    """The micro batches of worker `rank` from `start_step` on, in order. `index` holds a SampleIndex.

    `decode_cpus` 0: no CPU is free, and nothing waits for one. Raises DataError, when its turn comes, for a file that cannot
    be decoded.
    """
    read_cpus = READ_CPUS if decode_cpus else 0.0
    context = DataContext.get_current()
    saved = context.target_max_block_size, context.execution_options, context.enable_progress_bars
    try:
        # Every row becomes a block of its own.
        context.target_max_block_size = 1
        context.enable_progress_bars = False
        context.execution_options = type(context.execution_options)(
            preserve_order=True,
            resource_limits=type(context.execution_options.resource_limits).for_limits(
                cpu=round(read_cpus + decode_cpus * decode_tasks, 4)
            ),
        )
        source = PositionSource(index, start_step=start_step, num_steps=num_steps, rank=rank, world_size=world_size)
        dataset = ray.data.read_datasource(source, override_num_blocks=1, num_cpus=read_cpus).map_batches(
            _decode_chunk,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"index": index},
            # Another share of a CPU than the reading task's keeps Ray from fusing the two into one task.
            num_cpus=decode_cpus if decode_cpus != READ_CPUS else decode_cpus * 0.99,
            compute=TaskPoolStrategy(size=decode_tasks),
        )
    finally:
        context.target_max_block_size, context.execution_options, context.enable_progress_bars = saved
    return _micro_batches(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=_PREFETCHED_CHUNKS))


def _micro_batches(blocks: Iterator[pa.Table]) -> Iterator[StreamedBatch]:
    for block in blocks:
        pixels, extras = (np.frombuffer(block[name][0].as_buffer(), dtype=np.uint8) for name in ("pixels", "extra"))
        for (step, num_samples, is_last, micro), facts in zip(
            _parse_chunk(block["chunk"][0].as_py()), json.loads(block["facts"][0].as_py()), strict=True
        ):
            own, pixels = pixels[: _num_bytes(micro)], pixels[_num_bytes(micro) :]
            if "error" in facts:
                raise DataError(f"step {step + 1}: {facts['error']}", hint=facts["hint"])
            extra, taken = _unpack_extra(facts["extra"], extras)
            extras = extras[taken:]
            decoded = DecodedBatch(
                pixels=own.reshape(_shape(micro)),
                rows=tuple(facts["rows"]),
                prompts=tuple(facts["prompts"]),
                extra=extra,
                bad=tuple(BadSample(**fields) for fields in facts["bad"]),
            )
            yield StreamedBatch(step, num_samples, is_last, micro, decoded)
