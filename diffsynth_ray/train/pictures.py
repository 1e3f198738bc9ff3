"""Sample pictures of a run: made with the weights of their step, written as files, and shown together on one sheet.

Where the cluster has room that the training does not use, a process of its own makes them while the training goes on, from
the trained weights in a temporary file. Else, and at the end of the training, the prompts are dealt to the workers between
two steps. The noise of a prompt is always the same. Whatever goes wrong with a sample is told, and ends no training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from diffsynth_ray.config.schema import Job
from diffsynth_ray.data.samples import SampleRule
from diffsynth_ray.errors import DsrayError
from diffsynth_ray.run_dir import RunDir, write_whole
from diffsynth_ray.train.export import write_tensors
from diffsynth_ray.train.group import Group
from diffsynth_ray.train.sample_file import SampleFile
from diffsynth_ray.train.sampler import Errand, Made, Sampler, Spare, png
from diffsynth_ray.train.trainer import Trainer

_MOST_WEIGHT_BYTES = 2 << 30
"""Trained weights that are written for another process; with more, the workers make the samples themselves."""
_WAIT_S = 0.5
_BEGIN_S = 60.0
"""After the training's end, what has found no room in this time is not waited for."""
_TILE, _GAP, _LABEL_WIDTH, _LINE = 192, 6, 150, 14
"""Of the contact sheet, in pixels."""
_MOST_COLUMNS = 12


@dataclass(frozen=True)
class _Away:
    """An errand under way."""

    step: int
    weights_path: Path
    started: float


class Samples:
    """One worker's part. `make` is called on all ranks after the same step."""

    def __init__(
        self,
        job: Job,
        trainer: Trainer,
        *,
        run_dir: RunDir,
        rule: SampleRule,
        group: Group,
        rank: int,
        world_size: int,
        enter: Callable[[str], object],
        say: Callable[[str], object],
        show: Callable[[int, Sequence[SampleFile]], object],
        may_write: Callable[[], bool],
        spare: Spare | None = None,
        errand: Callable[[int, Path], Errand] | None = None,
    ) -> None:
        """`show` is called on rank 0 with the samples of a step; rank 0 has `spare`, and `errand` for what is sent there."""
        self._job, self._trainer, self._run_dir = job, trainer, run_dir
        self._group, self._rank, self._world_size = group, rank, world_size
        self._enter, self._say, self._show = enter, say, show
        self._spare, self._errand = spare, errand
        self._away: _Away | None = None
        self._sampler = Sampler(job, trainer.family, trainer.residency, run_dir=run_dir, rule=rule, may_write=may_write)

    def start(self) -> None:
        """Called before the first step of an attempt: what a lost worker has left half made is not made again."""
        if self._rank == 0:
            for step in self._run_dir.forget_sample_weights():
                self._say(f"warning: the samples of step {step} were not finished when their worker was lost")

    def make(self, step: int, *, is_last: bool = False) -> None:
        """Make, write and show the samples of a step, or send them where there is room."""
        self.take_late()
        if not is_last and self._send(step):
            return
        started = time.monotonic()
        made: list[Made] = []
        for number in range(self._rank, len(self._job.validation.prompts), self._world_size):
            self._enter("making samples")
            made.append(self._sampler.make(step, number))
        made = [one for found in self._group.gather(made) for one in found]
        if self._rank == 0:
            self._tell(step, made, f"in {time.monotonic() - started:.1f} s")

    def _send(self, step: int) -> bool:
        """Whether the samples are made elsewhere; the same on all ranks."""
        sizes = [param.numel() * param.element_size() for param in self._trainer.trained.values()]
        # Offloaded weights would be in the node's memory once more, which may be full of them.
        if sum(sizes) > _MOST_WEIGHT_BYTES or self._job.offload.cpu_offload:
            return False
        has_room = self._spare is not None and self._away is None and self._spare.has_room()
        if not self._group.number_from_rank_zero(int(has_room)):
            return False
        assert self._trainer.strategy is not None  # built by start()
        masters = self._trainer.strategy.full_masters()
        if self._rank == 0:
            self._begin(step, masters)
        return bool(self._group.number_from_rank_zero(int(self._away is not None)))

    def _begin(self, step: int, masters: Mapping[str, Tensor]) -> None:
        """Write the weights and send the errand; where that fails the workers make the samples."""
        assert self._spare is not None  # it has room
        assert self._errand is not None
        path, trained = self._run_dir.sample_weights_path(step), self._trainer.trained
        try:
            # As the workers compute with them: under bf16 rounded.
            weights = {name: master.to("cpu", trained[name].dtype).contiguous() for name, master in masters.items()}
            write_tensors(path, weights)
            self._spare.start(self._errand(step, path))
        except Exception as error:  # noqa: BLE001  a boundary: no sample is worth the run
            path.unlink(missing_ok=True)
            self._say(f"warning: the samples of step {step} could not be sent to spare resources: {error}")
        else:
            self._away = _Away(step, path, time.monotonic())
            self._say(f"samples of step {step} are made on spare resources of the cluster, training goes on")

    def take_late(self) -> None:
        """Show what has been made elsewhere since the last call. Called after every step; does nothing on ranks but 0."""
        if self._away is None:
            return
        assert self._spare is not None  # the errand is under way there
        result = self._spare.result()
        if result is not None:
            away = self._close()
            spent = f"in {time.monotonic() - away.started:.1f} s, while the training went on"
            made = self._left_by(away.step, cause=result) if isinstance(result, str) else result
            self._tell(away.step, made, spent)

    def _left_by(self, step: int, *, cause: str) -> list[Made]:
        """What an errand that `cause` ended has made before."""
        numbers = range(len(self._job.validation.prompts))
        return [Made(number, None if self._run_dir.find_sample(step, number) else cause) for number in numbers]

    def finish(self, *, timeout_s: float) -> None:
        """Wait for what is still made elsewhere. Called on all ranks when the training has ended."""
        if self._away is None:
            return
        self._say(f"waiting for the samples of step {self._away.step}, which are still being made")
        assert self._spare is not None  # the errand is under way there
        started = time.monotonic()
        while self._away is not None:
            self._enter("waiting for samples made elsewhere")
            time.sleep(_WAIT_S)
            self.take_late()
            patience_s = timeout_s if self._spare.has_begun else min(timeout_s, _BEGIN_S)
            if self._away is not None and time.monotonic() - started > patience_s:
                self._spare.give_up()
                away = self._close()
                why = "not made" if self._spare.has_begun else "not even begun, for want of room,"
                self._say(f"warning: samples of step {away.step} given up: {why} {patience_s:g} s after the training's end")

    def _close(self) -> _Away:
        """The errand is over."""
        assert self._away is not None  # the caller's
        away, self._away = self._away, None
        away.weights_path.unlink(missing_ok=True)
        return away

    def _tell(self, step: int, made: list[Made], spent: str) -> None:
        prompts = self._job.validation.prompts
        for one in sorted(made, key=lambda one: one.number):
            if one.problem is not None:
                self._say(
                    f"warning: sample {one.number + 1} of step {step} ({prompts[one.number]!r}) failed, training goes on: "
                    f"{one.problem}"
                )
        done = sum(one.problem is None for one in made)
        if done:
            self._say(f"{done} samples of step {step} {spent}")
            self._show_all(step)

    def _show_all(self, step: int) -> None:
        """The contact sheet, and what the trackers get; a full disk takes them, not the run."""
        prompts = self._job.validation.prompts
        try:
            # Not those of an earlier attempt that had come further than the checkpoint.
            newest = max(step, self._trainer.step)
            steps = [known for known in self._run_dir.sample_steps() if known <= newest]
            columns = {known: {one.number: one.picture() for one in self._files(known)} for known in thinned(steps)}
            write_whole(self._run_dir.contact_sheet_path, png(build_sheet(prompts, columns)))
            self._show(step, self._files(step))
        except (OSError, DsrayError) as error:
            self._say(f"warning: the contact sheet of step {step} could not be written: {error}")

    def _files(self, step: int) -> list[SampleFile]:
        """What there is of a step."""
        numbered = enumerate(self._job.validation.prompts)
        found = [(number, prompt, self._run_dir.find_sample(step, number)) for number, prompt in numbered]
        return [SampleFile(number, prompt, path) for number, prompt, path in found if path is not None]


