"""The figures of a run: loss.csv (step,key,value), TensorBoard, and the trackers of `services.py`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffsynth_ray.config.schema import LoggingSection
from diffsynth_ray.run_dir import RunDir, write_whole
from diffsynth_ray.train.services import open_services

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch.utils.tensorboard import SummaryWriter

_HEADER = "step,key,value\n"


class FigureWriter:
    """Written by rank 0. A resumed run first forgets what came after the step that it resumes from."""

    def __init__(self, run_dir: RunDir, logging: LoggingSection, *, start_step: int) -> None:
        self._csv_path = run_dir.loss_path if logging.csv else None
        self._pending: list[str] = []
        self._tensorboard: SummaryWriter | None = None
        if self._csv_path is not None:
            write_whole(self._csv_path, _HEADER + "".join(_rows_up_to(self._csv_path, start_step)))
        if logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = start_step + 1 if start_step else 0
            self._tensorboard = SummaryWriter(str(run_dir.tensorboard_dir), purge_step=purge, flush_secs=10)
        self._services = open_services(run_dir, logging)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Append the figures of optimizer step `step` (from 1). What finds no room on the disk waits for the next time."""
        if self._csv_path is not None:
            self._pending += [f"{step},{key},{value:.9g}\n" for key, value in figures.items()]
            self._append_pending(self._csv_path)
        if self._tensorboard is not None:
            try:
                for key, value in figures.items():
                    self._tensorboard.add_scalar(f"train/{key}", value, step)
            except OSError:
                self._tensorboard = None  # its writer is broken for good once a write has failed
        for service in self._services:
            service.write(step, figures)

    def write_pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        """Show pictures by name, in TensorBoard."""
        if self._tensorboard is not None:
            try:
                for name, picture in pictures.items():
                    self._tensorboard.add_image(f"samples/{name}", np.asarray(picture), step, dataformats="HWC")
            except OSError:
                self._tensorboard = None

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
        if self._tensorboard is not None:
            self._tensorboard.close()
        for service in self._services:
            service.close()


def _rows_up_to(path: Path, step: int) -> list[str]:
    if step == 0:
        return []  # a run from the start validates before its first step: there are rows of step 0
    try:
        lines = path.read_text().splitlines(keepends=True)[1:]
    except FileNotFoundError:
        return []
    return [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) <= step]
