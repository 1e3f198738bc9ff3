"""Whether this version can do a job made from a script, on a machine as large as it asks for, and why not."""

from __future__ import annotations

from pathlib import Path

from diffsynth_ray.config.distillation import DIRECT_DISTILL, TEACHER_COLUMNS
from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.errors import JobFileError, Problem
from diffsynth_ray.migrate.draft import Draft
from diffsynth_ray.models.family import family_names, get_family

_GPUS, _CPUS_PER_GPU = 8, 16


def find_refusals(path: Path, draft: Draft) -> list[Problem]:
    """What stands against the draft's job file, empty where nothing does. Data and weights are not looked for."""
    built = family_names()
    if draft.family is not None and draft.family not in built:
        # What else is missing for a family that is not there helps nobody.
        return [Problem("model.family", f"family {draft.family} is not built; this version has {', '.join(built)}")]
    problems = _of_the_family(draft, draft.family) if draft.family is not None else []
    try:
        job = load_job(str(path))
        wanted = job.distributed.num_workers
        gpus = max(_GPUS, wanted if isinstance(wanted, int) else 0)
        resolve(job, Resources(cpus=float(gpus * _CPUS_PER_GPU), gpus=float(gpus)), source=str(path))
    except JobFileError as error:
        problems += error.problems
    return problems


def _of_the_family(draft: Draft, name: str) -> list[Problem]:
    family = get_family(name)
    values = draft.values
    trained = {"training.trainable_models": values.get("training.trainable_models", [])}
    trained["lora.base_model"] = [values["lora.base_model"]] if "lora.base_model" in values else []
    have = ", ".join(family.component_names)
    problems = [
        Problem(key, f"family {name} has no component {component!r}, it has {have}{_advice(component)}")
        for key, components in trained.items()
        for component in components[:1]  # a list of parts has hundreds
        if component not in family.component_names
    ]
    known = {
        "model.extra_inputs": getattr(family, "extra_inputs", ()),
        "model.options": getattr(family, "option_names", ()),
    }
    # How the teacher drew the pictures is no condition of the model.
    teacher = TEACHER_COLUMNS if values.get("task") == DIRECT_DISTILL else ()
    for key, names in known.items():
        if unknown := [each for each in values.get(key, []) if each not in (*names, *teacher)]:
            problems.append(
                Problem(key, f"family {name} does not know {', '.join(unknown)}; it knows {', '.join(names) or 'none'}")
            )
    return problems


def _advice(component: str) -> str:
    return "; whole components are trained, parts by a LoRA on them (lora.target_modules)" if "." in component else ""
