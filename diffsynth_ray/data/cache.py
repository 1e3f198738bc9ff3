"""Encoded samples on disk, found by what was encoded with what.

An *entry* is one encoded text, image or set of extra inputs: named tensors under a key, the hash of everything that they
follow from (`entry_key`). So an entry is never wrong and never replaced; what no longer follows from a job's inputs is just
not asked for.

    shards/{id}.safetensors    tensors of many entries, named {key}.{tensor}; written once, whole
    index/{id}.parquet         where each entry is, and its SHA-256; written after the shard, which is what makes it count
    datasets/{id}.parquet      which entries the rows of a data set are (manifest.py)
    digests/{id}.parquet       content hashes of files that were read (digests.py)
    damaged/{id}.json          entries that were found damaged: they are looked for elsewhere, or encoded anew

Every name is new, so that any number of writers may share a cache; readers merge the indices. An entry is read alone, by
its offset, and checked against its SHA-256 at every read: that takes 2 ms for a picture and its text (2.4 MB), in a thread
beside steps of hundreds of ms (tests/bench/split.py measures both).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffsynth_ray.data.store import open_store, parse_parquet
from diffsynth_ray.errors import DataError, first_line

Kind = Literal["text", "image", "extra"]
"""What an entry is of; "extra": a row's extra inputs, with its prompt where the family reads both together."""
Positions = npt.NDArray[np.int64]

