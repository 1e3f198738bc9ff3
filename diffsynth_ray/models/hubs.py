"""The two model hubs: what a repository holds, and fetching files of it, resumed and checksummed.

ModelScope's library does both. huggingface_hub lists, but since version 2 starts a file from its beginning whenever the process
was ended, and compares no checksum; its files are fetched here. Tokens are the libraries' own affair: MODELSCOPE_API_TOKEN,
HF_TOKEN; endpoints are MODELSCOPE_ENDPOINT (or MODELSCOPE_DOMAIN) and HF_ENDPOINT.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffsynth_ray.errors import HubError, ModelError

if TYPE_CHECKING:
    import requests

Kind = Literal["model", "dataset"]

_CHUNK_BYTES = 1 << 16
"""Written at once; what is left of one when a connection is cut comes again."""
_PARALLEL_FILES = 4
_RETRIES = 5
"""Attempts in a row that bring nothing."""
_RETRY_S = 1.0
"""Before the first retry; doubled for each further one."""
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository's listing."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None
    """Of the blob "blob {size}\\0" + content; small files have this one on Hugging Face."""


class Hub(ABC):
    """A source of files."""

    name: str
    token_variable: str

    @property
    @abstractmethod
    def endpoint(self) -> str:
        """Address of the hub."""

    @abstractmethod
    def list_files(self, repo: str, kind: Kind) -> list[RemoteFile]:
        """All files of a repository. Raises HubError, or ModelError where there is no such repository."""

    @abstractmethod
    def fetch(
        self, repo: str, kind: Kind, files: Sequence[RemoteFile], directory: Path, received: Callable[[int], None]
    ) -> None:
        """Fetch files to `directory / path`; each appears under its name when it is complete and its checksum is right.

        `received` is told of bytes as they come (negative where some have to come again).
        """

    def refused(self, repo: str, status: int | None, detail: str = "", *, path: str = "") -> HubError | ModelError:
        """The error of an HTTP status (None = no answer), with the cure. Never says what the server's body holds."""
        where = f"{repo} on {self.name} ({self.endpoint}){f', {path}' if path else ''}"
        if status == 404 and path:
            return ModelError(f"{where}: listed, but not there", hint="try again later, or the other hub (model.source)")
        if status == 404:
            return ModelError(
                f"{where}: no such repository (or a private one)",
                hint=f"check owner and name; model.source chooses the hub; private ones need {self.token_variable}",
            )
        if status in (401, 403):
            return HubError(
                f"{where}: refused (HTTP {status})",
                hint=f"set {self.token_variable} where the download runs (on a cluster: on its nodes), and accept the "
                "model's licence on its page where it has one",
            )
        cause = f"HTTP {status}" if status else (detail or "no answer")
        return HubError(
            f"{where}: {cause}",
            hint="what has come is kept: the same command goes on from there; offline, put the files in place or set "
            "model.skip_download",
        )

    def not_written(self, repo: str, path: str, error: OSError) -> ModelError:
        """The error of a disk."""
        return ModelError(
            f"{repo}: {path} cannot be written: {error.strerror}",
            hint="make room, or set model.base_path (DIFFSYNTH_MODEL_BASE_PATH) to another disk",
        )

    def wrong_checksum(self, repo: str, path: str) -> ModelError:
        """The error of a file that came whole, but wrong, more than once."""
        return ModelError(
            f"{repo} on {self.name}: {path} came with another checksum or size than its listing says",
            hint="nothing was kept of it; try again later, or the other hub (model.source): a proxy or mirror between "
            "here and there may serve an old or broken copy",
        )


def build_hub(source: str) -> Hub:
    """The client of "modelscope" or "huggingface"."""
    return HuggingFace() if source == "huggingface" else ModelScope()


class ModelScope(Hub):
    """modelscope.cn, through modelscope_hub."""

    name, token_variable = "ModelScope", "MODELSCOPE_API_TOKEN"

    def __init__(self) -> None:
        # Its bars and log lines would run through our own progress. The variable is read when tqdm is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
        from modelscope_hub import HubApi, HubConfig

        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
        self._api = HubApi(HubConfig())

    @property
    def endpoint(self) -> str:
        """See `Hub.endpoint`."""
        return str(self._api.legacy.endpoint)

    def list_files(self, repo: str, kind: Kind) -> list[RemoteFile]:
        """See `Hub.list_files`."""
        with self._own_errors(repo):
            entries = self._api.list_repo_files(repo, kind)
        return [RemoteFile(entry.path, entry.size, entry.sha256) for entry in entries if entry.type != "tree"]

    def fetch(
        self, repo: str, kind: Kind, files: Sequence[RemoteFile], directory: Path, received: Callable[[int], None]
    ) -> None:
        """See `Hub.fetch`. The library retries a few times and an hour a file; as long as bytes come we go on."""
        from modelscope_hub import FileDownloadError, ProgressCallback

        told: dict[str, int] = {}

        class Told(ProgressCallback):
            def update(self, size: int) -> None:
                told[self.filename] = told.get(self.filename, 0) + size
                received(size)

        listing = [{"Path": file.path, "Size": file.size, "Sha256": file.sha256} for file in files]
        reached: dict[str, int] = {}
        while True:
            told.clear()
            try:
                with self._own_errors(repo):
                    self._api.download_repo(
                        repo, kind, local_dir=directory, file_list=listing, max_workers=_PARALLEL_FILES,
                        progress_callbacks=[Told],
                    )  # fmt: skip
                return
            except FileDownloadError as error:
                for path, cause in error.failed_files.items():
                    if not self._is_cut(cause) or told.get(path, 0) <= reached.get(path, 0):
                        raise self._translated(repo, path, cause) from None
                # What is complete is skipped, what is not goes on from where it was and is told of again from there.
                listing = [entry for entry in listing if entry["Path"] in error.failed_files]
                reached = {str(entry["Path"]): told.get(str(entry["Path"]), 0) for entry in listing}
                received(-sum(reached.values()))

    @contextmanager
    def _own_errors(self, repo: str) -> Iterator[None]:
        from modelscope_hub import FileDownloadError
        from modelscope_hub import HubError as LibraryError

        try:
            yield
        except FileDownloadError:
            raise
        except (LibraryError, OSError) as error:  # it also keeps files of its own in the home directory
            raise self._translated(repo, "", error) from None

    @staticmethod
    def _is_cut(error: BaseException) -> bool:
        return isinstance(error, ConnectionError)  # the library's errors of the transport are ConnectionErrors too

    def _translated(self, repo: str, path: str, error: BaseException) -> HubError | ModelError:
        from modelscope_hub import FileIntegrityError

        if isinstance(error, FileIntegrityError):
            return self.wrong_checksum(repo, path)
        if isinstance(error, OSError) and error.errno is not None:
            return self.not_written(repo, path or str(error.filename), error)
        detail = "the connection fails" if self._is_cut(error) else type(error).__name__
        return self.refused(repo, getattr(error, "status_code", None), detail, path=path)


