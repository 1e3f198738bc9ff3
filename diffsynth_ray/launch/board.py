"""Where the processes of a run leave what the driver tells the user: lines of the log, bad samples, losses of workers, and a
failure that ends the run. It also knows what each worker does, and so which one does nothing any more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ray

from diffsynth_ray.errors import DsrayError
from diffsynth_ray.launch.failures import WorkerPlace, pick_root
from diffsynth_ray.train.heartbeat import DONE, LOADING, LOADING_PATIENCE

if TYPE_CHECKING:
    from diffsynth_ray.data.bad_samples import BadSample

_SHOWN_WORKERS = 8


@dataclass(frozen=True)
class Failure:
    """An error that no restart mends."""

    error: DsrayError
    worker: WorkerPlace | None


@dataclass(frozen=True)
class Loss:
    """A group of workers that ended by itself; Ray Train starts another one, or gives up."""

    worker: WorkerPlace
    """The one that the others followed."""
    cause: str
    step: int
    """The newest step that a worker had begun or done."""
    is_preemption: bool


@dataclass(frozen=True)
class Hung:
    """Workers that no longer do anything, and the text that says so."""

    handles: list[bytes]
    """Pickled handles of their actors: reading one imports Ray Train, a second that only the driver needs to spend."""
    text: str


@dataclass(frozen=True)
class News:
    """What the driver has not seen yet."""

    lines: list[str]
    failure: Failure | None
    losses: list[Loss]
    bad: list[BadSample]
    hung: Hung | None
    idle_s: float
    """Seconds without a group of workers; 0 while there is one, and after one that was done."""
    no_encoder_s: float
    """Seconds that stage one has waited for its first encoder; 0 before, and once it is there."""
    waits_for: str | None
    """What the run's next stage waits for in the cluster's queue."""
    has_turn: bool
    """Whether a stage holds a place in that queue, which the driver keeps."""


@dataclass
class _Worker:
    place: WorkerPlace
    handle: bytes
    heard: float
    phase: str = "starting"
    since: float = 0.0
    step: int = 0


@dataclass
class _Group:
    """The workers that are alive together."""

    workers: dict[int, _Worker] = field(default_factory=dict)
    hung: dict[int, str] = field(default_factory=dict)


@ray.remote(num_cpus=0, max_restarts=0)
class Board:
    """One actor a run, on the driver's node."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._failure: Failure | None = None
        self._bad: list[BadSample] = []
        self._losses: list[Loss] = []
        self._group: _Group | None = None
        self._is_finished = False
        self._idle_since = time.monotonic()
        self._encoders_awaited: float | None = None
        self._waits_for: str | None = None
        self._has_turn = False

    def wait(self, reason: str | None) -> None:
        """A stage waits in the cluster's queue, and what for; None: it goes on."""
        self._waits_for, self._has_turn = reason, reason is None
        self._idle_since = time.monotonic()

    def await_encoders(self) -> None:
        """Stage one has asked Ray for encoders."""
        self._encoders_awaited = time.monotonic()

    def note_encoder(self) -> None:
        """An encoder has a place, and loads its model."""
        self._encoders_awaited = None

    def say(self, line: str) -> None:
        """Leave a line."""
        self._lines.append(line)

    def fail(self, rank: int | None, error: DsrayError) -> None:
        """Leave a failure; the first one counts, later ones follow from it."""
        self._failure = self._failure or Failure(error, self._place(rank) if rank is not None else None)

    def note_bad(self, samples: list[BadSample]) -> None:
        """Leave samples that were replaced."""
        self._bad += samples

    def begin_group(self, places: list[WorkerPlace], handles: list[bytes]) -> None:
        """A group of workers has started."""
        now = time.monotonic()
        pairs = zip(places, handles, strict=True)
        shown = ", ".join(map(str, places[:_SHOWN_WORKERS])) + (" ..." if len(places) > _SHOWN_WORKERS else "")
        self._lines.append(f"{len(places)} training worker(s): {shown}")
        self._group = _Group({place.rank: _Worker(place, handle, now, since=now) for place, handle in pairs})

    def end_group(self) -> None:
        """The group of workers is gone."""
        self._is_finished = self._group is not None and all(w.phase == DONE for w in self._group.workers.values())
        self._group = None
        self._idle_since = time.monotonic()

    def enter(self, rank: int, log: str) -> None:
        """Where a worker's output goes."""
        if self._group is not None and rank in self._group.workers:
            worker = self._group.workers[rank]
            worker.place = WorkerPlace(rank=rank, node=worker.place.node, pid=worker.place.pid, log=log)

    def beat(self, rank: int, phase: str, step: int, age_s: float) -> None:
        """What a worker's training thread is at, and for how long; sent by another thread of the worker."""
        if self._group is not None and rank in self._group.workers:
            worker = self._group.workers[rank]
            if worker.phase == DONE:
                return
            worker.heard = time.monotonic()
            worker.phase, worker.step, worker.since = phase, step, worker.heard - age_s

    def silence_s(self) -> float:
        """Seconds since the worker that is silent longest was heard."""
        if self._group is None:
            return float("inf")
        return time.monotonic() - min(worker.heard for worker in self._group.workers.values())

    def lose(self, failures: dict[int, tuple[str, int]], is_preemption: bool) -> None:
        """Workers have ended: rank -> (cause, how likely it is that the others followed from it; see failures.py)."""
        hung = self._group.hung if self._group is not None else {}
        rank, cause = pick_root({rank: (hung[rank], 0) if rank in hung else each for rank, each in failures.items()})
        self._losses.append(Loss(self._place(rank), cause, self._step(), is_preemption))

    def take(self, timeout_s: float) -> News:
        """What is new; workers that have stood still for `timeout_s` are named once."""
        lines, self._lines = self._lines, []
        losses, self._losses = self._losses, []
        bad, self._bad = self._bad, []
        is_idle = self._group is None and not self._is_finished
        idle_s = time.monotonic() - self._idle_since if is_idle else 0.0
        awaited = self._encoders_awaited
        return News(
            lines, self._failure, losses, bad, self._find_hung(timeout_s), idle_s=idle_s,
            no_encoder_s=0.0 if awaited is None else time.monotonic() - awaited,
            waits_for=self._waits_for, has_turn=self._has_turn,
        )  # fmt: skip

    def _place(self, rank: int) -> WorkerPlace:
        if self._group is not None and rank in self._group.workers:
            return self._group.workers[rank].place
        return WorkerPlace(rank=rank, node="", pid=0, log="")

    def _step(self) -> int:
        return max((worker.step for worker in self._group.workers.values()), default=0) if self._group is not None else 0

    def _find_hung(self, timeout_s: float) -> Hung | None:
        if self._group is None or self._group.hung:
            return None
        now = time.monotonic()
        limits = {
            rank: timeout_s * (LOADING_PATIENCE if worker.phase in LOADING else 1)
            for rank, worker in self._group.workers.items()
            if worker.phase != DONE
        }
        workers = self._group.workers
        stopped = {rank: workers[rank] for rank, limit in limits.items() if now - workers[rank].heard > limit}
        # A process that is silent altogether is the cause; the others only wait for it.
        stuck = stopped or {rank: workers[rank] for rank, limit in limits.items() if now - workers[rank].since > limit}
        if not stuck:
            return None
        texts = {
            rank: f"hung: {worker.phase} at step {worker.step} for {now - worker.since:.0f} s"
            + (", the process does not answer" if rank in stopped else "")
            for rank, worker in stuck.items()
        }
        self._group.hung = texts
        named = "; ".join(f"{stuck[rank].place} {text}" for rank, text in sorted(texts.items()))
        return Hung([worker.handle for worker in stuck.values()], f"{named} (distributed.timeout_s = {timeout_s:g})")
