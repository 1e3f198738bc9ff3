"""The output directory of a run: whom it belongs to, its attempts, its files.

`job.json` names the run that owns the directory. `attempt.json` holds the fencing token of the newest attempt: an attempt
whose token is no longer there commits nothing. Whatever appears under its final name is complete: files are written
beside it and renamed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.errors import OutputError

_PROGRESS = re.compile(
    r"step (?P<step>\d+)/(?P<num_steps>\d+) \| loss (?P<loss>[-+\d.einfa]+) \| lr (?P<lr>[-+\d.e]+)"
    r" \| grad norm (?P<grad_norm>[-+\d.einfa]+) \| (?P<step_s>[\d.]+) s/step \| (?P<samples_per_s>[\d.]+) samples/s"
    r" \| data wait (?P<data_wait_s>[\d.]+) s \| (?P<left_s>\d+) s left"
)

_RUN_OF_ATTEMPT = re.compile(r"(?P<run>.+)-(?:a|local-)\d+")
"""A submission id."""
_EXPORT = re.compile(r"(?:step|epoch)-\d+\.|best\.")
_UNKNOWN = "unknown"
"""In the place of a run's name."""
_UNREADABLE = (FileNotFoundError, NotADirectoryError, ValueError, TypeError)
"""Of a file that only tells how far a run is: one that is damaged, or another version's, is as good as none."""
_DATA_BOUND_SHARE = 0.2
"""Share of a step's time that may be spent waiting for data."""
_DATA_BOUND_S = 0.05
"""Shorter waits are not worth a word."""


@dataclass(frozen=True)
class Progress:
    """Where training is. One line of the log, and `progress.json`."""

    step: int
    num_steps: int
    loss: float
    lr: float
    grad_norm: float
    step_s: float
    samples_per_s: float
    data_wait_s: float
    left_s: int

    def line(self) -> str:
        """One line of the log; `parse_progress` reads it back."""
        return (
            f"step {self.step}/{self.num_steps} | loss {self.loss:.6g} | lr {self.lr:.3g} | grad norm {self.grad_norm:.4g}"
            f" | {self.step_s:.3f} s/step | {self.samples_per_s:.2f} samples/s | data wait {self.data_wait_s:.3f} s"
            f" | {self.left_s} s left"
        )

    def data_note(self) -> str | None:
        """One sentence where the job waits for its data more than it should, else None."""
        share = self.data_wait_s / self.step_s if self.step_s > 0 else 0.0
        if share < _DATA_BOUND_SHARE or self.data_wait_s < _DATA_BOUND_S:
            return None
        return (
            f"the job is data-bound: {share:.0%} of each step is spent waiting for decoded samples; give the cluster more CPUs "
            "(or raise dataset.num_workers where it is set), make the files smaller, or train with larger steps"
        )


def parse_progress(line: str) -> Progress | None:
    """The progress that a log line tells, or None."""
    match = _PROGRESS.search(line)
    if match is None:
        return None
    values: dict[str, Any] = match.groupdict()
    counts = {"step", "num_steps", "left_s"}
    return Progress(**{name: int(text) if name in counts else float(text) for name, text in values.items()})  # type: ignore[arg-type]


_ENCODE = re.compile(r"encode (?P<done>\d+)/(?P<total>\d+) samples \| (?P<per_s>[\d.]+) samples/s \| (?P<left_s>\d+) s left")


@dataclass(frozen=True)
class EncodeProgress:
    """Where stage one of split training is; a text and an image count one each. A line of the log, and `encode.json`."""

    done: int
    total: int
    per_s: float
    left_s: int

    def line(self) -> str:
        """One line of the log; `parse_encode_progress` reads it back."""
        return f"encode {self.done}/{self.total} samples | {self.per_s:.2f} samples/s | {self.left_s} s left"


def parse_encode_progress(line: str) -> EncodeProgress | None:
    """The progress of stage one that a log line tells, or None."""
    match = _ENCODE.search(line)
    if match is None:
        return None
    return EncodeProgress(int(match["done"]), int(match["total"]), float(match["per_s"]), int(match["left_s"]))


@dataclass(frozen=True)
class Attempt:
    """One start of a run. `token` is its right to commit."""

    number: int
    token: str
    submission_id: str


