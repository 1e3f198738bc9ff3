"""A training command -> a draft of a job: keys with their values, and everything that has to be said about them."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from diffsynth_ray.config import schema
from diffsynth_ray.config.distillation import DIRECT_DISTILL
from diffsynth_ray.config.flags import FAMILY_OPTIONS, KEY_OF_FLAG, WITHOUT_COUNTERPART
from diffsynth_ray.errors import Problem
from diffsynth_ray.migrate.accelerate import Setup
from diffsynth_ray.migrate.launch import TrainingCommand
from diffsynth_ray.migrate.secrets import hide_secrets, is_secret

FAMILY_OF_FOLDER = {"qwen_image": "qwen_image", "wanvideo": "wan", "flux": "flux", "flux2": "flux2", "z_image": "z_image"}
"""DiffSynth-Studio's folder of a model series -> dsray's family; other folders keep their name."""
_FAMILY_OF_ID = {
    "FLUX.2": "flux2", "FLUX.1": "flux", "Z-Image": "z_image", "Qwen-Image": "qwen_image", "Wan-AI/": "wan", "Wan2.": "wan",
}  # fmt: skip
_TASKS = ("sft", DIRECT_DISTILL)
_MEGABYTES_PER_MILLION = 2.0
_MERGED_SWITCHES = {"enable_wandb_log": "wandb_project", "enable_swanlab_log": "swanlab_project"}
_LOGGER_PROJECT = "DiffSynth-Studio"
_ENVIRONMENT_KEYS = {
    "DIFFSYNTH_MODEL_BASE_PATH": "model.base_path",
    "DIFFSYNTH_SKIP_DOWNLOAD": "model.skip_download",
    "DIFFSYNTH_DOWNLOAD_SOURCE": "model.source",
}
_FAMILY_SWITCHES = {"zero_cond_t", "first_frame_as_condition", "framewise_decoding"}


@dataclass
class Draft:
    """A job file in the making."""

    lines: list[int]
    """First lines of the commands that it comes from."""
    stage: Literal["", "data_process", "train"]
    """The half of split training that the command is; "" = all of it."""
    values: dict[str, Any] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    """Dotted key -> comment behind its value."""
    behind_hash: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Keys to be shown behind a '#': dotted key -> (value as TOML, comment)."""
    notes: list[str] = field(default_factory=list)
    without_counterpart: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def family(self) -> str | None:
        """Name of the model family."""
        return self.values.get("model.family")


def build_draft(command: TrainingCommand, setup: Setup) -> Draft:
    """The draft of one command; what cannot be translated is in its `problems`."""
    draft = Draft(lines=[command.line], stage="")
    draft.values.update(setup.values)
    draft.remarks.update(setup.remarks)
    draft.notes += setup.notes
    draft.without_counterpart += setup.without_counterpart
    draft.problems += setup.problems
    if command.prefix:
        draft.without_counterpart.append(f"`{command.prefix}` in front of the command: `dsray submit` takes its place")
    switches: dict[str, str] = {}
    for name, values in command.flags:
        _read_flag(name, values, draft, switches)
    _set_family(command, draft)
    _set_task(command, draft)
    _set_loggers(draft, switches)
    _set_accumulation(draft, setup)
    _set_offload(draft)
    _set_unused_parameters(draft)
    _set_lora_targets(draft)
    _read_environment(command, draft)
    _tell_about_precision(draft)
    _tell_about_defaults(draft)
    return draft


def _read_flag(name: str, values: tuple[str, ...], draft: Draft, switches: dict[str, str]) -> None:
    where = f"line {draft.lines[0]}: --{name}"
    if name == "":
        draft.notes.append(f"{' '.join(values)!r} in front of the flags belongs to none and is left out")
        return
    known = KEY_OF_FLAG.keys() | WITHOUT_COUNTERPART.keys()
    if name not in known:
        # argparse accepts unambiguous beginnings of a flag.
        longer = [flag for flag in known if flag.startswith(name)]
        if len(longer) != 1:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"; did you mean --{near[0]}?" if near else ""
            draft.without_counterpart.append(f"{_shown(name, values)}: no flag of DiffSynth-Studio's parsers{advice}")
            return
        name = longer[0]
    if name in _MERGED_SWITCHES:
        switches[_MERGED_SWITCHES[name]] = _LOGGER_PROJECT
        return
    if name in WITHOUT_COUNTERPART:
        draft.without_counterpart.append(f"{_shown(name, values)}: {WITHOUT_COUNTERPART[name]}")
        return
    key = KEY_OF_FLAG[name]
    try:
        if key == FAMILY_OPTIONS:
            draft.values.setdefault(key, {})[name] = _family_option(name, values)
        else:
            value = convert(key, values)
            if value == "" and key != "dataset.base_path":
                draft.notes.append(f"--{name} is empty and left out")
                return
            draft.values[key] = value
    except ValueError as error:
        draft.problems.append(Problem(where, str(error)))


