"""The only module that prints: results to stdout, progress and hints to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from diffsynth_ray.errors import DsrayError, JobFileError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from diffsynth_ray.launch.runs import RunView
    from diffsynth_ray.run_dir import EncodeProgress, Progress

_RAYS_OWN = ("Running entrypoint for job ", "Runtime env is setting up.")


def result(text: str) -> None:
    """A line of the result."""
    print(text, flush=True)


def result_json(content: object) -> None:
    """The one object of --json."""
    print(json.dumps(content, indent=2, default=str), flush=True)


def say(text: str) -> None:
    """Progress or a hint. Where nobody reads it any more (a closed terminal, an ended `tee`), there is nothing to do."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def error(problem: DsrayError) -> None:
    """A problem that the user can mend."""
    say(f"error: {problem.message}")
    if problem.hint:
        say(f"hint: {problem.hint}")


def error_json(problem: DsrayError) -> None:
    """The same under --json."""
    content: dict[str, Any] = {
        "kind": type(problem).__name__,
        "message": problem.message,
        "hint": problem.hint,
        "exit_code": int(problem.exit_code),
    }
    if isinstance(problem, JobFileError):
        content["problems"] = [{"key": each.key, "message": each.message} for each in problem.problems]
    result_json({"error": content})


class LogView:
    """The running log: a progress bar a stage on a terminal, else the lines as they are."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._stages: dict[str, Any] = {}
        """The bars of the stages by name, as Rich numbers them."""
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> LogView:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            with suppress(OSError):  # a closed terminal
                self._bar.stop()
            self._bar = None

    def line(self, text: str) -> None:
        """Show one line of the log."""
        if any(mark in text for mark in _RAYS_OWN):
            return
        if self._is_terminal and self._advance(text):
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            say(text)

    def _advance(self, text: str) -> bool:
        """Move the stage's bar where the line tells progress; whether it does."""
        from diffsynth_ray.run_dir import parse_encode_progress, parse_progress

        if (encode := parse_encode_progress(text)) is not None:
            self._move("encode", done=encode.done, total=encode.total, figures=_encode_figures(encode), left_s=encode.left_s)
        elif (train := parse_progress(text)) is not None:
            self._move("train", done=train.step, total=train.num_steps, figures=_train_figures(train), left_s=train.left_s)
        else:
            return False
        return True

    def _move(self, stage: str, *, done: int, total: int, figures: str, left_s: float) -> None:
        if self._bar is None:
            self._bar = _start_bar()
        if stage not in self._stages:
            self._stages[stage] = self._bar.add_task(stage, figures="", left="")
        self._bar.update(self._stages[stage], total=total, completed=done, figures=figures, left=duration(left_s))


def _encode_figures(progress: EncodeProgress) -> str:
    return f"{progress.per_s:.2f} samples/s"


def _train_figures(progress: Progress) -> str:
    return f"loss {progress.loss:.4g}  {progress.step_s:.2f} s/step, {progress.samples_per_s:.2f} samples/s"


def _start_bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("{task.fields[left]} left"),
        console=Console(stderr=True),
    )
    bar.start()
    return bar


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the largest two."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def num_bytes(count: float) -> str:
    """Bytes with the unit that leaves up to four digits."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def plan(lines: list[str], tell: Callable[[str], None]) -> None:
    """A plan, to stdout or stderr as `tell` has it."""
    for line in lines:
        tell(line)


def status(view: RunView) -> None:
    """Everything about one run."""
    rows = [("run", view.run), ("state", view.state + (f" (attempt {view.attempt})" if view.attempt else ""))]
    if view.num_steps:
        rows.append(("steps", f"{view.step} of {view.num_steps}"))
    if view.encode is not None and view.state == "RUNNING" and view.encode.done < view.encode.total:
        rows.append(("encode", f"{view.encode.done} of {view.encode.total}, {duration(view.encode.left_s)} left"))
    if view.progress is not None:
        left = f", {duration(view.progress.left_s)} left" if view.state == "RUNNING" else ""
        wait = f" ({view.progress.data_wait_s:.2f} s of it waiting for data)"
        rows.append(("progress", f"loss {view.progress.loss:.4g}, {view.progress.step_s:.2f} s/step{wait}{left}"))
    rows += _diagnosis(view)
    rows += [("started", _clock(view.started)), ("ended", _clock(view.ended))]
    rows += [("output", view.output), ("dashboard", view.address or ""), ("files", ", ".join(view.files))]
    rows += [("cause", view.cause or ""), ("note", view.note or "")]
    for name, text in rows:
        if text:
            first, *more = text.splitlines()
            result(f"{name:<10}{first}")
            for line in more:
                result(f"{'':<10}{line}")


def _diagnosis(view: RunView) -> list[tuple[str, str]]:
    from diffsynth_ray.launch.diagnosis import sparkline

    found = view.diagnosis
    if found is None:
        return []
    rows = []
    if len(found.losses) > 1:
        rows.append(("loss", f"{found.losses[0]:.4g} {sparkline(found.losses)} {found.losses[-1]:.4g}"))
    if view.progress is not None:
        rows.append(("speed", f"{view.progress.samples_per_s:.2f} samples/s"))
    if view.state == "RUNNING":
        rows.append(("time", found.bottleneck or ""))
    if found.checkpoint_step is not None:
        rows.append(("resume", f"from step {found.checkpoint_step}, the checkpoint of {_clock(found.checkpoint_time)}"))
    return rows


def _clock(moment: float | None) -> str:
    return datetime.fromtimestamp(moment).isoformat(sep=" ", timespec="seconds") if moment else ""


def run_list(views: list[RunView]) -> None:
    """One line a run."""
    rows = [("RUN", "STATE", "STEP", "STARTED", "OUTPUT")]
    for view in views:
        steps = f"{view.step}/{view.num_steps}" if view.num_steps else "-"
        rows.append((view.run, view.state, steps, _clock(view.started) or "-", view.output))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        result("  ".join([*cells, row[4]]).rstrip())
    for view in views:
        if view.state in ("PENDING", "UNKNOWN") and view.note:
            result(f"{view.run} {view.note}")


def close_quietly() -> None:
    """After the reader of a pipe has gone (`dsray logs | head`), nothing more can be said."""
    with suppress(OSError):
        sys.stdout.close()


def doctor(checks: list[dict[str, Any]]) -> None:
    """The checks of `dsray doctor`: a line each, and a line for every place that differs or needs a cure."""
    for check in checks:
        findings = check["findings"]
        details = {finding["detail"] for finding in findings}
        same = len(details) == 1 and (len(findings) == 1 or check["state"] in ("ok", "skipped"))
        places = f", {len(findings)} nodes" if len(findings) > 1 else ""
        head = f"{check['number']:>2}  {check['state']:<8}{check['title']}"
        result(f"{head}: {next(iter(details))}{places}" if same else head)
        for finding in findings:
            if not same:
                mark = "" if finding["state"] == check["state"] else f" {finding['state']}:"
                result(f"{'':<12}{finding['where']}:{mark} {finding['detail']}")
            if finding["cure"] and finding["state"] != "ok":
                result(f"{'':<12}-> {finding['cure']}")
    counts = {state: sum(check["state"] == state for check in checks) for state in ("failed", "warning", "ok", "skipped")}
    say(", ".join(f"{count} {state}" for state, count in counts.items() if count))
