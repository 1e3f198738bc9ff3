"""Job + resources -> `ResolvedJob`: defaults, batch arithmetic, stages, absolute paths and the run's name.

From here on one frozen class travels through every process, as JSON, validated again at each boundary.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from diffsynth_ray.config import schema
from diffsynth_ray.config.distillation import check_distillation
from diffsynth_ray.config.origins import parse_folder, parse_origin, tokenizer_ids
from diffsynth_ray.config.packages import check_optimizer_name
from diffsynth_ray.config.schema import Job, ModelSection, lookup
from diffsynth_ray.config.validation import check_validation
from diffsynth_ray.config.zero import check_zero_keys
from diffsynth_ray.errors import JobFileError, ModelError, Problem

READ_CPUS = 0.1
"""CPUs of the Ray Data task that computes positions, one a training worker."""
MIN_DECODE_CPUS = 0.1
"""Fewest CPUs that a decoding task can be given."""

_DEFAULT_RESOURCES = {"cuda": {"GPU": 1.0, "CPU": 1.0}, "cpu": {"CPU": 0.5}}
"""Of a worker by its device."""
LEAST_AMOUNT = 1e-4
"""Of a resource."""

_CGROUPS = Path("/sys/fs/cgroup")
_NAMED_WHERE_SET = ("model.tokenizer_1_path", "model.tokenizer_2_path", "model.processor_path")
DEFAULT_BASE_PATH = "./models"
"""Where DiffSynth-Studio keeps what it downloads."""


class Resources(BaseModel):
    """What a machine or cluster has in all."""

    model_config = ConfigDict(frozen=True)
    cpus: float
    gpus: float


def show_amounts(resources: Mapping[str, float]) -> str:
    """ "1 GPU, 0.5 CPU"."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


class EncodeResources(BaseModel):
    """What stage one of split training runs on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    num_workers: int
    device: Literal["cuda", "cpu"]
    resources_per_worker: dict[str, float]
    decode_cpus: float
    """CPUs of one decoding task."""
    decode_tasks: int
    """Decoding tasks of one encoding worker."""


class ResolvedJob(BaseModel):
    """Everything that a run needs to know. `job` has absolute paths; `given` is what the run's name was made of."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    job: Job
    run: str
    """Name of the run: the job's name and a hash of `given`."""
    given: dict[str, Any]
    """The keys that change what a step computes, as the user gave them."""
    stages: list[Literal["encode", "train"]]
    num_workers: int
    """Training workers; the most of an elastic run."""
    min_workers: int
    """The fewest that an elastic run goes on with; else the same number."""
    device: Literal["cuda", "cpu"]
    resources_per_worker: dict[str, float]
    decode_cpus: float
    """CPUs of one decoding task."""
    decode_tasks: int
    """Decoding tasks of one training worker."""
    micro_steps: int
    """Micro steps of a full optimizer step on each worker."""
    global_batch_size: int
    """Samples of an optimizer step."""
    encode: EncodeResources | None = None
    """Of stage one; None without split training."""

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers follows the cluster."""
        return self.min_workers < self.num_workers

    def with_keys(self, **sections: dict[str, Any]) -> ResolvedJob:
        """The same with other values of some keys, by section; nothing is resolved anew."""
        return self.model_copy(update={"job": self.job.with_keys(**sections)})

    @property
    def output_path(self) -> Path:
        """Folder of the run."""
        return Path(self.job.output.path)


def local_resources() -> Resources:
    """CPUs that this process may use and GPUs that it can see, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = len([entry for entry in Path("/dev").glob("nvidia[0-9]*") if entry.name[6:].isdigit()])
    else:
        gpus = len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    return Resources(cpus=float(available_cpus()), gpus=float(gpus))


def available_cpus() -> int:
    """CPUs that this process may use: of the machine's, those that its container and its affinity leave to it."""
    return max(1, int(min(len(os.sched_getaffinity(0)), _container_cpus())))