def _shown(name: str, values: tuple[str, ...]) -> str:
    return " ".join(hide_secrets([f"--{name}", *values]))


def convert(key: str, values: tuple[str, ...]) -> Any:
    """A flag's words as the value of a key. Raises ValueError with what was got and what is needed."""
    kind = _kind(key)
    if kind is bool:
        if values:
            raise ValueError(f"got {' '.join(values)!r}; it takes no value")
        return True
    if len(values) != 1:
        raise ValueError(f"got {len(values)} values ({' '.join(values)!r}); it takes one, in quotes where it has blanks")
    text = values[0]
    if key == "model.paths":
        return _paths(text)
    if kind is list:
        return [part.strip() for part in text.split(",") if part.strip()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"got {text!r}; a {'whole ' if kind is int else ''}number is needed") from None
    return text


def _kind(key: str) -> type:
    annotation: Any = schema.keys()[key].annotation
    if get_origin(annotation) in (UnionType, Union):
        annotation = next(one for one in get_args(annotation) if one is not NoneType)
    origin = get_origin(annotation) or annotation
    return origin if origin in (bool, int, float, list) else str


def _paths(text: str) -> list[Any]:
    try:
        paths = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"got {text!r}, which is not JSON: {error}") from None
    flat = (
        [one for entry in paths for one in (entry if isinstance(entry, list) else [entry])] if isinstance(paths, list) else [0]
    )
    if not all(isinstance(one, str) for one in flat):
        raise ValueError(f"got {text!r}; an array of paths is needed, in which an array holds the shards of one component")
    return list(paths)


def _family_option(name: str, values: tuple[str, ...]) -> Any:
    if name in _FAMILY_SWITCHES:
        return True
    if len(values) != 1:
        raise ValueError(f"got {len(values)} values; it takes one number")
    try:
        return float(values[0])
    except ValueError:
        raise ValueError(f"got {values[0]!r}; a number is needed") from None


def _set_family(command: TrainingCommand, draft: Draft) -> None:
    family = FAMILY_OF_FOLDER.get(command.folder, command.folder) if command.folder else None
    if family is None:
        ids = draft.values.get("model.id_with_origin_paths", [])
        family = next((name for each in ids for mark, name in _FAMILY_OF_ID.items() if mark in each), None)
    if family is not None:
        draft.values["model.family"] = family
    else:
        draft.notes.append("the family is not named: it is inferred from the weight files; set model.family if that fails")


def _set_task(command: TrainingCommand, draft: Draft) -> None:
    task = str(draft.values.pop("task", "sft"))
    if any(name.startswith("dmd2_") for name, _ in command.flags):
        task = "dmd2"  # a script of its own, without --task
    kind, _, stage = task.partition(":")
    if kind not in _TASKS or stage not in ("", "data_process", "train"):
        draft.problems.append(Problem(f"line {draft.lines[0]}: --task", f"got {task!r}; dsray's tasks are {', '.join(_TASKS)}"))
        return
    draft.stage = stage  # type: ignore[assignment]
    if kind != "sft":
        draft.values["task"] = kind


def _set_loggers(draft: Draft, switches: dict[str, str]) -> None:
    for name, default in switches.items():
        draft.values.setdefault(f"logging.{name}", default)
    for name in _MERGED_SWITCHES.values():
        if f"logging.{name}" in draft.values and name not in switches:
            project = draft.values.pop(f"logging.{name}")
            flag = next(flag for flag, of in _MERGED_SWITCHES.items() if of == name)
            draft.notes.append(f"--{name} {project} without --{flag} had no effect and is left out")


def _set_accumulation(draft: Draft, setup: Setup) -> None:
    key = "gradient.accumulation_steps"
    own = draft.values.get(key, 1)
    if setup.accumulation_steps is not None and setup.accumulation_steps != own:
        draft.notes.append(
            f"accelerate's DeepSpeed configuration says gradient_accumulation_steps {setup.accumulation_steps} and the "
            f"script {own}: accelerate takes the configuration's"
        )
        draft.values[key] = own = setup.accumulation_steps
    steps = draft.values.get("output.save_steps")
    if steps is not None and own > 1:
        draft.values["output.save_steps"] = max(1, math.ceil(steps / own))
        draft.remarks["output.save_steps"] = f"--save_steps {steps} counts micro steps: {steps} / {own} optimizer steps"
        draft.notes.append(
            f"save_steps: DiffSynth-Studio counts micro steps, dsray optimizer steps: {steps} / {own} = "
            f"{draft.values['output.save_steps']}; the exports' numbers change alike"
        )


