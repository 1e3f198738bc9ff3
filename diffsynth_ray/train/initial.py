"""Weights to start from: an initialisation, not a resume. Exports, LoRAs, and LoRAs merged into the base beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from diffsynth_ray.config.schema import Job, as_list
from diffsynth_ray.errors import JobFileError, ModelError, Problem
from diffsynth_ray.models.family import ModelFamily
from diffsynth_ray.models.lora import load_lora, merge_lora
from diffsynth_ray.models.weights import load_tensors, put_weights
from diffsynth_ray.schedule import trained_components

_SHOWN = 3


def merge_presets(family: ModelFamily, job: Job, say: Callable[[str], object]) -> None:
    """Add the preset LoRAs to the base weights, in place; the LoRA that is trained learns the difference to them."""
    for path, component in preset_loras(job):
        count = merge_lora(family.component(component), Path(path), names=family.layer_names(component))
        say(f"merged {path} into {count} layers of {component}")


def preset_loras(job: Job) -> list[tuple[str, str]]:
    """(file, component) of every preset LoRA; without preset_model they go into the component that is trained first."""
    paths = as_list(job.lora.preset_path)
    components = as_list(job.lora.preset_model) or trained_components(job)[:1]
    if len(components) == 1:
        components = components * len(paths)
    return list(zip(paths, components, strict=True))  # resolve has checked the lengths


def load_initial_weights(family: ModelFamily, job: Job, say: Callable[[str], object]) -> None:
    """Fill the trained parameters from the job's files. Raises ModelError with all keys that do not fit."""
    if job.lora.checkpoint is not None:
        assert job.lora.base_model is not None  # resolve has checked it
        component = job.lora.base_model
        load_lora(family.component(component), Path(job.lora.checkpoint), names=family.layer_names(component))
        say(f"the LoRA starts from {job.lora.checkpoint}")
    paths = [Path(path) for path in as_list(job.training.resume_from_checkpoint)]
    if not paths:
        return
    in_full = job.training.trainable_models
    if not in_full:
        message = "needs training.trainable_models; a LoRA starts from lora.checkpoint"
        raise JobFileError(f"job {job.name}", [Problem("training.resume_from_checkpoint", message)])
    load_exported(family, in_full, paths)
    say(f"{', '.join(in_full)}: the weights start from {', '.join(map(str, paths))}")


def load_exported(family: ModelFamily, components: list[str], paths: list[Path]) -> None:
    """Load exported weights of components in place: of each all parameters, in any number of files.

    A key's component is its prefix "pipe.{component}.", else the file's component is the one that its keys fit.
    """
    own = {component: dict(family.component(component).named_parameters()) for component in components}
    found: dict[str, dict[str, Tensor]] = {component: {} for component in components}
    problems = []
    for path in paths:
        tensors = load_tensors(path)
        if any(".lora_" in key for key in tensors):
            raise ModelError(f"training.resume_from_checkpoint: {path} is a LoRA; give it as lora.checkpoint")
        unknown = _sort_tensors(family, own, tensors, into=found)
        if unknown:
            problems.append(f"{path}: {len(unknown)} keys are unknown or of another shape ({_first(unknown)})")
    for component, parameters in own.items():
        missing = sorted(parameters.keys() - found[component].keys())
        if missing:
            problems.append(f"{len(missing)} parameters of {component} are missing ({_first(missing)})")
    if problems:
        raise ModelError("training.resume_from_checkpoint does not fit the trained components: " + "; ".join(problems))
    for component, state in found.items():
        put_weights(family.component(component), state)


def _sort_tensors(
    family: ModelFamily,
    own: Mapping[str, Mapping[str, Tensor]],
    tensors: Mapping[str, Tensor],
    *,
    into: dict[str, dict[str, Tensor]],
) -> list[str]:
    """Put a file's tensors to their components; returns the keys that fit nowhere."""
    prefixed = {key: component for key in tensors for component in own if key.startswith(f"pipe.{component}.")}

    def fitting(component: str, key: str) -> dict[str, Tensor] | None:
        """The tensor as parameters by name; {} for one that the family does not load, None for one that does not fit."""
        found = family.memory_tensors(component, key.removeprefix(f"pipe.{component}."), tensors[key])
        parameters = own[component]
        fits = all(name in parameters and parameters[name].shape == tensor.shape for name, tensor in found.items())
        return found if fits else None

    likeliest = max(own, key=lambda component: sum(bool(fitting(component, key)) for key in tensors))
    unknown = []
    for key in tensors:
        component = prefixed.get(key, likeliest)
        found = fitting(component, key)
        if found is None:
            unknown.append(key)
        else:
            into[component] |= found
    return unknown


def _first(names: list[str]) -> str:
    return "first " + ", ".join(names[:_SHOWN])
