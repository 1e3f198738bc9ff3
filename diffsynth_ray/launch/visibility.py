"""Paths of a job that some node of the cluster does not see, found before any GPU is taken."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from diffsynth_ray.config.origins import local_tokenizer
from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.config.schema import as_list
from diffsynth_ray.errors import DsrayError, last_line
from diffsynth_ray.launch.node_checks import sees, write_probe

_TIMEOUT_S = 60.0


def check_visible(resolved: ResolvedJob, say: Callable[[str], None]) -> None:
    """Ask every node that can work for the job's paths; raises DsrayError that names node, key and path.

    Called by the driver. On one node there is nothing to ask. A node that does not answer is told and passed over.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here and _can_work(node["Resources"])]
    if not others:
        return
    probes = {key: probe for key, path in shared_folders(resolved) if (probe := write_probe(path)) is not None}
    named = named_paths(resolved)
    look = ray.remote(num_cpus=0, max_retries=0)(find_invisible)
    try:
        asked = {
            node["NodeManagerAddress"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(named, probes)
            for node in others
        }
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=_TIMEOUT_S)
        problems = []
        for node, reference in asked.items():
            try:
                problems += [f"node {node}: {problem}" for problem in ray.get(reference, timeout=0.1)]
            except (ray.exceptions.RayError, TimeoutError) as error:
                last = last_line(error)
                say(f"node {node} was not asked for the job's paths: {last}")
    finally:
        for probe in probes.values():
            Path(probe).unlink(missing_ok=True)
    if problems:
        hint = "every node must mount the same storage at the same place; `dsray doctor JOB.toml` shows all of it"
        raise DsrayError("\n".join(["not every node sees the job's paths", *(f"  {each}" for each in problems)]), hint=hint)


def _can_work(resources: dict[str, float]) -> bool:
    return resources.get("CPU", 0.0) > 0 or resources.get("GPU", 0.0) > 0


def shared_folders(resolved: ResolvedJob) -> list[tuple[str, str]]:
    """Key and path of the folders that one node writes and others read; URLs are left out."""
    folders = [("output.path", str(resolved.output_path))]
    if resolved.encode is not None and "://" not in resolved.job.split.cache_path:
        folders.append(("split.cache_path", resolved.job.split.cache_path))
    return folders


def named_paths(resolved: ResolvedJob) -> list[tuple[str, str]]:
    """Key and path of everything that workers read; URLs are left out."""
    job = resolved.job
    named = [("model.paths", path) for entry in job.model.paths for path in as_list(entry)]
    for key, path in (
        ("dataset.base_path", job.dataset.base_path),
        ("model.tokenizer_path", local_tokenizer(job.model)),
        ("training.resume_from_checkpoint", job.training.resume_from_checkpoint),
        ("lora.checkpoint", job.lora.checkpoint),
        ("lora.preset_path", job.lora.preset_path),
        ("distributed.deepspeed_config", job.distributed.deepspeed_config),
    ):
        named += [(key, one) for one in as_list(path)]
    return [(key, path) for key, path in named if "://" not in path]


def find_invisible(named: Iterable[tuple[str, str]], probes: Mapping[str, str]) -> list[str]:
    """What of the paths cannot be read on this node; `probes` are files that the driver wrote below the path of a key."""
    problems = [f"{key}: {path} is not there or cannot be read" for key, path in named if not os.access(path, os.R_OK)]
    problems += [
        f"{key}: what the driver wrote to {Path(probe).parent} is not seen" for key, probe in probes.items() if not sees(probe)
    ]
    return problems
