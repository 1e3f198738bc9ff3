"""A job's model as its workers train it: read, adapters in place, initial weights in, everything where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from diffsynth_ray.config.schema import Job
from diffsynth_ray.memory.host import NodeGroup
from diffsynth_ray.models.family import ModelFamily
from diffsynth_ray.models.weights import load_tensors, put_weights
from diffsynth_ray.train.initial import load_initial_weights, merge_presets
from diffsynth_ray.train.residency import Residency, settle
from diffsynth_ray.train.trainer import load_family, select_trained

Say = Callable[[str], object]


def load_for_training(
    job: Job,
    *,
    device: torch.device,
    say: Say,
    components: Sequence[str] | None = None,
    group: NodeGroup | None = None,
    num_sizes: int = 1,
    weights_path: Path | None = None,
) -> tuple[ModelFamily, Residency]:
    """`components` None = all; `group` = the workers of this node, which share host memory; `num_sizes` that the data set's
    pictures or clips have; `weights_path` = a file with the trained weights by "component.parameter", in place of the initial
    ones.
    """
    family = load_family(job, device=device, components=components)
    merge_presets(family, job, say)
    select_trained(family, job)
    load_initial_weights(family, job, say)
    if weights_path is not None:
        tensors = load_tensors(weights_path)
        for name, component in family.components.items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            put_weights(component, own)
    sizes_vary = num_sizes > 1 or family.text_tokens_vary
    return family, settle(family, job, group=group, sizes_vary=sizes_vary, say=say)
