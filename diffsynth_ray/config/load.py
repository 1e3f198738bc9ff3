"""TOML file and `--set` overrides -> `Job`; every problem of the file in one error."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffsynth_ray.config import schema
from diffsynth_ray.config.resolve import check_rules
from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import JobFileError, Problem

_NO_TOML = (ValueError, RecursionError)
"""TOML's errors, UTF-8's, Python's about numbers of thousands of digits and about hundreds of brackets."""
_DEEPEST = 50
"""Levels of tables and arrays; what checks and shows them calls itself for each."""
_PACKAGE_DIR = Path(__file__).resolve().parent.parent


def recipes_dir() -> Path:
    """Folder of the shipped recipes: inside the installed package, or `jobs/` of a source checkout."""
    installed = _PACKAGE_DIR / "jobs"
    return installed if installed.is_dir() else _PACKAGE_DIR.parent / "jobs"


def recipe_names() -> list[str]:
    """Names that `dsray submit NAME` accepts besides paths."""
    return sorted(path.stem for path in recipes_dir().glob("*.toml"))


def find_job_file(reference: str) -> Path:
    """Path of a job file given as a path or as the name of a shipped recipe.

    Raises JobFileError where neither exists.
    """
    path = Path(reference)
    if path.is_file():
        return path
    recipe = recipes_dir() / f"{path.stem}.toml"
    if recipe.is_file() and path.parent in (Path("."), Path("jobs")):
        return recipe
    near = difflib.get_close_matches(path.stem, recipe_names(), n=1)
    advice = f"; did you mean the recipe {near[0]}?" if near else ""
    names = ", ".join(recipe_names())
    raise JobFileError(reference, [Problem("", f"no such file, and no shipped recipe of that name ({names}){advice}")])


def load_job(reference: str, overrides: list[str] | None = None) -> Job:
    """Read, override and check a job file.

    `overrides` are "section.key=value" strings; values are TOML, or plain strings where that does not parse.
    Raises JobFileError with all problems.
    """
    path = find_job_file(reference)
    try:
        raw = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except _NO_TOML as error:
        raise JobFileError(str(path), [Problem("", f"not valid TOML: {error}")]) from error
    problems = [problem for text in overrides or [] if (problem := _apply_override(raw, text))]
    if _is_deeper(raw, _DEEPEST):
        raise JobFileError(str(path), [*problems, Problem("", f"tables and arrays are nested more than {_DEEPEST} deep")])
    if "name" not in raw and re.fullmatch(schema.NAME, path.stem) is None:
        allowed = "at most 63 letters, digits, '_', '.', '-'"
        problems.append(Problem("name", f"the file's name {path.stem!r} cannot be the job's; set name = ... of {allowed}"))
        raw["name"] = "job"
    raw.setdefault("name", path.stem)
    if path.parent == recipes_dir() and not Path(reference).is_file():
        _anchor_shipped_data(raw)
    job = _validate(raw, str(path), problems)
    if problems:
        raise JobFileError(str(path), problems + check_rules(job))
    return job


def _anchor_shipped_data(raw: dict[str, Any]) -> None:
    # A recipe called by its name must find its photographs from any directory.
    for section, key in (("dataset", "base_path"), ("dataset", "metadata_path"), ("validation", "holdout")):
        value = raw.get(section, {}).get(key)
        if isinstance(value, str) and value.startswith("jobs/") and not Path(value).exists():
            raw[section][key] = str(recipes_dir() / value.removeprefix("jobs/"))


def _apply_override(raw: dict[str, Any], text: str) -> Problem | None:
    dotted, equals, value = text.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        return Problem(f"--set {text}", "expected section.key=value, as in --set training.learning_rate=2e-5")
    try:
        document = tomllib.loads(f"value = {value}")
        parsed = document.pop("value")
        if document:
            return Problem(f"--set {text}", f"sets {', '.join(document)} too; give each key a --set of its own")
    except _NO_TOML:
        parsed = value
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return Problem(f"--set {text}", f"{part} is a key, not a section")
    table[parts[-1]] = parsed
    return None


