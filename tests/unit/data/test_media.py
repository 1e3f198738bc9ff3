"""Images and videos: DiffSynth-Studio's sizes, pixels and frames."""

import http.server
import io
import random
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffsynth_ray.data import storage
from diffsynth_ray.data.media import (
    MediaInfo,
    clip_length,
    decode,
    media_extension,
    read_image,
    read_info,
    resize_and_crop,
    target_size,
)
from diffsynth_ray.data.storage import fetch
from diffsynth_ray.errors import DataError

ASSETS = Path(__file__).parents[2] / "assets"
PHOTOS = Path(__file__).parents[3] / "jobs" / "data" / "photos"
DATASET = ASSETS / "dataset"
CLIP, GIF, BUNNY = DATASET / "videos" / "v.mp4", DATASET / "videos" / "g.gif", ASSETS / "videos" / "bigbuckbunny.mp4"


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ((512, 512), {"max_pixels": 1048576}, (512, 512)),
        ((451, 300), {"max_pixels": 1048576}, (288, 448)),
        ((4096, 1024), {"max_pixels": 1048576}, (512, 2048)),
        ((3000, 2000), {"max_pixels": 1048576}, (832, 1248)),
        ((2731, 384), {"max_pixels": 1048576}, (368, 2720)),  # scaled to a height of 383.98
        ((100, 70), {"max_pixels": 6144}, (64, 80)),
        ((100, 70), {"fixed_height": 260, "fixed_width": 512, "max_pixels": 1024}, (256, 512)),
        ((100, 70), {"fixed_height": 256}, (64, 96)),
        ((16, 17), {}, (16, 16)),
    ],
)
def test_target_size(source: tuple[int, int], options: dict[str, int], expected: tuple[int, int]) -> None:
    assert target_size(*source, **options) == expected


@given(width=st.integers(16, 9000), height=st.integers(16, 9000), max_pixels=st.integers(10**5, 10**7))
def test_a_target_is_never_larger(width: int, height: int, max_pixels: int) -> None:
    try:
        target_height, target_width = target_size(width, height, max_pixels=max_pixels)
    except DataError:
        assert min(width, height) < 16 * max(1, (width * height / max_pixels) ** 0.5) + 1
        return
    assert target_height % 16 == target_width % 16 == 0
    assert target_height <= height
    assert target_width <= width
    assert target_height * target_width <= max_pixels


@pytest.mark.parametrize("source", [(15, 400), (400, 15), (20000, 20)])
def test_a_side_under_16_is_an_error(source: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"a source of \d+x\d+ .* under 16 pixels .*max_pixels"):
        target_size(*source, max_pixels=100_000)


def test_sizes_are_those_of_the_recorded_run() -> None:
    """Sizes that DiffSynth-Studio chose in records/lora_float32 (max_pixels 6144)."""
    recorded = [("0.png", 64, 96), ("1.png", 64, 80), ("2.png", 96, 64), ("3.png", 64, 80)]
    for name, height, width in recorded:
        source_width, source_height, *_ = read_info(DATASET / "images" / name)
        assert target_size(source_width, source_height, max_pixels=6144) == (height, width)


def test_resize_covers_and_crops_the_centre() -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 12).repeat(8, 0).repeat(8, 1))
    same = resize_and_crop(image, 32, 96)
    assert np.array_equal(np.asarray(same), np.asarray(image))
    assert np.array_equal(np.asarray(resize_and_crop(image, 32, 32)), np.asarray(image)[:, 32:64])
    upright = Image.fromarray(np.asarray(image).T.copy())
    assert np.array_equal(np.asarray(resize_and_crop(upright, 32, 32)), np.asarray(upright)[32:64])
    assert resize_and_crop(image, 64, 33).size == (33, 64)


@given(size=st.tuples(st.integers(1, 200), st.integers(1, 200)), target=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_resize_never_leaves_a_border(size: tuple[int, int], target: tuple[int, int]) -> None:
    height, width = target[0] * 16, target[1] * 16
    result = np.asarray(resize_and_crop(Image.new("L", size, 255), height, width))
    assert result.shape == (height, width)
    assert result.min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = encode(Image.new("RGB", (40, 20)), "jpeg", exif=exif)
    assert read_image(source).size == read_info(source)[:2] == ((40, 20) if orientation < 5 else (20, 40))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_png_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode)
    pixels = np.asarray(read_image(encode(image, "png")))
    assert pixels.shape == (20, 20, 3)
    assert (pixels == 255).all()


def test_cmyk_and_16_bit() -> None:
    assert read_image(encode(Image.new("CMYK", (20, 20)), "jpeg")).getpixel((5, 5)) == (255, 255, 255)
    grey = Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    assert read_image(encode(grey, "png")).getpixel((0, 0)) == (128, 128, 128)


def test_alpha_is_dropped_like_diffsynth_studio_does() -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert read_image(encode(image, "png")).getpixel((0, 0)) == (10, 20, 30)


