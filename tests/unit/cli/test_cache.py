"""`dsray cache` on a cache of this test's own; the display of two stages."""

import io
import json
import os
import time
from pathlib import Path

import pytest

from diffsynth_ray.cli import app, render
from diffsynth_ray.data.cache import Cache, TensorBytes, entry_key
from diffsynth_ray.data.manifest import Manifest, ManifestRow, write_manifest
from diffsynth_ray.errors import ExitCode


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Three texts, of which the one data set has two; older than a day."""
    cache = Cache(str(tmp_path / "cache"))
    for n in range(3):
        cache.write("text", {entry_key(n=n): {"prompt_embeds": TensorBytes("F32", (2,), b"12345678")}}, encoder="e")
    rows = tuple(ManifestRow(f"{n}", entry_key(n=n), None, 64, 64, 1) for n in range(2))
    source = {"base_path": "/data", "metadata_path": "/data/rows.csv"}
    write_manifest(cache, Manifest(rows, source=source, family="qwen_image", dtype="bf16", created=time.time()))
    for path in (tmp_path / "cache" / "shards").iterdir():
        os.utime(path, (0, 0))
    return cache


def dsray(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = app.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_ls_shows_data_sets_and_what_is_unused(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, hints = dsray(capsys, "cache", "ls", cache.path)
    assert code == ExitCode.DONE
    assert "2 rows, 16 bytes" in out
    assert "/data/rows.csv" in out
    assert "3 texts and 0 images in 3 shards" in out
    assert "1 entries (8 bytes) belong to no data set" in hints
    code, out, _ = dsray(capsys, "cache", "ls", cache.path, "--json")
    assert json.loads(out)["datasets"][0]["num_rows"] == 2


def test_verify_tells_damage_by_its_exit_code(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = dsray(capsys, "cache", "verify", cache.path)
    assert (code, out.strip()) == (ExitCode.DONE, "3 entries checked, 0 lost")
    shard = Path(cache.path) / cache.index().location(0).shard
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    code, out, hints = dsray(capsys, "cache", "verify", cache.path)
    assert code == ExitCode.RUN_FAILED
    assert f"shards/{shard.name}: 1 of 1 entries damaged" in out
    assert "encoded anew" in hints
    _, out, hints = dsray(capsys, "cache", "ls", cache.path)
    assert "1 entries were found damaged" in hints
    # The next submission: the same entry in another shard.
    (key,) = [row["key"] for row in cache.index_table().to_pylist() if row["shard"] == f"shards/{shard.name}"]
    cache.write("text", {key: {"prompt_embeds": TensorBytes("F32", (2,), b"12345678")}}, encoder="e")
    code, out, hints = dsray(capsys, "cache", "verify", cache.path)
    assert (code, out.strip()) == (ExitCode.DONE, "4 entries checked, 0 lost")
    assert "whole elsewhere" in hints
    assert "damaged" not in "".join(dsray(capsys, "cache", "ls", cache.path)[1:])


def test_gc_asks_before_it_deletes(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, hints = dsray(capsys, "cache", "gc", cache.path)
    assert code == ExitCode.DONE
    assert "would delete 0 data sets, 1 entries" in out
    assert "--yes" in hints
    assert len(cache.index()) == 3
    code, out, _ = dsray(capsys, "cache", "gc", cache.path, "--yes")
    assert "deleted 0 data sets, 1 entries" in out
    assert len(cache.index()) == 2
    code, _, error = dsray(capsys, "cache", "gc", cache.path, "--dataset", "nonsense")
    assert code == ExitCode.USAGE
    assert "no data set 'nonsense'" in error


def test_no_cache_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = dsray(capsys, "cache", "ls", str(tmp_path / "nowhere"))
    assert code == ExitCode.USAGE
    assert "no such cache" in error
    assert "split.cache_path" in error


def test_both_stages_have_a_bar_in_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    with render.LogView() as log:
        log.line("encode 120/400 samples | 12.30 samples/s | 23 s left")
        log.line("encode 400/400 samples | 12.30 samples/s | 0 s left")
        log.line(
            "step 3/10 | loss 0.5 | lr 0.001 | grad norm 0.1 | 0.500 s/step | 2.00 samples/s | data wait 0.000 s | 4 s left"
        )
        assert log._bar is not None
        tasks = [(task.description, task.completed, task.total) for task in log._bar.tasks]
    assert tasks == [("encode", 400, 400), ("train", 3, 10)]


def test_gc_deletes_only_what_a_cache_has_written(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["shards/train-000.tar", "shards/folder/0.tar", "shards/.keep", "datasets/.gitignore", "index/.notes"]
    killed = "shards/.0123456789abcdef01234567.safetensors.89abcdef"
    for name in [*names, killed, "datasets/train.parquet", "index/train.parquet"]:
        path = Path(cache.path) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (0, 0))
        os.utime(path.parent, (0, 0))
    code, out, _ = dsray(capsys, "cache", "gc", cache.path, "--yes")
    assert (code, out.splitlines()[1:]) == (ExitCode.DONE, [killed, "deleted 0 data sets, 1 entries, 129 bytes"])
    assert all((Path(cache.path) / name).exists() for name in names)


@pytest.mark.parametrize("command", ["ls", "verify", "gc"])
def test_a_folder_without_a_cache_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "train.parquet").write_bytes(b"x")
    code, _, hints = dsray(capsys, "cache", command, str(tmp_path))
    assert (code, f"{tmp_path}: no such cache" in hints) == (ExitCode.USAGE, True)
