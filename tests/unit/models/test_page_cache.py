"""Files are asked for while Ray starts, where they are there and have room."""

import os
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from residency import resident_bytes
from waiting import wait_until

from diffsynth_ray.config.schema import ModelSection
from diffsynth_ray.models import page_cache


@pytest.fixture
def asked(monkeypatch):
    """(file, first byte) of what the system was asked to read."""
    found = []
    monkeypatch.setattr(page_cache, "_PIECE_BYTES", 4096)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, start, length, advice: found.append((os.readlink(f"/proc/self/fd/{fd}"), start))
    )
    return found


@pytest.fixture
def files(tmp_path):
    for name, size in (("a", 4096 * 2 + 1), ("b", 10)):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(size))
    return [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]


def test_all_of_all_files_is_asked_for(asked, files):
    page_cache.read_ahead(ModelSection(paths=[files])).join()
    assert asked == [(files[0], 0), (files[0], 4096), (files[0], 8192), (files[1], 0)]


def test_what_would_not_stay_in_memory_is_left_alone(asked, files, monkeypatch):
    available = 2 * (4096 * 2 + 11) - 1
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    assert page_cache.read_ahead(ModelSection(paths=[files])) is None
    assert not asked


def resident_share(path):
    """How much of a file is in the system's memory."""
    content = np.memmap(path, dtype=np.uint8, mode="r")
    return resident_bytes(content.ctypes.data, content.size) / content.size


def test_a_large_file_comes_into_memory_whole(tmp_path):
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(os.urandom(1 << 20) * 96)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def is_there():
        # Linux passes over what it has no memory for just now; who asks for too much at once never gets the rest.
        page_cache.read_ahead(ModelSection(paths=[str(path)])).join()
        return resident_share(path) >= 0.99

    wait_until(is_there, explain=lambda: str(resident_share(path)), every_s=0.1)


@pytest.mark.parametrize(
    "model",
    [
        ModelSection(paths=["/nowhere/a.safetensors"]),
        ModelSection(id_with_origin_paths=["Qwen/Qwen-Image:vae/x.safetensors"], base_path="/nowhere"),
        ModelSection(tiny=True, family="qwen_image"),
    ],
)
def test_what_is_not_here_is_nobodys_error(asked, model):
    assert page_cache.read_ahead(model) is None
    assert not asked
