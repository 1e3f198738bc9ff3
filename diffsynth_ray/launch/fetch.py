"""The model's files on every node that may get a training worker: downloaded once a node, checked on each."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.run_dir import RunDir

_POLL_S = 1.0
_ONLINE = {"HF_HUB_OFFLINE": "0"}
"""The training workers are kept offline (driver.WORKER_ENV); this is the one place where a hub may be asked."""


def bring_model(resolved: ResolvedJob, board: Any) -> bool:
    """Download what the job's ids stand for and check what all files say; raises a node's error.

    Nodes that share a disk wait for the one that downloads, and then find the files. False = a stop was asked for meanwhile;
    what has come is kept.
    """
    model = resolved.job.model
    if model.tiny or (not model.id_with_origin_paths and model.tokenizer_path is not None):
        _check_model(resolved, board)
        return True
    tasks = [
        _download_and_check.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), runtime_env={"env_vars": _ONLINE}
        ).remote(resolved.model_dump_json(), board, name)
        for node, name in worker_nodes(resolved)
    ]
    waiting = tasks
    try:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=_POLL_S)
            ray.get(done)
            if waiting and (reason := RunDir(resolved.output_path).stop_reason()) is not None:
                board.say.remote(f"stopping before the first step: {reason}")
                return False
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    finally:
        for task in waiting:
            ray.cancel(task)
    return True


def worker_nodes(resolved: ResolvedJob) -> list[tuple[str, str]]:
    """(id, address to show; "" where there is one only) of the live nodes that one training worker fits on."""
    fitting = [
        node
        for node in ray.nodes()
        if node["Alive"]
        and all(node["Resources"].get(name, 0.0) >= amount for name, amount in resolved.resources_per_worker.items())
    ]
    return [(node["NodeID"], node["NodeManagerAddress"] if len(fitting) > 1 else "") for node in fitting]


@ray.remote(num_cpus=0, max_retries=0)
def _download_and_check(resolved_json: str, board: Any, node: str) -> None:
    _check_model(ResolvedJob.model_validate_json(resolved_json), board, node=node)


def _check_model(resolved: ResolvedJob, board: Any, *, node: str = "") -> None:
    from diffsynth_ray.models.download import download_model
    from diffsynth_ray.models.family import get_family
    from diffsynth_ray.train.trainer import check_components

    def say(line: str) -> None:
        board.say.remote(f"node {node}: {line}" if node else line)

    model = resolved.job.model
    family = str(model.family) if model.tiny else download_model(model, say)[0]
    check_components(get_family(family), resolved.job)
