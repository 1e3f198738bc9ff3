"""The figures of a run: loss.csv (step,key,value), TensorBoard, and the trackers of `services.py`."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from diffsynth_ray.config.schema import LoggingSection
from diffsynth_ray.run_dir import RunDir, write_whole
from diffsynth_ray.train.sample_file import SampleFile
from diffsynth_ray.train.services import Service, open_services

_HEADER = "step,key,value\n"


def _silent(line: str) -> None:
    """Where nobody listens."""


class FigureWriter:
    """Written by rank 0. A resumed run first forgets what came after the step that it resumes from."""

    def __init__(
        self, run_dir: RunDir, logging: LoggingSection, *, start_step: int, say: Callable[[str], object] = _silent
    ) -> None:
        """Raises DsrayError where a tracker refuses a run that begins; one that goes on does so without it."""
        self._csv_path = run_dir.loss_path if logging.csv else None
        self._pending: list[str] = []
        self._say, self._told = say, set[str]()
        if self._csv_path is not None:
            write_whole(self._csv_path, _HEADER + "".join(_rows_up_to(self._csv_path, start_step)))
        self._services: list[Service] = [_TensorBoard(run_dir, start_step=start_step)] if logging.tensorboard else []
        self._services += open_services(run_dir, logging, must_open=start_step == 0, say=say)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Append the figures of optimizer step `step` (from 1). What finds no room on the disk waits for the next time."""
        if self._csv_path is not None:
            self._pending += [f"{step},{key},{value:.9g}\n" for key, value in figures.items()]
            self._append_pending(self._csv_path)
        self._give_all(lambda service: service.write(step, figures))

    def write_samples(self, step: int, samples: Sequence[SampleFile]) -> None:
        """Show what was made with the weights after `step`, wherever pictures can be shown."""
        self._give_all(lambda service: service.write_samples(step, samples))

    def _give_all(self, give: Callable[[Service], object]) -> None:
        """A tracker that raises is told once, tried again the next time, and costs the training nothing."""
        for service in self._services:
            try:
                give(service)
            except Exception as error:  # noqa: BLE001  a boundary: no tracker is worth the run
                cause = f"{service.name}: {type(error).__name__}: {error}"
                if cause not in self._told:
                    self._told.add(cause)
                    self._say(f"warning: {cause}; training goes on")

    def _append_pending(self, path: Path) -> None:
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a") as file:
                file.writelines(self._pending)
        except OSError:
            os.truncate(path, size)  # half a row would be taken for a whole one
        else:
            self._pending.clear()

    def close(self) -> None:
        """Flush everything."""
        self._give_all(lambda service: service.close())


class _TensorBoard:
    """Event files in the run's folder."""

    name = "TensorBoard"

    def __init__(self, run_dir: RunDir, *, start_step: int) -> None:
        # TensorBoard's own switch: where TensorFlow is installed it would be imported for its file system.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
        from torch.utils.tensorboard import SummaryWriter

        purge = start_step + 1 if start_step else 0
        self._writer: SummaryWriter | None = SummaryWriter(str(run_dir.tensorboard_dir), purge_step=purge, flush_secs=10)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if self._writer is not None:
            with self._dropping_what_is_broken():
                for key, value in figures.items():
                    self._writer.add_scalar(f"train/{key}", value, step)

    def write_samples(self, step: int, samples: Sequence[SampleFile]) -> None:
        if self._writer is not None:
            with self._dropping_what_is_broken():
                for each in samples:
                    tag = f"{each.name} {each.prompt}"
                    if each.is_clip:
                        self._add_gif(tag, each.gif(), step)
                    else:
                        self._writer.add_image(tag, np.asarray(each.picture()), step, dataformats="HWC")

    def _add_gif(self, tag: str, gif: bytes, step: int) -> None:
        """Its page plays a GIF that stands where a picture would."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        assert self._writer is not None  # the caller's
        width, height = Image.open(io.BytesIO(gif)).size
        shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        events: Any = self._writer.file_writer
        events.add_summary(Summary(value=[Summary.Value(tag=tag, image=shown)]), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    @contextmanager
    def _dropping_what_is_broken(self) -> Iterator[None]:
        """Its thread is broken for good once a write has failed, and closing it would wait for it."""
        try:
            yield
        except OSError:
            self._writer = None
            raise


def _rows_up_to(path: Path, step: int) -> list[str]:
    if step == 0:
        return []  # a run from the start validates before its first step: there are rows of step 0
    try:
        lines = path.read_text().splitlines(keepends=True)[1:]
    except FileNotFoundError:
        return []
    return [line for line in lines if line.endswith("\n") and _step_of(line) <= step]


def _step_of(line: str) -> float:
    """Of a row; infinite where it is none, as after an edit by hand."""
    number = line.partition(",")[0]
    return int(number) if number.isdigit() else math.inf
