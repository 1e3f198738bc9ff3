"""Global batches: complete, resumable anywhere, independent of workers."""

import time
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsynth_ray.data.batches import Bucket, GlobalBatch, MicroBatch, SampleOrder, build_buckets, count_tokens, deal


def make_buckets(counts: list[int]) -> tuple[Bucket, ...]:
    """Buckets of growing size with the given numbers of rows, the rows interleaved."""
    owners = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return build_buckets([(16 * (owner + 1), 32, 1 + 4 * (owner % 2)) for owner in owners.tolist()])


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    return SampleOrder(
        buckets=make_buckets(draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))),
        repeat=draw(st.integers(1, 4)),
        batch_size=draw(st.integers(1, 5)),
        global_batch_size=draw(st.integers(1, 17)),
        seed=draw(st.integers(0, 2**32)),
    )


def epoch_batches(order: SampleOrder, epoch: int) -> list[GlobalBatch]:
    return [order.step(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]


@given(order=orders(), epoch=st.integers(0, 3))
def test_an_epoch_has_every_row_repeat_times(order: SampleOrder, epoch: int) -> None:
    batches = epoch_batches(order, epoch)
    num_rows = sum(len(bucket.rows) for bucket in order.buckets)
    seen = Counter(row for batch in batches for micro_batch in batch.micro_batches for row in micro_batch.rows)
    assert seen == dict.fromkeys(range(num_rows), order.repeat)
    assert order.num_samples == num_rows * order.repeat
    assert len(batches) == -(-order.num_samples // order.global_batch_size)


@given(order=orders(), epoch=st.integers(0, 3))
def test_every_step_is_full_but_the_last(order: SampleOrder, epoch: int) -> None:
    batches = epoch_batches(order, epoch)
    for number, batch in enumerate(batches):
        assert (batch.step, batch.epoch) == (epoch * order.steps_per_epoch + number, epoch)
        assert [i for micro_batch in batch.micro_batches for i in micro_batch.indices] == list(range(batch.num_samples))
        for micro_batch in batch.micro_batches:
            bucket = order.buckets[micro_batch.bucket_index]
            assert 1 <= len(micro_batch.rows) == len(micro_batch.indices) <= order.batch_size
            assert set(micro_batch.rows) <= set(bucket.rows.tolist())
            assert (micro_batch.height, micro_batch.width) == (bucket.height, bucket.width)
    assert all(batch.num_samples == order.global_batch_size for batch in batches[:-1])


@given(order=orders())
def test_a_micro_batch_is_cut_only_by_global_batches_and_the_end_of_its_bucket(order: SampleOrder) -> None:
    batches = epoch_batches(order, 0)
    num_full = sum(len(bucket.rows) * order.repeat // order.batch_size for bucket in order.buckets)
    num_uncut = sum(-(-len(bucket.rows) * order.repeat // order.batch_size) for bucket in order.buckets)
    num_pieces = sum(len(batch.micro_batches) for batch in batches)
    assert num_uncut <= num_pieces <= num_uncut + len(batches) - 1
    if order.global_batch_size % order.batch_size == 0:
        sizes = [len(micro_batch.rows) for batch in batches for micro_batch in batch.micro_batches]
        assert sizes[:num_full] == [order.batch_size] * num_full


@given(order=orders(), position=st.integers(0, 20))
def test_resumes_at_every_position(order: SampleOrder, position: int) -> None:
    """A fresh order, asked for any step first, gives what the running one gave."""
    running = [order.step(step) for step in range(position + 1)]
    fresh = SampleOrder(order.buckets, order.repeat, order.batch_size, order.global_batch_size, order.seed)
    assert fresh.step(position) == running[position]


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    buckets = make_buckets([40, 30])
    order = SampleOrder(buckets, repeat=1, batch_size=2, global_batch_size=8, seed=1)
    first, second, again = (
        [micro.rows for batch in epoch_batches(order, epoch) for micro in batch.micro_batches] for epoch in (0, 1, 0)
    )
    assert first == again != second
    other = SampleOrder(buckets, repeat=1, batch_size=2, global_batch_size=8, seed=2)
    assert other.step(0).micro_batches != order.step(0).micro_batches


def test_a_bucket_keeps_its_order_when_another_is_added() -> None:
    def micro_batches_of_rows_below_20(buckets: list[Bucket]) -> set[tuple[int, ...]]:
        order = SampleOrder(buckets, repeat=1, batch_size=4, global_batch_size=4, seed=0)
        micros = [micro for batch in epoch_batches(order, 0) for micro in batch.micro_batches]
        return {micro.rows for micro in micros if micro.rows[0] < 20}

    bucket, other = Bucket(32, 16, 1, np.arange(20)), Bucket(16, 16, 1, np.arange(20, 30))
    assert micro_batches_of_rows_below_20([bucket]) == micro_batches_of_rows_below_20([other, bucket])


def test_the_digest_is_that_of_the_rows_and_their_sizes() -> None:
    def digest(*buckets: Bucket) -> str:
        return SampleOrder(buckets, repeat=1, batch_size=1, global_batch_size=1, seed=0).digest

    first = Bucket(64, 64, 1, np.arange(3))
    assert digest(first) == digest(Bucket(64, 64, 1, np.arange(3, dtype=np.int32)))
    others = [Bucket(64, 64, 1, np.arange(4)), Bucket(64, 32, 1, np.arange(3)), Bucket(64, 64, 1, np.array([0, 2, 3]))]
    assert len({digest(first), *map(digest, others), digest(first, Bucket(32, 32, 1, np.array([7])))}) == 5


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_rows_meet_others_in_their_micro_batches(change: dict[str, int]) -> None:
    """With another seed and in every epoch: not the same micro batches in another order."""

    def companies(*, seed: int = 0, epoch: int = 0) -> set[frozenset[int]]:
        order = SampleOrder(make_buckets([40]), repeat=1, batch_size=4, global_batch_size=4, seed=seed)
        return {frozenset(micro.rows) for batch in epoch_batches(order, epoch) for micro in batch.micro_batches}

    assert len(companies() & companies(**change)) < 3


def test_mixes_buckets_over_the_epoch() -> None:
    order = SampleOrder(make_buckets([400, 400]), repeat=1, batch_size=4, global_batch_size=16, seed=0)
    mixed = [len({micro.bucket_index for micro in batch.micro_batches}) == 2 for batch in epoch_batches(order, 0)]
    assert sum(mixed) > len(mixed) / 2


def test_a_trillion_samples_cost_no_more_than_their_rows() -> None:
    buckets = make_buckets([700, 200, 100])
    tracemalloc.start()
    started = time.thread_time()  # whatever else the machine does
    order = SampleOrder(buckets, repeat=10**9 + 7, batch_size=4, global_batch_size=64, seed=0)
    steps = [0, order.steps_per_epoch // 2, order.steps_per_epoch - 1, 3 * order.steps_per_epoch + 12345]
    batches = [order.step(step) for step in steps]
    elapsed_s = time.thread_time() - started
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order.num_samples > 10**12
    assert [batch.epoch for batch in batches] == [0, 0, 0, 3]
    assert len({row for batch in batches for micro in batch.micro_batches for row in micro.rows}) > 100
    assert elapsed_s < 1
    assert peak_bytes < 2**21


@given(order=orders(), num_workers=st.integers(1, 9), step=st.integers(0, 20))
def test_dealing_keeps_every_micro_batch_once(order: SampleOrder, num_workers: int, step: int) -> None:
    batch = order.step(step)
    hands = deal(batch, num_workers)
    real = [micro for hand in hands for micro in hand if not micro.is_dummy]
    assert sorted(real, key=lambda micro: micro.indices) == list(batch.micro_batches)
    assert {len(hand) for hand in hands} == {-(-len(batch.micro_batches) // num_workers)}
    assert sum(micro.weight for hand in hands for micro in hand) == batch.num_samples
    cheapest = min(micro.tokens for micro in batch.micro_batches)
    assert all(micro.tokens == cheapest for hand in hands for micro in hand if micro.is_dummy)


@given(order=orders(), num_workers=st.integers(1, 9))
def test_dealing_balances(order: SampleOrder, num_workers: int) -> None:
    hands = deal(order.step(0), num_workers)
    loads = [sum(micro.tokens for micro in hand) for hand in hands]
    largest = max(micro.tokens for hand in hands for micro in hand)
    assert max(loads) - min(loads) <= largest
    for earlier, later in pairwise(zip(*hands, strict=True)):
        assert min(micro.tokens for micro in earlier) >= max(micro.tokens for micro in later)


def test_deals_distinct_sizes_as_a_snake() -> None:
    micros = tuple(MicroBatch(0, 16 * (i + 1), 16, 1, rows=(i,), indices=(i,)) for i in range(5))
    hands = deal(GlobalBatch(step=0, epoch=0, num_samples=5, micro_batches=micros), num_workers=3)
    assert [[(micro.tokens, micro.is_dummy) for micro in hand] for hand in hands] == [
        [(5, False), (1, True)],
        [(4, False), (1, False)],
        [(3, False), (2, False)],
    ]


def test_long_clips_are_spread_over_the_workers() -> None:
    """4 clips of 81 frames among 28 images: one for each of 4 workers, and the same load for all."""
    micros = [MicroBatch(0, 64, 64, 81, rows=(i,), indices=(i,)) for i in range(4)]
    micros += [MicroBatch(1, 64, 64, 1, rows=(i,), indices=(i,)) for i in range(4, 32)]
    hands = deal(GlobalBatch(step=0, epoch=0, num_samples=32, micro_batches=tuple(micros[::-1])), num_workers=4)
    assert [sum(micro.num_frames == 81 for micro in hand) for hand in hands] == [1] * 4
    assert len({sum(micro.tokens for micro in hand) for hand in hands}) == 1


def test_one_long_clip_costs_its_worker_the_small_ones() -> None:
    """A clip and images of two sizes: the clip's worker gets the smallest image of every further micro step."""
    clip = MicroBatch(0, 64, 64, 81, rows=(0,), indices=(0,))
    images = [MicroBatch(1, 64, 64 * (1 + i % 2), 1, rows=(i,), indices=(i,)) for i in range(1, 8)]
    hands = deal(GlobalBatch(step=0, epoch=0, num_samples=8, micro_batches=(*images, clip)), num_workers=2)
    with_clip = next(hand for hand in hands if clip in hand)
    other = next(hand for hand in hands if clip not in hand)
    for own, others in zip(with_clip[1:], other[1:], strict=True):
        assert own.tokens <= others.tokens


def test_buckets_group_rows_by_size() -> None:
    buckets = build_buckets([(32, 16, 1), (16, 16, 1), (32, 16, 1), (16, 16, 5)])
    assert [(b.height, b.width, b.num_frames, b.rows.tolist()) for b in buckets] == [
        (16, 16, 1, [1]),
        (16, 16, 5, [3]),
        (32, 16, 1, [0, 2]),
    ]
    assert build_buckets([]) == ()
    assert (buckets[1].tokens, count_tokens(1024, 1024, 81)) == (2, 64 * 64 * 21)


@pytest.mark.parametrize(("field", "value"), [("repeat", 0), ("batch_size", 0), ("global_batch_size", -1)])
def test_rejects_what_cannot_be_counted(field: str, value: int) -> None:
    sizes = {"repeat": 1, "batch_size": 1, "global_batch_size": 1} | {field: value}
    with pytest.raises(ValueError, match=field):
        SampleOrder(make_buckets([3]), seed=0, **sizes)


def test_rejects_empty_and_repeated_buckets() -> None:
    bucket = Bucket(16, 16, 1, np.arange(2))
    for buckets in ([], [Bucket(16, 16, 1, np.arange(0))], [bucket, bucket]):
        with pytest.raises(ValueError, match="bucket"):
            SampleOrder(buckets, repeat=1, batch_size=1, global_batch_size=1, seed=0)
