"""The stages of a run as Ray tasks. They run on the driver's node and take no CPU of their own.

Importing the training code costs seconds a process, so that only the training workers do it.
"""

from __future__ import annotations

from typing import Any

import ray

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.data.cached import open_cached_samples
from diffsynth_ray.data.samples import build_sample_index
from diffsynth_ray.run_dir import EncodeProgress, RunDir

_TORCH_TIMEOUT_MARGIN_S = 60
_RESIZE_INTERVAL_S = 15.0
"""How often an elastic run looks for room for more workers."""


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    from diffsynth_ray.train.worker import train_loop

    return train_loop(**config)


@ray.remote(num_cpus=0, max_retries=0)
def encode_stage(resolved_json: str, board: Any) -> str:
    """Stage one of split training; returns the id of the data set in the cache.

    Its encoders end with it: their GPUs are free for stage two. What it has written stays, however it ends.
    """
    from diffsynth_ray.models.family import get_family
    from diffsynth_ray.models.weights import load_components
    from diffsynth_ray.train.caching import cache_dataset
    from diffsynth_ray.train.trainer import check_components

    resolved = ResolvedJob.model_validate_json(resolved_json)
    run_dir = RunDir(resolved.output_path)
    model = resolved.job.model
    name, files = load_components(model.paths, family=model.family) if model.paths else (str(model.family), {})
    family = get_family(name)
    check_components(family, resolved.job)

    def say(line: str) -> None:
        board.say.remote(line)

    def report(progress: EncodeProgress) -> None:
        say(progress.line())
        run_dir.write_encode_progress(progress)

    return cache_dataset(resolved, family, files, board=board, say=say, report=report)


@ray.remote(num_cpus=0, max_retries=0)
def train_stage(
    resolved_json: str, token: str, attempt_name: str, board: Any, manifest_id: str | None = None
) -> dict[str, Any]:
    """Train; returns {"state", "step", "num_steps"}. `attempt_name` is fresh for every attempt.

    Ray Train would otherwise take up what it finds under the name of an earlier run; our checkpoints alone say where a run is.
    `manifest_id` is what stage one returned.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from diffsynth_ray.launch.watch import Watch
    from diffsynth_ray.models.family import get_family
    from diffsynth_ray.models.weights import load_components
    from diffsynth_ray.train.split import split_parts
    from diffsynth_ray.train.trainer import check_components

    resolved = ResolvedJob.model_validate_json(resolved_json)

    def say(line: str) -> None:
        board.say.remote(line)

    # What the files say is checked before any GPU is taken.
    model = resolved.job.model
    family = get_family(load_components(model.paths, family=model.family)[0] if model.paths else str(model.family))
    check_components(family, resolved.job)
    parts = split_parts(family, resolved.job) if manifest_id is not None else None
    if manifest_id is None or parts is None:
        index, cached = build_sample_index(resolved, say), None
    else:
        index, cached = open_cached_samples(resolved, manifest_id, kinds=parts.kinds, say=say)
        say(f"stage train loads {', '.join(parts.train)}")
    count = f"{resolved.min_workers} to {resolved.num_workers}" if resolved.is_elastic else f"{resolved.num_workers}"
    say(f"starting {count} training worker(s)")
    trainer = TorchTrainer(
        _train_loop,
        # Ray's dashboard shows it: JSON and handles, no secrets.
        train_loop_config={
            "resolved_json": resolved_json,
            "token": token,
            "index": ray.put(index),
            "cached": ray.put(cached),
            "components": parts.train if parts is not None else None,
            "board": board,
        },
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
