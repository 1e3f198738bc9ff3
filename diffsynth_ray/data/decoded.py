"""Decoded files that a process keeps, where the whole data set is small enough.

Few samples and many repeats are the usual data set of a LoRA: each file would be read and decoded once a repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffsynth_ray.data.media import Frames

MAX_BYTES = 128 << 20
"""What one process keeps at most: 42 pictures of 1024 x 1024, 170 of 512 x 512."""

_Stamp = tuple[int, int]


class DecodedFiles:
    """Frames by file and target, as long as the file stays as it is."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: dict[tuple[str, tuple[int, int, int]], tuple[_Stamp, Frames]] = {}

    def get(self, path: str, target: tuple[int, int, int], decode: Callable[[], Frames]) -> Frames:
        """uint8 [f, h, w, 3] of a file at a target (frames, height, width); read-only. What `decode` raises is not kept.

        Files on other machines are decoded every time: asking whether they have changed is a request each.
        """
        stamp = _stamp_of(path)
        if stamp is None:
            return decode()
        key = (path, target)
        before, frames = self._kept.get(key, (None, None))
        if frames is None or before != stamp:
            frames = decode()
            self._keep(key, stamp, frames)
        return frames

    def _keep(self, key: tuple[str, tuple[int, int, int]], stamp: _Stamp, frames: Frames) -> None:
        _, old = self._kept.pop(key, (None, None))
        self._num_bytes -= old.nbytes if old is not None else 0
        if self._num_bytes + frames.nbytes <= self._max_bytes:
            frames.flags.writeable = False
            self._kept[key] = stamp, frames
            self._num_bytes += frames.nbytes


def _stamp_of(path: str) -> _Stamp | None:
    """What changes with a local file, or None where there is none."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
