"""Which blocks keep their activations: as many as fit, those first whose recomputation costs most time a byte."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

MARGIN = 0.08
"""Share of the memory that is left free: larger texts than the probe's, and gaps between allocations."""


@dataclass(frozen=True)
class BlockUse:
    """What one block's recomputation showed."""

    kept_bytes: int
    """More on the device where the block keeps its activations."""
    seconds: float
    """Of its recomputation."""


class RecomputationMeter:
    """Measures one block's recomputation in a backward pass: memory before and after, and time."""

    def __init__(self, allocated: Callable[[], int]) -> None:
        """`allocated`: bytes that live on the device now."""
        self._allocated = allocated
        self.use: BlockUse | None = None
        """Of the last recomputation."""

    @contextmanager
    def stretch(self, result_bytes: Callable[[], int]) -> Iterator[None]:
        """The block computes inside; `result_bytes` of its results, which the next block keeps in any case."""
        before, started = self._allocated(), time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        kept = self._allocated() - before - result_bytes()
        self.use = BlockUse(max(kept, 0), time.perf_counter() - started)


def choose(uses: Sequence[BlockUse], *, budget_bytes: int) -> list[int]:
    """Positions of the blocks that keep their activations within the budget, ascending.

    Of blocks that are worth the same the last ones: their activations go first in backward.
    """
    by_worth = sorted(range(len(uses)), key=lambda n: (uses[n].seconds / max(uses[n].kept_bytes, 1), n), reverse=True)
    chosen, left = [], budget_bytes
    for position in by_worth:
        if uses[position].kept_bytes <= left:
            chosen.append(position)
            left -= uses[position].kept_bytes
    return sorted(chosen)