class HuggingFace(Hub):
    """huggingface.co: listed by huggingface_hub, fetched by plain ranged requests."""

    name, token_variable = "Hugging Face", "HF_TOKEN"

    def __init__(self) -> None:
        from huggingface_hub import HfApi

        self._api = HfApi()

    @property
    def endpoint(self) -> str:
        """See `Hub.endpoint`."""
        return str(self._api.endpoint)

    def list_files(self, repo: str, kind: Kind) -> list[RemoteFile]:
        """See `Hub.list_files`."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            entries = list(self._api.list_repo_tree(repo, recursive=True, repo_type=kind))
        except OfflineModeIsEnabled:
            raise HubError(f"{repo} on {self.name}: HF_HUB_OFFLINE is set", hint="unset it for the download") from None
        except HfHubHTTPError as error:
            raise self.refused(repo, error.response.status_code) from None
        except Exception as error:  # of an HTTP library that differs between major versions
            raise self.refused(repo, None, type(error).__name__) from error
        return [
            RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, None if entry.lfs else entry.blob_id)
            for entry in entries
            if isinstance(entry, RepoFile)
        ]

    def fetch(
        self, repo: str, kind: Kind, files: Sequence[RemoteFile], directory: Path, received: Callable[[int], None]
    ) -> None:
        """See `Hub.fetch`."""
        stop = threading.Event()
        with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
            futures = [pool.submit(self._fetch_one, repo, kind, file, directory / file.path, received, stop) for file in files]
            try:
                for future in futures:
                    future.result()
            except OSError as error:
                raise self.not_written(repo, str(error.filename or directory), error) from error
            finally:
                stop.set()

    def _fetch_one(
        self, repo: str, kind: Kind, file: RemoteFile, target: Path, received: Callable[[int], None], stop: threading.Event
    ) -> None:
        part = target.with_name(f"{target.name}.incomplete")
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # a checksum may be wrong because an older file of that name was begun
            self._fetch_part(repo, kind, file, part, received, stop)
            if stop.is_set():
                return
            if part.stat().st_size == file.size and _checksum_fits(part, file):
                part.replace(target)
                return
            received(-part.stat().st_size)
            part.unlink()
        raise self.wrong_checksum(repo, file.path)

    def _fetch_part(
        self, repo: str, kind: Kind, file: RemoteFile, part: Path, received: Callable[[int], None], stop: threading.Event
    ) -> None:
        """Bring `part` to the file's size, from where it is."""
        import requests
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(repo, file.path, repo_type=kind, endpoint=self.endpoint)
        part.touch()
        failures, told = 0, 0
        while not stop.is_set():
            have = part.stat().st_size
            received(have - told)
            told = have
            if have >= file.size:
                return
            headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
            try:
                with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as reply:
                    if reply.status_code not in (200, 206):
                        raise requests.HTTPError(response=reply)
                    for num_bytes in _write_body(reply, part):
                        received(num_bytes)
                        told += num_bytes
                        if stop.is_set():
                            return
                if part.stat().st_size <= have:
                    raise requests.ConnectionError("the reply brought nothing new")
            except requests.RequestException as error:
                status = getattr(error.response, "status_code", None)
                if status == 416:
                    raise self.wrong_checksum(repo, file.path) from None  # the hub's file is shorter than listed
                failures = 0 if part.stat().st_size > have else failures + 1
                if failures > _RETRIES or (status is not None and status < 500 and status not in (408, 429)):
                    raise self.refused(repo, status, "the connection fails", path=file.path) from None
                time.sleep(_RETRY_S * 2 ** max(failures - 1, 0))


def _write_body(reply: requests.Response, part: Path) -> Iterator[int]:
    """Write what comes to the file, behind what it has where only the rest comes; yields the bytes of each piece."""
    with part.open("ab" if reply.status_code == 206 else "wb") as out:
        for chunk in reply.iter_content(_CHUNK_BYTES):
            out.write(chunk)
            yield len(chunk)


def _checksum_fits(path: Path, file: RemoteFile) -> bool:
    if file.sha256 is not None:
        return _digest(path, hashlib.sha256()) == file.sha256
    if file.git_sha1 is not None:
        return _digest(path, hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)) == file.git_sha1
    return True


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as content:
        while chunk := content.read(128 * _CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())
