"""The report of a run: one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from diffsynth_ray import __version__
from diffsynth_ray.config.schema import Job, keys, lookup
from diffsynth_ray.report.curves import WIDTH, Curve, draw_chart, smoothed
from diffsynth_ray.report.record import AttemptRecord, RunRecord

_SMOOTHED_SHARE = 30
"""The smoothed loss averages over about this part of all points."""
_SHOWN_EXPORTS = 12


def build_page(record: RunRecord) -> str:
    """The whole page."""
    template = Template(files("diffsynth_ray.report").joinpath("page.html").read_text(encoding="utf-8"))
    job = record.resolved.job
    device = {"cuda": "GPU", "cpu": "CPU"}[record.resolved.device]
    return template.substitute(
        title=escape(f"{record.resolved.run} - dsray"),
        run=escape(record.resolved.run),
        state=escape(record.state.lower()),
        state_class=escape(record.state.split()[0]),
        subtitle=escape(
            f"{job.model.family or 'family from the files'}{' (tiny)' if job.model.tiny else ''}, "
            f"{_what_is_trained(job)}, {record.resolved.num_workers} worker(s) on {device}, "
            f"{record.resolved.global_batch_size} samples a step"
        ),
        facts="".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in _facts(record)),
        sections="\n".join(_sections(record)),
        footer=escape(f"Written by dsray {__version__} on {time.strftime('%Y-%m-%d %H:%M')}."),
    )


def _what_is_trained(job: Job) -> str:
    parts = [f"LoRA of rank {job.lora.rank} on {job.lora.base_model}"] if job.lora.base_model else []
    return " and ".join([*parts, *(f"all of {name}" for name in job.training.trainable_models)])


def _facts(record: RunRecord) -> Iterator[tuple[str, str]]:
    of_all = f" / {record.num_steps}" if record.num_steps else ""
    yield "optimizer steps", f"{record.step}{of_all}"
    if losses := record.figures.get("loss"):
        yield "training loss, smoothed", f"{smoothed(losses, window=_window(losses))[-1][1]:.4g}"
    if (best := record.best_validation) is not None:
        yield f"lowest validation loss, step {best.step}", f"{best.loss:.4g}"
    if speeds := record.figures.get("samples_per_s"):
        yield "samples a second", f"{speeds[-1][1]:.3g}"
    if record.seconds:
        yield "time of all attempts", _duration(record.seconds)
    count = sum(attempt.num_recoveries for attempt in record.attempts)
    recoveries = f", {count} {'recovery' if count == 1 else 'recoveries'}" if count else ""
    yield ("attempt" if len(record.attempts) == 1 else "attempts") + recoveries, str(len(record.attempts))


def _window(points: list[tuple[int, float]]) -> int:
    return max(3, len(points) // _SMOOTHED_SHARE)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _sections(record: RunRecord) -> Iterator[str]:
    if record.state == "FAILED" or record.error is not None:
        yield _failure(record)
    marks = list(_marks(record))
    losses = record.figures.get("loss", [])
    curves = [Curve("every step", losses, "raw"), Curve("smoothed", smoothed(losses, window=_window(losses)), "a")]
    chart = draw_chart(curves, width=WIDTH, marks=marks)
    yield _chart("Training loss", chart, note=_marks_note(marks), missing=_no_figures(record))
    yield from _validation(record, marks)
    yield from _samples(record)
    pairs = [
        ("Learning rate", "lr", "", False),
        ("Gradient norm", "grad_norm", "", False),
        ("Time of a step", "step_s", " s", True),
        ("Samples a second", "samples_per_s", "", True),
        ("Waiting for data, in each step", "data_wait_s", " s", True),
        ("Waiting for other workers, in each step", "communication_s", " s", True),
        ("Memory of the GPU of rank 0, at most", "gpu_memory_gib", " GiB", True),
        ("Memory of the process of rank 0", "host_memory_gib", " GiB", True),
    ]
    charts = [
        _chart(title, draw_chart([Curve(title, record.figures[key], "a")], unit=unit, marks=marks, from_zero=zero))
        for title, key, unit, zero in pairs
        if any(value for _, value in record.figures.get(key, []))
    ]
    if charts:
        yield f'<div class="two">{"".join(charts)}</div>'
    yield _attempts(record)
    yield _exports(record)
    yield _job(record.resolved.job)
    yield _environment(record)


def _section(title: str, body: str, *, style: str = "") -> str:
    return f'<section class="{style}"><h2>{escape(title)}</h2>{body}</section>'


def _chart(title: str, chart: str, *, note: str = "", missing: str = "") -> str:
    body = chart or f'<p class="note">{escape(missing or "nothing was logged")}</p>'
    return _section(title, body + (f'<p class="note">{escape(note)}</p>' if note and chart else ""))


def _no_figures(record: RunRecord) -> str:
    return "no step was logged" if record.resolved.job.logging.csv else "logging.csv = false: the figures were not kept"


def _marks(record: RunRecord) -> Iterator[tuple[int, str]]:
    """Where the run was interrupted."""
    for attempt in record.attempts:
        for loss in attempt.losses:
            yield int(loss.get("step") or 0), f"attempt {attempt.number}: {loss.get('cause')}"
        if attempt is not record.attempts[-1] and attempt.step:
            yield attempt.step, f"attempt {attempt.number} {attempt.state.lower()} here, the next one went on"


def _marks_note(marks: list[tuple[int, str]]) -> str:
    return "Dashed lines: the run was interrupted there and went on from its last checkpoint." if marks else ""


def _validation(record: RunRecord, marks: list[tuple[int, str]]) -> Iterator[str]:
    entries = record.validations
    if not entries:
        return
    newest = entries[-1]
    whole = [Curve("mean over all timesteps", [(entry.step, entry.loss) for entry in entries], "b", dots=True)]
    averaged = [(entry.step, entry.ema_loss) for entry in entries if entry.ema_loss is not None]
    if averaged:
        whole.append(Curve("of the averaged weights", averaged, "a", dots=True))
    names = ["most noise", *(f"quantile {number + 1}" for number in range(1, len(newest.quantiles) - 1)), "least noise"]
    parts = [
        Curve(name, [(entry.step, entry.quantiles[number]) for entry in entries], f"q{min(number, 3)}", dots=True)
        for number, name in enumerate(names[: len(newest.quantiles)])
    ]
    note = f"{newest.num_samples} samples at the same timesteps with the same noise every time: steps and runs compare."
    yield (
        '<div class="two">'
        + _chart("Validation loss", draw_chart(whole, marks=marks), note=note)
        + _chart("Validation loss by timestep", draw_chart(parts, marks=marks))
        + "</div>"
    )


def _samples(record: RunRecord) -> Iterator[str]:
    if record.contact_sheet is not None:
        body = f'<img class="sheet" alt="samples by prompt and step" src="{_data_uri(record.contact_sheet, "image/png")}">'
        for prompt, clip in record.clips.items():
            uri = _data_uri(clip, "video/mp4")
            body += f'<video controls muted loop src="{uri}" title="{escape(prompt, quote=True)}"></video>'
        validation = record.resolved.job.validation
        note = (
            f"{validation.num_inference_steps} denoising steps, guidance {validation.guidance_scale:g}, "
            f"seed {validation.seed}. Rows are prompts, columns are steps; step 0 is before the training."
        )
        yield _section("Samples", f'{body}<p class="note">{escape(note)}</p>')


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _failure(record: RunRecord) -> str:
    error = record.error or {}
    cause = str(error.get("cause") or record.attempts[-1].cause or "no cause is known")
    where = ", ".join(f"{name} {error[name]}" for name in ("attempt", "rank", "step", "node") if name in error)
    body = f"<pre>{escape(cause)}</pre>" + (f'<p class="note">{escape(where)}</p>' if where else "")
    if details := error.get("details"):
        body += f"<details><summary>Traceback</summary><pre>{escape(str(details))}</pre></details>"
    return _section("What ended it", body, style="failed")


def _attempts(record: RunRecord) -> str:
    rows = "".join(row for attempt in record.attempts for row in _attempt_rows(attempt))
    head = "<tr><th>attempt</th><th>began</th><th>lasted</th><th>workers</th><th>until step</th><th>what happened</th></tr>"
    return _section("Attempts and recoveries", f"<table>{head}{rows}</table>")


_SHORT = ("number",) * 5
"""The columns before what happened, each on one line."""


def _attempt_rows(attempt: AttemptRecord) -> Iterator[str]:
    lasted = _duration(attempt.ended - attempt.started) if attempt.ended is not None else ""
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.started))
    cause = attempt.cause or ""
    if any(attempt.ended_by(loss) for loss in attempt.losses):
        cause = cause.partition("\n")[2].strip() or cause  # the first line is that loss, which has a row of its own
    what = attempt.state.lower() + (f": {cause}" if cause else "")
    workers = f"{attempt.num_workers} on {attempt.device}"
    yield _row([str(attempt.number), began, lasted, workers, str(attempt.step or ""), what], _SHORT)
    for loss in attempt.losses:
        when = time.strftime("%H:%M:%S", time.localtime(loss["time"]))
        kind = "lost: one too many" if attempt.ended_by(loss) else "lost and replaced"
        kind = "taken away" if loss.get("is_preemption") else kind
        rank = "" if loss.get("rank") is None else f" rank {loss['rank']}"
        yield _row(["", when, "", "", str(loss.get("step", "")), f"worker{rank} {kind}: {loss.get('cause')}"], _SHORT)


def _row(cells: list[str], styles: tuple[str, ...] = ()) -> str:
    styled = [*styles, *[""] * (len(cells) - len(styles))]
    inner = "".join(
        f'<td class="{style}">{escape(cell)}</td>' if style else f"<td>{escape(cell)}</td>"
        for cell, style in zip(cells, styled, strict=True)
    )
    return f"<tr>{inner}</tr>"


def _exports(record: RunRecord) -> str:
    newest = record.exports[-_SHOWN_EXPORTS:]
    rows = "".join(_row([name, f"{size / 2**20:.1f} MiB"], ("", "number")) for name, size in newest)
    more = len(record.exports) - len(newest)
    note = f'<p class="note">and {more} older ones</p>' if more else ""
    return _section("Exported weights", f"<table>{rows}</table>{note}" if rows else '<p class="note">none yet</p>')


def _job(job: Job) -> str:
    """All keys; what is not the default first."""
    given: list[tuple[str, Any]] = []
    defaults: list[tuple[str, Any]] = []
    for dotted, info in keys().items():
        value = lookup(job, dotted)
        is_default = value == info.get_default(call_default_factory=True)
        (defaults if is_default else given).append((dotted, value))
    table = "".join(_row([name, _plain(value)], ("given",)) for name, value in given)
    rest = "".join(_row([name, _plain(value)]) for name, value in defaults)
    hidden = f"<details><summary>{len(defaults)} keys at their default</summary><table>{rest}</table></details>"
    return _section("The job, as it was resolved", f"<table>{table}</table>{hidden}")


def _plain(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _environment(record: RunRecord) -> str:
    rows = "".join(_row([str(name), _plain(value)], ("given",)) for name, value in record.environment.items())
    return _section("Environment", f"<table>{rows}</table>" if rows else '<p class="note">not recorded</p>')
