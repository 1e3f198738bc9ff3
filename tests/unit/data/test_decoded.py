"""Decoded files that are kept: what is decoded again and when, and which data sets are kept at all."""

import numpy as np
import pytest

from diffsynth_ray.data.decoded import DecodedFiles
from diffsynth_ray.errors import DataError

TARGET = (1, 4, 4)


class Decoder:
    """Frames of zeros; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return np.zeros((*TARGET, 3), dtype=np.uint8)


@pytest.fixture
def decode():
    return Decoder()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    return str(path)


def test_a_file_is_decoded_once_for_each_target(path, decode):
    kept = DecodedFiles()
    first = kept.get(path, TARGET, decode)
    assert kept.get(path, TARGET, decode) is first
    assert decode.calls == 1
    kept.get(path, (1, 8, 4), decode)
    assert decode.calls == 2


def test_what_is_kept_cannot_be_changed(path, decode):
    frames = DecodedFiles().get(path, TARGET, decode)
    with pytest.raises(ValueError, match="read-only"):
        frames[0] = 1


def test_a_file_that_has_changed_is_decoded_again(path, tmp_path, decode):
    kept = DecodedFiles()
    kept.get(path, TARGET, decode)
    (tmp_path / "a.png").write_bytes(b"other")
    kept.get(path, TARGET, decode)
    kept.get(path, TARGET, decode)
    assert decode.calls == 2


def test_a_file_that_is_gone_is_an_error_again(path, tmp_path, decode):
    def fail():
        raise DataError("no such file")

    kept = DecodedFiles()
    kept.get(path, TARGET, decode)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="no such file"):
        kept.get(path, TARGET, fail)


@pytest.mark.parametrize("path", ["https://host/a.png", "s3://bucket/a.png"])
def test_files_on_other_machines_are_not_kept(path, decode):
    kept = DecodedFiles()
    kept.get(path, TARGET, decode)
    kept.get(path, TARGET, decode)
    assert decode.calls == 2


def test_no_more_is_kept_than_fits(tmp_path, decode):
    kept = DecodedFiles(max_bytes=2 * 48)
    for name in ("a", "b", "c"):
        (tmp_path / name).touch()
    for name in ("a", "b", "c", "a", "b", "c"):
        kept.get(str(tmp_path / name), TARGET, decode)
    assert decode.calls == 4, "a and b are kept, c is not"


def test_room_of_a_changed_file_is_free_again(path, tmp_path, decode):
    kept = DecodedFiles(max_bytes=48)
    for content in (b"1", b"22", b"333"):
        (tmp_path / "a.png").write_bytes(content)
        kept.get(path, TARGET, decode)
        kept.get(path, TARGET, decode)
    assert decode.calls == 3
