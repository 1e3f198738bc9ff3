"""The stages of a run as Ray tasks. They run on the driver's node and take no CPU of their own.

Importing the training code costs seconds a process, so that only the training workers do it.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.util.metrics import Gauge

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.config.schema import Job
from diffsynth_ray.config.sizes import check_sample_size
from diffsynth_ray.data.cached import CachedRows, open_cached_samples
from diffsynth_ray.data.samples import SampleIndex, SampleRule, build_sample_index
from diffsynth_ray.errors import ClusterError, JobFileError
from diffsynth_ray.launch.early import start_early
from diffsynth_ray.launch.fetch import bring_model, bring_to_worker
from diffsynth_ray.launch.queue import QueuePlace, need_to_encode, need_to_train, wait_for_turn
from diffsynth_ray.run_dir import EncodeProgress, RunDir

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from diffsynth_ray.models.family import ModelFamily

_TORCH_TIMEOUT_MARGIN_S = 60
_RESIZE_INTERVAL_S = 15.0
"""How often an elastic run looks for room for more workers."""


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    try:
        from diffsynth_ray.launch.spare import SpareRoom
        from diffsynth_ray.train.worker import train_loop

        resolved = ResolvedJob.model_validate_json(config["resolved_json"])
        bring_to_worker(resolved, config["board"], rank=rank)
        resolved = _with_fp8_components(resolved)
        config["resolved_json"] = resolved.model_dump_json()
        return train_loop(**config, spare=SpareRoom(resolved, config["board"]))
    except ImportError as error:
        # It does not come by a restart either.
        ray.get(config["board"].fail.remote(rank, _missing_package(error)))
        raise


def _with_fp8_components(resolved: ResolvedJob) -> ResolvedJob:
    from diffsynth_ray.models.weights import find_fp8_components

    return resolved.with_keys(model={"fp8_models": find_fp8_components(resolved.job)})


def _missing_package(error: ImportError) -> ClusterError:
    return ClusterError(
        f"the Python of a worker ({sys.executable} on {socket.gethostname()}) lacks something: {error}",
        hint="install diffsynth_ray with all its dependencies on every node; `dsray doctor` compares the nodes",
    )


def sample_rule(job: Job) -> SampleRule:
    """What the job's family demands of its samples. Raises ModelError for files that are no known model."""
    family = _family_of(job)
    return SampleRule(family.size_multiple, family.clip_step)


def _family_of(job: Job) -> type[ModelFamily]:
    from diffsynth_ray.models.family import get_family
    from diffsynth_ray.models.weights import find_model

    return get_family(job.model.family or find_model(job.model)[0])


@ray.remote(num_cpus=0, max_retries=0)
def encode_stage(resolved_json: str, board: Any, place: QueuePlace | None) -> str | None:
    """Stage one of split training; returns the id of the data set in the cache, or None where a stop came before it began.

    Its encoders end with it: their GPUs are free for stage two. What it has written stays, however it ends.
    """
    from diffsynth_ray.models.weights import find_model
    from diffsynth_ray.train.caching import FoundModel, cache_dataset

    resolved = ResolvedJob.model_validate_json(resolved_json)
    assert resolved.encode is not None  # resolve has made it
    # Downloads end, and what the files say is checked, before any GPU is taken.
    if not bring_model(resolved, board, resources=resolved.encode.resources_per_worker):
        return None
    run_dir, model = RunDir(resolved.output_path), resolved.job.model
    found = FoundModel(_family_of(resolved.job))
    if not model.tiny:
        _, files, tokenizers = find_model(model)
        found = FoundModel(found.family, files, tokenizers)
        resolved = _with_fp8_components(resolved)

    def say(line: str) -> None:
        board.say.remote(line)

    if place is not None:
        wait_for_turn(place, need_to_encode(resolved), waits=board.wait.remote)

    shown = Gauge("dsray_stage_progress", tag_keys=("run", "stage", "rank"))

    def report(progress: EncodeProgress) -> None:
        say(progress.line())
        shown.set(progress.done / max(progress.total, 1), tags={"run": resolved.run, "stage": "encode", "rank": "0"})
        run_dir.write_encode_progress(progress)

    return cache_dataset(resolved, found, board=board, say=say, report=report)


