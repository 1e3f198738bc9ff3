"""The Ray Data stream of one training worker: positions -> decoded micro batches, in exact order.

One Ray Data task computes positions (a pure function, O(1) a step, from any step on); others decode. A row of the stream is a
micro batch: its uint8 pixels as one binary value. A block holds as many micro batches as make a task worth its cost, and they
are decoded straight into the block's one buffer, which the worker reads where it lies in the object store. A file that cannot
be decoded travels as its error, so that it is raised at its position, on the worker that needs it, and never retried.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
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

_BLOCK_BYTES = 16 << 20
"""Pixels of a block: about what makes Ray's cost per task small beside the decoding."""
_MAX_MICRO_BATCHES = 32
_PREFETCHED_BLOCKS = 2


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
        """One task that yields a table for every block."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        index, bounds = self.index, (self.start_step, self.num_steps, self.rank, self.world_size)
        return [ReadTask(lambda: _position_tables(ray.get(index), *bounds), metadata)]


def _position_tables(index: SampleIndex, start_step: int, num_steps: int, rank: int, world_size: int) -> Iterator[pa.Table]:
    positions: list[str] = []
    num_bytes = 0
    found = index.micro_batches(start_step=start_step, num_steps=num_steps, rank=rank, world_size=world_size)
    for step, num_samples, is_last, micro in found:
        positions.append(json.dumps([step, num_samples, is_last, asdict(micro)]))
        num_bytes += _num_bytes(micro)
        # The first block is small, so that the first step need not wait for a whole one.
        if num_bytes >= _BLOCK_BYTES or len(positions) == _MAX_MICRO_BATCHES or step == start_step:
            yield pa.table({"position": positions})
            positions, num_bytes = [], 0
    if positions:
        yield pa.table({"position": positions})


def _num_bytes(micro: MicroBatch) -> int:
    return len(micro.rows) * micro.num_frames * micro.height * micro.width * 3


def _decode_block(block: pa.Table, index: ray.ObjectRef) -> pa.Table:
    samples: SampleIndex = ray.get(index)
    positions = [_parse_position(text) for text in block["position"].to_pylist()]
    ends = np.cumsum([0, *(_num_bytes(micro) for _, _, _, micro in positions)], dtype=np.int64)
    pixels = np.empty(ends[-1], dtype=np.uint8)
    facts: list[str | None] = []
    extras: list[bytes | None] = []
    errors: list[str | None] = []
    for number, (step, _, _, micro) in enumerate(positions):
        out = pixels[ends[number] : ends[number + 1]].reshape(_shape(micro))
        try:
            decoded = samples.decode(micro, step=step, out=out)
        except DataError as error:
            facts.append(None)
            extras.append(None)
            errors.append(str(error))
            continue
        layout, content = _pack_extra(decoded.extra)
        facts.append(json.dumps([decoded.rows, decoded.prompts, [asdict(bad) for bad in decoded.bad], layout], default=str))
        extras.append(content)
        errors.append(None)
    return pa.table(
        {
            "position": block["position"],
            # Around the buffer as it is: Arrow would copy a list of values.
            "pixels": pa.LargeBinaryArray.from_buffers(
                pa.large_binary(), len(positions), [None, pa.py_buffer(ends), pa.py_buffer(pixels)]
            ),
            "facts": pa.array(facts, type=pa.string()),
            "extra": pa.array(extras, type=pa.large_binary()),
            "error": pa.array(errors, type=pa.string()),
        }
    )


def _shape(micro: MicroBatch) -> tuple[int, int, int, int, int]:
    return len(micro.rows), micro.num_frames, micro.height, micro.width, 3


def _parse_position(text: str) -> tuple[int, int, bool, MicroBatch]:
    step, num_samples, is_last, fields = json.loads(text)
    fields["rows"], fields["indices"] = tuple(fields["rows"]), tuple(fields["indices"])
    return step, num_samples, is_last, MicroBatch(**fields)


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


def _unpack_extra(layout: dict[str, list[Any]], content: memoryview) -> dict[str, tuple[Extra, ...]]:
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
                files.append(np.frombuffer(content, dtype=np.uint8, count=size, offset=start).reshape(shape))
                start += size
            found.append(tuple(files))
        extra[column] = tuple(found)
    return extra


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

    Raises DataError, when its turn comes, for a file that cannot be decoded.
    """
    context = DataContext.get_current()
    saved = context.target_max_block_size, context.execution_options, context.enable_progress_bars
    try:
        # Every table that a task yields becomes a block of its own.
        context.target_max_block_size = 1
        context.enable_progress_bars = False
        context.execution_options = type(context.execution_options)(
            preserve_order=True,
            resource_limits=type(context.execution_options.resource_limits).for_limits(
                cpu=round(READ_CPUS + decode_cpus * decode_tasks, 4)
            ),
        )
        source = PositionSource(index, start_step=start_step, num_steps=num_steps, rank=rank, world_size=world_size)
        dataset = ray.data.read_datasource(source, override_num_blocks=1, num_cpus=READ_CPUS).map_batches(
            _decode_block,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"index": index},
            # Another share of a CPU than the reading task's keeps Ray from fusing the two into one task.
            num_cpus=decode_cpus if decode_cpus != READ_CPUS else decode_cpus * 0.99,
            compute=TaskPoolStrategy(size=decode_tasks),
        )
    finally:
        context.target_max_block_size, context.execution_options, context.enable_progress_bars = saved
    return _rows(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=_PREFETCHED_BLOCKS))


def _rows(blocks: Iterator[pa.Table]) -> Iterator[StreamedBatch]:
    for block in blocks:
        for position, pixels, facts, extra, error in zip(
            block["position"], block["pixels"], block["facts"], block["extra"], block["error"], strict=True
        ):
            step, num_samples, is_last, micro = _parse_position(position.as_py())
            if error.is_valid:
                raise DataError(f"step {step + 1}: {error.as_py()}")
            rows, prompts, bad, layout = json.loads(facts.as_py())
            decoded = DecodedBatch(
                pixels=np.frombuffer(pixels.as_buffer(), dtype=np.uint8).reshape(_shape(micro)),
                rows=tuple(rows),
                prompts=tuple(prompts),
                extra=_unpack_extra(layout, memoryview(extra.as_buffer())),
                bad=tuple(BadSample(**fields) for fields in bad),
            )
            yield StreamedBatch(step, num_samples, is_last, micro, decoded)
