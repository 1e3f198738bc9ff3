"""The Ray Data stream of one training worker: positions -> decoded micro batches, in exact order.

One Ray Data task computes positions (a pure function, O(1) a step, from any step on); others decode. A row of the stream is a
micro batch: its uint8 pixels as one binary value, so that nothing is copied on the way to the worker. A block holds as many
micro batches as make a task worth its cost. A file that cannot be decoded travels as its error, so that it is raised at its
position, on the worker that needs it, and never retried.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata

from diffsynth_ray.config.resolve import READ_CPUS
from diffsynth_ray.data.batches import MicroBatch
from diffsynth_ray.data.samples import SampleIndex
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
    pixels: np.ndarray
    """uint8 [b, f, h, w, 3]."""
    prompts: tuple[str, ...]


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


def _position_tables(
    index: SampleIndex, start_step: int, num_steps: int, rank: int, world_size: int
) -> Iterator[pa.Table]:
    positions: list[str] = []
    num_bytes = 0
    found = index.micro_batches(start_step=start_step, num_steps=num_steps, rank=rank, world_size=world_size)
    for step, num_samples, is_last, micro in found:
        positions.append(json.dumps([step, num_samples, is_last, asdict(micro)]))
        num_bytes += len(micro.rows) * micro.num_frames * micro.height * micro.width * 3
        # The first block is small, so that the first step need not wait for a whole one.
        if num_bytes >= _BLOCK_BYTES or len(positions) == _MAX_MICRO_BATCHES or step == start_step:
            yield pa.table({"position": positions})
            positions, num_bytes = [], 0
    if positions:
        yield pa.table({"position": positions})


def _decode_block(block: pa.Table, index: ray.ObjectRef) -> pa.Table:
    samples: SampleIndex = ray.get(index)
    pixels: list[bytes | None] = []
    errors: list[str | None] = []
    prompts: list[list[str]] = []
    for position in block["position"].to_pylist():
        _, _, _, micro = _parse_position(position)
        prompts.append([samples.prompt(row) for row in micro.rows])
        try:
            pixels.append(samples.decode(micro).tobytes())
            errors.append(None)
        except DataError as error:
            pixels.append(None)
            errors.append(str(error))
    return pa.table(
        {
            "position": block["position"],
            "pixels": pa.array(pixels, type=pa.large_binary()),
            "prompts": pa.array(prompts, type=pa.list_(pa.string())),
            "error": pa.array(errors, type=pa.string()),
        }
    )


def _parse_position(text: str) -> tuple[int, int, bool, MicroBatch]:
    step, num_samples, is_last, fields = json.loads(text)
    fields["rows"], fields["indices"] = tuple(fields["rows"]), tuple(fields["indices"])
    return step, num_samples, is_last, MicroBatch(**fields)


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
        # Every table that a task yields becomes a block of its own.
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
        for position, pixels, prompts, error in zip(
            block["position"], block["pixels"], block["prompts"], block["error"], strict=True
        ):
            step, num_samples, is_last, micro = _parse_position(position.as_py())
            if error.is_valid:
                raise DataError(f"step {step}: {error.as_py()}")
            shape = (len(micro.rows), micro.num_frames, micro.height, micro.width, 3)
            yield StreamedBatch(
                step=step,
                num_samples=num_samples,
                is_last=is_last,
                micro_batch=micro,
                pixels=np.frombuffer(pixels.as_buffer(), dtype=np.uint8).reshape(shape),
                prompts=tuple(prompts.as_py()),
            )