SHARDS, INDEX, DAMAGED = "shards", "index", "damaged"
_LIST_ATTEMPTS = 5
# Also those that a killed writer left: `.{name}.{8 digits}`.
_OWN_NAME = re.compile(r"\.?[0-9a-f]{24,32}\.(safetensors|parquet|json)(\.[0-9a-f]{8})?")
_INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("kind", pa.string()),
        ("encoder", pa.string()),  # digest of the encoder's identity
        ("shard", pa.string()),
        ("offset", pa.int64()),  # bytes from the shard's beginning
        ("num_bytes", pa.int64()),
        ("layout", pa.string()),  # as `pack_entry` gives it, relative to offset
        ("sha256", pa.string()),
        ("shard_bytes", pa.int64()),
        ("shard_sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class TensorBytes:
    """A tensor's exact bits, without torch."""

    dtype: str
    """As safetensors names it: BF16, F32, ..."""
    shape: tuple[int, ...]
    data: bytes
    """Row-major, little-endian."""


Entry = Mapping[str, TensorBytes]


@dataclass(frozen=True)
class Location:
    """Where an entry is."""

    key: str
    kind: Kind
    encoder: str
    shard: str
    offset: int
    num_bytes: int
    layout: str
    sha256: str


def entry_key(**parts: Any) -> str:
    """32 hexadecimal digits that name everything that an entry follows from; `parts` are JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def pack_entry(entry: Entry) -> tuple[str, bytes]:
    """(layout, data): the tensors by name, side by side; the layout is JSON of [[tensor, dtype, shape, begin, end], ...]."""
    layout, chunks, end = [], [], 0
    for name, tensor in sorted(entry.items()):
        begin, end = end, end + len(tensor.data)
        layout.append([name, tensor.dtype, list(tensor.shape), begin, end])
        chunks.append(tensor.data)
    return json.dumps(layout), b"".join(chunks)


def unpack_entry(layout: str, data: bytes) -> dict[str, TensorBytes]:
    """The inverse of `pack_entry`."""
    return {name: TensorBytes(dtype, tuple(shape), data[begin:end]) for name, dtype, shape, begin, end in json.loads(layout)}


class Index:
    """The entries of a cache, each key once. Memory is about 300 bytes an entry; pickles as a table."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def positions(self, keys: Sequence[str]) -> Positions:
        """[len(keys)] place of each key in the index, -1 where it is not there."""
        found = pc.index_in(pa.array(keys, pa.string()), value_set=self.table["key"].combine_chunks())
        positions: Positions = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return positions

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that are not there, each once, in order."""
        unique = list(dict.fromkeys(keys))
        return [key for key, place in zip(unique, self.positions(unique), strict=True) if place < 0]

    def select(self, positions: Positions) -> Index:
        """An index of these places alone, in this order."""
        return Index(self.table.take(pa.array(positions)).combine_chunks())

    def location(self, position: int) -> Location:
        """The entry at a place."""
        row = self.table.slice(int(position), 1).to_pylist()[0]
        return Location(**{name: row[name] for name in Location.__dataclass_fields__})


class Cache:
    """A cache at a path or URI. Opening it creates nothing."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.store = open_store(path)

    def files(self, folder: str) -> dict[str, tuple[int, float]]:
        """Of a folder's files (see `Store.files`) those with a cache's names: whatever else lies there is not a cache's."""
        found = self.store.files(folder)
        return {name: about for name, about in found.items() if _OWN_NAME.fullmatch(name.rpartition("/")[2])}

    def write(self, kind: Kind, entries: Mapping[str, Entry], *, encoder: str) -> str:
        """Write entries as one shard and its index; returns the name of the index file.

        `encoder` is the digest of what encoded them. Until the index is there, the shard does not count.
        """
        name = secrets.token_hex(12)
        shard, rows = _build_shard(entries)
        shard_name = f"{SHARDS}/{name}.safetensors"
        self.store.write(shard_name, shard)
        shared = {
            "kind": kind,
            "encoder": encoder,
            "shard": shard_name,
            "shard_bytes": len(shard),
            "shard_sha256": hashlib.sha256(shard).hexdigest(),
        }
        return self.write_index(pa.Table.from_pylist([row | shared for row in rows], schema=_INDEX_SCHEMA))

    def write_index(self, table: pa.Table) -> str:
        """Add an index file; returns its name."""
        name = f"{INDEX}/{secrets.token_hex(12)}.parquet"
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        self.store.write(name, buffer.getvalue())
        return name

    def merge_index_files(self, names: Sequence[str]) -> str | None:
        """Make one index file of a writer's own; a cache of a million entries is then read in a second."""
        if len(names) < 2:
            return names[0] if names else None
        merged = self.write_index(pa.concat_tables([self.read_index_file(name) for name in names]))
        for name in names:
            self.store.delete(name)
        return merged

    def index(self) -> Index:
        """All entries that are whole as far as names and sizes tell: contents are checked when they are read."""
        table = self.index_table()
        sizes = {name: size for name, (size, _) in self.files(SHARDS).items()}
        shards = table["shard"].to_pylist()
        there = np.fromiter(
            (sizes.get(shard) == size for shard, size in zip(shards, table["shard_bytes"].to_pylist(), strict=True)),
            dtype=bool,
            count=len(shards),
        )
        if damaged := self.damaged():
            bad = [(key, shard) in damaged for key, shard in zip(table["key"].to_pylist(), shards, strict=True)]
            there &= ~np.array(bad, dtype=bool)
        table = table.filter(pa.array(there))
        # Two writers may have encoded the same: the first counts.
        numbered = pa.table({"key": table["key"], "place": np.arange(table.num_rows)})
        firsts = numbered.group_by("key", use_threads=False).aggregate([("place", "min")])["place_min"]
        return Index(table.take(firsts).combine_chunks())

    def index_table(self) -> pa.Table:
        """Every row of every index file, whatever became of its shard."""
        for _ in range(_LIST_ATTEMPTS):
            try:
                tables = [self.read_index_file(name) for name in self.index_files()]
                return pa.concat_tables([_INDEX_SCHEMA.empty_table(), *tables])
            except FileNotFoundError:
                continue  # its writer has merged it into another one since it was listed
        raise DataError(f"{self.store.path(INDEX)}: its files vanish while they are read", hint="is it being deleted?")

    def index_files(self) -> list[str]:
        """Names of the index files."""
        return [name for name in self.files(INDEX) if name.endswith(".parquet")]

    def read_index_file(self, name: str) -> pa.Table:
        """Rows of one index file; FileNotFoundError where it is gone, DataError where it is damaged."""
        content = self.store.read(name)
        try:
            table = parse_parquet(content)
            return table.select(_INDEX_SCHEMA.names).cast(_INDEX_SCHEMA)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{self.store.path(name)}: the index file is damaged, or of another version ({first_line(error)})",
                hint="delete that file: what it lists is encoded anew by the next submission",
            ) from error

    def read(self, location: Location) -> dict[str, TensorBytes]:
        """One entry, checked. Raises DataError with shard and cure, and notes the damage for the next stage one."""
        try:
            data = self.store.read_at(location.shard, location.offset, location.num_bytes)
            cause = None if entry_sha256(location.key, location.layout, data) == location.sha256 else "damaged"
        except FileNotFoundError:
            data, cause = b"", "missing"
        if cause is not None:
            self.note_damage([(location.key, location.shard)])
            raise DataError(
                f"{self.store.path(location.shard)}: the shard is {cause} at the entry {location.key} "
                f"({location.num_bytes} bytes from {location.offset})",
                hint="submit the job again: that entry is noted and encoded anew; "
                f"`dsray cache verify {self.path}` looks for more damage",
            )
        return unpack_entry(location.layout, data)

    def damaged(self) -> set[tuple[str, str]]:
        """(key, shard) of the entries that were found damaged."""
        found: set[tuple[str, str]] = set()
        for name in self.files(DAMAGED):
            if name.endswith(".json"):
                found.update((key, shard) for key, shard in json.loads(self.store.read(name))["entries"])
        return found

    def note_damage(self, entries: Sequence[tuple[str, str]]) -> None:
        """Leave a note that these (key, shard) are damaged. Nothing is deleted."""
        content = json.dumps({"time": time.time(), "entries": list(entries)})
        self.store.write(f"{DAMAGED}/{secrets.token_hex(12)}.json", content.encode())


def _build_shard(entries: Mapping[str, Entry]) -> tuple[bytes, list[dict[str, Any]]]:
    """A safetensors file with every entry's tensors side by side, and the entries' rows of the index."""
    header: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    chunks: list[bytes] = []
    start = 0
    for key, entry in entries.items():
        layout, data = pack_entry(entry)
        for name, dtype, shape, begin, end in json.loads(layout):
            offsets = [start + begin, start + end]
            header[f"{key}.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        sha256 = entry_sha256(key, layout, data)
        rows.append({"key": key, "offset": start, "num_bytes": len(data), "layout": layout, "sha256": sha256})
        chunks.append(data)
        start += len(data)
    # The format: length of the header (8 bytes), the header padded with spaces to a multiple of 8, then the tensors.
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    front = len(encoded).to_bytes(8, "little") + encoded
    for row in rows:
        row["offset"] += len(front)
    return b"".join([front, *chunks]), rows


def entry_sha256(key: str, layout: str, data: bytes) -> str:
    """What an entry is checked against."""
    # Key and layout too: a damaged index must not hand out other bits than were written under this key.
    digest = hashlib.sha256(f"{key} {layout} ".encode())
    digest.update(data)
    return digest.hexdigest()
