"""The index of sizes: reused, invalidated, never trusted when damaged."""

import os
from pathlib import Path

import pytest
from PIL import Image

from diffsynth_ray.data import sizes
from diffsynth_ray.data.media import MediaInfo
from diffsynth_ray.data.sizes import index_places, read_media_infos
from diffsynth_ray.errors import DataError


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for number, path in enumerate(paths):
        Image.new("RGB", (20 + number, 30)).save(path)
    return [str(path) for path in paths]


class Reader:
    """Reads sizes and knows which headers it had to read."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places = [place, place.with_name("fallback.sizes")]
        self.headers: list[str] = []
        self.said: list[str] = []
        plain = sizes.read_info

        def read_info(path: str) -> MediaInfo:
            self.headers.append(Path(path).name)
            return plain(path)

        monkeypatch.setattr(sizes, "read_info", read_info)

    def read(self, paths: list[str]) -> list[MediaInfo | DataError]:
        self.headers.clear()
        self.said.clear()
        infos = read_media_infos(paths, places=self.places, say=self.said.append)
        return [infos[path] for path in paths]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(tmp_path / "metadata.csv.sizes", monkeypatch)


def test_headers_are_read_once(reader: Reader, images: list[str]) -> None:
    first = reader.read(images)
    assert [info.width for info in first] == [20, 21, 22, 23, 24]
    assert len(reader.headers) == 5
    assert reader.read(images) == first
    assert reader.headers == []
    assert [path.name for path in reader.places[0].parent.glob("*sizes*")] == ["metadata.csv.sizes"]


def test_a_changed_file_is_read_again(reader: Reader, images: list[str]) -> None:
    reader.read(images)
    Image.new("RGB", (99, 30)).save(images[1])
    status = os.stat(images[3])
    os.utime(images[3], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert reader.read(images)[1].width == 99
    assert sorted(reader.headers) == ["1.png", "3.png"]
    assert any("3 files are known" in line for line in reader.said)


def test_a_new_file_leaves_the_others_known(reader: Reader, images: list[str]) -> None:
    reader.read(images[:4])
    reader.read(images)
    assert reader.headers == ["4.png"]
    reader.read(images[:2])
    assert reader.headers == []
    reader.read(images)
    assert reader.headers == [], "another job's rows are kept"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_index_is_not_trusted(reader: Reader, images: list[str], damage: str) -> None:
    first = reader.read(images)
    content = reader.places[0].read_bytes()
    middle = len(content) // 2
    reader.places[0].write_bytes({
        "cut": content[:middle],
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
        "text": b"path,width\n",
    }[damage])  # fmt: skip
    assert reader.read(images) == first
    assert len(reader.headers) == 5
    assert "damaged" in reader.said[0]
    reader.read(images)
    assert reader.headers == []


def test_where_the_folder_is_not_writable_the_output_takes_it(reader: Reader, images: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    reader.places[0] = tmp_path / "file" / "metadata.csv.sizes"
    reader.read(images)
    assert any("fallback.sizes" in line and "cannot be written" in line for line in reader.said)
    reader.read(images)
    assert reader.headers == []


def test_bad_headers_are_told_and_not_kept(reader: Reader, images: list[str]) -> None:
    Path(images[2]).write_bytes(b"no image")
    for _ in range(2):
        assert isinstance(reader.read(images)[2], DataError)
        assert "2.png" in reader.headers
    os.unlink(images[3])
    assert "no such file" in str(reader.read(images)[3])


def test_places() -> None:
    out = Path("/out")
    assert index_places("/data", "/data/m.csv", out) == [Path("/data/m.csv.sizes"), out / "dsray.sizes"]
    assert index_places("/data", "file:///data/m.csv", out)[0] == Path("/data/m.csv.sizes")
    assert index_places("/data", None, out)[0] == Path("/data/dsray.sizes")
    assert index_places("s3://b/data", "s3://b/m.csv", out) == index_places("s3://b/data", None, out) == [out / "dsray.sizes"]
