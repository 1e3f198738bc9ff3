"""The DeepSpeed configuration of a job: what the job's keys say, with a JSON file merged in. Needs no DeepSpeed.

What a job key decides has one home, the job file: another value for it in the JSON file is an error that names both. "auto",
as other trainers' files have it, stands for the job's value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffsynth_ray.config.schema import DistributedSection, Job
from diffsynth_ray.errors import JobFileError, Problem

_KEY = "distributed.deepspeed_config"
_ZERO_KEYS = ("zero_stage", "offload_optimizer_device", "offload_param_device", "deepspeed_config")
_NEEDS_WHOLE_TENSORS = tuple(f"torch.optim.{name}" for name in ("Adafactor", "Muon"))
_PASSED_ON = (
    "aio",
    "comms_logger",
    "communication_data_type",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
"""Sections of a DeepSpeed file that are handed through, beside those that a job key decides."""
_REFUSED = {
    "optimizer": "training.optimizer and training.optimizer_args say it",
    "scheduler": "training.lr_scheduler and training.warmup_steps say it",
    "zero_optimization.round_robin_gradients": "checkpoints need parameters in their order; remove it",
    "zero_optimization.zenflow": "it delays updates, so that a step would not be what its samples say; remove it",
    "zero_optimization.offload_optimizer.nvme_path": "NVMe offload is not supported; use cpu",
    "zero_optimization.offload_param.nvme_path": "NVMe offload is not supported; use cpu",
    "zero_optimization.offload_optimizer.super_offload": "checkpoints do not know it; remove it",
    "zero_optimization.zero_quantized_nontrainable_weights": "frozen weights in 8 bits: that is model.fp8_models",
    "bf16.bf16_master_weights_and_grads": "training.master_weights says it",
    "bf16.bf16_optimizer_states": "checkpoints keep float32 moments; remove it",
}


def check_zero_keys(job: Job) -> list[Problem]:
    """Rules between the DeepSpeed keys and the rest; reads no file."""
    distributed, training = job.distributed, job.training
    if distributed.strategy != "deepspeed":
        fields = DistributedSection.model_fields
        return [
            Problem(f"distributed.{name}", 'needs distributed.strategy = "deepspeed"')
            for name in _ZERO_KEYS
            if getattr(distributed, name) != fields[name].default
        ]
    problems = []
    if distributed.offload_param_device != "none" and distributed.zero_stage != 3:
        message = f"needs distributed.zero_stage = 3 (it is {distributed.zero_stage}): only there parameters are partitioned"
        problems.append(Problem("distributed.offload_param_device", message))
    if job.offload.cpu_offload:
        problems.append(
            Problem(
                "offload.cpu_offload",
                "layer offload and DeepSpeed exclude each other; DeepSpeed has offload_optimizer_device and "
                "offload_param_device",
            )
        )
    if distributed.zero_stage == 3:
        problems += _check_partitioned(job)
    if not training.master_weights:
        problems.append(
            Problem("training.master_weights", "DeepSpeed keeps float32 masters under bf16; remove the key, or use ddp")
        )
    if training.optimizer in _NEEDS_WHOLE_TENSORS:
        problems.append(
            Problem(
                "training.optimizer",
                f"{training.optimizer} needs whole tensors, and DeepSpeed shares out flat parts; use AdamW, or ddp",
            )
        )
    if training.find_unused_parameters is True:
        problems.append(
            Problem(
                "training.find_unused_parameters",
                'with DeepSpeed parameters without a gradient are found once, before step 0; use "auto"',
            )
        )
    return problems


def _check_partitioned(job: Job) -> list[Problem]:
    problems = []
    if job.lora.base_model in job.model.fp8_models:
        message = f"zero_stage = 3 shares {job.lora.base_model} out, and DeepSpeed cannot share FP8 weights; use zero_stage = 2"
        problems.append(Problem("model.fp8_models", message))
    if job.gradient.checkpointing_offload:
        message = "zero_stage = 3 has no offload of activations; use zero_stage = 2"
        problems.append(Problem("gradient.checkpointing_offload", message))
    return problems


def check_shared_encoders(
    job: Job, shared: Sequence[str], *, predict_components: Sequence[str], clip_components: Sequence[str]
) -> list[Problem]:
    """Encoders of which workers would gather the parameters unequally often, and wait for each other for ever.

    An encoder is called once a sample, a clip's once a few frames, and a bucket's last micro batch is short. `shared`: the
    components whose parameters are shared out; of the family `predict_components`, which are called once a micro batch, and
    `clip_components`, which encode clips.
    """
    encoders = [name for name in shared if name not in predict_components]
    if job.distributed.num_workers == 1:
        return []
    problems = []
    if encoders and job.dataset.batch_size > 1:
        message = (
            f"3 trains {', '.join(encoders)} with dataset.batch_size = 1 or distributed.num_workers = 1 only; use one of them, "
            "or zero_stage = 2"
        )
        problems.append(Problem("distributed.zero_stage", message))
    if names := [name for name in encoders if name in clip_components]:
        message = f"3 cannot share {', '.join(names)} out, whose calls depend on a clip's length; use zero_stage = 2"
        problems.append(Problem("distributed.zero_stage", message))
    return problems


def read_zero_config(job: Job) -> dict[str, Any]:
    """DeepSpeed's configuration; raises JobFileError with everything in the file that cannot be merged."""
    own = _own_values(job)
    config: dict[str, Any] = {}
    for path, (_, value) in own.items():
        _put(config, path, value)
    # The strategy says itself which backward completes a step.
    config["gradient_accumulation_steps"] = 1
    config.pop("train_batch_size")  # DeepSpeed works it out; it divides nothing by it
    # Gradients of several micro steps are summed in float32, as under DDP.
    config["data_types"] = {"grad_accum_dtype": "fp32"}
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    if job.distributed.deepspeed_config is not None:
        file = Path(job.distributed.deepspeed_config)
        given = {name: value for name, value in _leaves(_read_json(file)) if value != "auto"}
        if problems := _conflicts(given, own, file):
            raise JobFileError(f"job {job.name}", problems)
        for name, value in given.items():
            if name not in own:
                _put(config, name, value)
    return config