def _container_cpus() -> float:
    """CPUs that the control group allows (`docker run --cpus`, Kubernetes' limits): version 2, else version 1."""
    try:
        quota, period = (_CGROUPS / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((_CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return math.inf
    # "max" and -1 stand for no limit.
    return float(quota) / float(period) if quota.isdigit() and period.isdigit() and int(period) else math.inf


def resolve(job: Job, resources: Resources, *, source: str = "job", remote: bool = False) -> ResolvedJob:
    """Fill in everything that depends on the resources; raises JobFileError with all problems.

    `remote`: the files are on a cluster, so that relative paths mean nothing there and are errors.
    """
    problems = check_rules(job)
    min_workers, num_workers, device = _workers(job, resources)
    per_worker = job.distributed.resources_per_worker or _DEFAULT_RESOURCES[device]
    # An elastic run starts with what fits now, and needs room for its fewest workers only.
    now = max(min_workers, min(num_workers, _most_workers(resources, per_worker)))
    decode_cpus, decode_tasks, starved = _data_cpus(job, resources, num_workers=now, per_worker=per_worker)
    encode, encode_problems = _encode_resources(job, resources, num_workers=now, device=device)
    global_batch = job.dataset.global_batch_size or (job.dataset.batch_size * num_workers * job.gradient.accumulation_steps)
    if global_batch > schema.MOST_SAMPLES:
        problems.append(Problem("dataset.global_batch_size", f"{global_batch} samples a step; at most {schema.MOST_SAMPLES}"))
    given = identity(job, global_batch)
    job, source_problems = _with_source_where_needed(job, remote=remote)
    located, path_problems = _absolute_paths(job, remote=remote)
    problems += source_problems + path_problems + starved + encode_problems
    if problems:
        raise JobFileError(source, problems)
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]
    return ResolvedJob(
        job=located,
        run=f"{job.name}-{digest}",
        given=given,
        stages=["encode", "train"] if encode else ["train"],
        num_workers=num_workers,
        min_workers=min_workers,
        device=device,
        resources_per_worker=per_worker,
        decode_cpus=decode_cpus,
        decode_tasks=decode_tasks,
        micro_steps=-(-global_batch // (job.dataset.batch_size * num_workers)),
        global_batch_size=global_batch,
        encode=encode,
    )


def resolve_model(job: Job, *, source: str = "job") -> ModelSection:
    """Only [model], as `resolve` leaves it, whatever the machine: for downloads ahead of a run."""
    job, problems = _with_source_where_needed(job, remote=False)
    located, _ = _absolute_paths(job, remote=False)
    problems += _check_model(job)
    if problems:
        raise JobFileError(source, problems)
    return located.model


def identity(job: Job, global_batch_size: int) -> dict[str, Any]:
    """The keys that change what a step computes, by dotted name (DESIGN: identity of a run)."""
    given = {dotted: lookup(job, dotted) for dotted, field in schema.keys().items() if schema.mark(field, "identity")}
    given["dataset.global_batch_size"] = global_batch_size
    # What joined the marked keys later counts only where it is set, so that other runs keep their names.
    given = {dotted: value for dotted, value in given.items() if value is not None or dotted not in _NAMED_WHERE_SET}
    if isinstance(job.validation.holdout, float):  # a file takes no row from the training
        given["validation.holdout"] = job.validation.holdout
    return given


def _workers(job: Job, resources: Resources) -> tuple[int, int, Literal["cuda", "cpu"]]:
    """Fewest and most workers, and what they compute on."""
    asked = job.distributed.num_workers
    gpus = (job.distributed.resources_per_worker or {"GPU": 1.0}).get("GPU", 0.0)
    device: Literal["cuda", "cpu"] = "cuda" if resources.gpus >= 1 and gpus > 0 else "cpu"
    if isinstance(asked, list):
        return max(min(asked), 1), max(*asked, 1), device
    most = asked if asked is not None else (int(resources.gpus / gpus) if device == "cuda" else 1)
    return max(most, 1), max(most, 1), device


def _most_workers(resources: Resources, per_worker: dict[str, float]) -> int:
    """How many workers fit beside their reading and decoding."""
    cpus = per_worker.get("CPU", 0.0) + READ_CPUS + MIN_DECODE_CPUS
    gpus = per_worker.get("GPU", 0.0)
    return min(int(resources.cpus / cpus), int(resources.gpus / gpus) if gpus else 1 << 30)


def _encode_resources(
    job: Job, resources: Resources, *, num_workers: int, device: Literal["cuda", "cpu"]
) -> tuple[EncodeResources | None, list[Problem]]:
    """What stage one gets: by default what the training workers will have."""
    split = job.split
    if not split.enabled:
        return None, []
    per_worker = split.resources_per_worker or _DEFAULT_RESOURCES[device]
    on_gpus = resources.gpus > 0 and per_worker.get("GPU", 0.0) > 0
    count = split.num_workers or (num_workers if on_gpus else 1)
    decode_cpus, decode_tasks, problems = _data_cpus(job, resources, num_workers=count, per_worker=per_worker, section="split")
    encode = EncodeResources(
        num_workers=count,
        device="cuda" if on_gpus else "cpu",
        resources_per_worker=per_worker,
        decode_cpus=decode_cpus,
        decode_tasks=decode_tasks,
    )
    return encode, problems


def _data_cpus(
    job: Job, resources: Resources, *, num_workers: int, per_worker: dict[str, float], section: str = "distributed"
) -> tuple[float, int, list[Problem]]:
    """CPUs and number of the decoding tasks of one worker, from what the workers leave free."""
    problems = []
    gpus = per_worker.get("GPU", 0.0) * num_workers
    if gpus > resources.gpus:
        problems.append(
            Problem(
                f"{section}.num_workers",
                f"{num_workers} workers need {gpus:g} GPUs, there are {resources.gpus:g}; use fewer workers or another cluster",
            )
        )
    worker_cpus = per_worker.get("CPU", 0.0)
    found = data_share(resources.cpus, num_workers=num_workers, worker_cpus=worker_cpus, most_tasks=job.dataset.num_workers)
    if found is None:
        share = resources.cpus / num_workers - worker_cpus
        most = _most_workers(resources, {"CPU": worker_cpus})
        cure = f"at most {most} workers of that size fit" if most else "use a larger machine"
        problems.append(
            Problem(
                f"{section}.num_workers",
                f"{num_workers} workers x {worker_cpus:g} CPU leave {max(share, 0) * num_workers:g} of {resources.cpus:g} "
                f"CPUs for reading and decoding, which needs {READ_CPUS + MIN_DECODE_CPUS:g} a worker, or the run would "
                f"wait forever; {cure}, or lower {section}.resources_per_worker",
            )
        )
        return MIN_DECODE_CPUS, 1, problems
    return *found, problems


def data_share(cpus: float, *, num_workers: int, worker_cpus: float, most_tasks: int) -> tuple[float, int] | None:
    """CPUs and number of the decoding tasks of a worker, from what the workers leave free; None where that is too little.

    `most_tasks`: dataset.num_workers, 0 = no bound.
    """
    free = round((cpus - num_workers * worker_cpus) / num_workers - READ_CPUS, 4)
    if free < MIN_DECODE_CPUS:
        return None
    decode_cpus = min(1.0, free)
    tasks = max(1, int(free / decode_cpus))
    return decode_cpus, min(tasks, most_tasks or tasks)


def check_rules(job: Job) -> list[Problem]:
    """Rules between keys."""
    problems = []
    dataset, training = job.dataset, job.training
    if dataset.base_path is None and (not job.split.enabled or dataset.metadata_path is not None):
        problems.append(Problem("dataset.base_path", "required: the folder of the media files"))
    if "://" in job.output.path:
        message = f"got {job.output.path!r}; a folder that all nodes see; only checkpoints can be at a URL (checkpoint_path)"
        problems.append(Problem("output.path", message))
    for key, place in (("output.checkpoint_path", job.output.checkpoint_path), ("split.cache_path", job.split.cache_path)):
        scheme, is_url, inside = (place or "").partition("://")
        if is_url and not inside.strip("/"):
            problems.append(Problem(key, f"got {place!r}, which names no place; as in {scheme}://bucket/folder"))
    if (dataset.height is None) != (dataset.width is None):
        problems.append(Problem("dataset.height", "height and width go together; give both or none"))
    if training.min_timestep_boundary >= training.max_timestep_boundary:
        problems.append(Problem("training.min_timestep_boundary", "must be below training.max_timestep_boundary"))
    if not training.trainable_models and job.lora.base_model is None:
        problems.append(
            Problem(
                "training.trainable_models",
                'nothing is trained; name components, as in ["dit"], or set lora.base_model',
            )
        )
    if job.lora.base_model is not None and job.lora.base_model in training.trainable_models:
        problems.append(
            Problem(
                "lora.base_model",
                f"{job.lora.base_model!r} is also in training.trainable_models; a component has one or the other",
            )
        )
    if job.lora.base_model is None and job.lora.checkpoint is not None:
        problems.append(Problem("lora.checkpoint", "needs lora.base_model"))
    problems += _check_presets(job)
    if len(set(training.trainable_models)) != len(training.trainable_models):
        problems.append(Problem("training.trainable_models", "a component is named twice"))
    if training.precision == "fp32" and not training.master_weights:
        problems.append(Problem("training.master_weights", 'false has no meaning with precision = "fp32"; remove it'))
    if both := [name for name in job.model.fp8_models if name in training.trainable_models]:
        message = f"{', '.join(both)} is trained; FP8 is for frozen weights (a LoRA on it is fine)"
        problems.append(Problem("model.fp8_models", message))
    for section in ("distributed", "split"):
        for name, amount in (getattr(job, section).resources_per_worker or {}).items():
            if amount != 0 and amount < LEAST_AMOUNT:
                least = f"{LEAST_AMOUNT:g} is the smallest part that Ray knows"
                message = f"{name} = {amount:g}; amounts are 0 or more, and {least}"
                problems.append(Problem(f"{section}.resources_per_worker", message))
    problems += check_optimizer_name(training.optimizer)
    problems += _check_offload(job)
    problems += _check_plain_values("training.optimizer_args", training.optimizer_args)
    if "lr" in training.optimizer_args:
        problems.append(Problem("training.optimizer_args", "has lr, which each step sets; that is training.learning_rate"))
    problems += _check_plain_values("model.options", job.model.options)
    asked = job.distributed.num_workers
    if isinstance(asked, int) and asked < 1:
        problems.append(Problem("distributed.num_workers", "must be at least 1"))
    if isinstance(asked, list) and not 1 <= asked[0] <= asked[1]:
        message = f"got {asked}; [min, max] of an elastic run, with 1 <= min <= max, as in [1, 4]"
        problems.append(Problem("distributed.num_workers", message))
    return problems + check_zero_keys(job) + _check_model(job) + check_validation(job) + check_distillation(job)


def _check_offload(job: Job) -> list[Problem]:
    """What of the memory keys cannot be combined."""
    problems = []
    offload = job.offload
    if not offload.cpu_offload:
        problems += [
            Problem(f"offload.{name}", "needs offload.cpu_offload = true")
            for name in ("param_size_threshold", "vram_budget_gib")
            if getattr(offload, name) is not None
        ]
        if offload.optimize_on_cpu:
            problems.append(Problem("offload.optimize_on_cpu", "needs offload.cpu_offload = true"))
    elif job.gradient.checkpointing is False:
        message = "false keeps every block's weights on the device until its backward, which offload.cpu_offload is to avoid"
        problems.append(Problem("gradient.checkpointing", message))
    if offload.optimize_on_cpu and not job.training.master_weights:
        problems.append(Problem("training.master_weights", "false has no meaning with offload.optimize_on_cpu; remove it"))
    if job.gradient.checkpointing_offload and job.gradient.checkpointing is False:
        problems.append(Problem("gradient.checkpointing_offload", "needs gradient.checkpointing = true"))
    return problems


def _check_presets(job: Job) -> list[Problem]:
    paths, models = job.lora.preset_path, job.lora.preset_model
    if models is not None and not paths:
        return [Problem("lora.preset_model", "needs lora.preset_path: the LoRA to merge")]
    num_paths = len(paths) if isinstance(paths, list) else 1
    if isinstance(models, list) and len(models) not in (1, num_paths):
        message = f"names {len(models)} components for {num_paths} files of lora.preset_path; give one, or one for each"
        return [Problem("lora.preset_model", message)]
    return []


def _check_plain_values(key: str, values: dict[str, Any]) -> list[Problem]:
    """Values of a free table travel as JSON: dates and infinities have no place there."""
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError) as error:
        return [Problem(key, f"got {values!r}; only numbers, strings, booleans, arrays and tables: {error}")]
    return []


def _check_model(job: Job) -> list[Problem]:
    problems = []
    model = job.model
    for text in model.id_with_origin_paths:
        try:
            parse_origin(text)
        except ModelError as error:
            problems.append(Problem("model.id_with_origin_paths", error.message))
    for key, text in tokenizer_ids(model).items():
        try:
            parse_folder(text)
        except ModelError as error:
            problems.append(Problem(f"model.{key}", error.message))
    if model.tiny:
        if model.paths or model.id_with_origin_paths:
            problems.append(Problem("model.tiny", "random weights and model.paths or ids exclude each other"))
        if model.family is None:
            problems.append(Problem("model.family", 'required with model.tiny; as in family = "qwen_image"'))
    elif not model.paths and not model.id_with_origin_paths:
        message = "required: the weight files (or model.id_with_origin_paths, or model.tiny = true)"
        problems.append(Problem("model.paths", message))
    return problems


_SWITCHES = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


def with_source(model: ModelSection) -> tuple[ModelSection, list[Problem]]:
    """`source`, `base_path` and `skip_download` filled in from the variables that DiffSynth-Studio reads too."""
    values: dict[str, Any] = {}
    problems = []
    if model.base_path is None:
        values["base_path"] = os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or DEFAULT_BASE_PATH
    if model.source is None:
        values["source"] = os.environ.get("DIFFSYNTH_DOWNLOAD_SOURCE", "").lower() or "modelscope"
        if values["source"] not in ("modelscope", "huggingface"):
            message = f"got {values['source']!r}; it is modelscope or huggingface"
            problems.append(Problem("DIFFSYNTH_DOWNLOAD_SOURCE", message))
    if model.skip_download is None:
        given = os.environ.get("DIFFSYNTH_SKIP_DOWNLOAD", "").lower()
        values["skip_download"] = _SWITCHES.get(given, False)
        if given not in _SWITCHES:
            problems.append(Problem("DIFFSYNTH_SKIP_DOWNLOAD", f"got {given!r}; it is true or false"))
    return model.model_copy(update=values), problems


def _with_source_where_needed(job: Job, *, remote: bool) -> tuple[Job, list[Problem]]:
    if not job.model.paths and not job.model.id_with_origin_paths:
        return job, []
    model, problems = with_source(job.model)
    is_from_hub = bool(model.id_with_origin_paths or tokenizer_ids(model))
    if remote and model.base_path == DEFAULT_BASE_PATH and not is_from_hub:
        # Only a default tokenizer could want it; a relative path would mean nothing there.
        model = model.model_copy(update={"base_path": None})
    return job.model_copy(update={"model": model}), problems


def _absolute_paths(job: Job, *, remote: bool) -> tuple[Job, list[Problem]]:
    """The job with paths made absolute; remote relative ones are problems."""
    problems: list[Problem] = []
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in _path_keys(job):
        section, _, leaf = dotted.partition(".")
        # Of the data "" is the working directory: a metadata file may have absolute paths.
        if "" in _flat(value) and dotted != "dataset.base_path":
            problems.append(Problem(dotted, "is empty; name a path, or remove the key"))
            continue
        if any("\0" in path for path in _flat(value)):
            problems.append(Problem(dotted, f"got {value!r}; no path has the character \\0"))
            continue
        if section == "model" and leaf in tokenizer_ids(job.model):
            continue
        if dotted == "output.path":
            value = value.replace("{name}", job.name)
        if (
            remote
            and (relative := [path for path in _flat(value) if not _is_absolute(path)])
            and (job.split.enabled or dotted != "split.cache_path")
        ):
            problems.append(
                Problem(dotted, f"got {relative[0]!r}; with a remote cluster paths must be absolute, as the nodes see them")
            )
        sections.setdefault(section, {})[leaf] = _absolute(value)
    if given := _flat(job.model.paths):
        sections.setdefault("model", {})["fp8_models"] = [
            _absolute(text) if text in given else text for text in job.model.fp8_models
        ]
    return job.with_keys(**sections), problems


def paths_below(job: Job, folder: Path) -> dict[str, str]:
    """Dotted key -> local path of everything that a resolved job reads, or shares with other jobs, below a folder."""
    found = {}
    for dotted, value in _path_keys(job):
        for path in _flat(value) if not dotted.startswith("output.") else ():
            if "://" not in path and Path(path).is_relative_to(folder) and Path(path).exists():
                found[dotted] = path
    return found


def _path_keys(job: Job) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that names files."""
    for dotted, field in schema.keys().items():
        value = lookup(job, dotted)
        if schema.mark(field, "path") and value not in (None, []) and not isinstance(value, float):
            yield dotted, value


def _is_absolute(path: str) -> bool:
    return "://" in path or os.path.isabs(os.path.expanduser(path))


def _flat(value: str | list[Any]) -> list[str]:
    return [value] if isinstance(value, str) else [path for item in value for path in _flat(item)]


def _absolute(value: str | list[Any]) -> str | list[Any]:
    if isinstance(value, str):
        return value if "://" in value else os.path.abspath(os.path.expanduser(value))
    return [_absolute(item) for item in value]