@dataclass(frozen=True)
class ValidationEntry:
    """One validation of a run: a line of validation.jsonl."""

    step: int
    """Optimizer steps done before it."""
    loss: float
    """Mean over samples and timesteps, weighted as in training."""
    quantiles: list[float]
    """The mean of each timestep, from most to least noise."""
    num_samples: int
    seconds: float
    ema_loss: float | None = None
    """Of the moving average of the weights, where there is one."""


class RunDir:
    """Paths and small files of one run's output directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job_path = path / "job.json"
        self.attempt_path = path / "attempt.json"
        self.writer_path = path / "writer.json"
        self.attempts_path = path / "attempts.jsonl"
        self.error_path = path / "error.json"
        self.bad_samples_path = path / "bad_samples.jsonl"
        self.progress_path = path / "progress.json"
        self.encode_path = path / "encode.json"
        self.stop_path = path / "stop.json"
        self.checkpoint_request_path = path / "checkpoint.json"
        self.environment_path = path / "environment.json"
        self.loss_path = path / "loss.csv"
        self.validation_path = path / "validation.jsonl"
        self.samples_dir = path / "samples"
        self.contact_sheet_path = self.samples_dir / "contact_sheet.png"
        self.tensorboard_dir = path / "tensorboard"
        self.checkpoints_dir = path / "checkpoints"
        self.checkpoint_location_path = path / "checkpoint_location.json"
        self.ray_dir = path / ".ray"

    def owner(self) -> ResolvedJob | None:
        """The job of the run that owns the directory, or None where it is free."""
        try:
            text = self.job_path.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(
                f"output.path: {self.job_path} cannot be read: {error}",
                hint="use another output.path, or mend the permissions of that folder",
            ) from error
        try:
            return ResolvedJob.model_validate_json(text)
        except ValidationError as error:
            if error.errors()[0]["type"] == "json_invalid":
                raise OutputError(
                    f"output.path: {self.job_path} is damaged: it is not JSON",
                    hint="delete that file and submit the run's own job again: it goes on from its checkpoints",
                ) from error
            raise OutputError(
                f"output.path: {self.job_path} is not a job of this version of dsray ({error.error_count()} differences)",
                hint="use another output.path, or move that folder away",
            ) from error

    def owner_name(self) -> str | None:
        """Name of the run that owns the directory, also where its job.json was deleted; None where the directory is free."""
        owner = self.owner()
        return owner.run if owner is not None else self._left_by()

    def _left_by(self) -> str | None:
        """Whose files are here, without a job.json that says it: as its attempts tell, else unknown."""
        for attempt in reversed(self.attempts()):
            if found := _RUN_OF_ATTEMPT.fullmatch(str(attempt.get("submission_id"))):
                return found["run"]
        return _UNKNOWN if self._traces() else None

    def _traces(self) -> list[str]:
        """Names of what a run has written that another would write over."""
        known = (self.attempts_path, self.checkpoints_dir, self.loss_path)
        exports = [path.name for path in sorted(self.path.glob("*.safetensors")) if _EXPORT.match(path.name)]
        return exports + [path.name for path in known if path.exists()]

    def check_owner(self, resolved: ResolvedJob) -> None:
        """Raise OutputError, with the differing keys, where another run owns the directory."""
        owner = self.owner()
        if owner is None:
            self._check_left_by(resolved)
            return
        if owner.run == resolved.run:
            return
        keys = sorted(owner.given.keys() | resolved.given.keys())
        differing = [key for key in keys if owner.given.get(key) != resolved.given.get(key)]
        lines = [f"  {key}: {owner.given.get(key)!r} there, {resolved.given.get(key)!r} here" for key in differing]
        raise OutputError(
            "\n".join([f"{self.path} belongs to the run {owner.run}, this job is {resolved.run}; they differ in", *lines]),
            hint="use another output.path, or --new to move the old content to "
            f"{self.path / 'previous' / owner.run} and start afresh",
        )

    def _check_left_by(self, resolved: ResolvedJob) -> None:
        name = self._left_by()
        if name is None or name == resolved.run:
            return
        if name == _UNKNOWN:
            message = f"{self.path} has files of a run, as {self._traces()[0]}, without the job.json that says of which"
        else:
            message = f"{self.path} has files of the run {name}, though no job.json any more; this job is {resolved.run}"
        raise OutputError(
            message, hint=f"use another output.path, or --new to move them to {self.path / 'previous' / name} and start afresh"
        )

    def check_writable(self) -> None:
        """Create the directory and write one file into it; raises OutputError with the cause."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{secrets.token_hex(4)}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise OutputError(
                f"output.path: {self.path} cannot be written: {error.strerror or error}; "
                "choose another folder or mend its permissions"
            ) from error

    def move_aside(self) -> Path | None:
        """Move everything to previous/{run}; returns that folder, or None where there was nothing."""
        try:
            name = self.owner_name()
        except OutputError:
            name = _UNKNOWN
        if name is None:
            return None
        target = self.path / "previous" / name
        number = 1
        while target.exists():
            number += 1
            target = self.path / "previous" / f"{name}.{number}"
        target.mkdir(parents=True)
        for entry in self.path.iterdir():
            if entry.name != "previous":
                shutil.move(str(entry), str(target / entry.name))
        return target

    def begin_attempt(self, resolved: ResolvedJob, submission_id: str) -> Attempt:
        """Claim the directory for a new attempt; the one before loses its right to commit."""
        self.check_writable()
        self.check_owner(resolved)
        self.checkpoint_location(resolved)
        number = max((entry["attempt"] for entry in self.attempts()), default=0) + 1
        attempt = Attempt(number=number, token=secrets.token_hex(8), submission_id=submission_id)
        write_whole(self.job_path, resolved.model_dump_json(indent=2))
        write_whole(self.attempt_path, json.dumps(asdict(attempt)))
        self.stop_path.unlink(missing_ok=True)
        self.checkpoint_request_path.unlink(missing_ok=True)
        self.error_path.unlink(missing_ok=True)
        self.encode_path.unlink(missing_ok=True)
        self.note_attempt(attempt, "started", num_workers=resolved.num_workers, device=resolved.device)
        return attempt

    def holds_token(self, token: str) -> bool:
        """Whether the attempt with this token may still commit."""
        try:
            return json.loads(self.attempt_path.read_text())["token"] == token
        except (FileNotFoundError, NotADirectoryError):
            return False

    def checkpoint_location(self, resolved: ResolvedJob) -> str:
        """Folder or URL of the run's checkpoints. Under output.checkpoint_path each run has a folder of its own, which goes out
        of use together with this directory's content (--new)."""
        base = resolved.job.output.checkpoint_path
        try:
            known = json.loads(self.checkpoint_location_path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            known = {"base": None, "location": str(self.checkpoints_dir)}
            if base is not None and not self.checkpoints_dir.exists():
                folder, mark, options = base.partition("?")  # as in s3://bucket/runs?endpoint_override=...
                location = f"{folder.rstrip('/')}/{resolved.run}-{secrets.token_hex(4)}{mark}{options}"
                known = {"base": base, "location": location}
                write_whole(self.checkpoint_location_path, json.dumps(known))
        if known["base"] != base:
            cure = f"set it to {known['base']!r}" if known["base"] else "remove the key"
            raise OutputError(
                f"output.checkpoint_path: got {base!r}, but the checkpoints of this run are at {known['location']}",
                hint=f"{cure}, or --new to start afresh",
            )
        return str(known["location"])

    def claim_writer(self, token: str) -> str | None:
        """A fresh name for the group of workers that writes from now on; None where the attempt has no right to commit."""
        if not self.holds_token(token):
            return None
        writer = secrets.token_hex(4)
        write_whole(self.writer_path, json.dumps({"token": token, "writer": writer}))
        return writer

    def may_commit(self, token: str, writer: str) -> bool:
        """Whether neither a newer attempt nor a restarted group of workers has taken over."""
        try:
            newest = json.loads(self.writer_path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return False
        return self.holds_token(token) and newest == {"token": token, "writer": writer}

    def note_attempt(self, attempt: Attempt, event: str, **details: Any) -> None:
        """Append one line to attempts.jsonl."""
        entry = {"attempt": attempt.number, "event": event, "time": time.time(), "submission_id": attempt.submission_id}
        append_line(self.attempts_path, json.dumps(entry | details))

    def attempts(self) -> list[dict[str, Any]]:
        """The lines of attempts.jsonl; a line cut by a crash is left out."""
        return list(read_jsonl(self.attempts_path))

    def request_stop(self, *, reason: str, now: bool = False) -> None:
        """Ask the running attempt to checkpoint and end, which rank 0 reads after each step; `now`: its driver to end it."""
        write_whole(self.stop_path, json.dumps({"time": time.time(), "reason": reason, "now": now}))

    def stop_reason(self, *, now: bool = False) -> str | None:
        """Why the run should stop (`now`: at once), or None."""
        try:
            request = json.loads(self.stop_path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        return str(request["reason"]) if request.get("now") or not now else None

    def request_checkpoint(self) -> None:
        """Ask the running attempt for a checkpoint; rank 0 reads it after each step."""
        write_whole(self.checkpoint_request_path, json.dumps({"time": time.time(), "request": secrets.token_hex(4)}))

    def checkpoint_request(self) -> str | None:
        """The request for a checkpoint that is not yet answered, if there is one: what its file holds."""
        try:
            return self.checkpoint_request_path.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def answer_checkpoint_request(self, request: str | None) -> None:
        """Take a request, if there was one, back: a checkpoint of a step after it is committed. A newer request stays."""
        if request is not None and self.checkpoint_request() == request:
            self.checkpoint_request_path.unlink(missing_ok=True)

    def write_progress(self, progress: Progress) -> None:
        """Keep the newest progress for `dsray status`."""
        write_whole(self.progress_path, json.dumps(asdict(progress)))

    def note_validation(self, entry: ValidationEntry) -> None:
        """Append one line to validation.jsonl."""
        append_line(self.validation_path, json.dumps(asdict(entry)))

    def validations(self) -> list[ValidationEntry]:
        """The run's validations in order."""
        return [ValidationEntry(**entry) for entry in read_jsonl(self.validation_path)]

    def forget_validations(self, *, after_step: int) -> None:
        """Drop what a run that goes on after this step will do again; a run from the start begins with a validation."""
        if self.validation_path.exists():
            kept = [entry for entry in self.validations() if 0 < after_step >= entry.step]
            write_whole(self.validation_path, "".join(json.dumps(asdict(entry)) + "\n" for entry in kept))

    def sample_path(self, step: int, number: int, *, is_clip: bool) -> Path:
        """Of the sample of a prompt (from 0) after a step."""
        return self.samples_dir / f"step-{step}" / f"step-{step}-{number}.{'mp4' if is_clip else 'png'}"

    def find_sample(self, step: int, number: int) -> Path | None:
        """The sample of a prompt (from 0) after a step, where it was made."""
        paths = (self.sample_path(step, number, is_clip=is_clip) for is_clip in (False, True))
        return next((path for path in paths if path.exists()), None)

    def sample_weights_path(self, step: int) -> Path:
        """Temporary file of the weights that another process makes the samples of a step with."""
        return self.samples_dir / f".weights-{step}.safetensors"

    def forget_sample_weights(self) -> list[int]:
        """Remove such files of workers that were lost; returns their steps, ascending."""
        paths = list(self.samples_dir.glob(".weights-*.safetensors"))
        for path in paths:
            path.unlink(missing_ok=True)
        return sorted(int(path.name.split("-")[1].partition(".")[0]) for path in paths)

    def sample_steps(self) -> list[int]:
        """Steps that samples were made after, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.samples_dir.glob("step-*") if path.is_dir())

    def progress(self) -> Progress | None:
        """The newest progress, or None before the first logged step."""
        try:
            return Progress(**json.loads(self.progress_path.read_text()))
        except _UNREADABLE:
            return None

    def write_encode_progress(self, progress: EncodeProgress) -> None:
        """Keep the newest progress of stage one for `dsray status`."""
        write_whole(self.encode_path, json.dumps(asdict(progress)))

    def encode_progress(self) -> EncodeProgress | None:
        """The newest progress of this attempt's stage one, or None where it encodes nothing."""
        try:
            return EncodeProgress(**json.loads(self.encode_path.read_text()))
        except _UNREADABLE:
            return None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, none where there is no file; a line cut by a crash is left out."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def append_line(path: Path, line: str) -> None:
    """Append a line to a file whose last line a crash may have cut."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(f"{line}\n".encode())


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it appears under its name only when complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # on a full disk a run would leave one after every step
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
