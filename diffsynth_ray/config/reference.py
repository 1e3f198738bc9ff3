"""The reference of the job file in Markdown, made from the schema; `python -m` this module writes it to stdout."""

from __future__ import annotations

import json
import sys
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from diffsynth_ray.config import schema
from diffsynth_ray.config.schema import Job

_HEAD = """\
# The job file

Made from the code by `python -m diffsynth_ray.config.reference > jobs/REFERENCE.md`; do not edit.

A job is a TOML file. An unknown key is an error. Relative paths are relative to the directory that the command is run
in; with the address of a remote cluster they are an error. `--set section.key=value` overrides a key.

* **R**: another value of the key is another run, because it changes what a step computes. All other keys may change
  when a job is submitted again, and the run goes on. Where `global_batch_size` is unset, its default counts.
* *Later version: ...*: the key is reserved. Any value but its default is refused.
"""

_WORDS = {str: "text", int: "whole number", float: "number", bool: "true, false"}
_SYMBOLS: dict[type, tuple[str, str]] = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}


def build_reference() -> str:
    """The whole page."""
    parts = [_HEAD]
    sections: dict[str, list[str]] = {}
    for dotted, field in schema.keys().items():
        section, _, leaf = dotted.rpartition(".")
        sections.setdefault(section, []).append(_row(dotted, leaf, field))
    for section, rows in sections.items():
        title = f"`[{section}]`" if section else "Top level"
        parts.append(f"## {title}\n")
        if section:
            parts.append(_meaning_of_section(section))
        parts.append("\n".join(["| key | value | default | | meaning |", "| --- | --- | --- | --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _meaning_of_section(section: str) -> str:
    kind = Job.model_fields[section].annotation
    return f"{(kind.__doc__ or '').strip()}\n"


def _row(dotted: str, leaf: str, field: FieldInfo) -> str:
    mark = "R" if schema.mark(field, "identity") else ""
    meaning = " ".join((field.description or "").split())
    cells = [f"`{leaf}`", _allowed(field), _default(field), mark, meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _allowed(field: FieldInfo) -> str:
    bounds = [
        f"{symbol} {getattr(rule, attribute):g}" if getattr(rule, attribute) < 1e6 else f"{symbol} {getattr(rule, attribute)}"
        for rule in field.metadata
        for kind, (symbol, attribute) in _SYMBOLS.items()
        if isinstance(rule, kind)
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{_toml(value)}`" for value in arguments)
    if origin in (UnionType, Union):
        return " or ".join(_type(one) for one in arguments if one is not NoneType)
    if origin is list:
        inner = _type(arguments[0])
        return f"array of ({inner})" if " or " in inner else f"array of {inner}"
    if origin is dict:
        return "table" if arguments[1] is Any else f"table of {_type(arguments[1])}s"
    assert annotation is Any, annotation  # the schema has no other kinds
    return "anything"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "" if value is None else f"`{_toml(value)}`"


def _toml(value: object) -> str:
    # JSON and TOML agree on everything that the schema has as a default.
    return f"{value:g}" if isinstance(value, float) and value < 1e-3 and value > 0 else json.dumps(value)


def main() -> None:
    """Write the page to stdout."""
    sys.stdout.write(build_reference())


if __name__ == "__main__":
    main()
