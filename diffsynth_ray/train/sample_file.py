"""A sample on disk, in the forms in which it is shown elsewhere."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image, Resampling, fromarray

from diffsynth_ray.data.media import Frames, decode, read_info

CLIP_FPS = 16
"""Frames a second of sample clips: Wan's own."""
_GIF_SIDE = 320
"""Pixels of a GIF's longer side, at most: it packs far worse than MP4."""
_GIF_STEP = 2
"""Every second frame is enough for it, and browsers do not show more than some."""


@dataclass(frozen=True)
class SampleFile:
    """What was made of one prompt after a step."""

    number: int
    """Of the prompt, from 0."""
    prompt: str
    path: Path
    """PNG, or MP4 for a clip."""

    @property
    def is_clip(self) -> bool:
        """Whether it is more than one frame."""
        return self.path.suffix == ".mp4"

    @property
    def name(self) -> str:
        """As the trackers show it: "samples/1" for the first prompt."""
        return f"samples/{self.number + 1}"

    def picture(self) -> Image:
        """Of a clip its first frame."""
        return fromarray(self._frames(most=1)[0])

    def gif(self) -> bytes:
        """The clip as an animated GIF, smaller and with half of its frames, for what shows no MP4."""
        pictures = [fromarray(frame) for frame in self._frames()[::_GIF_STEP]]
        for picture in pictures:
            picture.thumbnail((_GIF_SIDE, _GIF_SIDE), Resampling.LANCZOS)
        buffer = io.BytesIO()
        duration_ms = 1000 * _GIF_STEP // CLIP_FPS
        pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=duration_ms, loop=0)
        return buffer.getvalue()

    def _frames(self, *, most: int | None = None) -> Frames:
        """uint8 [f, h, w, 3]."""
        info = read_info(str(self.path))
        num_frames = info.num_frames if most is None else min(info.num_frames, most)
        return decode(str(self.path), height=info.height, width=info.width, num_frames=num_frames, frame_rate=None)
