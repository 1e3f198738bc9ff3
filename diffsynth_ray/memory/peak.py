"""The most bytes that live at once while plain code runs on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class PeakBytes(TorchDispatchMode):
    """Counts the storages that operators make inside of it, until they are dropped: `alive` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.alive = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {each.untyped_storage()._cdata for each in args if isinstance(each, Tensor)}
        tree_map_only(Tensor, lambda tensor: self._note(tensor, known), result)
        self.peak = max(self.peak, self.alive)
        return result

    def _note(self, tensor: Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in known or storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.alive += size
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.alive -= size


def peak_bytes(call: Callable[[], object]) -> int:
    """Of a call under a fake mode; its inputs and the weights do not count."""
    with PeakBytes() as counter:
        call()
    return counter.peak