@ray.remote(num_cpus=0, max_retries=0)
def train_stage(
    resolved_json: str,
    token: str,
    attempt_name: str,
    board: Any,
    place: QueuePlace | None,
    manifest_id: str | None = None,
) -> dict[str, Any]:
    """Train; returns {"state", "step", "num_steps"}. `attempt_name` is fresh for every attempt, `place` None where no other
    run can be on this Ray.

    Ray Train would otherwise take up what it finds under the name of an earlier run; our checkpoints alone say where a run is.
    `manifest_id` is what stage one returned.
    """
    start_early()  # before the imports below, which are seconds too
    from diffsynth_ray.train.services import check_services

    resolved = ResolvedJob.model_validate_json(resolved_json)

    def say(line: str) -> None:
        board.say.remote(line)

    check_services(resolved.job.logging)
    # Downloads end, and what the files say is checked, before any GPU is taken.
    if (resolved.encode is not None and manifest_id is None) or not bring_model(resolved, board):
        return {"state": "STOPPED", "step": 0, "num_steps": 0}
    index, cached, components = _open_samples(resolved, manifest_id, board, say)
    if place is not None:
        wait_for_turn(place, need_to_train(resolved), waits=board.wait.remote)
    count = f"{resolved.min_workers} to {resolved.num_workers}" if resolved.is_elastic else f"{resolved.num_workers}"
    say(f"starting {count} training worker(s)")
    # Ray's dashboard shows it: JSON and handles, no secrets.
    config = {
        "resolved_json": resolved_json,
        "token": token,
        "index": ray.put(index),
        "cached": ray.put(cached),
        "components": components,
        "board": board,
    }
    result = _build_trainer(resolved, config, attempt_name=attempt_name).fit()
    assert isinstance(result.return_value, dict), result  # rank 0's
    return result.return_value


def _open_samples(
    resolved: ResolvedJob, manifest_id: str | None, board: Any, say: Callable[[str], None]
) -> tuple[SampleIndex, CachedRows | None, tuple[str, ...] | None]:
    """What is trained on, where the cache has it, and the components that stage two loads; without split training the latter
    two are None."""
    rule = sample_rule(resolved.job)
    if problems := check_sample_size(resolved.job, multiple=rule.size_multiple):
        raise JobFileError(f"job {resolved.job.name}", problems)
    cached = components = None
    if manifest_id is None:
        index = build_sample_index(resolved, say, rule=rule)
    else:
        from diffsynth_ray.train.split import sample_prompts, split_parts

        family = _family_of(resolved.job)
        parts = split_parts(family, resolved.job)
        prompts = sample_prompts(family, resolved.job, parts)
        index, cached = open_cached_samples(resolved, manifest_id, kinds=parts.kinds, rule=rule, say=say, prompts=prompts)
        components = parts.train
        if cached.bad:
            board.note_bad.remote(list(cached.bad.values()))
        say(f"stage train loads {', '.join(components)}")
    if index.unusable:
        board.note_bad.remote(index.bad_headers())
    return index, cached, components


def _build_trainer(resolved: ResolvedJob, config: dict[str, Any], *, attempt_name: str) -> TorchTrainer:
    """`config`: the arguments of `_train_loop` on every worker."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from diffsynth_ray.launch.watch import Watch

    trainer_class = TorchTrainer
    if resolved.is_elastic:
        # It stands on insides of Ray Train: other runs do without them.
        from diffsynth_ray.launch.elastic import ElasticTrainer

        trainer_class = ElasticTrainer
    return trainer_class(
        _train_loop,
        train_loop_config=config,
        # The driver ends what hangs after timeout_s, and names it; torch's own time-out is for what it does not see.
        torch_config=TorchConfig(timeout_s=int(resolved.job.distributed.timeout_s) + _TORCH_TIMEOUT_MARGIN_S),
        scaling_config=ScalingConfig(
            num_workers=(resolved.min_workers, resolved.num_workers) if resolved.is_elastic else resolved.num_workers,
            elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
            use_gpu=resolved.device == "cuda",
            resources_per_worker=resolved.resources_per_worker,
        ),
        run_config=RunConfig(
            name=attempt_name,
            storage_path=str(RunDir(resolved.output_path).ray_dir),
            failure_config=FailureConfig(max_failures=resolved.job.distributed.max_failures),
            callbacks=[Watch(config["board"], resolved.output_path)],
        ),
    )
