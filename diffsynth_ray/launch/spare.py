"""Samples on resources that the training leaves free, as a Ray task beside it.

Not Ray Train's validation: that takes a checkpoint of Ray Train's, which all workers report, puts its tasks in a queue
whether or not there is room, and does not let a run end before each has had its turn. Nor a placement group, which would
hold the room for certain: that of a worker that is killed lives on until the driver ends, and the next worker may need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import ray

from diffsynth_ray.config.resolve import READ_CPUS, ResolvedJob
from diffsynth_ray.data.nodes import free_resources
from diffsynth_ray.errors import first_line
from diffsynth_ray.launch.fetch import bring_here
from diffsynth_ray.train.sampler import Errand, Made


class SpareRoom:
    """`train.sampler.Spare` on Ray: one task with the resources of a training worker. It ends with the worker that asks."""

    def __init__(self, resolved: ResolvedJob, board: Any) -> None:
        self._needed = {name: amount for name, amount in resolved.resources_per_worker.items() if amount > 0}
        # Whatever the moment shows: every worker can always decode.
        self._kept = {"CPU": resolved.num_workers * (resolved.decode_cpus + READ_CPUS)}
        self._board = board
        self._items: Any = None
        """What the task yields, as references."""
        self._made: list[Made] = []
        self._has_begun = False

    def has_room(self) -> bool:
        """See Spare. Of all nodes that stay: a task that fits on none of them just now begins later."""
        try:
            free = free_resources()
        except Exception:  # noqa: BLE001  a boundary: no sample is worth the run
            return False
        return all(free.get(name, 0.0) >= amount + self._kept.get(name, 0.0) for name, amount in self._needed.items())

    def start(self, errand: Errand) -> None:
        """See Spare."""
        task = _run_errand.options(
            num_cpus=self._needed.get("CPU", 0),
            num_gpus=self._needed.get("GPU", 0),
            resources={name: amount for name, amount in self._needed.items() if name not in ("CPU", "GPU")},
            scheduling_strategy="DEFAULT",  # never inside what Ray Train has reserved
        )
        self._items, self._made, self._has_begun = task.remote(errand, self._board), [], False

    @property
    def has_begun(self) -> bool:
        """See Spare."""
        return self._has_begun

    def result(self) -> list[Made] | str | None:
        """See Spare."""
        try:
            while ray.wait([self._items], timeout=0)[0]:
                made = ray.get(next(self._items))
                self._has_begun = True
                self._made += [made] if made is not None else []
        except StopIteration:
            return self._made
        except Exception as error:  # noqa: BLE001  a boundary: however its process ends, the training goes on
            cause = getattr(error, "cause", None) or error
            return f"{type(cause).__name__}: {first_line(cause)}"
        return None

    def give_up(self) -> None:
        """See Spare."""
        with suppress(Exception):  # a cluster that goes away takes it along
            ray.cancel(self._items, force=True)


@ray.remote(max_retries=0)
def _run_errand(errand: Errand, board: Any) -> Iterator[Made | None]:
    """None when it begins, then what came of each prompt."""
    yield None
    # The training goes on meanwhile: seconds of imports are this process's own.
    from diffsynth_ray.train.sampler import run_errand

    bring_here(ResolvedJob.model_validate_json(errand.resolved_json), board)
    yield from run_errand(errand)
