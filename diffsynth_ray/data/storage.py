"""Where files are: local paths, file:// and s3:// (pyarrow's file system) and http(s)://.

A *path* is text as users write it. Credentials, region and endpoint of s3:// come from the node's environment
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL), never from a job file.
"""

from __future__ import annotations

import http.client
import io
import os
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from diffsynth_ray.errors import DataError, first_line

_HTTP_TIMEOUT_S = 30.0
_HTTP_ATTEMPTS = 3
# File systems over the network answer in milliseconds, so many questions are kept open; local ones do not mind.
_NUM_THREADS = 32
_PATHS_PER_TASK = 500
_REMOTE_READ_BYTES = 256 << 10
_S3_HINT = (
    "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and, for other servers than Amazon's, AWS_ENDPOINT_URL in the "
    "environment of the nodes"
)
# A listing tells a thousand objects a request: beyond a few it is cheaper than asking for each.
_MOST_SINGLE_QUESTIONS = 64


class Stamp(NamedTuple):
    """What changes when a file's content does."""

    size: int
    """Bytes."""
    mark: str
    """Time of the last change in nanoseconds, or the server's ETag; "" where a server tells neither."""


def is_url(path: str | Path) -> bool:
    """Whether a path is fetched over http(s)."""
    return str(path).lower().startswith(("http://", "https://"))


def is_remote(path: str | Path) -> bool:
    """Whether a path is on pyarrow's remote file system."""
    return str(path).startswith("s3://")


def local_or_remote(path: str | Path) -> str:
    """Return a folder or file without a file:// in front, s3:// as it is; other schemes are an error."""
    text = str(path)
    if text.startswith("file://"):
        return text.removeprefix("file://")
    if "://" in text and not is_remote(text):
        raise DataError(f"{text}: must be a local path, file:// or s3://; mount or download other storage first")
    return text.rstrip("/") if is_remote(text) else text


def join(base: str, path: str) -> str:
    """Return a row's path ready to open: URLs, s3:// and absolute paths as they are, others under `base`."""
    if is_url(path) or is_remote(path):
        return path
    path = path.removeprefix("file://")
    if is_remote(base) and not os.path.isabs(path):
        return f"{base}/{path}"
    return os.path.join(base, path)


def read_bytes(path: str | Path) -> bytes:
    """Read a whole file. Raises DataError or OSError."""
    if is_url(path):
        return fetch(str(path))
    with open_binary(str(path)) as file:
        return file.read()


def open_binary(path: str) -> io.BufferedReader:
    """Open a local or s3:// file for reading; of s3:// only what is read is downloaded. Raises DataError or OSError."""
    if not is_remote(path):
        return open(path, "rb")
    filesystem, inner = _filesystem(path)
    try:
        # Buffered, so that a header costs one request and not one a field.
        return io.BufferedReader(filesystem.open_input_file(inner), _REMOTE_READ_BYTES)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {first_line(error)}") from error