def _own_values(job: Job) -> dict[str, tuple[str, Any]]:
    """DeepSpeed's name -> (job key, its value) of everything that the job file decides."""
    bf16 = job.training.precision == "bf16"
    distributed = job.distributed
    return {
        "train_batch_size": ("dataset.global_batch_size", job.dataset.global_batch_size),
        "train_micro_batch_size_per_gpu": ("dataset.batch_size", job.dataset.batch_size),
        "gradient_accumulation_steps": ("gradient.accumulation_steps", job.gradient.accumulation_steps),
        "gradient_clipping": ("training.max_grad_norm", job.training.max_grad_norm),
        "bf16.enabled": ("training.precision", bf16),
        "fp16.enabled": ("training.precision", False),
        "zero_optimization.stage": ("distributed.zero_stage", distributed.zero_stage),
        "zero_optimization.offload_optimizer.device": (
            "distributed.offload_optimizer_device",
            distributed.offload_optimizer_device,
        ),
        "zero_optimization.offload_param.device": (
            "distributed.offload_param_device",
            distributed.offload_param_device,
        ),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise JobFileError("job", [Problem(_KEY, f"{path} cannot be read as JSON: {error}")]) from error
    if not isinstance(found, dict):
        raise JobFileError("job", [Problem(_KEY, f"{path} must hold a JSON object, got {type(found).__name__}")])
    return found


def _conflicts(given: dict[str, Any], own: dict[str, tuple[str, Any]], path: Path) -> list[Problem]:
    problems = []
    reported = set()
    for name, value in given.items():
        refused = next((key for key in _REFUSED if name == key or name.startswith(f"{key}.")), None)
        if name in own:
            key, wanted = own[name]
            if value != wanted:
                message = f"{path}: {name} = {value!r} contradicts {key} ({wanted!r} there); change one of them"
                problems.append(Problem(_KEY, message))
        elif refused is not None:
            if value and refused not in reported:
                problems.append(Problem(_KEY, f"{path}: {refused}: {_REFUSED[refused]}"))
                reported.add(refused)
        elif name.split(".")[0] not in (*_PASSED_ON, "bf16", "fp16"):
            message = f"{path}: {name} is not passed on; what is: {', '.join(_PASSED_ON)}"
            problems.append(Problem(_KEY, message))
    return problems


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _put(table: dict[str, Any], dotted: str, value: Any) -> None:
    *folders, leaf = dotted.split(".")
    for folder in folders:
        table = table.setdefault(folder, {})
    table[leaf] = value
