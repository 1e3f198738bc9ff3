"""Ray Train's controller tells the board when workers start, fail and go; before it adds workers it asks for a checkpoint.

Ray Train's public callback hears of errors only. The classes below are its internal ones, which it lets pass as callbacks of
a run; nothing but what is told here depends on them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from diffsynth_ray.launch.failures import WorkerPlace, describe
from diffsynth_ray.run_dir import RunDir

_POLL_S = 0.2
_SILENCE_S = 20.0
_CHECKPOINT_WAIT_S = 600.0
"""How long a change of the number of workers waits for the checkpoint that it starts from."""


class Watch(WorkerGroupCallback, ControllerCallback):
    """Lives in Ray Train's controller."""

    def __init__(self, board: Any, output_path: Path) -> None:
        self._board = board
        self._run_dir = RunDir(output_path)
        self._has_told = False
        self._is_running = False

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called when the workers' processes are there."""
        workers = worker_group.get_workers()
        places = [
            WorkerPlace(
                rank=worker.distributed_context.world_rank, node=worker.metadata.node_ip, pid=worker.metadata.pid, log=""
            )
            for worker in workers
        ]
        self._has_told, self._is_running = False, True
        self._board.begin_group.remote(places, [ray.cloudpickle.dumps(worker.actor) for worker in workers])

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Called several times a second; tells the first errors of a group."""
        errors = worker_group_status.errors
        if not errors or self._has_told:
            return
        causes = {rank: describe(error) for rank, error in errors.items()}
        self._has_told, self._is_running = True, False
        self._board.lose.remote(causes, worker_group_status.has_preempted_worker())

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Called before the workers are ended, for whatever reason."""
        self._is_running = False
        self._board.end_group.remote()

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        """Called when the run was cancelled."""
        self._board.end_group.remote()

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Called before a group of another size replaces the running one, which goes on meanwhile."""
        if not self._is_running:
            return
        self._board.say.remote(f"going on with {resize_decision.num_workers} worker(s): a checkpoint first")
        self._run_dir.request_checkpoint()
        end = time.monotonic() + _CHECKPOINT_WAIT_S
        while time.monotonic() < end and self._run_dir.checkpoint_request() is not None:
            if ray.get(self._board.silence_s.remote()) > _SILENCE_S:
                return  # a worker has died meanwhile
            time.sleep(_POLL_S)
