"""Weights for others: trained components under DiffSynth-Studio's key names (and other tools'), written whole."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diffsynth_ray.config.schema import Job
from diffsynth_ray.models.family import ModelFamily
from diffsynth_ray.models.lora import lora_state_dict
from diffsynth_ray.models.names import lora_from_memory
from diffsynth_ray.schedule import export_file_names, trained_components


def export_weights(family: ModelFamily, job: Job, *, masters: dict[str, Tensor], output_dir: Path, stem: str) -> list[Path]:
    """Write the trained weights of every trained component in every format, DiffSynth-Studio's first; returns the files.

    `masters` are the float32 weights by "component.parameter"; under bf16 the files are bf16.
    """
    dtype = torch.bfloat16 if job.training.precision == "bf16" else torch.float32
    written = []
    for component, file_name in export_file_names(job, stem).items():
        state = _component_state(family, job, component, masters)
        state = {key: tensor.to(dtype=dtype, device="cpu").contiguous() for key, tensor in state.items()}
        is_lora = component == job.lora.base_model
        for fmt in dict.fromkeys(["diffsynth", *job.output.formats]):
            if not is_lora and fmt != "diffsynth":
                continue  # other tools' names exist for LoRA only
            converted = (
                lora_from_memory(state, target=fmt, names=family.layer_names(component))
                if is_lora
                else family.checkpoint_tensors(component, state)
            )
            folder = output_dir if fmt == "diffsynth" else output_dir / fmt
            written.append(write_tensors(folder / file_name, _with_prefix(converted, job, component, fmt)))
    return written


def _component_state(family: ModelFamily, job: Job, component: str, masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained weights under their names in memory."""
    module = family.component(component)
    if component == job.lora.base_model:
        prefix = f"{component}."
        values = {name.removeprefix(prefix): tensor for name, tensor in masters.items() if name.startswith(prefix)}
        return lora_state_dict(module, values=values)
    return {name: masters[f"{component}.{name}"] for name, param in module.named_parameters() if param.requires_grad}


def _with_prefix(state: dict[str, Tensor], job: Job, component: str, fmt: str) -> dict[str, Tensor]:
    """Full names ("pipe.dit.NAME") less the prefix that the job takes off; other components lose their own."""
    own = f"pipe.{component}."
    asked = job.output.remove_prefix_in_ckpt
    if fmt != "diffsynth" or asked is None or component != trained_components(job)[0]:
        return state
    return {f"{own}{key}".removeprefix(asked): tensor for key, tensor in state.items()}


def write_tensors(path: Path, state: dict[str, Tensor], *, metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file that appears under its name only when complete. Raises OSError where that cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(state, temporary, metadata={"format": "pt"} | (metadata or {}))
        except SafetensorError as error:
            if (number := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        temporary.chmod(mode)  # it lets nobody but the owner read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
