"""accelerate's configuration (YAML or JSON, and the arguments of `accelerate launch`) -> keys of `[distributed]`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsynth_ray.errors import Problem

_WITHOUT_EFFECT = {
    "compute_environment", "debug", "downcast_bf16", "enable_cpu_affinity", "machine_rank", "main_training_function",
    "main_process_ip", "main_process_port", "rdzv_backend", "rdzv_conf", "same_network", "tpu_env", "tpu_use_cluster",
    "tpu_use_sudo", "tpu_cluster", "no_tpu_cluster", "zero3_init_flag", "zero3_save_16bit_model", "deepspeed_hostfile",
    "deepspeed_multinode_launcher", "num_cpu_threads_per_process", "quiet", "module", "standalone", "rdzv_endpoint",
    "rdzv_id", "master_addr", "master_port", "node_rank", "multi_gpu", "use_deepspeed", "use_fsdp", "log_dir", "tee",
    "role", "monitor_interval", "no_python", "use_cpu", "cpu",
}  # fmt: skip
"""Settings that Ray, or dsray's own way of loading and saving, makes needless."""
_DEEPSPEED = {
    "deepspeed_config_file", "zero_stage", "offload_optimizer_device", "offload_param_device",
    "gradient_accumulation_steps", "gradient_clipping",
}  # fmt: skip
_READ = _DEEPSPEED | {
    "config_file", "distributed_type", "num_processes", "num_machines", "mixed_precision", "gpu_ids", "deepspeed_config",
    "nproc_per_node", "nnodes", "fsdp_config", "max_restarts",
}  # fmt: skip


@dataclass
class Setup:
    """What a launcher's configuration says in dsray's words."""

    values: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value."""
    remarks: dict[str, str] = field(default_factory=dict)
    """Dotted key -> comment."""
    accumulation_steps: int | None = None
    """Of the DeepSpeed configuration; it wins over the script's own flag."""
    notes: list[str] = field(default_factory=list)
    without_counterpart: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read_setup(arguments: Mapping[str, str], config_file: Path | None, find: Callable[[str], Path | None]) -> Setup:
    """Read the launcher's arguments and its configuration file; `find` looks for a file that the configuration names."""
    setup = Setup()
    settings = _read_config(config_file, setup) if config_file else {}
    nested = settings.pop("deepspeed_config", None) or {}
    if isinstance(nested, dict):
        settings.update(nested)
    settings.update(arguments)
    uses_deepspeed = settings.get("distributed_type") == "DEEPSPEED" or "use_deepspeed" in arguments
    _read_workers(settings, setup)
    if uses_deepspeed:
        _read_deepspeed(settings, setup, find)
    elif settings.get("distributed_type") == "FSDP" or "use_fsdp" in arguments:
        setup.values |= {"distributed.strategy": "deepspeed", "distributed.zero_stage": 3}
        setup.notes.append("FSDP has no counterpart; DeepSpeed's ZeRO-3 shards parameters, gradients and optimizer alike")
    elif settings.get("distributed_type") not in (None, "NO", "MULTI_GPU", "MULTI_CPU"):
        setup.without_counterpart.append(f"distributed_type {settings['distributed_type']}: dsray runs on CUDA GPUs and CPUs")
    if settings.get("mixed_precision") in ("fp16", "fp8"):
        setup.notes.append(
            f"mixed_precision {settings['mixed_precision']}: dsray computes in bf16 (training.precision), "
            "in which DiffSynth-Studio loads its models as well"
        )
    if not uses_deepspeed and (idle := sorted(_DEEPSPEED & {n for n, v in settings.items() if v not in (None, "none")})):
        setup.notes.append(f"{', '.join(idle)} had no effect without DeepSpeed (--use_deepspeed) and is left out")
    _list_the_rest(settings, setup, uses_deepspeed=uses_deepspeed)
    return setup


def _read_config(path: Path, setup: Setup) -> dict[str, Any]:
    import yaml  # comes with ray; `import` alone needs it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        setup.problems.append(Problem(str(path), f"cannot be read as accelerate's YAML: {error}"))
        return {}
    if not isinstance(content, dict):
        setup.problems.append(Problem(str(path), "is not accelerate's configuration: it holds no settings"))
        return {}
    return {str(key): value for key, value in content.items()}


