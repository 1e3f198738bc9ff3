"""Media files to uint8 arrays, with the sizes and frames that DiffSynth-Studio takes.

Shapes: an image is PIL RGB; a clip is uint8 [frames, height, width, 3]; an image is a clip of one frame.
A file that cannot be read is a `DataError` that names the file and the cause.
"""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from diffsynth_ray.data.storage import is_remote, is_url, open_binary, read_bytes
from diffsynth_ray.errors import DataError, first_line

Frames = npt.NDArray[np.uint8]
Source = str | Path | bytes

STATIC_IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
IMAGE_EXTENSIONS = STATIC_IMAGE_EXTENSIONS | {"gif"}
"""What Pillow reads; in a video column a gif is a clip."""
VIDEO_EXTENSIONS = frozenset({"mp4", "avi", "mov", "wmv", "mkv", "flv", "webm"})
"""What decord reads."""
MEDIA_EXTENSIONS = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS

SIDE_MULTIPLE = 16
"""Heights and widths are multiples of this many pixels in most families: 8 of the VAE, 2 of the patches."""
CLIP_STEP = 4
"""Clips have a multiple of this many frames and one more (1, 5, 9 ...) in most families: what the VAE packs into one."""

_QUARTER_TURNS = frozenset({5, 6, 7, 8})
"""EXIF orientations, of those that Pillow turns by (whatever else damaged or odd files have there, it ignores)."""
_PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's readers raise on broken files."""

_ROUNDING = 1e-6
"""Frames that a quotient of floats may be wrong by."""

# A clip is converted this many frames at a time: 81 frames of 4K would take 2 GB before they are made small.
_FRAMES_PER_READ = 16


class MediaInfo(NamedTuple):
    """What a file's header says."""

    width: int
    """Pixels, as displayed (EXIF orientation applied)."""
    height: int
    """Pixels."""
    num_frames: int
    """1 for images."""
    fps: float | None
    """Frames a second; None for images and for gifs, whose frames are taken as they are."""


