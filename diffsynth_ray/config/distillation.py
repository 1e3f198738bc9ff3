"""Direct distillation: what the job says about it; reads no file.

The metadata's pictures were drawn by a teacher in many steps; the student learns to reach them from the same noise in few.
"""

from __future__ import annotations

from diffsynth_ray.config.schema import Job, TrainingSection
from diffsynth_ray.errors import Problem

DIRECT_DISTILL = "direct_distill"
REQUIRED_COLUMNS = ("seed", "num_inference_steps")
TEACHER_COLUMNS = (*REQUIRED_COLUMNS, "rand_device", "cfg_scale")
"""How each picture was drawn. `cfg_scale` is the teacher's: the student learns to do without guidance."""


def condition_columns(job: Job) -> list[str]:
    """The extra inputs that the model is conditioned on: all but the teacher's settings."""
    return [name for name in job.model.extra_inputs if job.task != DIRECT_DISTILL or name not in TEACHER_COLUMNS]


def check_distillation(job: Job) -> list[Problem]:
    """What direct distillation does not go together with."""
    if job.task != DIRECT_DISTILL:
        return []
    problems = []
    if missing := [name for name in REQUIRED_COLUMNS if name not in job.model.extra_inputs]:
        message = f"direct distillation takes each sample's {', '.join(missing)} from the metadata; add the columns' names"
        problems.append(Problem("model.extra_inputs", message))
    if job.split.enabled:
        problems.append(Problem("split.enabled", "direct distillation trains combined; set split.enabled = false"))
    if job.validation.holdout is not None:
        message = "the validation loss is that of single timesteps, which direct distillation has not; use validation.prompts"
        problems.append(Problem("validation.holdout", message))
    for key in ("min_timestep_boundary", "max_timestep_boundary"):
        if getattr(job.training, key) != TrainingSection.model_fields[key].default:
            problems.append(Problem(f"training.{key}", "direct distillation draws no timesteps; remove the key"))
    return problems
