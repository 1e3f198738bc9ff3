"""Sample pictures between steps: made with the weights as they are, written as files, and shown together on one sheet.

The prompts are dealt to the workers; the noise of a prompt is always the same. Whatever goes wrong with a sample is told, and
ends no training.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw

from diffsynth_ray.config.schema import Job
from diffsynth_ray.config.validation import sample_size
from diffsynth_ray.data.media import Frames, decode, read_info
from diffsynth_ray.data.samples import SampleRule, target_of
from diffsynth_ray.errors import DsrayError
from diffsynth_ray.models.sampling import SampleRequest
from diffsynth_ray.run_dir import RunDir, write_whole
from diffsynth_ray.train.group import Group
from diffsynth_ray.train.sample_file import CLIP_FPS, SampleFile
from diffsynth_ray.train.trainer import Trainer, fastest_attention
from diffsynth_ray.train.video import write_video

_TILE, _GAP, _LABEL_WIDTH, _LINE = 192, 6, 150, 14
"""Of the contact sheet, in pixels."""
_MOST_COLUMNS = 12


@dataclass(frozen=True)
class Made:
    """What came of one prompt."""

    number: int
    name: str | None = None
    """File below the run's folder."""
    problem: str | None = None


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
    ) -> None:
        """`show` is called on rank 0 with the samples of a step."""
        self._job, self._trainer, self._run_dir, self._rule = job, trainer, run_dir, rule
        self._group, self._rank, self._world_size = group, rank, world_size
        self._enter, self._say, self._show, self._may_write = enter, say, show, may_write

    def make(self, step: int) -> None:
        """Make, write and show the samples of a step."""
        started = time.monotonic()
        prompts = self._job.validation.prompts
        mine = range(self._rank, len(prompts), self._world_size)
        made = [one for found in self._group.gather([self._make_one(step, number) for number in mine]) for one in found]
        if self._rank != 0:
            return
        for one in sorted(made, key=lambda one: one.number):
            if one.problem is not None:
                self._say(
                    f"warning: sample {one.number + 1} of step {step} ({prompts[one.number]!r}) failed, training goes on: "
                    f"{one.problem}"
                )
        done = sum(one.problem is None for one in made)
        if done:
            self._say(f"{done} samples of step {step} in {time.monotonic() - started:.1f} s")
            self._show_all(step)

    def _make_one(self, step: int, number: int) -> Made:
        self._enter("making samples")
        try:
            frames = self._sample(number)
            if not self._may_write():
                return Made(number, problem="a newer attempt writes now")
            path = self._run_dir.sample_path(step, number, is_clip=len(frames) > 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            if len(frames) > 1:
                write_video(path, frames, fps=CLIP_FPS)
            else:
                write_whole(path, _png(Image.fromarray(frames[0])))
        except Exception as error:  # noqa: BLE001  a boundary: no sample is worth the run
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            lines = str(error).splitlines() or [""]
            return Made(number, problem=f"{type(error).__name__}: {lines[0]}")
        return Made(number, name=str(path.relative_to(self._run_dir.path)))

    def _sample(self, number: int) -> Frames:
        validation, family = self._job.validation, self._trainer.family
        height, width = sample_size(self._job, multiple=family.size_multiple)
        request = SampleRequest(
            prompt=validation.prompts[number],
            height=height,
            width=width,
            num_frames=1 if family.clip_step is None else self._job.dataset.num_frames,
            num_inference_steps=validation.num_inference_steps,
            guidance_scale=validation.guidance_scale,
            seed=validation.seed,
            inputs=self._inputs(number, height=height, width=width),
        )
        self._trainer.residency.begin()
        with fastest_attention(), torch.no_grad():
            return family.sample(request)

    def _inputs(self, number: int, *, height: int, width: int) -> tuple[Image.Image, ...]:
        """The prompt's picture: a first frame at the clip's size, a picture to edit as in training."""
        inputs = self._job.validation.inputs
        if not inputs:
            return ()
        path = inputs[number % len(inputs)]
        if self._trainer.family.clip_step is None:
            height, width, _ = target_of(read_info(path), self._job.dataset, self._rule)
        return (Image.fromarray(decode(path, height=height, width=width, num_frames=1, frame_rate=None)[0]),)

    def _show_all(self, step: int) -> None:
        """The contact sheet, and what the trackers get; a full disk takes them, not the run."""
        prompts = self._job.validation.prompts
        try:
            steps = [known for known in self._run_dir.sample_steps() if known <= step]
            columns = {known: {one.number: one.picture() for one in self._files(known)} for known in thinned(steps)}
            write_whole(self._run_dir.contact_sheet_path, _png(build_sheet(prompts, columns)))
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


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