def test_sizes_from_headers() -> None:
    assert read_info(PHOTOS / "cat.jpg")[:3] == (451, 300, 1)
    assert read_info(CLIP)[:3] == (64, 48, 23)
    assert read_info(GIF)[:3] == (64, 48, 23)
    assert read_info(GIF.read_bytes())[:3] == (64, 48, 23)
    assert read_info(BUNNY) == MediaInfo(1280, 720, 132, 25.0)


@pytest.mark.parametrize(
    ("available", "wanted", "expected"),
    [(132, 81, 81), (23, 81, 21), (23, 23, 23), (24, 25, 21), (1, 81, 1), (4, 5, 1)],
)
def test_clip_length(available: int, wanted: int, expected: int) -> None:
    assert clip_length(MediaInfo(64, 48, available, 16.0), num_frames=wanted) == expected


def test_clip_length_at_another_rate() -> None:
    info = MediaInfo(64, 48, 23, 16.0)
    assert clip_length(info, num_frames=81, frame_rate=32.0) == 45
    assert clip_length(info, num_frames=81, frame_rate=8.0) == 9
    assert clip_length(info, num_frames=81, frame_rate=0.5) == 1
    assert clip_length(MediaInfo(64, 48, 23, None), num_frames=81, frame_rate=8.0) == 21


@pytest.mark.parametrize("path", [CLIP, GIF])
def test_decodes_the_first_frames(path: Path) -> None:
    frames = decode(path, height=32, width=48, num_frames=81)
    assert frames.shape == (21, 32, 48, 3)
    assert frames.dtype == np.uint8
    assert np.array_equal(decode(path, height=32, width=48, num_frames=5), frames[:5])
    assert np.array_equal(decode(path, height=32, width=48, num_frames=1), frames[:1])
    assert not np.array_equal(frames[0], frames[-1])


@pytest.mark.parametrize("kind", ["mp4", "avi", "mov", "wmv", "mkv", "flv", "webm"])
def test_every_container(kind: str) -> None:
    """Eleven frames that grow redder by 20 each, made with ffmpeg's usual codec of the container."""
    path = ASSETS / "containers" / f"c.{kind}"
    assert read_info(path) == MediaInfo(64, 48, 11, 8.0)
    frames = decode(path, height=48, width=64, num_frames=81)
    assert [float(frame[..., 0].mean()) for frame in frames] == pytest.approx([20 + 20 * n for n in range(9)], abs=6)


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "JPG", "png", "webp", "bmp", "gif"])
def test_every_kind_of_image(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    Image.new("RGB", (64, 48), (200, 100, 50)).save(path)
    assert read_info(path)[:3] == (64, 48, 1)
    frames = decode(path, height=48, width=64)
    assert np.abs(frames.astype(int) - (200, 100, 50)).max() <= 4


def test_16_bit_colour_is_scaled(tmp_path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    pixel = struct.pack(">HHH", 65535, 32896, 257)
    rows = (b"\0" + pixel * 16) * 16
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert read_image(png).getpixel((3, 3)) == (255, 128, 1)


def test_decodes_the_same_scene_from_mp4_and_gif() -> None:
    clip, gif = (decode(path, height=48, width=64, num_frames=21).astype(float) for path in (CLIP, GIF))
    assert np.abs(clip - gif).mean() < 40


def test_frame_rate_picks_the_nearest_source_frames() -> None:
    every = decode(CLIP, height=48, width=64, num_frames=21)
    half = decode(CLIP, height=48, width=64, num_frames=81, frame_rate=8.0)
    assert np.array_equal(half, every[0:17:2])
    double = decode(CLIP, height=48, width=64, num_frames=9, frame_rate=32.0)
    assert np.array_equal(double, every[[round(i / 2) for i in range(9)]])


def test_decodes_a_real_video() -> None:
    frames = decode(BUNNY, height=64, width=112, num_frames=17, frame_rate=5.0)
    assert frames.shape == (17, 64, 112, 3)
    assert 20 < frames.mean() < 235


def test_an_image_is_a_clip_of_one_frame() -> None:
    frames = decode(PHOTOS / "cat.jpg", height=288, width=448, num_frames=81)
    assert frames.shape == (1, 288, 448, 3)
    assert frames.flags.writeable
    assert np.array_equal(frames[0], np.asarray(resize_and_crop(read_image(PHOTOS / "cat.jpg"), 288, 448)))


def damaged_png() -> bytes:
    content = bytearray((DATASET / "images" / "0.png").read_bytes())
    content[60:64] = struct.pack(">I", 0xDEADBEEF)
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jpg", (PHOTOS / "cat.jpg").read_bytes()[:9000]),
        ("x.jpg", (PHOTOS / "cat.jpg").read_bytes()[:100]),
        ("x.png", damaged_png()),
        ("x.png", b"<html>404</html>"),
        ("x.gif", GIF.read_bytes()[:3000]),
        ("x.mp4", BUNNY.read_bytes()[:20000]),
        ("x.mp4", b"not a video" * 100),
    ],
    ids=["truncated jpeg", "jpeg header", "png", "html", "truncated gif", "truncated mp4", "not mp4"],
)
def test_a_damaged_file_names_itself_and_the_cause(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path}: cannot be read, the file is damaged or not what its name says \(.+\)"):
        decode(path, height=32, width=32, num_frames=81)


