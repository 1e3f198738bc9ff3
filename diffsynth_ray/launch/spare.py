"""Samples on resources that the training leaves free, as a Ray task beside it.

Not Ray Train's validation: that takes a checkpoint of Ray Train's, which all workers report, puts its tasks in a queue
whether or not there is room, and does not let a run end before each has had its turn.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from diffsynth_ray.config.resolve import READ_CPUS, ResolvedJob
from diffsynth_ray.launch.fetch import bring_here
from diffsynth_ray.train.sampler import Errand, Made

_RESERVE_S = 2.0
"""Wait for a reservation on one node; that the cluster as a whole has as much does not say so."""


class SpareRoom:
    """`train.sampler.Spare` on Ray: one task with the resources of a training worker."""

    def __init__(self, resolved: ResolvedJob, board: Any) -> None:
        self._needed = {name: amount for name, amount in resolved.resources_per_worker.items() if amount > 0}
        # Whatever the moment shows: every worker can always decode.
        self._kept = {"CPU": resolved.num_workers * (resolved.decode_cpus + READ_CPUS)}
        self._board = board
        self._group: PlacementGroup | None = None
        self._task: ray.ObjectRef | None = None

    def reserve(self) -> bool:
        """See Spare."""
        try:
            free = ray.available_resources()
            if any(free.get(name, 0.0) < amount + self._kept.get(name, 0.0) for name, amount in self._needed.items()):
                return False
            self._group = placement_group([self._needed])
            if self._group.wait(_RESERVE_S):
                return True
        except Exception as error:  # noqa: BLE001  a boundary: no sample is worth the run
            self._board.say.remote(f"warning: no room was found for samples beside the training: {error}")
        self.give_up()
        return False

    def start(self, errand: Errand) -> None:
        """See Spare."""
        others = {name: amount for name, amount in self._needed.items() if name not in ("CPU", "GPU")}
        task = _run_errand.options(
            num_cpus=self._needed.get("CPU", 0),
            num_gpus=self._needed.get("GPU", 0),
            resources=others,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0),
        )
        self._task = task.remote(errand, self._board)

    def result(self) -> list[Made] | str | None:
        """See Spare."""
        if self._task is None or not ray.wait([self._task], timeout=0)[0]:
            return None
        try:
            made: list[Made] = ray.get(self._task)
        except Exception as error:  # noqa: BLE001  a boundary: however its process ends, the training goes on
            cause = getattr(error, "cause", None) or error
            return f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
        finally:
            self._task = None
            self.give_up()
        return made

    def give_up(self) -> None:
        """See Spare."""
        with suppress(Exception):  # a cluster that goes away takes both with it
            if self._task is not None:
                ray.cancel(self._task, force=True)
            if self._group is not None:
                remove_placement_group(self._group)
        self._task = self._group = None


@ray.remote(max_retries=0)
def _run_errand(errand: Errand, board: Any) -> list[Made]:
    # The training goes on meanwhile: seconds of imports are this process's own.
    from diffsynth_ray.train.sampler import run_errand

    bring_here(ResolvedJob.model_validate_json(errand.resolved_json), board)
    return run_errand(errand)
