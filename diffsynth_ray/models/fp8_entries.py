"""What `model.fp8_models` names: components, or entries of [model], as in DiffSynth-Studio's `--fp8_models`. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from diffsynth_ray.config.resolve import check_rules
from diffsynth_ray.config.schema import Job, ModelSection, as_list
from diffsynth_ray.errors import Problem


def entry_number(model: ModelSection, name: str) -> int | None:
    """Place among paths and then ids of the entry that is `name`, or has it as a shard; None for a component's name."""
    entries = [*map(as_list, model.paths), *([text] for text in model.id_with_origin_paths)]
    return next((number for number, texts in enumerate(entries) if name in texts), None)


def names_entries(job: Job) -> bool:
    """Whether the components are known by the files only."""
    return any(entry_number(job.model, name) is not None for name in job.model.fp8_models)


def fp8_components(job: Job, held: Mapping[int, Iterable[str]]) -> list[str]:
    """`model.fp8_models` with components for entries, where `held` tells what is in the entry; each once."""
    names: list[str] = []
    for name in job.model.fp8_models:
        number = entry_number(job.model, name)
        names += held[number] if number is not None and number in held else [name]
    return list(dict.fromkeys(names))


def fp8_problems(job: Job, names: list[str]) -> list[Problem]:
    """What is wrong with these components that could not be told of the entries."""
    return [problem for problem in check_rules(job.with_keys(model={"fp8_models": names})) if problem.key == "model.fp8_models"]
