"""The model's files on every node that may get a training worker: downloaded once a node, checked on each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffsynth_ray.config.origins import tokenizer_ids
from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.errors import DsrayError, JobFileError, ModelError
from diffsynth_ray.run_dir import RunDir

_POLL_S = 1.0
_ONLINE = {"HF_HUB_OFFLINE": "0"}
"""The training workers are kept offline (environment.WORKER_ENV); this is the one place where a hub may be asked."""


def bring_model(resolved: ResolvedJob, board: Any, *, resources: Mapping[str, float] | None = None) -> bool:
    """Download what the job's ids stand for and check what all files say; raises a node's error.

    On the nodes that a worker with these resources fits on: by default a training worker.
    Nodes that share a disk wait for the one that downloads, and then find the files. False = a stop was asked for meanwhile;
    what has come is kept.
    """
    if not _may_ask_a_hub(resolved):
        _check_model(resolved, board)
        return True

    def is_stopped() -> bool:
        reason = RunDir(resolved.output_path).stop_reason()
        if reason is not None:
            board.say.remote(f"stopping before the first step: {reason}")
        return reason is not None

    nodes = worker_nodes(resources or resolved.resources_per_worker)
    return _bring(resolved, board, nodes, should_end=is_stopped)


def bring_to_worker(resolved: ResolvedJob, board: Any, *, rank: int) -> None:
    """The same for a training worker on a node that has come after `bring_model`, in place of another or as one more."""

    def is_ended() -> bool:
        board.beat.remote(rank, "loading the model", 0, 0.0)
        return False

    try:
        bring_here(resolved, board, should_end=is_ended)
    except DsrayError as error:
        ray.get(board.fail.remote(rank, error))
        raise


def bring_here(resolved: ResolvedJob, board: Any, *, should_end: Callable[[], bool] = lambda: False) -> None:
    """The same for the node of the task or actor that calls; raises what is wrong with the files."""
    from diffsynth_ray.models.weights import find_model

    if not _may_ask_a_hub(resolved):
        return
    try:
        find_model(resolved.job.model)
    except ModelError:
        node = (ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())
        _bring(resolved, board, [node], should_end=should_end)


def _may_ask_a_hub(resolved: ResolvedJob) -> bool:
    model = resolved.job.model
    has_ids = bool(model.id_with_origin_paths or tokenizer_ids(model))
    return not model.tiny and (has_ids or model.tokenizer_path is None)


def _bring(resolved: ResolvedJob, board: Any, nodes: list[tuple[str, str]], *, should_end: Callable[[], bool]) -> bool:
    """On these nodes, each in a process of its own; whether it came to its end."""
    tasks = [
        _download_and_check.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), runtime_env={"env_vars": _ONLINE}
        ).remote(resolved.model_dump_json(), board, name)
        for node, name in nodes
    ]
    waiting = tasks
    try:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=_POLL_S)
            ray.get(done)
            if waiting and should_end():
                return False
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    finally:
        for task in waiting:
            ray.cancel(task)
    return True


def worker_nodes(resources: Mapping[str, float]) -> list[tuple[str, str]]:
    """(id, address to show; "" where there is one only) of the live nodes that one worker with these resources fits on."""
    fitting = [
        node
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(name, 0.0) >= amount for name, amount in resources.items())
    ]
    return [(node["NodeID"], node["NodeManagerAddress"] if len(fitting) > 1 else "") for node in fitting]


@ray.remote(num_cpus=0, max_retries=0)
def _download_and_check(resolved_json: str, board: Any, node: str) -> None:
    _check_model(ResolvedJob.model_validate_json(resolved_json), board, node=node)


def _check_model(resolved: ResolvedJob, board: Any, *, node: str = "") -> None:
    from diffsynth_ray.models.download import download_model
    from diffsynth_ray.models.family import get_family
    from diffsynth_ray.models.inspection import check_trained
    from diffsynth_ray.models.weights import find_fp8_components
    from diffsynth_ray.train.optim import check_optimizer
    from diffsynth_ray.train.trainer import check_components

    def say(line: str) -> None:
        board.say.remote(f"node {node}: {line}" if node else line)

    model = resolved.job.model
    family, files = (str(model.family), None) if model.tiny else download_model(model, say)[:2]
    find_fp8_components(resolved.job)
    check_components(get_family(family), resolved.job)
    if files is not None and (absent := check_trained(resolved.job, files)):
        raise JobFileError(f"job {resolved.job.name}", list(absent.values()))
    check_optimizer(resolved.job)
