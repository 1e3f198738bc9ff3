"""Bring what a job's ids stand for to this machine, once, whoever else may be at it; data sets too."""

from __future__ import annotations

import difflib
import fcntl
import fnmatch
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from diffsynth_ray.config.origins import Origin
from diffsynth_ray.config.schema import ModelSection
from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import sources
from diffsynth_ray.models.hubs import Hub, Kind, RemoteFile, build_hub
from diffsynth_ray.models.sources import WEIGHT_SUFFIXES, Found, size
from diffsynth_ray.run_dir import write_whole

if TYPE_CHECKING:
    from diffsynth_ray.models.family import ComponentFiles

Say = Callable[[str], None]

_SAY_EVERY_S = 5.0
_SHOWN_NAMES = 8


class Progress:
    """Tells every few seconds how far a download is, from its own thread: a hub that is silent is told of too."""

    def __init__(self, title: str, *, num_files: int, total_bytes: int, say: Say) -> None:
        self.title, self.num_files, self.total_bytes, self.say = title, num_files, total_bytes, say
        self._received = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def received(self, num_bytes: int) -> None:
        """Count bytes that have come; negative where they have to come again."""
        with self._lock:
            self._received += num_bytes

    def __enter__(self) -> Progress:
        self.say(f"{self.title}: downloading {self.num_files} file(s), {size(self.total_bytes)}")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        before, since = 0, time.monotonic()
        while not self._ended.wait(_SAY_EVERY_S):
            now, done = time.monotonic(), self._received
            rate = max(done - before, 0) / (now - since)
            left = f", {(self.total_bytes - done) / rate / 60:.0f} min left" if rate > 0 else ", waiting for the hub"
            self.say(f"{self.title}: {size(done)} of {size(self.total_bytes)}, {size(rate)}/s{left}")
            before, since = done, now


class Downloader:
    """Brings origins from one hub to one folder; a repository is listed once."""

    def __init__(self, hub: Hub, *, base_path: str | Path, say: Say) -> None:
        self.hub, self.base_path, self.say = hub, Path(base_path), say
        self._listings: dict[str, list[RemoteFile]] = {}

    def bring(self, origin: Origin) -> Found:
        """The origin's files, complete; no request is made where they are here already."""
        found = sources.find(origin, self.base_path)
        if found.missing is None:
            return found
        with _lock(found.directory, self.say):
            found = sources.find(origin, self.base_path)  # another process may have brought it meanwhile
            if found.missing is None:
                return found
            return self._fetch(self._choose(origin))

    def _choose(self, origin: Origin) -> Origin:
        """The first alternative that the hub has files of."""
        *better, last = origin.alternatives()
        for alternative in better:
            try:
                if any(alternative.matches(file.path) for file in self._list(alternative.repo)):
                    return alternative
            except ModelError:  # no such repository on this hub
                continue
        return last

    def _list(self, repo: str) -> list[RemoteFile]:
        if repo not in self._listings:
            self.say(f"{repo}: asking {self.hub.name} what it holds")
            self._listings[repo] = self.hub.list_files(repo, "model")
        return self._listings[repo]

    def _fetch(self, origin: Origin) -> Found:
        listing = self._list(origin.repo)
        wanted = [file for file in listing if origin.matches(file.path)]
        if not wanted:
            raise ModelError(f"{origin}: no file of the repository on {self.hub.name} matches {_near(origin.pattern, listing)}")
        directory = sources.repo_dir(self.base_path, origin.repo)
        wanted += _configs_beside(wanted, listing)
        lacking = [file for file in wanted if not _is_here(directory, file)]
        for file in lacking:
            if (directory / file.path).is_file():
                self.say(f"{directory / file.path} is not {file.size} bytes long as on the hub: it is replaced")
        names = {file.path: file.size for file in wanted}
        list_path = sources.list_path(self.base_path, origin)
        list_path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(list_path, json.dumps({"files": names}, indent=1))
        fetch_files(self.hub, origin.repo, "model", lacking, directory=directory, say=self.say)
        found = sources.find(origin, self.base_path)
        assert found.missing is None, found
        return found


def _configs_beside(weights: Sequence[RemoteFile], listing: Sequence[RemoteFile]) -> list[RemoteFile]:
    """config.json of the folders that hold weights; without one it is inferred from the tensors' shapes."""
    chosen = {file.path for file in weights}
    folders = {PurePosixPath(file.path).parent for file in weights if file.path.endswith(WEIGHT_SUFFIXES)}
    paths = {str(folder / "config.json") for folder in folders} - chosen
    return [file for file in listing if file.path in paths]


