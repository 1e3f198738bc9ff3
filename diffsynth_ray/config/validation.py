"""Rules between the keys of [validation]; reads no file."""

from __future__ import annotations

from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import Problem


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
    if holdout is None and not validation.prompts and validation.every_steps is not None:
        problems.append(Problem("validation.every_steps", "there is nothing to validate; set validation.holdout"))
    return problems
