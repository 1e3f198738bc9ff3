"""The cache of encoded samples: exact, whole, shared, and never wrong."""

import multiprocessing
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from waiting import wait_until

from diffsynth_ray.data.cache import Cache, TensorBytes, entry_key
from diffsynth_ray.data.digests import content_digest, file_digest, file_digests
from diffsynth_ray.data.holdout import held_out
from diffsynth_ray.data.manifest import Manifest, ManifestRow, manifest_ids, only_manifest, read_manifest, write_manifest
from diffsynth_ray.data.storage import Stamp
from diffsynth_ray.data.store import ArrowStore, open_store
from diffsynth_ray.data.upkeep import delete_garbage, find_garbage, summarize, verify
from diffsynth_ray.errors import DataError, OutputError


def entry(seed: int, num_tokens: int = 3) -> dict[str, TensorBytes]:
    """Two tensors whose bits follow from the seed."""
    random = np.random.default_rng(seed)
    return {
        "prompt_embeds": TensorBytes("BF16", (num_tokens, 8), random.bytes(num_tokens * 16)),
        "extra": TensorBytes("F32", (2,), random.bytes(8)),
    }


def write(cache: Cache, *seeds: int, kind: str = "text") -> str:
    return cache.write(kind, {entry_key(n=seed): entry(seed) for seed in seeds}, encoder="e")


