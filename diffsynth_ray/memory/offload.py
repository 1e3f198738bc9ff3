"""Layerwise CPU offload: weights live in pinned host memory and visit the device when their layer computes.

A unit is what is loaded at once: a repeated block, or a smaller module where a block is larger than the threshold. A second
stream loads the units that come next while the present one computes, in forward, recomputation and backward. Which unit comes
next is not guessed: every micro step uses the units in the same order, so that the order of the last one of its kind (training,
validation, a picture) predicts this one, around the end into the next. A unit on the device stays until its room is needed;
then the one goes whose next use is furthest (the optimal choice of Belady, IBM Systems Journal 1966). A larger budget is
therefore the only difference between "three blocks at a time" and "as many resident as fit". Where units come round and round,
as in passes that only go forward, what is loaded ahead would take each unit's room before its turn comes again: some stay there
for good (`choose_residents`).

While a unit is away its parameters are NaN of the right shape and device, which takes no memory: a use without `acquire` shows.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from diffsynth_ray.memory.timing import DeviceTimer

ALIGNMENT = 256
"""Bytes; tensors start at multiples of it, as the device's kernels like them."""
RING_UNITS = 4
"""Largest units that fit on the device where no budget is given: one computes, one has just computed, two are on their way."""


@dataclass(frozen=True)
class Slot:
    """One parameter's place inside its unit."""

    param: nn.Parameter
    name: str
    offset: int
    """Bytes from the unit's beginning."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameter."""
        return self.param.numel() * self.param.element_size()

    def view(self, buffer: Tensor) -> Tensor:
        """The parameter's values inside a buffer [bytes] of the unit."""
        part = buffer[self.offset : self.offset + self.num_bytes]
        return part.view(self.param.dtype).view(self.param.shape)


class Pending(Protocol):
    """Somebody writes a unit's host memory."""

    def done(self) -> bool:
        """Whether it is written."""
        ...

    def wait(self) -> None:
        """Return when it is written; raises what went wrong."""
        ...


@dataclass(eq=False)
class Unit:
    """Parameters that are loaded at once."""

    name: str
    slots: list[Slot]
    num_bytes: int
    host: Tensor | None = None
    """uint8 [num_bytes], set once the host memory is there."""
    buffer: Tensor | None = None
    """uint8 [num_bytes] on the device while the unit is loaded."""
    uses: int = 0
    """How many callers hold it at the moment."""
    ready: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None
    absent: list[Tensor] = field(default_factory=list, repr=False)
    """What the parameters are while the unit is away."""
    pending: Pending | None = None
    """A change of the host memory that is not complete."""
    version: Tensor | None = None
    """int64 in memory that the node's workers share: how often the host memory has been changed."""


