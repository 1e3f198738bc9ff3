"""Keyed permutations."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsynth_ray.data.order import KeyedPermutation, derive_key


@given(size=st.integers(0, 3000), key=st.binary(max_size=16))
def test_is_a_bijection(size: int, key: bytes) -> None:
    outputs = KeyedPermutation(size, key)(np.arange(size))
    assert outputs.dtype == np.int64
    assert np.array_equal(np.sort(outputs), np.arange(size))


@pytest.mark.parametrize("size", [2**k + d for k in range(1, 15) for d in (-1, 0, 1)])
def test_is_a_bijection_around_powers_of_two(size: int) -> None:
    assert len(set(KeyedPermutation(size, b"key")(np.arange(size)).tolist())) == size


def test_follows_from_the_key_alone() -> None:
    # Literal values: a change of the order of runs must be a decision, because resumed runs would mix two orders.
    assert KeyedPermutation(10, derive_key(0, 0, "samples"))(np.arange(10)).tolist() == [6, 0, 2, 1, 3, 4, 5, 8, 7, 9]
    large = KeyedPermutation(10**12, derive_key(7, 3))
    assert large([0, 1, 10**12 - 1]).tolist() == [526709270228, 340557950978, 239031543165]


def test_one_position_at_a_time_gives_the_same() -> None:
    permutation = KeyedPermutation(1000, b"key")
    assert [int(permutation([position])[0]) for position in range(1000)] == permutation(np.arange(1000)).tolist()
    assert permutation(np.arange(6).reshape(2, 3)).shape == (2, 3)


def test_a_large_size_costs_nothing() -> None:
    tracemalloc.start()
    started = time.thread_time()  # whatever else the machine does
    permutation = KeyedPermutation(2**62, b"key")
    outputs = permutation(np.arange(2**62 - 1000, 2**62))
    elapsed_s = time.thread_time() - started
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(outputs.tolist())) == 1000
    assert outputs.min() >= 0
    assert outputs.max() < 2**62
    assert elapsed_s < 1
    assert peak_bytes < 2**20


def test_looks_shuffled() -> None:
    """Over many keys every value is equally likely at every position, also for a tiny dataset."""
    size, num_keys = 7, 2000
    counts = np.zeros((size, size))
    for key in range(num_keys):
        counts[np.arange(size), KeyedPermutation(size, derive_key(key, 0))(np.arange(size))] += 1
    expected = num_keys / size
    assert ((counts - expected) ** 2 / expected).sum() < 80  # 36 degrees of freedom: above 80 once in 30000


def test_neighbours_do_not_stay_neighbours() -> None:
    outputs = KeyedPermutation(10**6, b"key")(np.arange(10**5))
    assert abs(np.corrcoef(outputs[:-1], outputs[1:])[0, 1]) < 0.02


def test_keys_differ_where_any_argument_does() -> None:
    keys = {derive_key(0, 1), derive_key(1, 0), derive_key(0, 1, "a", "b"), derive_key(0, 1, "ab"), derive_key(0, 1, 1)}
    assert len(keys) == 5


def test_rejects_positions_outside() -> None:
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        KeyedPermutation(5, b"")([5])
    with pytest.raises(ValueError, match="positions"):
        KeyedPermutation(-1, b"")
