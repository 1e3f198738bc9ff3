"""`sft:data_process` and `sft:train` pairs -> one draft of split training each."""

from __future__ import annotations

import posixpath
from dataclasses import replace

from diffsynth_ray.errors import Problem
from diffsynth_ray.migrate.draft import Draft

_OF_FIRST = ("dataset.", "model.")
"""Sections that describe what is encoded: they come from the first command."""
_OF_SECOND = ("dataset.repeat", "dataset.num_workers")
_UNITED = ("model.paths", "model.id_with_origin_paths", "model.fp8_models")


def join_stages(drafts: list[Draft]) -> tuple[list[Draft], list[Problem]]:
    """Drafts with pairs merged, in the order of the second commands, and the halves that are left over."""
    firsts = [draft for draft in drafts if draft.stage == "data_process"]
    joined: list[Draft] = []
    used: list[Draft] = []
    left_over: list[Problem] = []
    for draft in drafts:
        if draft.stage == "train":
            first = _first_of(draft, firsts, used)
            if first is None:
                left_over.append(Problem(f"line {draft.lines[0]}", _NO_FIRST.format(draft.values.get("dataset.base_path"))))
                continue
            used.append(first)
            joined.append(_merge(first, draft))
        elif draft.stage == "":
            joined.append(draft)
    left_over += [Problem(f"line {first.lines[0]}", _NO_SECOND) for first in firsts if not any(first is each for each in used)]
    return joined, left_over


_NO_FIRST = (
    "trains on {!r}, encoded by a command that is not in this file: put both commands into one file, or turn that "
    "folder into a cache with `dsray import-cache`"
)
_NO_SECOND = "encodes for a training that is not in this file: put both commands into one file"


def _first_of(second: Draft, firsts: list[Draft], used: list[Draft]) -> Draft | None:
    """The command whose output the second reads; else an unused one of the same model and LoRA."""
    alike = [first for first in firsts if first.family == second.family]
    for first in alike:
        if _folder(first, "output.path") == _folder(second, "dataset.base_path"):
            return first
    for first in alike:
        if not any(first is each for each in used) and _trained(first) == _trained(second):
            return first
    return None


def _folder(draft: Draft, key: str) -> str:
    return posixpath.normpath(str(draft.values.get(key, "")))


def _trained(draft: Draft) -> tuple[object, ...]:
    keys = ("lora.base_model", "lora.target_modules", "lora.rank", "training.trainable_models", "task")
    return tuple(str(draft.values.get(key)) for key in keys)


def _merge(first: Draft, second: Draft) -> Draft:
    values = {key: value for key, value in second.values.items() if not _is_of_first(key)}
    notes = []
    for key, value in first.values.items():
        if _is_of_first(key):
            values[key] = value
    for key, value in second.values.items():
        if not _is_of_first(key) or key == "dataset.base_path":
            continue
        if key in _UNITED:
            values[key] = [*value, *(entry for entry in first.values.get(key, []) if entry not in value)]
        elif key == "model.options":
            values[key] = {**value, **first.values.get(key, {})}
        elif key not in first.values:
            values[key] = value
        elif value != first.values[key]:
            notes.append(f"{key}: the first command says {first.values[key]!r}, the second {value!r}; the first's counts")
    notes += _differences(first, second)
    values["split.enabled"] = True
    remarks = {**first.remarks, **second.remarks, "split.enabled": "encode once, then train with the trained components alone"}
    if "distributed.num_workers" in first.values:
        values["split.num_workers"] = first.values["distributed.num_workers"]
    if "distributed.num_workers" not in second.values:
        remarks.pop("distributed.num_workers", None)
    merged = replace(second, lines=[*first.lines, *second.lines], stage="", values=values, remarks=remarks)
    merged.notes = list(dict.fromkeys([*notes, *first.notes, *second.notes]))
    merged.without_counterpart = list(dict.fromkeys([*first.without_counterpart, *second.without_counterpart]))
    merged.problems = [*first.problems, *second.problems]
    return merged


def _is_of_first(key: str) -> bool:
    return key.startswith(_OF_FIRST) and key not in _OF_SECOND


def _differences(first: Draft, second: Draft) -> list[str]:
    written, read = first.values.get("output.path"), second.values.get("dataset.base_path")
    lines = f"lines {first.lines[0]} and {second.lines[0]}"
    notes = [f"{lines} are one job: what sft:data_process wrote to {written!r} goes to split.cache_path, which jobs share"]
    if _folder(first, "output.path") != _folder(second, "dataset.base_path"):
        notes.append(f"{lines}: the first writes {written!r} and the second reads {read!r}; taken for the same")
    repeat = first.values.get("dataset.repeat", 1)
    if repeat != 1:
        notes.append(f"dataset.repeat: the first command's {repeat} is left out: each row is encoded once")
    if _trained(first) != _trained(second):
        notes.append(f"{lines} name different LoRA settings or trained components; the second's count")
    return notes
