"""Keyed permutations: the order of a run as a pure function of its seed.

A permutation of `size` positions is a Feistel network over the next power of four (at least 16), restricted to `size`
by cycle walking: an output outside the range is fed in again until it falls inside. Both are bijections whatever the
round function is, so nothing is dropped or repeated, and any position is found in O(1) time and memory: a run resumes
anywhere in an epoch of 1e12 samples without drawing what came before.
"""

import hashlib
import json

import numpy as np
import numpy.typing as npt

from diffsynth_ray.config.schema import MOST_SAMPLES

IntArray = npt.NDArray[np.int64]

MAX_SIZE = MOST_SAMPLES
"""Largest permutation: positions are int64, and the network's range is at most four times the size."""

# Four rounds make a pseudorandom permutation; the small ranges of small datasets need more to look shuffled.
_NUM_ROUNDS = 8
# Halves of one bit would leave a handful of permutations only.
_MIN_HALF_BITS = 2


def derive_key(seed: int, epoch: int, *names: int | str) -> bytes:
    """Return 16 bytes that follow from the arguments alone, on every machine and in every Python version."""
    return hashlib.blake2b(json.dumps([seed, epoch, *names]).encode(), digest_size=16).digest()


class KeyedPermutation:
    """A bijection of range(size) chosen by `key`."""

    def __init__(self, size: int, key: bytes) -> None:
        if not 0 <= size <= MAX_SIZE:
            raise ValueError(f"a permutation has 0 to {MAX_SIZE} positions, got {size}")
        self.size = size
        self._half_bits = np.uint64(max(_MIN_HALF_BITS, (max(size - 1, 0).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(key, digest_size=8 * _NUM_ROUNDS, person=b"dsray.order").digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: npt.ArrayLike) -> IntArray:
        """Map positions (integers in [0, size), any shape) to an int64 array of the same shape."""
        start = np.asarray(positions, dtype=np.int64)
        if start.size and (start.min() < 0 or start.max() >= self.size):
            raise ValueError(f"positions must be in [0, {self.size}), got {start.min()} to {start.max()}")
        if self.size <= 1:
            return np.zeros(start.shape, dtype=np.int64)
        values = self._encrypt(start.reshape(-1).astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64).reshape(start.shape)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Run the Feistel network; values [n] of 2 * half_bits bits."""
        left, right = values >> self._half_bits, values & self._half_mask
        for round_key in self._round_keys:
            left, right = right, left ^ (_mix(right + round_key) & self._half_mask)
        return (left << self._half_bits) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread every input bit over all 64 output bits (the finaliser of SplitMix64, arithmetic modulo 2**64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
