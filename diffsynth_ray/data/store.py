"""Files of a cache on a local disk or any pyarrow file system: a file is there whole or not at all.

Names are relative to the store's root, with "/" between folders.
"""

from __future__ import annotations

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from diffsynth_ray.errors import OutputError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_APPEARS_WHOLE = {"s3", "gcs", "abfs"}
"""pyarrow file systems on which an object appears when its stream is closed, and renaming means copying."""


class Store(ABC):
    """What a cache needs of a file system."""

    root: str

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a file so that it appears under its name only when complete, and survives a power cut then."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file; FileNotFoundError where there is none."""

    @abstractmethod
    def read_at(self, name: str, offset: int, num_bytes: int) -> bytes:
        """A part of a file, shorter where the file ends before."""

    @abstractmethod
    def files(self, folder: str) -> dict[str, tuple[int, float]]:
        """Name -> (bytes, time of the last change in s) of the files in a folder, sorted by name; empty without the folder."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file; no error where it is gone already."""

    def path(self, name: str) -> str:
        """The file's full name, for messages."""
        return f"{self.root}/{name}"


class LocalStore(Store):
    """A folder."""

    def __init__(self, root: str) -> None:
        self.root = root

    def write(self, name: str, content: bytes) -> None:
        """See `Store.write`: written beside, synchronised, renamed."""
        path = Path(self.root, name)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise _not_writable(path, error) from error

    def read(self, name: str) -> bytes:
        """See `Store.read`."""
        return Path(self.root, name).read_bytes()

    def read_at(self, name: str, offset: int, num_bytes: int) -> bytes:
        """See `Store.read_at`."""
        file = os.open(f"{self.root}/{name}", os.O_RDONLY)
        try:
            return os.pread(file, num_bytes, offset)
        finally:
            os.close(file)

    def files(self, folder: str) -> dict[str, tuple[int, float]]:
        """See `Store.files`."""
        found = {}
        try:
            with os.scandir(f"{self.root}/{folder}") as entries:
                for entry in entries:
                    try:
                        stat = entry.stat()
                    except FileNotFoundError:
                        continue  # renamed or deleted since it was listed
                    found[f"{folder}/{entry.name}"] = (stat.st_size, stat.st_mtime)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return dict(sorted(found.items()))

    def delete(self, name: str) -> None:
        """See `Store.delete`."""
        Path(self.root, name).unlink(missing_ok=True)


class ArrowStore(Store):
    """A folder of a pyarrow file system (s3://, gs://, hdfs://, ...)."""

    def __init__(self, root: str, *, system: FileSystem, base: str) -> None:
        self.root = root
        self.system, self.base = system, base.rstrip("/")

    def write(self, name: str, content: bytes) -> None:
        """See `Store.write`. Where a file is seen while it is written, it is written under another name and moved."""
        path = f"{self.base}/{name}"
        whole = self.system.type_name in _APPEARS_WHOLE
        folder, _, leaf = path.rpartition("/")
        target = path if whole else f"{folder}/.{leaf}.{secrets.token_hex(4)}"
        try:
            if not whole:
                self.system.create_dir(folder, recursive=True)
            with self.system.open_output_stream(target) as file:
                file.write(content)
            if not whole:
                self.system.move(target, path)
        except OSError as error:
            raise _not_writable(self.path(name), error) from error

    def read(self, name: str) -> bytes:
        """See `Store.read`."""
        with self._reading(name), self.system.open_input_file(f"{self.base}/{name}") as file:
            return bytes(file.read())

    def read_at(self, name: str, offset: int, num_bytes: int) -> bytes:
        """See `Store.read_at`."""
        with self._reading(name), self.system.open_input_file(f"{self.base}/{name}") as file:
            return bytes(file.read_at(num_bytes, offset))

    def files(self, folder: str) -> dict[str, tuple[int, float]]:
        """See `Store.files`."""
        from pyarrow.fs import FileSelector, FileType

        with self._reading(folder):
            found = self.system.get_file_info(FileSelector(f"{self.base}/{folder}", allow_not_found=True))
        return {
            f"{folder}/{info.base_name}": (info.size, info.mtime.timestamp() if info.mtime else 0.0)
            for info in sorted(found, key=lambda info: info.path)
            if info.type == FileType.File
        }

    def delete(self, name: str) -> None:
        """See `Store.delete`."""
        try:
            self.system.delete_file(f"{self.base}/{name}")
        except FileNotFoundError:
            return

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """A storage that refuses or does not answer is the user's to mend; a file that is not there is the caller's."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise OutputError(
                f"split.cache_path: {self.path(name)} cannot be read: {error}",
                hint="check the address, the network and the credentials in the nodes' environment",
            ) from error


def _not_writable(path: str | Path, error: OSError) -> OutputError:
    return OutputError(
        f"split.cache_path: {path} cannot be written: {error.strerror or error}",
        hint="choose another split.cache_path, free space there, or mend its permissions",
    )


def parse_parquet(content: bytes) -> pa.Table:
    """A Parquet file, its pages checked. Raises pyarrow's errors and OSError for one that is damaged."""
    # In this thread alone: a command that ends right after pq.read_table is aborted by its threads now and then (3 of 60).
    file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True, pre_buffer=False)
    return file.read(use_threads=False)


def open_store(path: str) -> Store:
    """The store at a path or URI; nothing is created. Raises OutputError for a URI that cannot be opened."""
    if "://" not in path or path.startswith("file://"):
        return LocalStore(os.path.abspath(path.removeprefix("file://")))
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem

    try:
        if not path.partition("://")[2].strip("/"):
            raise ArrowInvalid("it names no place")
        system, base = FileSystem.from_uri(path)
    except (ArrowInvalid, OSError, NotImplementedError) as error:
        raise OutputError(
            f"split.cache_path: {path} cannot be opened: {error}",
            hint="a folder, or a URI that pyarrow knows: s3://bucket/folder, gs://bucket/folder, hdfs://host/folder",
        ) from error
    return ArrowStore(path.rstrip("/"), system=system, base=base)
