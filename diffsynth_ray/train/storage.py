"""A folder of files on local disk or on any file system that pyarrow knows (s3://, gs://, hdfs://, ...).

Only what an object store can do is asked of it: write an object, read parts of one, list, delete. Nothing is renamed; on a
local disk small texts appear whole by way of a rename, on an object store everything does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import fs as pafs

from diffsynth_ray.errors import OutputError
from diffsynth_ray.run_dir import write_whole


class Output(Protocol):
    """What is written to."""

    def write(self, data: Any, /) -> Any:
        """Append bytes."""
        ...


class Storage:
    """Names are relative to `root`, with "/" between folders."""

    def __init__(self, file_system: pafs.FileSystem, root: str) -> None:
        self.file_system = file_system
        self.root = root.rstrip("/")
        self.is_local = isinstance(file_system, pafs.LocalFileSystem)

    @classmethod
    def at(cls, location: str | Path) -> Storage:
        """The storage at a local path or a URL. Raises OutputError for a URL that pyarrow does not know."""
        if "://" in str(location):
            try:
                return cls(*pafs.FileSystem.from_uri(str(location)))
            except (pa.ArrowInvalid, NotImplementedError):
                # Without pyarrow's words, which repeat all of the address: keys may be in it.
                raise OutputError(
                    f"output.checkpoint_path: no address that pyarrow can open ({str(location).partition('://')[0]}://...)",
                    hint="a folder, or a URL that pyarrow knows: s3://bucket/folder, gs://bucket/folder, hdfs://host/folder",
                ) from None
        return cls(pafs.LocalFileSystem(use_mmap=True), os.path.abspath(location))

    def path(self, name: str) -> str:
        """Full name, as errors and logs show it."""
        return f"{self.root}/{name}" if name else self.root

    @contextmanager
    def writing(self, name: str) -> Iterator[Output]:
        """Write a file; on local disk it is on the disk (fsync) when the block ends. What a failure leaves is deleted."""
        self.file_system.create_dir(os.path.dirname(self.path(name)), recursive=True)
        try:
            if self.is_local:
                # Not pyarrow's stream: it has no fsync, and errors of close would be lost.
                with open(self.path(name), "wb", buffering=1 << 20) as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
            else:
                with self.file_system.open_output_stream(self.path(name)) as stream:
                    yield stream
        except BaseException:
            with suppress(OSError):
                self.delete(name)
            raise

    def write_text(self, name: str, text: str) -> None:
        """Write a small file that appears only when complete."""
        if self.is_local:
            write_whole(Path(self.path(name)), text)
            _sync_folder(os.path.dirname(self.path(name)))
        else:
            with self.writing(name) as stream:
                stream.write(text.encode())

    def read_text(self, name: str) -> str:
        """Read a small file; raises FileNotFoundError."""
        with self.file_system.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read()).decode()

    def open(self, name: str) -> Any:
        """A pyarrow file to seek and read in; memory-mapped on local disk. Raises FileNotFoundError."""
        return self.file_system.open_input_file(self.path(name))

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""
        info = self.file_system.get_file_info(self.path(name))
        return int(info.size) if info.type == pafs.FileType.File else None

    def list(self, name: str = "") -> list[str]:
        """Names in a folder, without the folder's; empty where there is none."""
        selector = pafs.FileSelector(self.path(name), allow_not_found=True)
        return sorted(info.base_name for info in self.file_system.get_file_info(selector))

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""
        with suppress(FileNotFoundError):
            self.file_system.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Delete a folder and everything in it, as far as possible."""
        if self.is_local:
            shutil.rmtree(self.path(name), ignore_errors=True)
        else:
            with suppress(OSError):
                self.file_system.delete_dir(self.path(name))


def _sync_folder(path: str) -> None:
    """A rename is on the disk only when the folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
