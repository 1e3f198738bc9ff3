"""The most bytes that live at once while plain code runs on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Moment(NamedTuple):
    """After an operator."""

    operator: Any
    alive: int
    """Bytes."""


class PeakBytes(TorchDispatchMode):
    """Counts the storages that operators make inside of it, until they are dropped: `alive` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.course: list[Moment] = []
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    @property
    def peak(self) -> int:
        """Most that was alive."""
        return max((moment.alive for moment in self.course), default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {each.untyped_storage()._cdata for each in args if isinstance(each, Tensor)}
        tree_map_only(Tensor, lambda tensor: self._note(tensor, known), result)
        self.course.append(Moment(func, self.alive))
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


_ROUNDS = 5
"""Of a computation in rounds, so many are looked at: the first three differ from the others in what they find in memory."""


def peak_in_rounds(build: Callable[[int], Callable[[], object]], num_rounds: int) -> int:
    """The peak of a call in so many rounds, made by `build(num_rounds)`, under a fake mode; what `build` makes does not count.

    Of many rounds only a few are run: what is alive at an operator grows by the same bytes with every further round.
    """
    if num_rounds > 2 * _ROUNDS + 1:
        fewer, more = (_course(build(rounds)) for rounds in (_ROUNDS, _ROUNDS + 1))
        # Operators before the middle are paired with their like from the beginning, the last rounds and what follows from
        # the end.
        middle = len(fewer) // 2
        pairs = [*zip(fewer[:middle], more, strict=False), *zip(reversed(fewer[middle:]), reversed(more), strict=False)]
        if all(one.operator is other.operator for one, other in pairs):
            return max(one.alive + (num_rounds - _ROUNDS) * (other.alive - one.alive) for one, other in pairs)
    return max((moment.alive for moment in _course(build(num_rounds))), default=0)


def _course(call: Callable[[], object]) -> list[Moment]:
    with PeakBytes() as counter:
        call()
    return counter.course
