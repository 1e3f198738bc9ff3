"""`dsray import`: DiffSynth-Studio's launch scripts to job files."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsynth_ray.cli import render
from diffsynth_ray.cli.options import Json, writing_output
from diffsynth_ray.errors import DsrayError, ExitCode, JobFileError

if TYPE_CHECKING:
    from diffsynth_ray.errors import Problem
    from diffsynth_ray.migrate.draft import Draft
    from diffsynth_ray.migrate.read import Migration


def import_script(
    script: Annotated[Path, typer.Argument(metavar="TRAIN.sh", help="A launch script of DiffSynth-Studio.")],
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config_file",
            "--config-file",
            metavar="FILE",
            help="accelerate's configuration, in place of the one that the script names.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="JOB.toml|DIR",
            help="Where to write; a folder where the script holds several jobs. Default: to stdout.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite job files that are there.")] = False,
    as_json: Json = False,
) -> int:
    """Turn a launch script of DiffSynth-Studio into job files.

    What has no counterpart is listed in the file, never dropped. Exit code 2: the script, or a job made of it, cannot
    be used by this version; the reasons are told.
    """  # fmt: skip
    from diffsynth_ray.migrate.read import read_migration
    from diffsynth_ray.run_dir import write_whole

    migration = read_migration(script, config_file=config_file)
    if output is None:
        return _show(migration, script, as_json=as_json)
    paths = _paths(migration, output, force=force)
    written = []
    for draft, path, name in zip(migration.drafts, paths, migration.names(), strict=True):
        given = None if _can_be_name(path.stem) else name
        with writing_output(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, _text(migration, draft, script, name=given))
        written.append(path)
    return _report(migration, written, as_json=as_json)


def _can_be_name(stem: str) -> bool:
    import re

    from diffsynth_ray.config.schema import NAME

    return re.fullmatch(NAME, stem) is not None


def _text(migration: Migration, draft: Draft, script: Path, *, name: str | None) -> str:
    from diffsynth_ray.migrate.job_file import write_job_file

    return write_job_file(draft, name=name, source=str(script), script_notes=migration.notes, downloads=migration.downloads)


def _show(migration: Migration, script: Path, *, as_json: bool) -> int:
    if len(migration.drafts) != 1:
        raise DsrayError(f"{script} makes {len(migration.drafts)} jobs", hint="name a folder for them: dsray import ... -o DIR")
    text = _text(migration, migration.drafts[0], script, name=migration.names()[0])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "job.toml"
        path.write_text(text, encoding="utf-8")
        refused = _check(migration, [path])[0]
    code = ExitCode.USAGE if migration.refused or refused else ExitCode.DONE
    if as_json:
        render.result_json(_json_of(migration, [refused], [{"text": text}]) | {"exit_code": int(code)})
        return code
    render.result(text.rstrip("\n"))
    for problem in refused:
        render.say(f"refused by this version: {problem}")
    _tell_refused(migration)
    return code


def _check(migration: Migration, paths: list[Path]) -> list[list[Problem]]:
    from diffsynth_ray.migrate.acceptance import find_refusals

    render.say("checking what this version can do of it ...")
    return [find_refusals(path, draft) for path, draft in zip(paths, migration.drafts, strict=True)]


def _json_of(migration: Migration, refusals: list[list[Problem]], places: list[dict[str, Any]]) -> dict[str, Any]:
    jobs = [
        place
        | {
            "family": draft.family,
            "lines": draft.lines,
            "downloads": migration.downloads,
            "notes": [*draft.notes, *migration.notes],
            "without_counterpart": draft.without_counterpart,
            "refused": [{"key": each.key, "message": each.message} for each in refused],
        }
        for place, draft, refused in zip(places, migration.drafts, refusals, strict=True)
    ]
    return {"jobs": jobs, "refused": [{"place": each.key, "message": each.message} for each in migration.refused]}


def _paths(migration: Migration, output: Path, *, force: bool) -> list[Path]:
    """Where each job goes. Raises DsrayError where the place is wrong or taken."""
    names = migration.names()
    if output.suffix == ".toml" and not output.is_dir():
        if len(names) > 1:
            raise DsrayError(
                f"the script makes {len(names)} jobs, and {output} is one file",
                hint=f"name a folder: -o {output.with_suffix('')}",
            )
        paths = [output]
    else:
        paths = [output / f"{name}.toml" for name in names]
    if there := [str(path) for path in paths if path.exists() and not force]:
        raise DsrayError(f"{', '.join(there)} is already there", hint="--force overwrites it")
    blocked = next((folder for path in paths for folder in path.parents if folder.exists() and not folder.is_dir()), None)
    if blocked is not None:
        raise DsrayError(f"{blocked} is a file, not a folder", hint="name another place with -o")
    return paths


def _report(migration: Migration, written: list[Path], *, as_json: bool) -> int:
    refusals = _check(migration, written)
    code = ExitCode.USAGE if migration.refused or any(refusals) else ExitCode.DONE
    if as_json:
        render.result_json(_json_of(migration, refusals, [{"path": str(path)} for path in written]) | {"exit_code": int(code)})
        return code
    for path in written:
        render.result(str(path))
    told = [f"note: {text}" for draft in migration.drafts for text in draft.notes]
    told += [f"without counterpart: {text}" for draft in migration.drafts for text in draft.without_counterpart]
    told += [f"note: {text}" for text in migration.notes]
    told += [f"to be run first: {text}" for text in migration.downloads]
    for text in dict.fromkeys(told):
        render.say(text)
    for path, refused in zip(written, refusals, strict=True):
        for problem in refused:
            render.say(f"{path}: refused by this version: {problem}")
    accepted = [str(path) for path, refused in zip(written, refusals, strict=True) if not refused]
    if accepted:
        render.say(f"look at it, then: dsray plan {accepted[0]}; dsray submit {' '.join(accepted)}")
    _tell_refused(migration)
    return code


def _tell_refused(migration: Migration) -> None:
    if migration.refused:
        render.error(JobFileError("no job is made of", migration.refused))