def build_unit(name: str, params: Sequence[tuple[str, nn.Parameter]]) -> Unit:
    """Lay out parameters one behind the other; what they hold now is what they hold while the unit is away."""
    slots, offset = [], 0
    for param_name, param in params:
        slots.append(Slot(param, param_name, offset))
        offset += -(-slots[-1].num_bytes // ALIGNMENT) * ALIGNMENT
    return Unit(name, slots, offset, absent=[param.data for _, param in params])


class LayerOffload:
    """The units of all components of one worker, and which of them are on the device."""

    def __init__(self, units: Sequence[Unit], *, device: torch.device, budget_bytes: int | None = None) -> None:
        """`budget_bytes`: device memory for offloaded weights; None = RING_UNITS of the largest unit.

        Less than two of the largest unit is raised to that: one computes while the next is loaded.
        """
        self.units = list(units)
        self.device = device
        largest = max((unit.num_bytes for unit in self.units), default=0)
        self.budget_bytes = RING_UNITS * largest if budget_bytes is None else max(budget_bytes, 2 * largest)
        self.loaded_bytes = 0
        self.moved_bytes = 0
        """Bytes copied to the device since the start."""
        self.stalls = DeviceTimer(device)
        """What the computation waits for weights."""
        self._loaded: dict[Unit, None] = {}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._orders: dict[str, list[Unit]] = {}
        """What the last micro step of each kind used."""
        self._order: list[Unit] = []
        self._positions: dict[Unit, list[int]] = {}
        self._residents: set[Unit] = set()
        self._recorded: list[Unit] = []
        self._kind, self._cursor = "train", -1

    def begin(self, kind: str = "train") -> None:
        """A micro step begins: what the last one of its kind used, in its order, predicts this one, else what was used last."""
        if self._recorded:
            self._orders[self._kind] = self._recorded
        order = self._orders.get(kind, self._recorded or self._order)
        self._recorded, self._kind, self._cursor = [], kind, -1
        if order == self._order:
            return
        self._order, self._positions = order, {}
        for position, unit in enumerate(order):
            self._positions.setdefault(unit, []).append(position)
        self._residents = choose_residents(order, budget_bytes=self.budget_bytes)

    @contextmanager
    def use(self, unit: Unit) -> Iterator[None]:
        """The unit's parameters are on the device inside."""
        try:
            self.acquire(unit)  # may end in an out-of-memory that the run survives: a sample's
            yield
        finally:
            self.release(unit)

    def acquire(self, unit: Unit) -> None:
        """Bring the unit to the device, and start to load the ones that come after it."""
        unit.uses += 1
        if unit.uses > 1:
            return
        self._recorded.append(unit)
        self._follow(unit)
        if unit.buffer is None or unit.ready is not None:
            with self.stalls.stretch():
                self._arrive(unit)
        self._prefetch()

    def _arrive(self, unit: Unit) -> None:
        if unit.buffer is None:
            # Something must go even if it is needed soon: nothing computes without this one.
            self._make_room(unit.num_bytes, before=None)
            self._load(unit)
        if unit.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(unit.ready)
            unit.ready = None

    def release(self, unit: Unit) -> None:
        """The unit's last kernel has been launched; it may go when its room is needed."""
        unit.uses -= 1
        if unit.uses == 0 and self._copies is not None:
            unit.done = torch.cuda.Event()
            unit.done.record(torch.cuda.current_stream(self.device))

    def evict(self, unit: Unit) -> None:
        """Take the unit off the device, where it is not in use."""
        if unit.buffer is None or unit.uses:
            return
        if self._copies is not None and unit.done is not None:
            # The memory goes back to the copy stream's pool: whatever it loads next there comes after the last use here.
            self._copies.wait_event(unit.done)
        self._forget(unit)
        unit.buffer = unit.ready = unit.done = None
        self.loaded_bytes -= unit.num_bytes
        del self._loaded[unit]

    def _forget(self, unit: Unit) -> None:
        for slot, absent in zip(unit.slots, unit.absent, strict=True):
            slot.param.data = absent

    def _load(self, unit: Unit) -> None:
        assert unit.host is not None, unit.name
        if unit.pending is not None:
            unit.pending.wait()
            unit.pending = None
        if self._copies is None:
            unit.buffer = unit.host.clone()
        else:
            with torch.cuda.stream(self._copies):
                unit.buffer = torch.empty(unit.num_bytes, dtype=torch.uint8, device=self.device)
                unit.buffer.copy_(unit.host, non_blocking=True)
                unit.ready = torch.cuda.Event()
                unit.ready.record(self._copies)
        for slot in unit.slots:
            slot.param.data = slot.view(unit.buffer)
        self._loaded[unit] = None
        self.loaded_bytes += unit.num_bytes
        self.moved_bytes += unit.num_bytes

    def _follow(self, unit: Unit) -> None:
        """Move the cursor to this use of the unit; a use that was not predicted leaves it where it is."""
        places = self._positions.get(unit, [])
        following = bisect.bisect_right(places, self._cursor)
        if following < len(places):
            self._cursor = places[following]

    def _next_use(self, unit: Unit) -> float:
        """Position of the unit's next use, counted on into the following micro step."""
        places = self._positions.get(unit)
        if not places:
            return float("inf")
        following = bisect.bisect_right(places, self._cursor)
        return places[following] if following < len(places) else places[0] + len(self._order)

    def _prefetch(self) -> None:
        # Two micro steps always share their end and beginning, so that a look one round ahead suffices.
        for position in range(self._cursor + 1, self._cursor + 1 + len(self._order)):
            unit = self._order[position % len(self._order)]
            if unit.buffer is not None:
                continue
            if unit.pending is not None and not unit.pending.done():
                return
            if not self._make_room(unit.num_bytes, before=position):
                return
            self._load(unit)

    def _make_room(self, num_bytes: int, *, before: int | None) -> bool:
        """Evict until `num_bytes` fit. With `before`, only units whose next use is later than that; whether they fit then."""
        while self.loaded_bytes + num_bytes > self.budget_bytes:
            idle = [unit for unit in self._loaded if not unit.uses and (before is None or unit not in self._residents)]
            victim = max(idle, key=lambda unit: (unit not in self._residents, self._next_use(unit)), default=None)
            if victim is None or (before is not None and self._next_use(victim) <= before):
                return False
            self.evict(victim)
        return True


def choose_residents(order: Sequence[Unit], *, budget_bytes: int) -> set[Unit]:
    """Units that stay on the device, where those that are used most often come round and round in one order; none elsewhere.

    They take what the budget has beyond the ring, and lie evenly between the others, so that a resident one's turn is time to
    load the next.
    """
    counts = Counter(order)
    most = max(counts.values(), default=0)
    once = [unit for unit, count in counts.items() if count == most]
    total = sum(unit.num_bytes for unit in once)
    spare = budget_bytes - RING_UNITS * max((unit.num_bytes for unit in counts), default=0)
    goes_round = [unit for unit in order if counts[unit] == most] == once * most
    if spare <= 0 or not goes_round or budget_bytes >= sum(unit.num_bytes for unit in counts):
        return set()
    residents, passed, taken = set[Unit](), 0, 0
    for unit in once:
        passed += unit.num_bytes
        if (taken + unit.num_bytes) * total <= passed * spare:
            residents.add(unit)
            taken += unit.num_bytes
    return residents
