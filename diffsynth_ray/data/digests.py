"""Content hashes of files, so that a cache can be trusted: kept beside it, because 40 GB are not read at every submission.

A hash is used again while path, size, time of change and time of the inode's change are the same: the last one cannot be
set, so that a file that was replaced or copied over is always read again. Of s3:// and http(s) files it is the size and the
time or ETag that the server tells.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffsynth_ray.data.storage import Stamp, is_remote, is_url, read_bytes, read_stamps
from diffsynth_ray.data.store import Store, parse_parquet
from diffsynth_ray.errors import DataError

FOLDER = "digests"
_NUM_THREADS = 16
_CHUNK_BYTES = 8 << 20
_SETTLED_S = 2.0
"""A file that changed less than this ago may change again within the resolution of its times: its hash is not kept."""
_SAY_S = 5.0
_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("num_bytes", pa.int64()),
        ("mark", pa.string()),
        ("digest", pa.string()),
    ]
)

Known = dict[str, tuple[Stamp, str]]


def content_digest(content: bytes) -> str:
    """The hash that `file_digests` gives for a file with this content."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: str) -> str:
    """Hash of a file, s3:// or http(s) too. Raises DataError where it cannot be read."""
    digest = hashlib.sha256()  # in hardware on today's CPUs: 1.2 GB/s a thread, against 0.25 of BLAKE2b
    try:
        if is_url(path) or is_remote(path):
            return content_digest(read_bytes(path))
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def file_digests(paths: Sequence[str], store: Store, say: Callable[[str], object]) -> list[str | DataError]:
    """Hash of each file, or why it cannot be read; what is known from before is not read again."""
    known = _read_known(store)
    fresh: Known = {}
    unique = list(dict.fromkeys(paths))
    stamps = _stamps(unique)
    found: dict[str, str | DataError] = {}

    def digest_of(path: str) -> str | DataError:
        before = stamps[path]
        if before is not None and path in known and known[path][0] == before:
            return known[path][1]
        try:
            digest = file_digest(path)
        except DataError as error:
            return error
        if before is not None and _is_settled(path, before) and _stamps([path])[path] == before:
            fresh[path] = (before, digest)
        return digest

    try:
        with ThreadPoolExecutor(max_workers=_NUM_THREADS) as pool:
            results = pool.map(digest_of, unique)
            for path, result in zip(unique, _with_progress(results, len(unique), say), strict=True):
                found[path] = result
    finally:
        _write_known(store, fresh)
    return [found[path] for path in paths]


def _with_progress(results: Iterator[str | DataError], total: int, say: Callable[[str], object]) -> Iterator[str | DataError]:
    said = time.monotonic()
    for number, result in enumerate(results):
        if time.monotonic() - said > _SAY_S:
            said = time.monotonic()
            say(f"hashing files: {number}/{total}")
        yield result


def _stamps(paths: Sequence[str]) -> dict[str, Stamp | None]:
    """What changes when a file does; None where nobody tells."""
    local = {path: _local_stamp(path) for path in paths if not (is_url(path) or is_remote(path))}
    remote = read_stamps([path for path in paths if path not in local])
    return {**local, **{path: stamp if stamp is not None and stamp.mark else None for path, stamp in remote.items()}}


def _local_stamp(path: str) -> Stamp | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return Stamp(stat.st_size, f"{stat.st_mtime_ns} {stat.st_ctime_ns}")


def _is_settled(path: str, stamp: Stamp) -> bool:
    """Whether the file is old enough for its times to tell the next change. An ETag always does."""
    if is_url(path):
        return True
    return time.time_ns() - max(int(part) for part in stamp.mark.split()) > _SETTLED_S * 1e9


def _read_known(store: Store) -> Known:
    known: Known = {}
    for name in store.files(FOLDER):
        if not name.endswith(".parquet"):
            continue
        try:
            table = parse_parquet(store.read(name))
            columns = [table[column].to_pylist() for column in _SCHEMA.names]
        except (pa.ArrowException, OSError, KeyError):
            continue  # only a memory of what was read: without it the files are read again
        for path, size, mark, digest in zip(*columns, strict=True):
            known[path] = (Stamp(size, mark), digest)
    return known


def _write_known(store: Store, fresh: Known) -> None:
    if not fresh:
        return
    rows = [dict(zip(_SCHEMA.names, (path, *stamp, digest), strict=True)) for path, (stamp, digest) in fresh.items()]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer, compression="zstd", write_page_checksum=True)
    store.write(f"{FOLDER}/{secrets.token_hex(12)}.parquet", buffer.getvalue())