def thinned(steps: list[int]) -> list[int]:
    """At most `_MOST_COLUMNS` of the steps, evenly, the first and the last among them."""
    if len(steps) <= _MOST_COLUMNS:
        return steps
    last = len(steps) - 1
    return [steps[round(number * last / (_MOST_COLUMNS - 1))] for number in range(_MOST_COLUMNS)]


def build_sheet(prompts: list[str], columns: Mapping[int, Mapping[int, Image.Image]]) -> Image.Image:
    """Rows = prompts, columns = steps; `columns` has the pictures of each step by prompt, missing ones stay empty."""
    size = next((one.size for pictures in columns.values() for one in pictures.values()), (1, 1))
    scale = _TILE / max(size)
    tile = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    shape = _LABEL_WIDTH + len(columns) * (tile[0] + _GAP), _LINE + _GAP + len(prompts) * (tile[1] + _GAP)
    sheet = Image.new("RGB", shape, "white")
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        y = _LINE + _GAP + row * (tile[1] + _GAP)
        for line, text in enumerate(_wrapped(prompt, draw)[: tile[1] // _LINE]):
            draw.text((_GAP, y + line * _LINE), text, fill="black")
    for column, (step, pictures) in enumerate(columns.items()):
        x = _LABEL_WIDTH + column * (tile[0] + _GAP)
        draw.text((x, 2), f"step {step}", fill="black")
        for row, picture in pictures.items():
            # Small pictures are shown in their own pixels, not smoothed.
            method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            sheet.paste(picture.resize(tile, method), (x, _LINE + _GAP + row * (tile[1] + _GAP)))
    return sheet


def _wrapped(text: str, draw: ImageDraw.ImageDraw) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer) <= _LABEL_WIDTH - 2 * _GAP:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
