"""The model's files on their way into the system's memory while Ray starts, which takes as long as reading them may."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

import psutil

from diffsynth_ray.config.schema import ModelSection
from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.sources import model_entries

_LARGEST_SHARE = 0.5
"""Of the memory that is free: pages that push out others, or each other, would be read twice."""
_PIECE_BYTES = 1 << 20
"""Linux reads no more than some MB for a single call, however much it asks for."""


def read_ahead(model: ModelSection) -> Thread | None:
    """Have this machine read the weight files beforehand; returns at once.

    None where there is nothing to read: a tiny model, files that are not here (yet), files too large for the memory.
    """
    if model.tiny:
        return None
    try:
        paths = [path for entry in model_entries(model) for path in entry]
        num_bytes = sum(path.stat().st_size for path in paths)
    except (ModelError, OSError):
        return None  # the run will say so
    if num_bytes > _LARGEST_SHARE * psutil.virtual_memory().available:
        return None
    # Asking can take a while where much is asked for.
    thread = Thread(target=_advise, args=(paths,), daemon=True)
    thread.start()
    return thread


def _advise(paths: Sequence[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                for start in range(0, os.fstat(descriptor).st_size, _PIECE_BYTES):
                    os.posix_fadvise(descriptor, start, _PIECE_BYTES, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
