"""A draft -> the text of a commented job file."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from diffsynth_ray.config import schema
from diffsynth_ray.migrate.draft import Draft

_WIDTH = 120
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")


def write_job_file(
    draft: Draft, *, name: str | None, source: str, script_notes: Iterable[str] = (), downloads: Sequence[str] = ()
) -> str:
    """The job file's text; `name` only where the file's own name cannot be the job's."""
    lines = ", ".join(str(line) for line in draft.lines)
    head = [
        f"Made by `dsray import` from {source}, line{'s' if len(draft.lines) > 1 else ''} {lines}.",
        "Relative paths hold in the folder in which the script was run. Keys behind a '#' are not set.",
    ]
    parts = ["".join(f"# {_one_line(line)}\n" for line in head)]
    if downloads:
        parts.append("# To be run first, from the script:\n" + "".join(f"#   {_one_line(each)}\n" for each in downloads))
    parts += _listed("Notes", [*draft.notes, *script_notes])
    parts += _listed("Without a counterpart in dsray", draft.without_counterpart)
    sections: dict[str, list[str]] = {}
    for dotted in schema.keys():  # noqa: SIM118 - a function of the module, no dict
        section, _, leaf = dotted.rpartition(".")
        if dotted in draft.values:
            sections.setdefault(section, []).append(_entry(leaf, draft.values[dotted], draft.remarks.get(dotted)))
        elif dotted in draft.behind_hash:
            value, comment = draft.behind_hash[dotted]
            sections.setdefault(section, []).append(f"# {leaf} = {value}  # {comment}\n")
        elif dotted == "name" and name is not None:
            sections.setdefault("", []).append(_entry("name", name, None))
    for section, entries in sections.items():
        parts.append((f"[{section}]\n" if section else "") + "".join(entries))
    return "\n".join(parts)


def _listed(title: str, items: list[str]) -> list[str]:
    if not items:
        return []
    text = f"# {title}:\n"
    for item in dict.fromkeys(items):
        text += textwrap.fill(
            _one_line(item),
            _WIDTH,
            initial_indent="# * ",
            subsequent_indent="#   ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        text += "\n"
    return [text]


def _one_line(text: str) -> str:
    """Text that cannot end the comment that it stands in."""
    return "".join(char if char.isprintable() else " " for char in text)


def _entry(leaf: str, value: Any, remark: str | None) -> str:
    text = f"{leaf} = {toml_value(value)}"
    if remark:
        remark = _one_line(remark)
        return f"# {remark}\n{text}\n" if "\n" in text or len(text) + len(remark) > _WIDTH else f"{text}  # {remark}\n"
    return f"{text}\n"


def toml_value(value: Any, *, indent: str = "") -> str:
    """A value in TOML; long arrays get a line an element."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the one control character that JSON leaves alone.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        pairs = (f"{key if _PLAIN_KEY.fullmatch(key) else toml_value(key)} = {toml_value(each)}" for key, each in value.items())
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, list):
        short = f"[{', '.join(toml_value(each) for each in value)}]"
        if len(short) + len(indent) <= _WIDTH - 24:
            return short
        inner = indent + "  "
        lines = "".join(f"{inner}{toml_value(each, indent=inner)},\n" for each in value)
        return f"[\n{lines}{indent}]"
    return repr(value)  # whole numbers and floats: Python's and TOML's spelling agree