def location(cache: Cache, seed: int):
    index = cache.index()
    return index.location(index.positions([entry_key(n=seed)])[0])


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.fixture(params=["local", "pyarrow"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    cache = Cache(str(tmp_path / "cache"))
    if request.param == "pyarrow":
        system = pyarrow.fs.LocalFileSystem()
        cache.store = ArrowStore(str(tmp_path / "cache"), system=system, base=str(tmp_path / "cache"))
    return cache


def test_entries_come_back_bit_by_bit(cache: Cache) -> None:
    write(cache, 1, 2, 3)
    write(cache, 4, kind="image")
    assert len(cache.index()) == 4
    for seed in (1, 2, 3, 4):
        found = location(cache, seed)
        assert cache.read(found) == entry(seed)
        assert found.kind == ("image" if seed == 4 else "text")


def test_a_shard_is_a_safetensors_file(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    write(cache, 1, 2)
    (shard,) = (tmp_path / "shards").iterdir()
    with safe_open(shard, framework="np") as file:
        assert set(file.keys()) == {f"{entry_key(n=n)}.{name}" for n in (1, 2) for name in ("extra", "prompt_embeds")}
        assert file.get_tensor(f"{entry_key(n=2)}.extra").tobytes() == entry(2)["extra"].data


def test_missing_keys_are_told_once_and_in_order(cache: Cache) -> None:
    write(cache, 1, 2)
    keys = [entry_key(n=n) for n in (3, 1, 9, 3, 2)]
    assert cache.index().missing(keys) == [keys[0], keys[2]]
    assert cache.index().positions(keys[:1])[0] == -1
    assert Cache(str(cache.path) + "-none").index().missing(keys[:2]) == keys[:2]


def test_a_key_names_every_part() -> None:
    assert entry_key(a=1, b="x") == entry_key(b="x", a=1)
    keys = [entry_key(a=a) for a in (1, 2, "1", [1], "x", "X", "é", "e")]
    assert len({*keys, entry_key(b=1)}) == 9
    # A literal value: another would make every cache stale.
    assert entry_key(text="Ein Käse", size=[1, 2]) == "3522beb881907cc37567fd187bc98507"


def test_a_shard_without_its_index_does_not_count(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    name = write(cache, 1)
    (tmp_path / name).unlink()  # as if the writer was killed between the two
    assert len(cache.index()) == 0


def test_a_shard_that_is_gone_or_short_does_not_count(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    write(cache, 1)
    write(cache, 2)
    first = tmp_path / location(cache, 1).shard
    second = tmp_path / location(cache, 2).shard
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    assert len(cache.index()) == 0


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_is_found_at_read_and_by_verify(cache: Cache, tmp_path: Path, where: str) -> None:
    write(cache, 1, 2)
    seed = 1 if where == "first" else 2
    found = location(cache, seed)
    flip(tmp_path / "cache" / found.shard, found.offset if where == "first" else found.offset + found.num_bytes - 1)
    num_entries, (damage,) = verify(cache, lambda line: None)
    assert num_entries == 2
    assert damage.keys == (entry_key(n=seed),)
    assert "1 of 2 entries damaged" in damage.cause
    with pytest.raises(DataError, match="damaged") as caught:
        cache.read(found)
    assert found.shard in caught.value.message
    assert "submit the job again" in str(caught.value.hint)
    # From now on it is missing, so that stage one encodes it anew; the other one is still used.
    assert cache.index().missing([entry_key(n=1), entry_key(n=2)]) == [entry_key(n=seed)]
    write(cache, seed)
    assert cache.read(location(cache, seed)) == entry(seed)


@pytest.mark.parametrize("change", [{"key": entry_key(n=2)}, {"layout": "F32"}])
def test_an_entry_is_read_under_its_own_key_and_layout_only(cache: Cache, change: dict[str, str]) -> None:
    """A damaged or forged index hands out no other bits, and none of another type."""
    write(cache, 1)
    found = location(cache, 1)
    if "layout" in change:
        change = {"layout": found.layout.replace("F32", "I32")}
    with pytest.raises(DataError, match="damaged"):
        cache.read(replace(found, **change))  # type: ignore[arg-type]
    assert cache.read(found) == entry(1)


def test_a_flipped_bit_in_a_header_is_found_by_verify(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    write(cache, 1)
    flip(tmp_path / location(cache, 1).shard, 20)
    _, (damage,) = verify(cache, lambda line: None)
    assert "header damaged" in damage.cause
    assert damage.keys == ()
    assert cache.read(location(cache, 1)) == entry(1)


def test_a_damaged_index_is_never_believed(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    name = write(cache, *range(40))
    size = (tmp_path / name).stat().st_size
    original = (tmp_path / name).read_bytes()
    num_refused = 0
    for offset in range(0, size, size // 60):
        flip(tmp_path / name, offset)
        try:
            index = cache.index()
            place = index.positions([entry_key(n=3)])[0]
            assert place < 0 or cache.read(index.location(place)) == entry(3)
        except DataError:
            num_refused += 1
        (tmp_path / name).write_bytes(original)
    assert num_refused > 20
    (tmp_path / name).write_bytes(original[: size // 2])
    with pytest.raises(DataError, match="index file is damaged") as caught:
        cache.index()
    assert "delete that file" in str(caught.value.hint)
    assert "index file is damaged" in verify(cache, lambda line: None)[1][0].cause


def test_index_files_are_merged_and_nothing_is_lost(cache: Cache) -> None:
    other = write(cache, 100)
    names = [write(cache, n) for n in range(5)]
    cache.merge_index_files(names)
    assert len(cache.index_files()) == 2
    assert other in cache.index_files()
    assert len(cache.index()) == 6
    assert cache.merge_index_files([]) is None


def _write_many(path: str, first: int) -> None:
    cache = Cache(path)
    names = [write(cache, *range(first + 10 * n, first + 10 * n + 12)) for n in range(10)]
    cache.merge_index_files(names)


def test_two_writers_and_a_reader_at_once(tmp_path: Path) -> None:
    writers = [multiprocessing.get_context("fork").Process(target=_write_many, args=(str(tmp_path), n)) for n in (0, 50)]
    for writer in writers:
        writer.start()
    cache = Cache(str(tmp_path))
    while any(writer.is_alive() for writer in writers):
        index = cache.index()
        for place in range(0, len(index), 5):
            cache.read(index.location(place))
    assert [writer.exitcode for writer in writers] == [0, 0]
    index = cache.index()
    assert len(index) == 152
    for seed in range(152):
        assert cache.read(index.location(index.positions([entry_key(n=seed)])[0])) == entry(seed)


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"split\.cache_path.*cannot be written"):
        write(Cache(str(tmp_path / "file")), 1)
    for place in ("nonsense://x/y", "s3://"):
        with pytest.raises(OutputError, match="cannot be opened") as caught:
            open_store(place)
        assert "s3://" in str(caught.value.hint)


# Hashes of files


def test_hashes_are_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / "cache"))
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_bytes(os.urandom(1000))
    paths = [str(file) for file in files] + [str(tmp_path / "gone")]
    read: list[str] = []
    monkeypatch.setattr("diffsynth_ray.data.digests.file_digest", lambda path: read.append(path) or file_digest(path))
    monkeypatch.setattr("diffsynth_ray.data.digests._SETTLED_S", 0.0)
    first = file_digests(paths, store, lambda line: None)
    assert first[:2] == [file_digest(path) for path in paths[:2]]
    assert isinstance(first[2], DataError)
    assert sorted(read) == sorted(paths)
    read.clear()
    assert file_digests(paths[:2], store, lambda line: None) == first[:2]
    assert read == []
    stat = files[0].stat()
    # Within the resolution of a file system's times a change shows nowhere: that is what _SETTLED_S is for.
    wait_until(lambda: files[0].write_bytes(os.urandom(1000)) and files[0].stat().st_ctime_ns != stat.st_ctime_ns)
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time, other content
    second = file_digests(paths[:2], store, lambda line: None)
    assert read == [paths[0]]
    assert second[0] != first[0]
    assert second[1] == first[1]


def test_hashes_of_remote_files_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / "cache"))
    old = str(time.time_ns() - 10**12)
    stamps: dict[str, Stamp | None] = {
        "s3://bucket/a": Stamp(1, old),
        "https://host/b": Stamp(1, '"etag"'),
        "https://host/silent": Stamp(-1, ""),
        "s3://bucket/gone": None,
    }
    read: list[str] = []

    def read_bytes(path: str) -> bytes:
        if path.endswith("gone"):
            raise DataError(f"{path}: no such file")
        read.append(path)
        return path.encode()

    monkeypatch.setattr("diffsynth_ray.data.digests.read_bytes", read_bytes)
    monkeypatch.setattr("diffsynth_ray.data.digests.read_stamps", lambda paths: {path: stamps[path] for path in paths})
    *first, gone = file_digests(list(stamps), store, lambda line: None)
    assert first == [content_digest(path.encode()) for path in list(stamps)[:3]]
    assert isinstance(gone, DataError)
    read.clear()
    assert file_digests(list(stamps)[:3], store, lambda line: None) == first
    assert read == ["https://host/silent"]
    stamps["https://host/b"] = Stamp(1, '"another"')
    read.clear()
    file_digests(list(stamps)[:2], store, lambda line: None)
    assert read == ["https://host/b"]


def test_the_hash_of_a_file_that_has_just_changed_is_not_kept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "cache"))
    (tmp_path / "a").write_bytes(b"x")
    file_digests([str(tmp_path / "a")], store, lambda line: None)
    assert store.files("digests") == {}


# Data sets and what nothing refers to


def manifest(*seeds: int, source: str = "a", created: float = 1.0) -> Manifest:
    rows = tuple(ManifestRow(f"prompt {n}", entry_key(n=n), None, 64, 48, 1) for n in seeds)
    return Manifest(rows, source={"base_path": source}, family="f", dtype="bf16", encoders={"text": "e"}, created=created)


def test_manifests_come_back(cache: Cache) -> None:
    written = manifest(1, 2)
    write_manifest(cache, written)
    write_manifest(cache, written)
    assert read_manifest(cache, written.id) == written
    assert manifest_ids(cache) == [written.id]
    assert manifest(1, 3).id != written.id


def test_the_only_data_set(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    with pytest.raises(DataError, match="holds no data set"):
        only_manifest(cache)
    old, new = manifest(1, 2), manifest(1, 3, created=2.0)
    write_manifest(cache, new)
    write_manifest(cache, old)
    assert only_manifest(cache) == new
    write_manifest(cache, manifest(5, source="b"))
    with pytest.raises(DataError, match="holds 2 data sets") as caught:
        only_manifest(cache)
    assert new.id in caught.value.message


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    written = manifest(*range(20))
    write_manifest(cache, written)
    path = tmp_path / "datasets" / f"{written.id}.parquet"
    whole, refused = path.read_bytes(), {}
    for position in range(0, len(whole), 5):
        path.write_bytes(whole)
        flip(path, position)
        try:
            assert read_manifest(cache, written.id).rows == written.rows  # a byte of no meaning, as in statistics
        except DataError as error:
            refused[position] = error.message
    assert all(re.search(r"damaged|does not fit its name", message) for message in refused.values())
    assert len(refused) > len(whole) // 5 / 2
    path.write_bytes(whole)
    flip(path, list(refused)[len(refused) // 2])
    assert verify(cache, lambda line: None)[1]
    with pytest.raises(DataError, match="no such data set"):
        read_manifest(cache, "0" * 32)


def test_an_older_manifest_tells_its_files_apart_by_what_is_encoded(tmp_path: Path) -> None:
    rows = [
        ManifestRow("a cat", "t", "i1", 32, 32, 1),
        ManifestRow("the same cat", "t", "i1", 32, 32, 1),
        ManifestRow("a dog", "t", "i2", 32, 32, 1),
        ManifestRow("no picture", "t", None, 32, 32, 1, bad=["/x/a.jpg", "damaged"]),
    ]
    cache, older = Cache(str(tmp_path)), Manifest(rows=tuple(rows), family="qwen_image")
    write_manifest(cache, older)
    path = tmp_path / "datasets" / f"{older.id}.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["file"]), path)
    media = read_manifest(cache, older.id).media
    assert media == ["i1", "i1", "i2", "/x/a.jpg"]
    held = {tuple(held_out(media, share=0.34, seed=seed).tolist()) for seed in range(20)}
    assert held == {(0, 1), (2,), (3,)}


def test_garbage_is_what_no_data_set_refers_to(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    write(cache, 1, 2)
    write(cache, 3, 4)
    write(cache, 5)
    kept, dropped = manifest(1), manifest(5, source="b")
    write_manifest(cache, kept)
    write_manifest(cache, dropped)
    orphan = f"{'0' * 24}.safetensors"
    (tmp_path / "shards" / orphan).write_bytes(b"x")
    assert find_garbage(cache).shards == []  # all of it is younger than a day
    garbage = find_garbage(cache, min_age_s=-1)
    assert (len(garbage.shards), garbage.num_entries, garbage.num_kept) == (1, 2, 1)
    assert garbage.leftovers == [f"shards/{orphan}"]
    assert summarize(cache).num_unused == 3
    with pytest.raises(DataError, match="no data set 'nonsense'"):
        find_garbage(cache, without=("nonsense",))
    garbage = find_garbage(cache, without=(dropped.id,), min_age_s=-1)
    assert (len(garbage.shards), garbage.num_entries) == (2, 3)
    delete_garbage(cache, garbage)
    assert cache.index().missing([entry_key(n=n) for n in (1, 2, 3, 4, 5)]) == [entry_key(n=n) for n in (3, 4, 5)]
    assert cache.read(location(cache, 1)) == entry(1)
    assert verify(cache, lambda line: None) == (2, [])
    assert manifest_ids(cache) == [kept.id]
    assert len(list((tmp_path / "shards").iterdir())) == 1


def test_the_summary(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    write(cache, 1, 2)
    write(cache, 3, kind="image")
    write_manifest(cache, manifest(1, 2, 9, created=time.time()))
    summary = summarize(cache)
    assert (summary.num_texts, summary.num_images, summary.num_shards) == (2, 1, 2)
    (dataset,) = summary.datasets
    assert (dataset.num_rows, dataset.num_missing, dataset.num_bytes) == (3, 1, 2 * (3 * 16 + 8))