def _is_deeper(value: object, levels: int) -> bool:
    inside = [value]
    for _ in range(levels):
        inside = [
            part
            for each in inside
            for part in (each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
        ]
    return bool(inside)


def _validate(raw: dict[str, Any], source: str, problems: list[Problem]) -> Job:
    try:
        return Job.model_validate(raw)
    except ValidationError as error:
        found: dict[str, list[Problem]] = {}
        for item in error.errors(include_url=False):
            problem = _problem(dict(item))
            found.setdefault(problem.key, []).append(problem)
        # A union reports one error a branch: one line a key is enough.
        merged = [_merge(group) for group in found.values()]
        rest = _problems_of_the_rest(raw, error, told=merged)
        raise JobFileError(source, [*problems, *merged, *rest]) from None


def _problems_of_the_rest(raw: dict[str, Any], error: ValidationError, *, told: list[Problem]) -> list[Problem]:
    """Rules that the other keys break, less what may only follow from those that are wrong themselves."""
    rest = {name: dict(value) if isinstance(value, dict) else value for name, value in raw.items()}
    wrong = set()
    for section, *inner in (item["loc"] for item in error.errors(include_url=False)):
        wrong.add(str(inner[0] if inner else section))
        table = rest.get(str(section))
        if inner and isinstance(table, dict):
            table.pop(str(inner[0]), None)
        else:
            rest.pop(str(section), None)
    try:
        broken = check_rules(Job.model_validate({"name": "job", **rest}))
    except ValidationError:
        return []
    texts = " ".join(str(problem) for problem in told)
    return [
        problem
        for problem in broken
        if problem.key not in texts
        and (section := problem.key.partition(".")[0]) not in wrong
        and f"mean [{section}]" not in texts
        and not any(re.search(rf"\b{re.escape(name)}\b", problem.message) for name in wrong)
    ]


def _merge(group: list[Problem]) -> Problem:
    if len(group) == 1:
        return group[0]
    return Problem(group[0].key, "; or ".join(dict.fromkeys(problem.message for problem in group)))


def _problem(item: dict[str, Any]) -> Problem:
    known = schema.keys()
    dotted = ".".join(str(part) for part in item["loc"][:2])
    if item["type"] == "extra_forbidden":
        return Problem(dotted, f"unknown key{_suggestion(dotted, known)}")
    if len(item["loc"]) > 1 and dotted not in known:
        dotted = str(item["loc"][0])  # a top-level key whose value has parts of its own
    got = _short(item["input"])
    if item["type"] == "model_type":
        return Problem(dotted, f"got {got}; it is a section: [{dotted}], and its keys below")
    if item["type"] == "list_type" and isinstance(item["input"], str) and len(item["loc"]) == 2:
        # DiffSynth-Studio's lists are texts with commas.
        parts = [int(part) if part.strip().isdecimal() else part.strip() for part in item["input"].split(",")]
        return Problem(dotted, f"got {got}; an array is needed, as in {_short(parts)}")
    return Problem(dotted, f"got {got}; {item['msg'][0].lower()}{item['msg'][1:]}")


def _suggestion(dotted: str, known: dict[str, Any]) -> str:
    sections = {name.split(".")[0] for name in known if "." in name}
    section, _, leaf = dotted.rpartition(".")
    elsewhere = [name for name in known if name.split(".")[-1] == (leaf or dotted)]
    without_prefix = [name for name in known if name.replace(".", "_") == dotted.split(".")[-1]]
    # The name of the section alone makes no two keys alike.
    alike = [name for name in difflib.get_close_matches(dotted, known, n=3, cutoff=0.7) if _are_alike(dotted, name)]
    near = without_prefix or elsewhere or alike
    if not near and not section:
        near = difflib.get_close_matches(dotted, sections, n=1)
        return f" or section; did you mean [{near[0]}]?" if near else f"; sections are {', '.join(sorted(sections))}"
    if near:
        return f"; did you mean {near[0]}?"
    names = ", ".join(name.split(".")[1] for name in known if name.startswith(f"{section}."))
    return f"; [{section}] has {names}" if names else ""


def _are_alike(dotted: str, known: str) -> bool:
    return difflib.SequenceMatcher(None, dotted.rpartition(".")[2], known.rpartition(".")[2]).ratio() >= 0.5


def _short(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError:
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
