"""Sample pictures during training: diffusers' own pipelines around the modules that are being trained.

What a pipeline is made of is each family's (`ModelFamily.sample`); here is what they share. Text is encoded by the family, as
in training, so that a prompt means the same in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image
from torch import nn

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SampleRequest:
    """One picture or clip to be made."""

    prompt: str
    height: int
    """Pixels."""
    width: int
    num_frames: int
    """1 for a picture."""
    num_inference_steps: int
    guidance_scale: float
    """Classifier-free guidance; 1 or less = none. For a model that is told its guidance (FLUX.1-dev), what it is told."""
    seed: int
    inputs: tuple[Image, ...] = ()
    """Pictures to edit, or the first (and last) frame of a clip."""

    @property
    def is_guided(self) -> bool:
        """Whether the model is also asked about the negative prompt."""
        return self.guidance_scale > 1

    def generator(self) -> torch.Generator:
        """Of the initial noise, on the CPU: the same noise on every device."""
        return torch.Generator().manual_seed(self.seed)


def build_pipeline(pipeline_class: Any, *, device: torch.device, **components: Any) -> Any:
    """A pipeline around loaded components. Parts that it does not need are None.

    A pipeline takes its device from its parameters, which under offload are not where they are computed with.
    """
    placed = type(pipeline_class.__name__, (pipeline_class,), {"_execution_device": property(lambda self: device)})
    with _quiet():
        pipeline = placed(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def run_pipeline(pipeline: Any, request: SampleRequest, **arguments: Any) -> Frames:
    """What it makes of a request, uint8 [f, h, w, 3]. The global random generators are left as they were."""
    with torch.random.fork_rng(), _quiet(), _computed_on(pipeline):
        output = pipeline(
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            generator=request.generator(),
            output_type="np",
            **arguments,
        )
    made = output.frames[0] if hasattr(output, "frames") else output.images
    return (np.asarray(made, dtype=np.float32) * 255).round().astype(np.uint8)


@contextmanager
def _computed_on(pipeline: Any) -> Iterator[None]:
    """Tells diffusers that the components compute on the pipeline's device, wherever their weights are (`build_pipeline`)."""
    hook = SimpleNamespace(execution_device=pipeline._execution_device)
    modules = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    for module in modules:
        module._hf_hook = hook  # type: ignore[assignment]  # a module takes any attribute
    try:
        yield
    finally:
        for module in modules:
            del module._hf_hook


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings: nobody has called it by hand."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