def _is_here(directory: Path, file: RemoteFile) -> bool:
    """Whether a file need not be fetched. What a user has edited beside the weights is left as it is."""
    path = directory / file.path
    return path.is_file() and (not file.path.endswith(WEIGHT_SUFFIXES) or path.stat().st_size == file.size)


def _near(pattern: str, listing: Sequence[RemoteFile]) -> str:
    paths = [file.path for file in listing]
    folders = sorted({f"{parent}/" for path in paths for parent in PurePosixPath(path).parents if str(parent) != "."})
    near = difflib.get_close_matches(pattern, [*paths, *folders], n=_SHOWN_NAMES, cutoff=0.5)
    if near:
        return f"{pattern!r}; did you mean {', '.join(near)}?"
    shown = [path for path in paths if "/" not in path and not path.startswith(".")] + folders
    more = f" ... ({len(paths)} files in all)" if len(shown) > _SHOWN_NAMES else ""
    return f"{pattern!r}; it holds {', '.join(shown[:_SHOWN_NAMES]) or 'nothing'}{more}"


def fetch_files(hub: Hub, repo: str, kind: Kind, files: Sequence[RemoteFile], *, directory: Path, say: Say) -> None:
    """Fetch listed files to `directory / path`, with progress. Raises ModelError, HubError."""
    if not files:
        return
    for file in files:
        parts = PurePosixPath(file.path).parts
        if file.path.startswith("/") or ".." in parts or "\\" in file.path:
            raise ModelError(f"{repo} on {hub.name} lists a file outside of itself: {file.path!r}; not downloaded")
    directory.mkdir(parents=True, exist_ok=True)
    total_bytes = sum(file.size for file in files)
    free = shutil.disk_usage(directory).free
    if total_bytes > free:
        raise ModelError(
            f"{repo}: {size(total_bytes)} are to be downloaded to {directory}, where {size(free)} are free",
            hint="make room, or set model.base_path (DIFFSYNTH_MODEL_BASE_PATH) to a larger disk",
        )
    started = time.monotonic()
    with Progress(repo, num_files=len(files), total_bytes=total_bytes, say=say) as progress:
        hub.fetch(repo, kind, files, directory, progress.received)
    say(f"{repo}: {len(files)} file(s), {size(total_bytes)} in {time.monotonic() - started:.0f} s, checksums right")


@contextmanager
def _lock(directory: Path, say: Say) -> Iterator[None]:
    """One download of a repository at a time, over all processes that see the disk."""
    path = directory / sources.LISTS_DIR / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ModelError(
            f"{directory} cannot be written: {error.strerror}",
            hint="set model.base_path (DIFFSYNTH_MODEL_BASE_PATH) to a folder for models",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{directory}: another process is downloading to it; waiting for it ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            say(f"{directory}: this disk has no locks ({error.strerror}); two downloads at once may fetch a file twice")
        yield


def download_model(model: ModelSection, say: Say) -> tuple[str, dict[str, ComponentFiles], dict[str, Path]]:
    """Bring everything that a job's [model] needs to this machine: its ids, its family's default tokenizers.

    Returns what `find_model` does. Nothing is asked of a hub where all is here.
    """
    from diffsynth_ray.models.weights import find_model  # with torch, which data sets do without

    downloader: Downloader | None = None

    def bring(origin: Origin) -> None:
        nonlocal downloader
        assert model.base_path is not None  # resolve fills it in where something may have to be downloaded
        if sources.find(origin, model.base_path).missing is None or model.skip_download:
            return
        if downloader is None:
            downloader = Downloader(build_hub(model.source or "modelscope"), base_path=model.base_path, say=say)
        downloader.bring(origin)

    return find_model(model, bring=bring)


def download_dataset(repo: str, include: Sequence[str], *, source: str, output: Path, say: Say) -> list[Path]:
    """Files of a data set repository, those that match a pattern of `include` ("qwen_image/*", all where empty).

    A `*` goes over folders. Files that are there with the listed size are left alone. Returns their paths.
    """
    hub = build_hub(source)
    say(f"{repo}: asking {hub.name} what it holds")
    listing = hub.list_files(repo, "dataset")
    wanted = [file for file in listing if not include or any(fnmatch.fnmatchcase(file.path, glob) for glob in include)]
    if not wanted:
        near = _near(include[0] if include else "*", listing)
        raise ModelError(f"{repo}: no file of the data set on {hub.name} matches {near}")
    lacking = []
    for file in wanted:
        path = output / file.path
        if not path.is_file() or path.stat().st_size != file.size:
            lacking.append(file)
    with _lock(output, say):
        fetch_files(hub, repo, "dataset", lacking, directory=output, say=say)
    return [output / file.path for file in wanted]
