"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from diffsynth_ray.errors import OutputError

JobFile = Annotated[str, typer.Argument(metavar="JOB.toml", help="A job file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the job file; may be repeated."),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, its job file or its output path.")]
New = Annotated[bool, typer.Option("--new", help="Move what is in the output path to previous/ first, and start afresh.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@contextmanager
def writing_output(path: Path) -> Iterator[None]:
    """Inside, the file that -o names is written. Raises OutputError where it cannot be."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}", hint="give another place with -o") from error
