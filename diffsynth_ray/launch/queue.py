"""The queue of a cluster: runs that do not fit beside each other wait for each other.

Without it two runs on a small cluster would each take what their workers ask for, and then wait for ever for the CPUs that
their reading and decoding need. A run counts with its workers and its data tasks; who has waited longest goes first, unless
`distributed.priority` says otherwise; a later run goes ahead only where that takes nothing from those before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from diffsynth_ray.data.nodes import staying_resources

if TYPE_CHECKING:
    from diffsynth_ray.config.resolve import ResolvedJob

NAME, NAMESPACE = "queue", "dsray"
RENEW_EVERY_S = 5.0
_EXPIRY_S = 60.0
"""Seconds without a word of its driver after which a run no longer counts."""
_ASK_EVERY_S = 1.0
_EPSILON = 1e-6

Amounts = dict[str, float]


@dataclass(frozen=True)
class Need:
    """What a stage takes of a cluster: so many workers of one kind, each with its data tasks."""

    run: str
    priority: int
    per_worker: Amounts
    """CPUs, GPUs and other resources of one worker and its data tasks."""
    least: int
    """Fewest workers."""
    most: int
    """Most workers; more than `least` for an elastic run, which takes what it finds."""

    def amounts(self, num_workers: int) -> Amounts:
        """Resources of so many workers."""
        return {name: amount * num_workers for name, amount in self.per_worker.items() if amount > 0}


def need_to_train(resolved: ResolvedJob) -> Need:
    """What the training stage takes. Decoding goes on with one task a worker, however many there may be."""
    workers = (resolved.min_workers, resolved.num_workers)
    return _need(resolved, resolved.resources_per_worker, decode_cpus=resolved.decode_cpus, workers=workers)


def need_to_encode(resolved: ResolvedJob) -> Need:
    """What stage one of split training takes."""
    stage = resolved.encode
    assert stage is not None  # resolve has made it
    workers = (stage.num_workers, stage.num_workers)
    return _need(resolved, stage.resources_per_worker, decode_cpus=stage.decode_cpus, workers=workers)


def _need(resolved: ResolvedJob, resources: Amounts, *, decode_cpus: float, workers: tuple[int, int]) -> Need:
    from diffsynth_ray.config.resolve import READ_CPUS  # the queue's own process does without the job's schema

    per_worker = {**resources, "CPU": resources.get("CPU", 0.0) + READ_CPUS + decode_cpus}
    return Need(resolved.run, resolved.job.distributed.priority, per_worker, *workers)


@dataclass
class _Entry:
    need: Need
    arrived: int
    heard: float
    has_turn: bool = False

    @property
    def order(self) -> tuple[int, int]:
        return (-self.need.priority, self.arrived)


class Turns:
    """Who may go and who waits. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._arrivals = 0

    def ask(self, ticket: str, need: Need, total: Amounts) -> str | None:
        """None where the run may go now, else what it waits for; `total` is what the nodes that stay have in all.

        The first word of a ticket puts it at the end of the queue; every later one renews it.
        """
        self._expire()
        if ticket not in self._entries:
            # An earlier attempt of this run has died without a word, or ends now: it may commit nothing any more.
            self._entries = {key: each for key, each in self._entries.items() if each.need.run != need.run}
            self._arrivals += 1
            self._entries[ticket] = _Entry(need, self._arrivals, self._clock())
        entry = self._entries[ticket]
        entry.heard = self._clock()
        if entry.need != need:
            # The run's next stage: what the one before it held is free, and its place in the queue stays.
            entry.need, entry.has_turn = need, False
        if not entry.has_turn:
            before = [each for each in self._entries.values() if not each.has_turn and each.order < entry.order]
            lacking = self._lacking(need, before, total)
            if lacking:
                return self._reason(need, lacking, before)
            entry.has_turn = True
        return None

    def keep(self, ticket: str, need: Need) -> None:
        """A run that has its turn still holds it, also after this queue was made anew."""
        self._expire()
        if ticket not in self._entries:
            self._arrivals += 1
            self._entries[ticket] = _Entry(need, self._arrivals, self._clock(), has_turn=True)
        self._entries[ticket].heard = self._clock()

    def leave(self, ticket: str) -> None:
        """The run has ended, or does not want its turn any more."""
        self._entries.pop(ticket, None)

    def wanted(self) -> list[Amounts]:
        """One bundle a worker of all runs, where some wait: what an autoscaler should make room for; else nothing."""
        if all(entry.has_turn for entry in self._entries.values()):
            return []
        return [entry.need.amounts(1) for entry in self._entries.values() for _ in range(entry.need.least)]

    def _expire(self) -> None:
        now = self._clock()
        self._entries = {key: each for key, each in self._entries.items() if now - each.heard < _EXPIRY_S}

    def _lacking(self, need: Need, before: list[_Entry], total: Amounts) -> Amounts:
        """Resource -> free amount, of what is too little for `need`; those before it are served first."""
        free = {}
        for name, amount in need.amounts(need.least).items():
            # A cluster that is smaller than the run may grow for it; other runs are not to be in its way then.
            has = max(total.get(name, 0.0), amount)
            for entry in self._entries.values():
                if entry.has_turn:
                    has -= _held(entry.need, total).get(name, 0.0)
            for entry in before:
                has -= entry.need.amounts(entry.need.least).get(name, 0.0)
            if has + _EPSILON < amount:
                free[name] = max(has, 0.0)
        return free

    def _reason(self, need: Need, lacking: Amounts, before: list[_Entry]) -> str:
        wanted = need.amounts(need.least)
        holders = [entry.need.run for entry in self._entries.values() if entry.has_turn]
        parts = [", ".join(f"{free:g} of {wanted[name]:g} {name} free" for name, free in lacking.items())]
        if holders:
            parts.append(f"held by {', '.join(holders)}")
        if before:
            parts.append(f"before it in the queue: {', '.join(entry.need.run for entry in before)}")
        return "; ".join(parts)


