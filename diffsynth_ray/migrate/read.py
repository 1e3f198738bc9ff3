"""A launch script's file -> the job files that do the same."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffsynth_ray.errors import DsrayError, JobFileError, Problem
from diffsynth_ray.migrate.accelerate import read_setup
from diffsynth_ray.migrate.draft import Draft, build_draft
from diffsynth_ray.migrate.launch import TrainingCommand, as_training
from diffsynth_ray.migrate.secrets import hide_secrets
from diffsynth_ray.migrate.shell import Command, read_script
from diffsynth_ray.migrate.split import join_stages

_MAX_BYTES = 4 << 20
_QUIET = {"set", "echo", "printf", "true", ":", "[", "[[", "test", "shopt", "exit", "wait", "sleep", "date"}
"""Commands that no job needs."""
_NAME_LENGTH = 50


@dataclass
class Migration:
    """What a script becomes."""

    drafts: list[Draft] = field(default_factory=list)
    """One a job, in order."""
    downloads: list[str] = field(default_factory=list)
    """Commands of the script that fetch data or weights."""
    notes: list[str] = field(default_factory=list)
    """About the whole script; they stand in every job file."""
    refused: list[Problem] = field(default_factory=list)
    """Training commands of which no job can be made, with the reason."""

    def names(self) -> list[str]:
        """A job name for each draft, numbered where there are several."""
        width = len(str(len(self.drafts)))
        names = []
        for number, draft in enumerate(self.drafts, start=1):
            folder = Path(str(draft.values.get("output.path", "job"))).name
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder).strip("-._")[:_NAME_LENGTH] or "job"
            names.append(name if len(self.drafts) == 1 else f"{number:0{width}}-{name}")
        return names


def read_migration(script: Path, *, config_file: Path | None = None, environment: Mapping[str, str] | None = None) -> Migration:
    """Read a launch script; `config_file` is accelerate's and takes the place of those that the script names.

    Raises DsrayError where it cannot be read or trains nothing, JobFileError where a flag's value makes no sense.
    """
    source = str(script)
    if config_file is not None and not config_file.is_file():
        raise JobFileError(str(config_file), [Problem("--config_file", "no such file")])
    read = read_script(_text_of(script), source=source, environment=os.environ if environment is None else environment)
    migration = Migration(notes=read.notes)
    drafts = []
    for command in read.commands:
        training = as_training(command)
        if training is not None:
            drafts.append(_draft_of(training, script, config_file))
        else:
            _note_other(command, migration)
    if not drafts:
        raise DsrayError(
            f"{source}: no training command of DiffSynth-Studio in it",
            hint="looked for `accelerate launch ... train.py --dataset_base_path ...`, also under python and torchrun",
        )
    migration.drafts, migration.refused = join_stages(drafts)
    if problems := [problem for draft in migration.drafts for problem in draft.problems]:
        raise JobFileError(source, problems + migration.refused)
    return migration


def _text_of(script: Path) -> str:
    try:
        if script.stat().st_size > _MAX_BYTES:
            raise DsrayError(f"{script} is larger than {_MAX_BYTES >> 20} MiB: not a launch script")
        return script.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DsrayError(f"{script}: no such file", hint="dsray import train.sh -o job.toml") from None
    except UnicodeDecodeError:
        raise DsrayError(f"{script} is not text in UTF-8", hint="give DiffSynth-Studio's launch script (.sh)") from None
    except OSError as error:
        raise DsrayError(f"{script} cannot be read: {error.strerror}") from error


def _draft_of(command: TrainingCommand, script: Path, config_file: Path | None) -> Draft:
    named = command.launcher.get("config_file")
    notes = []
    path = config_file
    if named and path is None:
        path = _find(named, script)
        if path is None:
            notes.append(
                f"accelerate's configuration {named} was not found from here: workers and DeepSpeed are not set; "
                "give it with --config_file"
            )
    elif named and path is not None and Path(named).name != path.name:
        notes.append(f"accelerate's configuration is {path}, given with --config_file, not the script's {named}")
    setup = read_setup(command.launcher, path, lambda inner: _find(inner, path or script))
    setup.notes = notes + setup.notes
    return build_draft(command, setup)


def _find(named: str, near: Path) -> Path | None:
    """A file named relative to the folder that the script was run in: here, or one of the folders above `near`."""
    for folder in (Path(), *near.absolute().parents):
        if (folder / Path(named).expanduser()).is_file():
            return folder / Path(named).expanduser()
    return None


def _note_other(command: Command, migration: Migration) -> None:
    program = command.words[0].rpartition("/")[2]
    shown = command.shown()
    if command.words[1:2] == ("download",) or program in ("wget", "curl", "git"):
        migration.downloads.append(
            " ".join(word if "***" in word else shlex.quote(word) for word in hide_secrets(command.words))
        )
    elif command.words[0].startswith("--"):
        migration.notes.append(f"line {command.line}: {shown} belongs to no command and is left out")
    elif program == "cd":
        migration.notes.append(f"line {command.line}: {shown}; run `dsray` in that folder, or make the paths absolute")
    elif program not in _QUIET:
        migration.notes.append(f"line {command.line}: {shown} is left out; run it before, if the job needs it")
