"""Blocks are compiled once for samples of all sizes, and the time that it takes is known.

Left to itself the compiler makes a block for the first size that it meets, another when the captions' length is found to vary,
and a third when the pictures' does, each for most of a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._dynamo.callback import CallbackArgs


def let_sizes_vary(tensors: Sequence[Tensor]) -> None:
    """What is compiled for these inputs of a block holds for other numbers of tokens, and of samples, too.

    They count along every dimension but the last of [b, tokens, width] or of a table [tokens, ...], along all of a mask. What
    turns out to be settled by the weights becomes fixed again by itself.
    """
    for tensor in tensors:
        if not hasattr(tensor, "_dynamo_weak_dynamic_indices"):  # one tensor is the input of many blocks
            counts = tensor.ndim if tensor.dtype == torch.bool else tensor.ndim - 1
            torch._dynamo.maybe_mark_dynamic(tensor, list(range(counts)))


class CompileTime:
    """The time that torch.compile takes in this process while this is open; `say` is told when it begins."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._began = self._seconds = 0.0
        self._is_told = False

    def __enter__(self) -> CompileTime:
        from torch._dynamo.callback import callback_handler  # seconds of imports, which a worker needs at its first step

        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        from torch._dynamo.callback import callback_handler

        with suppress(ValueError):  # another use of torch in this process may have cleared them
            callback_handler.remove_start_callback(self._begin)
            callback_handler.remove_end_callback(self._end)

    def take_s(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds, self._is_told = self._seconds, 0.0, False
        return seconds

    def _begin(self, args: CallbackArgs) -> None:
        self._began = time.monotonic()
        if not self._is_told:
            self._is_told = True
            self._say("compiling blocks: about a minute the first time on a node, less when it was done there before")

    def _end(self, args: CallbackArgs) -> None:
        self._seconds += time.monotonic() - self._began