def _held(need: Need, total: Amounts) -> Amounts:
    """What a run with its turn takes; an elastic one all that is there, up to its most."""
    least = need.amounts(need.least)
    return {name: max(least[name], min(amount, total.get(name, 0.0))) for name, amount in need.amounts(need.most).items()}


class Queue:
    """`Turns` as an actor of the cluster, shared by all drivers."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._wanted: list[Amounts] = []

    def ask(self, ticket: str, need: Need) -> str | None:
        """See Turns.ask."""
        answer = self._turns.ask(ticket, need, staying_resources())
        self._tell_autoscaler()
        return answer

    def keep(self, ticket: str, need: Need) -> None:
        """See Turns.keep."""
        self._turns.keep(ticket, need)

    def leave(self, ticket: str) -> None:
        """See Turns.leave."""
        self._turns.leave(ticket)
        self._tell_autoscaler()

    def _tell_autoscaler(self) -> None:
        """A waiting run asks Ray for nothing yet, so that an autoscaler would not know of it."""
        wanted = self._turns.wanted()
        if wanted != self._wanted:
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=wanted)
            self._wanted = wanted


@dataclass(frozen=True)
class QueuePlace:
    """A run's place in the queue of its cluster."""

    queue: Any
    """Handle of the Queue."""
    ticket: str
    """The attempt's submission id."""

    def keep(self, need: Need) -> None:
        """Hold on to the turn; at least every _EXPIRY_S."""
        self.queue.keep.remote(self.ticket, need)

    def leave(self) -> None:
        """Make room for others."""
        self.queue.leave.remote(self.ticket)


def join_queue(ticket: str) -> QueuePlace:
    """A place in the cluster's queue, which the first run makes. Returns at once."""
    cls = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Queue)
    return QueuePlace(cls.options(name=NAME, namespace=NAMESPACE, get_if_exists=True, lifetime="detached").remote(), ticket)


def wait_for_turn(place: QueuePlace, need: Need, *, waits: Callable[[str | None], object]) -> None:
    """Return when the stage may take its workers; `waits` is told what it waits for, and at the end None."""
    told = ""
    while True:
        reason = ray.get(place.queue.ask.remote(place.ticket, need))
        if reason != told:
            waits(reason)
            told = reason
        if reason is None:
            return
        time.sleep(_ASK_EVERY_S)