def _whole(settings: Mapping[str, Any], name: str, setup: Setup) -> int | None:
    value = settings.get(name)
    if value in (None, "auto"):
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        setup.problems.append(Problem(name, f"got {value!r} in accelerate's configuration; a whole number is needed"))
        return None


def _read_workers(settings: Mapping[str, Any], setup: Setup) -> None:
    machines = _whole(settings, "num_machines", setup) or 1
    count = _whole(settings, "num_processes", setup)
    if "nproc_per_node" in settings:
        machines = _whole(settings, "nnodes", setup) or 1
        count = (_whole(settings, "nproc_per_node", setup) or 1) * machines
    if count is None and (ids := str(settings.get("gpu_ids") or "all")) != "all":
        count = len(ids.split(","))
    if count is not None:
        setup.values["distributed.num_workers"] = count
        setup.remarks["distributed.num_workers"] = "as accelerate's num_processes; unset: all GPUs"
    if machines > 1:
        setup.notes.append(f"the script ran on {machines} machines; submit the job to a cluster of them with --address")


def _read_deepspeed(settings: dict[str, Any], setup: Setup, find: Callable[[str], Path | None]) -> None:
    named = settings.get("deepspeed_config_file")
    if named:
        _read_deepspeed_file(str(named), settings, setup, find)
    stage = _whole(settings, "zero_stage", setup)
    stage = 2 if stage is None else stage
    values = setup.values
    values["distributed.strategy"] = "deepspeed"
    values["distributed.zero_stage"] = max(stage, 1)
    if stage == 0:
        setup.notes.append('zero_stage 0 becomes 1: without ZeRO, strategy = "ddp" is the plainer choice')
    for name in ("offload_optimizer_device", "offload_param_device"):
        device = str(settings.get(name) or "none")
        if device == "nvme":
            device = "cpu"
            setup.notes.append(f'{name} nvme has no counterpart; it becomes "cpu"')
        if name == "offload_param_device" and device != "none" and stage < 3:
            setup.notes.append(
                f"offload_param_device {device} is left out: DeepSpeed offloads parameters with ZeRO-3 only, "
                f"with ZeRO-{stage} it had no effect"
            )
            device = "none"
        if device != "none":
            values[f"distributed.{name}"] = device
    clipping = settings.get("gradient_clipping")
    if clipping not in (None, "auto", "none"):
        try:
            values["training.max_grad_norm"] = float(clipping)
        except (TypeError, ValueError):
            setup.problems.append(
                Problem("gradient_clipping", f"got {clipping!r} in accelerate's configuration; a number is needed")
            )
    setup.accumulation_steps = _whole(settings, "gradient_accumulation_steps", setup)


def _read_deepspeed_file(named: str, settings: dict[str, Any], setup: Setup, find: Callable[[str], Path | None]) -> None:
    path = find(named)
    setup.values["distributed.deepspeed_config"] = str(path or named)
    if path is None:
        setup.notes.append(f"DeepSpeed's configuration {named} is not there: put it there, and set zero_stage as it has it")
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        zero = content.get("zero_optimization", {})
        settings.setdefault("zero_stage", zero.get("stage", 0))
        for short in ("optimizer", "param"):
            settings.setdefault(f"offload_{short}_device", (zero.get(f"offload_{short}") or {}).get("device"))
    except (OSError, ValueError, AttributeError) as error:
        setup.problems.append(Problem(str(path), f"cannot be read as DeepSpeed's JSON: {error}"))
        return
    for name in ("gradient_accumulation_steps", "gradient_clipping"):
        settings.setdefault(name, content.get(name))


def _list_the_rest(settings: Mapping[str, Any], setup: Setup, *, uses_deepspeed: bool) -> None:
    needless = sorted(name for name in settings if name in _WITHOUT_EFFECT)
    if needless:
        setup.without_counterpart.append(f"accelerate's {', '.join(needless)}: Ray and dsray see to it themselves")
    if "max_restarts" in settings:
        setup.notes.append("max_restarts: distributed.max_failures restarts a run after a lost worker, 3 times by default")
    for name, value in settings.items():
        if name in _READ or name in _WITHOUT_EFFECT or value in (None, "", "none", "no", False):
            continue
        reason = "a DeepSpeed setting of accelerate" if uses_deepspeed else "a setting of the launcher"
        setup.without_counterpart.append(f"{name} = {value!r}: {reason} that dsray does not have")