def target_size(
    width: int,
    height: int,
    *,
    fixed_height: int | None = None,
    fixed_width: int | None = None,
    max_pixels: int | None = None,
    multiple: int = SIDE_MULTIPLE,
) -> tuple[int, int]:
    """Return (height, width) in pixels to train an image or video of width x height at.

    Both sides given: those. Otherwise the source's size, made smaller to at most `max_pixels` and never larger. Then
    each side goes down to a multiple of `multiple`.
    """
    if width < 1 or height < 1:
        raise DataError(f"the source is {width}x{height} pixels; it must have at least one pixel")
    if fixed_height is not None and fixed_width is not None:
        target_height, target_width = fixed_height, fixed_width
    elif max_pixels is not None and width * height > max_pixels:
        scale = (width * height / max_pixels) ** 0.5
        target_height, target_width = int(height / scale), int(width / scale)
    else:
        target_height, target_width = height, width
    floor_height, floor_width = (side // multiple * multiple for side in (target_height, target_width))
    if not floor_height or not floor_width:
        raise DataError(
            f"a source of {width}x{height} pixels gets the target size {target_width}x{target_height}, and a side "
            f"under {multiple} pixels cannot be trained on; remove the row, enlarge or crop the file, "
            "or set dataset.height and dataset.width (or a larger dataset.max_pixels)"
        )
    return floor_height, floor_width


def resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize so that the image covers height x width pixels, then cut the centre; pixel-equal to DiffSynth-Studio."""
    scale = max(width / image.width, height / image.height)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    return resized.crop((left, top, left + width, top + height))


def read_image(source: Source) -> Image.Image:
    """Read an image (path, http(s) URL or the file's bytes) as RGB, turned as its EXIF orientation says.

    An alpha channel is dropped, as DiffSynth-Studio does; 16-bit grey is scaled to 8 bits, not clipped.
    """
    with _open_image(source) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def read_info(source: Source) -> MediaInfo:
    """Read size and length from the header, without decoding (a video's first frame excepted)."""
    if _extension(source) in VIDEO_EXTENSIONS:
        with _open_video(source) as reader:
            height, width, _ = reader[0].shape
            return MediaInfo(int(width), int(height), len(reader), float(reader.get_avg_fps()))
    with _open_image(source) as image:
        width, height = image.size
        # Not the PNG reader's own getexif: it decodes the whole image.
        if Image.Image.getexif(image).get(0x0112) in _QUARTER_TURNS:
            width, height = height, width
        num_frames = getattr(image, "n_frames", 1) if image.format == "GIF" else 1
        return MediaInfo(width, height, num_frames, None)


def clip_length(info: MediaInfo, *, num_frames: int, frame_rate: float | None = None, step: int = CLIP_STEP) -> int:
    """Return how many frames a clip gets: `num_frames`, or for a shorter file the largest step * n + 1 that it has.

    With `frame_rate` (frames a second) a file's length is what it has at that rate.
    """
    available = info.num_frames
    if frame_rate is not None and info.fps:
        # 57 frames at 25 a second are 57 / 25 * 25 = 56.99999 ones.
        available = math.floor(info.num_frames / info.fps * frame_rate + _ROUNDING)
    if available >= num_frames:
        return num_frames
    # Not below one frame: a file shorter than one period of a low frame rate still has its first frame.
    return max(available - (available - 1) % step, 1)


def decode(source: Source, *, height: int, width: int, num_frames: int = 1, frame_rate: float | None = None) -> Frames:
    """Read a file (path, http(s) URL, or an image's bytes) as uint8 [frames, height, width, 3], RGB.

    An image is one frame. Of a video or gif it is the first `num_frames` frames, fewer where the file is shorter
    (`clip_length`): a video's at its own rate, or with `frame_rate` (frames a second) the frames nearest to that rate.
    [0] and [-1] of the result are the first and last frame that image-to-video models are conditioned on.
    """
    if num_frames < 1 or height < 1 or width < 1:
        raise ValueError(f"num_frames, height and width must be at least 1, got {num_frames}, {height}, {width}")
    extension = _extension(source)
    if extension in VIDEO_EXTENSIONS:
        return _decode_video(source, height=height, width=width, num_frames=num_frames, frame_rate=frame_rate)
    if extension == "gif" and num_frames > 1:
        return _decode_gif(source, height=height, width=width, num_frames=num_frames)
    # A copy, because an image's own buffer is read-only and torch warns about those.
    return np.array(resize_and_crop(read_image(source), height, width))[None]


def media_extension(path: str | Path) -> str:
    """Return the extension in lower case without its dot; a URL's query does not count."""
    # Not urlsplit, which raises for a malformed URL: that is for reading it to report.
    text = str(path).partition("?")[0].partition("#")[0] if is_url(path) else str(path)
    return text.rpartition("/")[2].rpartition(".")[2].lower()


def _decode_video(source: Source, *, height: int, width: int, num_frames: int, frame_rate: float | None) -> Frames:
    with _open_video(source) as reader:
        num_source, fps = len(reader), float(reader.get_avg_fps())
        if num_source < 1:
            raise DataError(f"{_name(source)}: the video has no frames")
        info = MediaInfo(width, height, num_source, fps)
        frame_ids = list(range(clip_length(info, num_frames=num_frames, frame_rate=frame_rate)))
        if frame_rate is not None:
            frame_ids = [min(round(frame_id / frame_rate * fps), num_source - 1) for frame_id in frame_ids]
        frames = np.empty((len(frame_ids), height, width, 3), dtype=np.uint8)
        for first in range(0, len(frame_ids), _FRAMES_PER_READ):
            chunk = reader.get_batch(frame_ids[first : first + _FRAMES_PER_READ]).asnumpy()
            for offset, frame in enumerate(chunk):
                frames[first + offset] = np.asarray(resize_and_crop(Image.fromarray(frame), height, width))
    return frames


def _decode_gif(source: Source, *, height: int, width: int, num_frames: int) -> Frames:
    with _open_image(source) as image:
        info = MediaInfo(image.width, image.height, getattr(image, "n_frames", 1), None)
        frames = np.empty((clip_length(info, num_frames=num_frames), height, width, 3), dtype=np.uint8)
        for frame_id in range(len(frames)):
            image.seek(frame_id)
            frames[frame_id] = np.asarray(resize_and_crop(image.convert("RGB"), height, width))
    return frames


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips 16-bit grey at 255, which turns a photograph white.
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.int64)
        if image.mode != "I" or grey.max(initial=0) > 255:
            grey = (grey.clip(0, 65535) + 128) // 257
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


@contextmanager
def _open_image(source: Source) -> Iterator[Image.Image]:
    """Open with Pillow; its errors, inside the block too, become DataError."""
    try:
        with Image.open(_file_of(source)) as image:
            yield image
    except _PILLOW_ERRORS as error:
        raise DataError(f"{_name(source)}: {_reason(error, source)}") from error


@contextmanager
def _open_video(source: Source) -> Iterator[Any]:
    """Open with decord; its errors, inside the block too, become DataError."""
    decord = _load_decord()
    try:
        if isinstance(source, bytes) or is_url(source) or is_remote(source):
            content: str | io.BytesIO = io.BytesIO(source if isinstance(source, bytes) else read_bytes(source))
        elif Path(source).is_file():
            content = str(source)
        else:
            raise FileNotFoundError
        # One thread: Ray Data runs one task a CPU already.
        yield decord.VideoReader(content, num_threads=1)
    except (OSError, RuntimeError, IndexError, decord.DECORDError) as error:
        raise DataError(f"{_name(source)}: {_reason(error, source)}") from error


def _load_decord() -> ModuleType:
    # Imported late: it loads ffmpeg, which a dataset of images does not need.
    try:
        import decord
    except ImportError as error:
        raise DataError(f"videos need the package decord: {error}; pip install decord") from error
    # Its errors arrive as exceptions; ffmpeg would write them to stderr as well.
    decord.logging.set_level(decord.logging.QUIET)
    module: ModuleType = decord
    return module


def _file_of(source: Source) -> Path | IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if is_remote(source):
        return open_binary(str(source))
    return io.BytesIO(read_bytes(source)) if is_url(source) else Path(source)


def _extension(source: Source) -> str:
    # Bytes are images: a gif is told by its magic number.
    if isinstance(source, bytes):
        return "gif" if source[:4] == b"GIF8" else ""
    return media_extension(source)


def _name(source: Source) -> str:
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)


def _reason(error: BaseException, source: Source) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.DecompressionBombError):
        return f"more pixels than Pillow takes, make the picture smaller ({error})"
    if not isinstance(source, bytes) and Path(source).is_file() and Path(source).stat().st_size == 0:
        return "the file is empty"
    return f"cannot be read, the file is damaged or not what its name says ({first_line(error)})"