def exists(path: str) -> bool:
    """Whether a file is there (not for http(s))."""
    return read_stamps([path])[path] is not None if is_remote(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """Whether a folder, or an s3:// prefix with something in it, is there."""
    if not is_remote(path):
        return os.path.isdir(path)
    filesystem, inner = _filesystem(path)
    info = _ask(filesystem.get_file_info, inner, path=path)
    return bool(info.type.name == "Directory")


def list_files(base: str) -> list[str]:
    """All files under a folder or s3:// prefix, relative to it, sorted."""
    if is_remote(base):
        return sorted(_list_remote(base))
    return sorted(os.path.relpath(os.path.join(folder, name), base) for folder, _, names in os.walk(base) for name in names)


def read_stamps(paths: Sequence[str]) -> dict[str, Stamp | None]:
    """Size and mark of every file, many at once; None where there is no such file (or it is a folder).

    A server that does not answer a question about an http(s) file gives None too: reading it tells why.
    """
    local = [path for path in paths if not is_remote(path) and not is_url(path)]
    chunks = [local[first : first + _PATHS_PER_TASK] for first in range(0, len(local), _PATHS_PER_TASK)]
    stamps: dict[str, Stamp | None] = {}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for chunk in pool.map(lambda chunk: [(path, _local_stamp(path)) for path in chunk], chunks):
            stamps.update(chunk)
        urls = [path for path in paths if is_url(path)]
        stamps.update(zip(urls, pool.map(_url_stamp, urls), strict=True))
    remote = [path for path in paths if is_remote(path)]
    return stamps | _remote_stamps(remote)


def fetch(url: str, *, timeout_s: float = _HTTP_TIMEOUT_S) -> bytes:
    """Download an http(s) URL; a server's error or a dropped connection is tried three times."""
    for attempt in range(1, _HTTP_ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(_request(url), timeout=timeout_s) as response:
                content: bytes = response.read()
            return content
        except (OSError, http.client.HTTPException, ValueError) as error:
            # The request itself is wrong (404, 403, a malformed URL): it stays wrong.
            is_final = isinstance(error, ValueError) or (isinstance(error, urllib.error.HTTPError) and error.code < 500)
            if is_final or attempt == _HTTP_ATTEMPTS:
                raise DataError(f"{url}: cannot be downloaded ({attempt} attempt(s)): {error}") from error
            time.sleep(attempt)
    raise AssertionError("unreachable")


def _request(url: str, method: str = "GET") -> urllib.request.Request:
    return urllib.request.Request(url, headers={"User-Agent": "dsray"}, method=method)


def _local_stamp(path: str) -> Stamp | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # a name with a NUL or half a character in it is that of no file
        return None
    return Stamp(found.st_size, str(found.st_mtime_ns)) if stat.S_ISREG(found.st_mode) else None


def _url_stamp(url: str) -> Stamp | None:
    try:
        with urllib.request.urlopen(_request(url, "HEAD"), timeout=_HTTP_TIMEOUT_S) as response:
            headers = response.headers
    except (OSError, http.client.HTTPException, ValueError):
        return None
    return Stamp(int(headers.get("Content-Length") or -1), headers.get("ETag") or headers.get("Last-Modified") or "")


def _remote_stamps(paths: Sequence[str]) -> dict[str, Stamp | None]:
    if len(paths) <= _MOST_SINGLE_QUESTIONS:
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            return dict(zip(paths, pool.map(_remote_stamp, paths), strict=True))
    found: dict[str, Stamp] = {}
    for base in _common_folders(paths):
        found.update((f"{base}/{name}", stamp) for name, stamp in _list_remote(base).items())
    return {path: found.get(path) for path in paths}


def _common_folders(paths: Iterable[str]) -> list[str]:
    """The deepest s3:// folder that the paths of each bucket have in common."""
    folders: dict[str, set[str]] = {}
    for path in paths:
        folder = path.rpartition("/")[0]
        folders.setdefault(path.split("/")[2], set()).add(folder)
    return ["s3://" + os.path.commonpath([folder.removeprefix("s3://") for folder in group]) for group in folders.values()]


def _remote_stamp(path: str) -> Stamp | None:
    filesystem, inner = _filesystem(path)
    return _stamp_of(_ask(filesystem.get_file_info, inner, path=path))


def _list_remote(base: str) -> dict[str, Stamp]:
    from pyarrow.fs import FileSelector

    filesystem, inner = _filesystem(base)
    infos = _ask(filesystem.get_file_info, FileSelector(inner, allow_not_found=True, recursive=True), path=base)
    stamps = {info.path[len(inner) + 1 :]: _stamp_of(info) for info in infos}
    return {name: stamp for name, stamp in stamps.items() if stamp is not None}


def _stamp_of(info: Any) -> Stamp | None:
    if info.type.name != "File":
        return None
    return Stamp(info.size, str(info.mtime_ns))


def _ask(question: Any, argument: Any, *, path: str) -> Any:
    try:
        return question(argument)
    except OSError as error:
        raise DataError(f"{path}: the storage does not answer: {first_line(error)}", hint=_S3_HINT) from error


def _filesystem(path: str) -> tuple[Any, str]:
    """pyarrow's file system of a remote path, and the path inside it."""
    inner = path.removeprefix("s3://").rstrip("/")
    return _s3_of_bucket(inner.partition("/")[0]), inner


@lru_cache
def _s3_of_bucket(bucket: str) -> Any:
    # Imported late: most datasets are local, and the import takes a third of a second.
    from pyarrow.fs import FileSystem

    # Of the bucket alone: keys with spaces or percent signs are no URIs.
    try:
        return FileSystem.from_uri(f"s3://{bucket}")[0]
    except (OSError, ValueError) as error:
        raise DataError(f"s3://{bucket}: cannot be opened: {first_line(error)}", hint=_S3_HINT) from error
