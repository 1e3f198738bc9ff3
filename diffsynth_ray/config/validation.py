"""Rules between the keys of [validation], and for the moving average of the weights; reads no file."""

from __future__ import annotations

import math

from diffsynth_ray.config.distillation import condition_columns
from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import Problem

_CLIP_INPUTS = ("vace_video", "vace_video_mask")
"""Of the extra inputs, those that are clips; the others are pictures."""


def check_validation(job: Job) -> list[Problem]:
    """All problems of the section."""
    validation = job.validation
    problems = []
    holdout = validation.holdout
    if isinstance(holdout, float) and not 0 < holdout < 1:
        message = f"got {holdout:g}; a share of the files, above 0 and below 1, as in 0.1, or the path of a metadata file"
        problems.append(Problem("validation.holdout", message))
    if holdout is None:
        problems += [
            Problem(f"validation.{name}", "needs validation.holdout: it goes by the validation loss")
            for name in ("early_stopping", "keep_best")
            if getattr(validation, name)
        ]
    if job.split.enabled and validation.prompts and condition_columns(job):
        message = (
            "samples with inputs of their own need encoders that the training stage of split training does not load; "
            "set split.enabled = false, or validation.holdout alone"
        )
        problems.append(Problem("validation.prompts", message))
    problems += _check_samples(job)
    if job.training.ema_decay is not None and (job.distributed.strategy != "ddp" or job.offload.optimize_on_cpu):
        message = 'needs distributed.strategy = "ddp" without offload.optimize_on_cpu: elsewhere no worker has all weights'
        problems.append(Problem("training.ema_decay", message))
    if holdout is None and not validation.prompts and validation.every_steps is not None:
        problems.append(Problem("validation.every_steps", "there is nothing to validate; set validation.holdout or prompts"))
    return problems


def _check_samples(job: Job) -> list[Problem]:
    validation, extra = job.validation, condition_columns(job)
    problems = []
    num_prompts, num_inputs = len(validation.prompts), len(validation.inputs)
    if num_inputs not in (0, 1, num_prompts):
        message = f"{num_inputs} files for {num_prompts} prompts; give one for each prompt, or one for all"
        problems.append(Problem("validation.inputs", message))
    if num_inputs and not num_prompts:
        problems.append(Problem("validation.inputs", "needs validation.prompts"))
    if num_prompts and extra and not num_inputs:
        message = f"required with prompts: the model takes {', '.join(extra)}; one file for each prompt, or one for all"
        problems.append(Problem("validation.inputs", message))
    if num_inputs and not extra:
        problems.append(Problem("validation.inputs", "the model takes no inputs; see model.extra_inputs"))
    if num_prompts and len(extra) > 1:
        message = f"samples take one input, and the model takes {', '.join(extra)}; remove prompts, and keep holdout"
        problems.append(Problem("validation.prompts", message))
    if num_prompts and (clips := [name for name in extra if name in _CLIP_INPUTS]):
        message = f"samples take a picture, and {', '.join(clips)} takes a clip; remove prompts, and keep holdout"
        problems.append(Problem("validation.prompts", message))
    if num_prompts and job.distributed.strategy == "deepspeed" and job.distributed.zero_stage == 3:
        message = "samples need whole weights, which zero_stage = 3 shares out; use zero_stage = 2, or validation.holdout alone"
        problems.append(Problem("validation.prompts", message))
    return problems


def sample_size(job: Job, *, multiple: int) -> tuple[int, int]:
    """Height and width of sample pictures, multiples of `multiple`."""
    dataset, size = job.dataset, job.validation.size
    if size is not None:
        return size[0], size[1]
    if dataset.height is not None and dataset.width is not None:
        return dataset.height // multiple * multiple, dataset.width // multiple * multiple
    side = max(math.isqrt(dataset.max_pixels) // multiple, 1) * multiple
    return side, side
