"""Looking after a cache: what is in it, whether it is whole, and what nothing refers to any more."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from diffsynth_ray.data.cache import DAMAGED, INDEX, SHARDS, Cache, entry_sha256
from diffsynth_ray.data.manifest import FOLDER as DATASETS
from diffsynth_ray.data.manifest import manifest_ids, read_manifest
from diffsynth_ray.errors import DataError

_MIN_AGE_S = 24 * 3600.0
"""Younger files may belong to a writer that has not come to its index or its data set yet."""
_SAY_S = 5.0

Say = Callable[[str], object]


@dataclass(frozen=True)
class DatasetSummary:
    """A data set in the cache."""

    id: str
    num_rows: int
    source: dict[str, object]
    family: str
    dtype: str
    created: float
    num_bytes: int
    """Of its entries, each once."""
    num_missing: int
    """Entries that the cache no longer has."""


@dataclass(frozen=True)
class CacheSummary:
    """What is in a cache."""

    path: str
    datasets: list[DatasetSummary]
    num_texts: int
    num_images: int
    num_extras: int
    """Sets of extra inputs."""
    num_shards: int
    num_bytes: int
    num_unused: int
    """Entries that no data set refers to."""
    unused_bytes: int
    num_damaged: int
    """Entries that were found damaged, by a run or by verify, and are not encoded anew yet."""


def summarize(cache: Cache) -> CacheSummary:
    """Read indices and data sets, no contents."""
    index = cache.index()
    columns = (index.table["key"].to_pylist(), index.table["num_bytes"].to_pylist())
    sizes: dict[str, int] = dict(zip(*columns, strict=True))
    used: set[str] = set()
    datasets = []
    for manifest_id in manifest_ids(cache):
        manifest = read_manifest(cache, manifest_id)
        keys = set(manifest.entry_keys())
        used |= keys
        datasets.append(
            DatasetSummary(
                id=manifest_id,
                num_rows=len(manifest.rows),
                source=manifest.source,
                family=manifest.family,
                dtype=manifest.dtype,
                created=manifest.created,
                num_bytes=sum(sizes.get(key, 0) for key in keys),
                num_missing=sum(key not in sizes for key in keys),
            )
        )
    kinds = index.table["kind"].to_pylist()
    unused = sizes.keys() - used
    shards = {name: size for name, (size, _) in cache.files(SHARDS).items() if name.endswith(".safetensors")}
    return CacheSummary(
        path=cache.path,
        datasets=sorted(datasets, key=lambda each: each.created),
        num_texts=kinds.count("text"),
        num_images=kinds.count("image"),
        num_extras=kinds.count("extra"),
        num_shards=len(shards),
        num_bytes=sum(shards.values()),
        num_unused=len(unused),
        unused_bytes=sum(sizes[key] for key in unused),
        num_damaged=len({key for key, _ in cache.damaged()} - sizes.keys()),
    )


def is_cache(cache: Cache) -> bool:
    """Whether anything is there that a cache has written."""
    return any(cache.files(folder) for folder in (SHARDS, INDEX, DATASETS))


@dataclass(frozen=True)
class Damage:
    """A file of the cache that is not what was written."""

    name: str
    """Relative to the cache."""
    cause: str
    keys: tuple[str, ...] = ()
    """Entries that are lost."""


def verify(cache: Cache, say: Say) -> tuple[int, list[Damage]]:
    """Read everything. Returns (entries checked, damage); lost entries are noted, so that they are encoded anew."""
    damages: list[Damage] = []
    by_shard: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name in cache.index_files():
        try:
            rows = cache.read_index_file(name).to_pylist()
        except DataError as error:
            damages.append(Damage(name, error.message.partition(": ")[2]))
            continue
        for row in rows:
            by_shard[row["shard"]].append(row)
    for manifest_id in manifest_ids(cache):
        try:
            read_manifest(cache, manifest_id)
        except DataError as error:
            damages.append(Damage(f"{DATASETS}/{manifest_id}.parquet", error.message.partition(": ")[2]))
    said = time.monotonic()
    whole: set[str] = set()
    for number, (shard, rows) in enumerate(by_shard.items()):
        if time.monotonic() - said > _SAY_S:
            said = time.monotonic()
            say(f"verified {number}/{len(by_shard)} shards")
        damage = _verify_shard(cache, shard, rows)
        damages += [damage] if damage else []
        whole |= {row["key"] for row in rows} - set(damage.keys if damage else ())
    for old in [damage for damage in damages if damage.keys and whole.issuperset(damage.keys)]:
        say(f"{old.name}: {old.cause}, which are whole elsewhere; `dsray cache gc` deletes what nothing needs")
        damages.remove(old)
    known = cache.damaged()
    lost = [(key, damage.name) for damage in damages for key in damage.keys if (key, damage.name) not in known]
    if lost:
        cache.note_damage(lost)
    return sum(len(rows) for rows in by_shard.values()), damages


def _verify_shard(cache: Cache, shard: str, rows: list[dict[str, Any]]) -> Damage | None:
    try:
        content = cache.store.read(shard)
    except FileNotFoundError:
        return Damage(shard, "missing", tuple(row["key"] for row in rows))
    if hashlib.sha256(content).hexdigest() == rows[0]["shard_sha256"]:
        return None
    lost = []
    for row in rows:
        data = content[row["offset"] : row["offset"] + row["num_bytes"]]
        if entry_sha256(row["key"], row["layout"], data) != row["sha256"]:
            lost.append(row["key"])
    cause = f"{len(lost)} of {len(rows)} entries damaged" if lost else "header damaged, all entries whole"
    return Damage(shard, cause, tuple(lost))


@dataclass
class Garbage:
    """What `delete_garbage` would delete, or has deleted."""

    datasets: list[str] = field(default_factory=list)
    """Names of manifests, asked for by the user."""
    shards: list[str] = field(default_factory=list)
    """Names of shards without any entry that a data set refers to."""
    leftovers: list[str] = field(default_factory=list)
    """Names of files that a killed writer left."""
    num_entries: int = 0
    num_bytes: int = 0
    num_kept: int = 0
    """Unused entries that stay, because their shard also holds used ones."""


def find_garbage(cache: Cache, *, without: tuple[str, ...] = (), min_age_s: float = _MIN_AGE_S) -> Garbage:
    """What nothing refers to, once the data sets `without` are gone. Reads no contents and changes nothing."""
    garbage = Garbage()
    known = manifest_ids(cache)
    for manifest_id in without:
        if manifest_id not in known:
            raise DataError(f"{cache.path} has no data set {manifest_id!r}", hint=f"it has {', '.join(known) or 'none'}")
        garbage.datasets.append(f"{DATASETS}/{manifest_id}.parquet")
    used = {key for each in known if each not in without for key in read_manifest(cache, each).entry_keys()}
    files = cache.files(SHARDS)
    oldest = time.time() - min_age_s
    damaged = cache.damaged()
    entries: dict[str, list[bool]] = defaultdict(list)
    table = cache.index_table()
    for key, shard in zip(table["key"].to_pylist(), table["shard"].to_pylist(), strict=True):
        entries[shard].append(key in used and (key, shard) not in damaged)
    for name, (size, changed) in files.items():
        if changed > oldest:
            continue
        if name.rpartition("/")[2].startswith(".") or name not in entries:
            garbage.leftovers.append(name)
        elif any(entries[name]):
            garbage.num_kept += entries[name].count(False)
            continue
        else:
            garbage.shards.append(name)
            garbage.num_entries += len(entries[name])
        garbage.num_bytes += size
    for folder in (INDEX, DATASETS, DAMAGED):
        for name, (size, changed) in cache.files(folder).items():
            if name.rpartition("/")[2].startswith(".") and changed <= oldest:
                garbage.leftovers.append(name)
                garbage.num_bytes += size
    return garbage


def delete_garbage(cache: Cache, garbage: Garbage) -> None:
    """Delete it: what refers to it first, so that a reader never looks for something that is gone."""
    for name in garbage.datasets:
        cache.store.delete(name)
    gone = pa.array(garbage.shards, pa.string())
    for name in cache.index_files():
        table = cache.read_index_file(name)
        kept = table.filter(pc.invert(pc.is_in(table["shard"], value_set=gone)))
        if kept.num_rows == table.num_rows:
            continue
        if kept.num_rows:
            cache.write_index(kept)
        cache.store.delete(name)
    for name in (*garbage.shards, *garbage.leftovers):
        cache.store.delete(name)
    for name in list(cache.files(DAMAGED)):
        noted = json.loads(cache.store.read(name))["entries"] if name.endswith(".json") else []
        if noted and all(shard in garbage.shards for _, shard in noted):
            cache.store.delete(name)
