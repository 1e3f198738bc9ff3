"""Does a job fit its workers' device and host memory, how long takes a step, and which keys would help."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from diffsynth_ray.config.distillation import DIRECT_DISTILL
from diffsynth_ray.config.resolve import ResolvedJob, check_rules
from diffsynth_ray.config.schema import Job
from diffsynth_ray.config.sizes import check_micro_batch
from diffsynth_ray.data.metadata import PROMPT_COLUMN, read_metadata
from diffsynth_ray.errors import DataError, JobFileError, Problem
from diffsynth_ray.memory.devices import Device
from diffsynth_ray.models.family import BatchShape, ModelFamily, get_family
from diffsynth_ray.schedule import partitioned_components
from diffsynth_ray.train.estimate import GIB, RESERVED_BYTES, Estimate, Spread, activation_bytes, estimate
from diffsynth_ray.train.model_cost import ModelCost, find_configs, measure_model

_TEXT_TOKENS = 256
"""Of a prompt where the metadata cannot be read."""
_CHARACTERS_PER_TOKEN = 3
_PICTURE_TOKENS = 1400
"""Of a picture to edit, as a text encoder with eyes counts it."""
_MOST_ON_A_NODE = 8

Say = Callable[[str], object]


def estimate_job(resolved: ResolvedJob, *, device: Device | None, is_remote: bool, say: Say) -> Estimate:
    """The estimate of a worker, with advice where it does not fit; raises DsrayError for what cannot be reckoned."""
    job = resolved.job
    if job.task == DIRECT_DISTILL:
        message = "estimates cover single timesteps; direct distillation computes through every step of inference"
        raise JobFileError(f"job {job.name}", [Problem("task", message)])
    family = get_family(find_configs(job)[0])
    if problems := check_micro_batch(job.dataset, step=family.clip_step, area=job.dataset.max_pixels):
        raise JobFileError(f"job {job.name}", problems)
    capability = None if device is None else device.capability
    cost = measure_model(job, largest_shape(job, family), capability=capability, say=say)
    on_node = min(resolved.num_workers, _MOST_ON_A_NODE) if is_remote else resolved.num_workers
    spread = Spread(resolved.num_workers, on_node, resolved.micro_steps)
    found = estimate(job, cost, device, spread=spread)
    return replace(found, advice=tuple(advise(job, cost, device, spread, found)))


def largest_shape(job: Job, family: type[ModelFamily]) -> BatchShape:
    """The costliest micro batch that the job's keys allow; the samples themselves may be smaller."""
    dataset, multiple = job.dataset, 2 * family.size_multiple
    side = max(math.isqrt(dataset.max_pixels) // multiple, 1) * multiple
    height, width = dataset.height or side, dataset.width or side
    num_frames = 1
    if family.clip_step is not None:
        num_frames = (dataset.num_frames - 1) // family.clip_step * family.clip_step + 1
    tokens = _text_tokens(job) + (_PICTURE_TOKENS if family.text_reads_extra and job.model.extra_inputs else 0)
    return BatchShape(dataset.batch_size, height, width, num_frames, tokens)


def _text_tokens(job: Job) -> int:
    """Of the longest prompt, about."""
    dataset = job.dataset
    if dataset.base_path is None:
        return _TEXT_TOKENS
    try:
        metadata = read_metadata(
            dataset.base_path, dataset.metadata_path, data_file_keys=dataset.data_file_keys,
            required_columns=[PROMPT_COLUMN], check_files=False,
        )  # fmt: skip
    except DataError:
        return _TEXT_TOKENS  # on the cluster
    longest = max((len(str(row.get(PROMPT_COLUMN, ""))) for row in metadata.rows), default=0)
    return max(16, -(-longest // _CHARACTERS_PER_TOKEN))


def advise(job: Job, cost: ModelCost, device: Device | None, spread: Spread, found: Estimate) -> list[tuple[int, str]]:
    """(bytes, setting) of what would lower the peak, the largest first."""
    saved, known = [], check_rules(job)
    for changes, setting in _variants(job, spread):
        changed = job.with_keys(**changes)
        if [problem for problem in check_rules(changed) if problem not in known]:
            continue  # refused with something else that the job has
        other = estimate(changed, cost, device, spread=spread)
        saved.append((found.peak_bytes - other.peak_bytes, setting))
    activations = activation_bytes(job, cost)
    if job.dataset.batch_size > 1:
        half = -(-job.dataset.batch_size // 2)
        share = 1 - half / job.dataset.batch_size
        setting = f"dataset.batch_size = {half}, with global_batch_size as it is (a new run)"
        saved.append((int(activations * share), setting))
    if job.dataset.height is None:
        setting = f"dataset.max_pixels = {job.dataset.max_pixels // 2} (smaller pictures, a new run)"
        saved.append((activations // 2, setting))
    if not job.model.fp8_models:
        named = [name for name, other in cost.others.items() if other.weights.frozen_linear_bytes]
        named += [name for name in cost.traced if name not in job.training.trainable_models]
        linear = sum(weights.frozen_linear_bytes for weights in (cost.weights, *(o.weights for o in cost.others.values())))
        if not job.offload.cpu_offload:
            setting = f"model.fp8_models = [{', '.join(repr(name) for name in named)}] (a new run)"
            saved.append((linear // 2, setting.replace("'", '"')))
    if cost.others and not job.offload.cpu_offload:
        encoders = sum(other.weights.frozen_bytes for other in cost.others.values())
        saved.append((encoders, "split.enabled = true (encodes everything beforehand)"))
    if job.training.trainable_models:
        state = sum(found.memory.get(name, 0) for name in ("float32 masters", "optimizer state", "gradients"))
        saved.append((state, "lora.base_model instead of training.trainable_models: a LoRA (a new run)"))
    return sorted(((size, setting) for size, setting in saved if size > GIB // 20), reverse=True)


def _variants(job: Job, spread: Spread) -> Iterator[tuple[dict[str, dict[str, Any]], str]]:
    """Changes by section, and how a user would write them."""
    if job.gradient.checkpointing is False:
        yield {"gradient": {"checkpointing": True}}, "gradient.checkpointing = true (a third more time)"
    elif not job.gradient.checkpointing_offload and not partitioned_components(job):
        yield {"gradient": {"checkpointing_offload": True}}, "gradient.checkpointing_offload = true"
    is_sharded = job.distributed.strategy == "deepspeed"
    if not job.offload.cpu_offload and not is_sharded:
        changed: dict[str, dict[str, Any]] = {"offload": {"cpu_offload": True}, "gradient": {"checkpointing": True}}
        yield changed, "offload.cpu_offload = true (slower steps)"
    if job.training.trainable_models and not job.offload.optimize_on_cpu and not is_sharded:
        changed = {"offload": {"cpu_offload": True, "optimize_on_cpu": True}, "gradient": {"checkpointing": True}}
        yield changed, "offload.cpu_offload and offload.optimize_on_cpu = true (slower steps)"
    if not is_sharded and not job.offload.cpu_offload and spread.num_workers > 1:
        yield {"distributed": {"strategy": "deepspeed"}}, 'distributed.strategy = "deepspeed" (shares the state out)'
    if is_sharded and job.distributed.zero_stage != 3 and spread.num_workers > 1:
        yield {"distributed": {"zero_stage": 3}}, "distributed.zero_stage = 3 (shares the weights out too)"
    if is_sharded and job.distributed.offload_optimizer_device == "none":
        yield (
            {"distributed": {"offload_optimizer_device": "cpu"}},
            'distributed.offload_optimizer_device = "cpu" (slower steps)',
        )


def cannot_fit(found: Estimate) -> bool:
    """Whether the weights and what belongs to them alone exceed the device, whatever the samples."""
    kinds = ("frozen weights", "trained weights", "float32 masters", "optimizer state", "moving averages")
    return bool(found.device_bytes) and sum(found.memory.get(name, 0) for name in kinds) > found.device_bytes


def check_host(job: Job, found: Estimate, *, host_bytes: int) -> None:
    """Raise JobFileError where a node's memory cannot hold what the job keeps there."""
    needed = sum(found.host.values())
    if needed <= host_bytes:
        return
    largest = max(found.host, key=lambda name: found.host[name])
    keys = {
        "pinned weights, once a node": "offload.cpu_offload",
        "masters and optimizer state": "offload.optimize_on_cpu",
        "gradients on the host": "offload.optimize_on_cpu",
        "masters, optimizer state and gradients": "distributed.offload_optimizer_device",
        "pinned parameters": "distributed.offload_param_device",
        "pinned activations": "gradient.checkpointing_offload",
    }
    cure = _host_cure(job, largest)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in found.host.items() if size >= 0.05 * GIB)
    message = f"a node needs {needed / GIB:.1f} GiB of host memory and has {host_bytes / GIB:.1f} ({parts}); {cure}"
    raise JobFileError(f"job {job.name}", [Problem(keys.get(largest, "distributed.num_workers"), message)])


def _host_cure(job: Job, largest: str) -> str:
    if largest in ("masters and optimizer state", "gradients on the host", "masters, optimizer state and gradients"):
        return "train fewer parameters (a LoRA), or use more nodes with DeepSpeed, or a machine with more memory"
    if largest == "pinned weights, once a node" and not job.model.fp8_models:
        return "model.fp8_models halves the frozen weights; or use a machine with more memory"
    if largest == "pinned activations":
        return "set it to false, or lower dataset.batch_size"
    return "use fewer workers a node, or a machine with more memory"


def warning(found: Estimate) -> str | None:
    """What is said before a job is submitted that will not fit; None where it does, or where that is not known."""
    if found.fits is not False:
        return None
    need = f"{found.peak_bytes / GIB:.1f} GiB and {RESERVED_BYTES / GIB:.1f} beside"
    lines = [
        f"an estimate says that this job does not fit: {need} of {found.device_bytes / GIB:.1f} GiB on {found.device}; "
        "what would help:",
        *(f"  {size / GIB:6.2f} GiB less with {setting}" for size, setting in found.advice[:5]),
    ]
    return "\n".join(lines)