@pytest.mark.parametrize("name", ["x.jpg", "x.mp4", "x.gif"])
def test_a_missing_or_empty_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for read in (read_info, partial(decode, height=32, width=32)):
        path.unlink(missing_ok=True)
        with pytest.raises(DataError, match=rf"{path}: no such file"):
            read(path)
        path.touch()
        with pytest.raises(DataError, match=rf"{path}: the file is empty"):
            read(path)


def test_extensions() -> None:
    assert media_extension("a.b/C.JPG") == media_extension("https://x.org/c.jpg?size=1.5#a") == "jpg"
    assert media_extension("https://x.org/v.mp4/") == ""


@pytest.fixture
def server_url() -> Iterator[str]:
    """Serve the repository's test files on the loopback interface."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Stay quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(DATASET)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def breaking_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[int]]]:
    """Its address, and after how many bytes of the body its next answers break off."""
    cuts: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Stay quiet."""

        def do_GET(self) -> None:
            body = (DATASET / self.path.lstrip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: cuts.pop(0)] if cuts else body)
            self.close_connection = True

    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=lambda seconds: None))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", cuts
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["images/0.png", "videos/v.mp4"])
def test_a_connection_that_is_cut_gives_the_whole_file_or_an_error(breaking_server: tuple[str, list[int]], name: str) -> None:
    address, cuts = breaking_server
    cuts[:] = [100, 0]
    found = decode(f"{address}/{name}", height=32, width=48, num_frames=5)
    assert cuts == [], "twice it broke off"
    assert np.array_equal(found, decode(DATASET / name, height=32, width=48, num_frames=5))
    cuts[:] = [100, 0, 50]
    with pytest.raises(DataError, match=rf"{name}: cannot be downloaded \(3 attempt\(s\)\): IncompleteRead\(50 bytes"):
        decode(f"{address}/{name}", height=32, width=48, num_frames=5)


def test_urls_are_fetched(server_url: str) -> None:
    for name in ("images/0.png", "videos/v.mp4", "videos/g.gif"):
        local = decode(DATASET / name, height=32, width=48, num_frames=5)
        assert np.array_equal(decode(f"{server_url}/{name}", height=32, width=48, num_frames=5), local)
    with pytest.raises(DataError, match=r"/images/9.png: cannot be downloaded \(1 attempt\(s\)\).*404"):
        read_info(f"{server_url}/images/9.png")
    with pytest.raises(DataError, match="cannot be downloaded"):
        fetch("http://[bad")


def _with_exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of (tag, type, count, value) as a camera writes them."""
    fields = [struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0") for tag, kind, count, value in entries]
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(fields) + bytes(4)


@pytest.mark.parametrize(
    "orientation",
    [(3, 1, b"\6\0"), (3, 1, b"\x09\0"), (3, 1, b"\0\0"), (2, 2, b"6\0"), (7, 1, b"\6"), (1, 1, b"\6"), (3, 2, b"\6\0\6\0")],
)
def test_the_header_is_turned_as_the_picture_is(tmp_path: Path, orientation: tuple[int, int, bytes]) -> None:
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (64, 32)).save(path, exif=_with_exif((0x0112, *orientation)))
    assert read_info(path)[:2] == read_image(path).size


def test_damaged_files_are_told_as_such_whatever_pillow_makes_of_them(tmp_path: Path) -> None:
    frames = [Image.new("P", (64, 48), number) for number in range(3)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (64, 48)).save(tmp_path / "still.jpg", exif=_with_exif((0x0112, 3, 1, b"\6\0"), (0x010E, 2, 4, b"abc\0")))
    drawn = random.Random(0)
    num_read = 0
    for name in ("moves.gif", "still.jpg"):
        content = (tmp_path / name).read_bytes()
        damaged = tmp_path / f"damaged-{name}"
        for _ in range(800):
            spoiled = bytearray(content)
            for _ in range(drawn.choice((1, 2, 8))):
                spoiled[drawn.randrange(min(len(spoiled), 1000))] = drawn.randrange(256)
            damaged.write_bytes(spoiled)
            with suppress(DataError), warnings.catch_warnings(action="ignore"):
                read_info(damaged)
                num_read += len(decode(damaged, height=32, width=32, num_frames=3)) > 0
    assert 100 < num_read < 1500, "both must happen"


@pytest.mark.parametrize("rate", [12.5, 23.976, 25.0, 29.97, 30000 / 1001])
def test_a_clip_at_its_own_rate_has_all_its_frames(rate: float) -> None:
    for num_frames in range(1, 1000, 4):
        info = MediaInfo(64, 32, num_frames, rate)
        assert clip_length(info, num_frames=9999, frame_rate=rate) == num_frames
        assert clip_length(info, num_frames=9999, frame_rate=rate / 2) == clip_length(
            MediaInfo(64, 32, num_frames // 2, rate), num_frames=9999
        )


def test_a_picture_of_too_many_pixels_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(DataError, match=r"more pixels than Pillow takes, make the picture smaller .*4096 pixels"):
        read_info(path)
