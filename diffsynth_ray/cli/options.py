"""Options and arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

JobFile = Annotated[str, typer.Argument(metavar="JOB.toml", help="A job file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the job file; may be repeated."),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, its job file or its output path.")]
New = Annotated[bool, typer.Option("--new", help="Move what is in the output path to previous/ first, and start afresh.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
