"""`dsray`: the commands, and the one boundary at which errors become a message and an exit code."""

from __future__ import annotations

import errno
import io
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from diffsynth_ray import __version__
from diffsynth_ray.cli import (
    control,
    data,
    doctor,
    download,
    export,
    foreground,
    import_script,
    inspect,
    render,
    report,
    submit,
)
from diffsynth_ray.cli.cache import cache_app, import_cache
from diffsynth_ray.errors import DsrayError, ExitCode

app = typer.Typer(
    name="dsray",
    help="Train image and video diffusion models on a Ray cluster from one TOML file.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich costs a third of the time of --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_OF_THE_FILE_SYSTEM = frozenset(
    (
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST,
        errno.ELOOP,
    )
)  # fmt: skip
"""Errors of a file that its user can mend, wherever they come up."""
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer brings its own copy of click


def _show_version(wanted: bool) -> None:
    if wanted:
        render.result(f"dsray {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Train image and video diffusion models on a Ray cluster from one TOML file."""


app.command("submit")(submit.submit)
app.command("run")(foreground.run)
app.command("plan")(inspect.plan)
app.command("status")(inspect.status)
app.command("logs")(inspect.logs)
app.command("stop")(control.stop)
app.command("list")(inspect.list_runs)
app.add_typer(cache_app, name="cache")
app.command("import-cache")(import_cache)
app.command("doctor")(doctor.doctor)
app.command("import")(import_script.import_script)
app.add_typer(data.app, name="data")
app.command("download")(download.download)
app.command("export")(export.export)
app.command("report")(report.report)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code. Every error of every command ends here."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper) and (sys.stdout.errors == "strict" or sys.stdout.encoding != "utf-8"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character gets the others
    as_json = "--json" in arguments
    try:
        outcome = app(args=arguments, prog_name="dsray", standalone_mode=False)
        return int(outcome) if isinstance(outcome, int) else ExitCode.DONE
    except typer.Exit as ending:
        return ending.exit_code
    except (KeyboardInterrupt, typer.Abort):
        render.say("interrupted")
        return ExitCode.INTERRUPTED
    except (BrokenPipeError, SystemExit) as ended:
        # Of a broken pipe typer makes a SystemExit; others are Ray's answer to a signal.
        if not isinstance(ended, BrokenPipeError) and not isinstance(ended.__context__, BrokenPipeError):
            raise
        render.close_quietly()
        return ExitCode.DONE
    except _UsageError as problem:
        return _usage(problem, as_json=as_json)
    except Exception as problem:  # noqa: BLE001 - the process boundary: the traceback is kept in a file
        told = _shown(problem)
        _tell(told, as_json=as_json)
        return told.exit_code


def _tell(problem: DsrayError, *, as_json: bool) -> None:
    if as_json and not getattr(sys.stdout, "closed", False):
        try:
            return render.error_json(problem)
        except OSError:  # the reader of stdout has gone, or its disk is full
            render.close_quietly()
    render.error(problem)


def _usage(problem: Exception, *, as_json: bool) -> int:
    context = getattr(problem, "ctx", None)
    message = getattr(problem, "format_message", lambda: str(problem))()
    if type(problem).__name__ == "NoArgsIsHelpError":
        render.say(message)
        return ExitCode.USAGE
    hint = f"see `{context.command_path} --help`" if context else None
    _tell(DsrayError(message, hint=hint), as_json=as_json)
    return ExitCode.USAGE


def _shown(problem: Exception) -> DsrayError:
    if isinstance(problem, DsrayError):
        return problem
    if isinstance(problem, OSError) and problem.filename and problem.errno in _OF_THE_FILE_SYSTEM:
        return DsrayError(f"{problem.filename}: {problem.strerror}")
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        render.close_quietly()  # what is left for it would fail once more at the end of the process
        return DsrayError(f"the result cannot be written: {problem.strerror}")
    return _unexpected(problem)


class _UnexpectedError(DsrayError):
    exit_code = ExitCode.UNEXPECTED


def _unexpected(problem: Exception) -> DsrayError:
    text = "".join(traceback.format_exception(problem))
    summary = f"unexpected {type(problem).__name__}: {problem}"
    try:
        from diffsynth_ray.launch.registry import state_dir

        path: Path = state_dir() / f"error-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        path.write_text(f"dsray {' '.join(sys.argv[1:])}\n{text}")
    except (OSError, DsrayError):
        return _UnexpectedError(f"{summary}\n{text}")
    return _UnexpectedError(summary, hint=f"this is a bug of dsray; the traceback is in {path}")


if __name__ == "__main__":
    sys.exit(main())
