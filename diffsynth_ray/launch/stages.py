"""The stages of a run as Ray tasks. They run on the driver's node and take no CPU of their own.

Importing the training code costs seconds a process, so that only the training workers do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.config.schema import Job
from diffsynth_ray.data.samples import SampleRule, build_sample_index
from diffsynth_ray.launch.fetch import bring_model, bring_to_worker
from diffsynth_ray.run_dir import RunDir

if TYPE_CHECKING:
    from diffsynth_ray.models.family import ModelFamily

_TORCH_TIMEOUT_MARGIN_S = 60
_RESIZE_INTERVAL_S = 15.0
"""How often an elastic run looks for room for more workers."""


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    import ray.train

    from diffsynth_ray.train.worker import train_loop

    rank = ray.train.get_context().get_world_rank()
    bring_to_worker(ResolvedJob.model_validate_json(config["resolved_json"]), config["board"], rank=rank)
    return train_loop(**config)


def sample_rule(job: Job) -> SampleRule:
    """What the job's family demands of its samples. Raises ModelError for files that are no known model."""
    family = _family_of(job)
    return SampleRule(family.size_multiple, family.clip_step)


def _family_of(job: Job) -> type[ModelFamily]:
    from diffsynth_ray.models.family import get_family
    from diffsynth_ray.models.weights import find_model

    return get_family(job.model.family or find_model(job.model)[0])


@ray.remote(num_cpus=0, max_retries=0)
def train_stage(resolved_json: str, token: str, attempt_name: str, board: Any) -> dict[str, Any]:
    """Train; returns {"state", "step", "num_steps"}. `attempt_name` is fresh for every attempt.

    Ray Train would otherwise take up what it finds under the name of an earlier run; our checkpoints alone say where a run is.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from diffsynth_ray.launch.elastic import ElasticTrainer
    from diffsynth_ray.launch.watch import Watch
    from diffsynth_ray.train.services import check_services

    resolved = ResolvedJob.model_validate_json(resolved_json)

    def say(line: str) -> None:
        board.say.remote(line)

    check_services(resolved.job.logging)
    # Downloads end, and what the files say is checked, before any GPU is taken.
    if not bring_model(resolved, board):
        return {"state": "STOPPED", "step": 0, "num_steps": 0}
    index = build_sample_index(resolved, say, rule=sample_rule(resolved.job))
    if index.unusable:
        board.note_bad.remote(index.bad_headers())
    count = f"{resolved.min_workers} to {resolved.num_workers}" if resolved.is_elastic else f"{resolved.num_workers}"
    say(f"starting {count} training worker(s)")
    trainer = ElasticTrainer(
        _train_loop,
        # Ray's dashboard shows it: JSON and handles, no secrets.
        train_loop_config={"resolved_json": resolved_json, "token": token, "index": ray.put(index), "board": board},
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
            callbacks=[Watch(board, resolved.output_path)],
        ),
    )
    result = trainer.fit()
    assert isinstance(result.return_value, dict), result  # rank 0's
    return result.return_value