def _set_offload(draft: Draft) -> None:
    key = "offload.param_size_threshold"
    millions = draft.values.get(key)
    if millions is None:
        return
    draft.values[key] = millions * _MEGABYTES_PER_MILLION
    draft.remarks[key] = f"MB: {millions:g} million parameters of 2 bytes (bf16)"
    draft.notes.append(
        f"param_size_threshold: DiffSynth-Studio's threshold counts millions of parameters (2^20), dsray's MB: "
        f"{millions:g} x 2 bytes (bf16) = {draft.values[key]:g} MB"
    )


def _set_unused_parameters(draft: Draft) -> None:
    key = "training.find_unused_parameters"
    if draft.values.get("distributed.strategy") == "deepspeed" and draft.values.pop(key, None):
        draft.notes.append("find_unused_parameters is left out: with DeepSpeed they are found once, before step 0, unasked")


def _set_lora_targets(draft: Draft) -> None:
    key = "lora.target_modules"
    if draft.values.get(key) == []:
        draft.remarks[key] = "every large Linear of the repeated blocks"
    if "lora.base_model" not in draft.values:
        idle = sorted(name for name in draft.values if name.startswith("lora.") and "preset" not in name)
        for name in idle:
            del draft.values[name]
        if idle:
            draft.notes.append(f"{', '.join(idle)} had no effect without --lora_base_model and are left out")
    elif key not in draft.values and draft.family != "wan":
        draft.notes.append(
            "no --lora_target_modules: DiffSynth-Studio would take Wan's names (q,k,v,o,ffn.0,ffn.2), dsray takes the family's"
        )


def _read_environment(command: TrainingCommand, draft: Draft) -> None:
    for name, value in command.environment.items():
        if name in _ENVIRONMENT_KEYS and value:
            _set_from_environment(_ENVIRONMENT_KEYS[name], name, value, draft)
        elif name == "CUDA_VISIBLE_DEVICES":
            count = len([entry for entry in value.split(",") if entry.strip()])
            if count and "distributed.num_workers" not in draft.values:
                draft.values["distributed.num_workers"] = count
                draft.remarks["distributed.num_workers"] = f"CUDA_VISIBLE_DEVICES={value}"
            draft.notes.append(f"CUDA_VISIBLE_DEVICES={value}: Ray hands GPUs out; which ones, its nodes' environment decides")
        elif is_secret(name):
            draft.notes.append(f"{name} is not copied: it must be in the environment of the cluster's nodes")
        else:
            shown = hide_secrets([f"{name}={value}"])[0]
            draft.without_counterpart.append(
                f"environment variable {shown}: set it where Ray is started, if it is still needed"
            )


def _set_from_environment(key: str, name: str, value: str, draft: Draft) -> None:
    if key == "model.skip_download":
        draft.values[key] = value.lower() == "true"
    elif key == "model.source" and value.lower() not in ("modelscope", "huggingface"):
        draft.notes.append(f"{name}={value}: dsray downloads from modelscope or huggingface; left out")
        return
    else:
        draft.values[key] = value.lower() if key == "model.source" else value
    draft.remarks[key] = name


def _tell_about_precision(draft: Draft) -> None:
    uses_deepspeed = draft.values.get("distributed.strategy") == "deepspeed"
    if not draft.values.get("training.trainable_models") or uses_deepspeed or draft.stage == "data_process":
        return
    draft.notes.append(
        "full training without DeepSpeed: dsray keeps float32 masters and moments, 12 bytes a trained parameter on every "
        "GPU, where DiffSynth-Studio's bf16 moments take 4 (20 billion parameters: 240 GB, not 80). "
        "[training] master_weights = false trains in bf16 alone, as it does, and loses small updates; "
        '[distributed] strategy = "deepspeed" shares them out'
    )
    draft.behind_hash["training.master_weights"] = ("false", "no float32 masters, as in DiffSynth-Studio: less memory")


def _tell_about_defaults(draft: Draft) -> None:
    values = draft.values
    if "training.max_grad_norm" not in values:
        draft.behind_hash["training.max_grad_norm"] = ("0", "no gradient clipping, as in DiffSynth-Studio; dsray clips at 1.0")
    if "gradient.checkpointing" not in values and "gradient.checkpointing_offload" not in values:
        draft.behind_hash["gradient.checkpointing"] = ("false", "the script does not ask for it; dsray does by default")
    if "dataset.metadata_path" not in values and draft.stage == "":
        draft.notes.append(
            "no --dataset_metadata_path: DiffSynth-Studio takes the folder for a cache, dsray for media with .txt captions"
        )
