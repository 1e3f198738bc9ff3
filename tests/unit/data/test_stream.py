"""Chunks without Ray: what a reading task yields, what a decoding task makes of it, what the worker reads."""

from types import SimpleNamespace

import numpy as np
import pytest

from diffsynth_ray.data import stream
from diffsynth_ray.data.batches import SampleOrder, build_buckets
from diffsynth_ray.data.samples import DecodedBatch
from diffsynth_ray.errors import DataError


class Samples:
    """Rows of two sizes whose pixels are their number; row 7 cannot be decoded."""

    def keeping_decoded(self):
        return self

    def __init__(self) -> None:
        sizes = [(16, 16 + 16 * (row % 2), 1) for row in range(10)]
        self.order = SampleOrder(build_buckets(sizes), repeat=3, batch_size=2, global_batch_size=6, seed=0)

    def micro_batches(self, *, start_step, num_steps, rank, world_size):
        for step in range(start_step, num_steps):
            micros = self.order.step(step).micro_batches[rank::world_size]
            for number, micro in enumerate(micros, start=1):
                yield step, 6, number == len(micros), micro

    def decode(self, micro, *, step, out):
        if 7 in micro.rows:
            raise DataError("row 8 is damaged", hint="mend it")
        for number, row in enumerate(micro.rows):
            out[number] = row
        extra = tuple((np.full((1, 2, row + 1, 3), row, dtype=np.uint8),) for row in micro.rows)
        return DecodedBatch(out, micro.rows, tuple(str(row) for row in micro.rows), {"edit_image": extra})


@pytest.fixture
def samples(monkeypatch):
    found = Samples()
    monkeypatch.setattr(stream, "ray", SimpleNamespace(get=lambda reference: found))
    stream.load_index.cache_clear()
    yield found
    stream.load_index.cache_clear()


def read(samples, *, start_step=0, num_steps=5):
    tables = list(stream._position_tables(samples, start_step, num_steps, 0, 1))
    assert all(table.num_rows == 1 for table in tables), "Ray cuts between rows"
    blocks = [stream._decode_chunk(table, None) for table in tables]
    assert all(block.num_rows == 1 for block in blocks)
    return stream._micro_batches(iter(blocks)), len(tables)


@pytest.mark.parametrize("most", [1, 3, 64])
def test_every_micro_batch_arrives_whole_and_in_order(samples, monkeypatch, most):
    monkeypatch.setattr(stream, "_MAX_MICRO_BATCHES", most)
    plan = [(*one,) for one in samples.micro_batches(start_step=0, num_steps=5, rank=0, world_size=1)]
    found, num_chunks = read(samples)
    for step, num_samples, is_last, micro in plan:
        if 7 in micro.rows:
            with pytest.raises(DataError, match=f"step {step + 1}: row 8 is damaged") as caught:
                next(found)
            assert caught.value.hint == "mend it"
            break
        batch = next(found)
        assert (batch.step, batch.num_samples, batch.is_last, batch.micro_batch) == (step, num_samples, is_last, micro)
        assert batch.pixels.shape == (len(micro.rows), 1, micro.height, micro.width, 3)
        assert not batch.pixels.flags.writeable
        for number, row in enumerate(micro.rows):
            assert (batch.pixels[number] == row).all()
            assert batch.decoded.extra["edit_image"][number][0].shape == (1, 2, row + 1, 3)
            assert (batch.decoded.extra["edit_image"][number][0] == row).all()
        assert batch.decoded.prompts == tuple(str(row) for row in micro.rows)
    assert num_chunks == (len(plan) if most == 1 else num_chunks)
    assert num_chunks >= 2, "the first step is a chunk of its own"


def test_chunks_hold_about_so_many_bytes(samples, monkeypatch):
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 4000)
    chunks = [stream._parse_chunk(table["chunk"][0].as_py()) for table in stream._position_tables(samples, 0, 5, 0, 1)]
    sizes = [sum(stream._num_bytes(micro) for *_, micro in chunk) for chunk in chunks if chunk[0][0] > 0]
    assert len(sizes) > 3
    assert all(4000 <= size < 4000 + 2 * 16 * 32 * 3 for size in sizes[:-1])
    assert chunks[0][0][0] == 0
    assert not any({0, 1} <= {step for step, *_ in chunk} for chunk in chunks), "the first step does not wait for the second"
