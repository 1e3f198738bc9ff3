"""Where a job's model files are on this machine: its own paths, and what its ids stand for. No network, no torch.

Whether a download is whole is told by the list that was written when it began (`.dsray/` in the repository's folder), and
for files that another tool has put there by what can be seen: shard numbers, safetensors headers, leftovers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from diffsynth_ray.config.origins import Origin, parse_folder, parse_origin, tokenizer_ids
from diffsynth_ray.config.schema import ModelSection, as_list
from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.layouts import read_header

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_FOLDERS = {
    "tokenizer_path": "tokenizer",
    "tokenizer_1_path": "tokenizer",
    "tokenizer_2_path": "tokenizer_2",
    "processor_path": "processor",
}
"""Key of [model] -> the folder's name in a repository in diffusers' layout."""
LISTS_DIR = ".dsray"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
# modelscope's: `x.incomplete`, the parts `x_0_1023` of a file x, and the folder of its older versions.
_UNFINISHED = re.compile(r".+\.incomplete|.+\.parallel_tmp|.+_\d+_\d+")
_OLD_UNFINISHED_DIR = "._____temp"


@dataclass(frozen=True)
class Files:
    """What of an entry of [model] is here."""

    directory: Path
    """Of the repository, or of the first file."""
    files: tuple[Path, ...]
    missing: str | None
    """What lacks, in words; None = complete."""

    @property
    def weights(self) -> list[Path]:
        """Those of the files that hold tensors."""
        return [path for path in self.files if path.suffix in WEIGHT_SUFFIXES]

    @property
    def num_bytes(self) -> int:
        """Of the files that are here."""
        return sum(path.stat().st_size for path in self.files)


@dataclass(frozen=True)
class Found(Files):
    """What of an origin is here."""

    origin: Origin
    """The one that is used; see `Origin.alternatives`."""


def repo_dir(base_path: str | Path, repo: str) -> Path:
    """Folder of a repository, as DiffSynth-Studio has it."""
    return Path(base_path, *repo.split("/"))


def list_path(base_path: str | Path, origin: Origin) -> Path:
    """The list of an origin's files: {"files": {path in the repository: size in bytes}}, written before they come."""
    return repo_dir(base_path, origin.repo) / LISTS_DIR / f"{quote(origin.pattern, safe='') or 'all'}.json"


def find(origin: Origin, base_path: str | Path) -> Found:
    """What of an origin is here; of alternatives the first complete one, else the first."""
    found = [_find_exactly(alternative, base_path) for alternative in origin.alternatives()]
    return next((one for one in found if one.missing is None), found[0])


def _find_exactly(origin: Origin, base_path: str | Path) -> Found:
    directory = repo_dir(base_path, origin.repo)
    listed = list_path(base_path, origin)
    if listed.is_file():
        try:
            expected: dict[str, int] = json.loads(listed.read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{listed}: not readable ({error}); remove it") from error
        there = {name: directory / name for name in expected if (directory / name).is_file()}
        lacking = sorted(name for name in expected if name not in there or _is_cut(there[name], expected[name]))
        missing = f"{len(lacking)} of {len(expected)} files, first {lacking[0]}" if lacking else None
        own = sorted(path for name, path in there.items() if origin.matches(name))
        return Found(directory, tuple(own), missing, origin)
    files, unfinished = _look(directory, origin)
    return Found(directory, tuple(files), unfinished or what_lacks(files), origin)


def _is_cut(path: Path, size: int) -> bool:
    # A user may have edited a small file; weights have the size that the hub says.
    return path.suffix in WEIGHT_SUFFIXES and path.stat().st_size != size


def _look(directory: Path, origin: Origin) -> tuple[list[Path], str | None]:
    """The origin's files without a list, and what shows that a download of them has not ended."""
    pattern = origin.pattern
    if not directory.is_dir():
        return [], None
    below = pattern == "" or pattern.endswith("/")
    files = [path for path in sorted(directory.glob(f"{pattern}**/*" if below else pattern)) if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    leftovers = [path for path in files if _UNFINISHED.fullmatch(path.name)]
    if not below:
        leftovers += [*directory.glob(f"{pattern}.incomplete"), *(directory / _OLD_UNFINISHED_DIR).glob(pattern)]
    unfinished = f"an unfinished download, {leftovers[0]}" if leftovers else None
    return [path for path in files if path not in leftovers], unfinished


def what_lacks(files: Sequence[Path]) -> str | None:
    """What can be seen to be missing from files that came without a list; None = nothing."""
    if not files:
        return "no file"
    names = {path.name for path in files}
    for path in files:
        lacking = [name for name in _shard_names(path.name) if name not in names]
        if lacking:
            return f"shard {lacking[0]}"
    for path in files:
        if path.suffix == ".safetensors":
            try:
                read_header(path)
            except ModelError as error:
                return f"the rest of a file ({error.message})"
    return None


def _shard_names(name: str) -> list[str]:
    """The names of all shards that a name like x-00001-of-00003.safetensors tells of."""
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return []
    count = int(shard["count"])
    return [f"{shard['stem']}-{number:05d}-of-{count:05d}{shard['suffix']}" for number in range(1, count + 1)]


def model_origins(model: ModelSection) -> list[Origin]:
    """The job's ids."""
    return [parse_origin(text) for text in model.id_with_origin_paths]


def model_entries(model: ModelSection) -> list[list[Path]]:
    """Weight files, one list a component: those of `paths`, then those of the ids. Raises ModelError where some lack."""
    entries = [[Path(path) for path in as_list(entry)] for entry in model.paths]
    for origin in model_origins(model):
        assert model.base_path is not None  # resolve fills it in where there are ids
        found = find(origin, model.base_path)
        if found.missing is not None:
            raise ModelError(f"{origin} is not complete in {found.directory}: {found.missing}", hint=_hint(model))
        if not found.weights:
            raise ModelError(
                f"model.id_with_origin_paths: {origin} has no weights ({', '.join(WEIGHT_SUFFIXES)}) among its files"
            )
        entries.append(found.weights)
    return entries


def _hint(model: ModelSection) -> str:
    if model.skip_download:
        return "model.skip_download (DIFFSYNTH_SKIP_DOWNLOAD) is set: unset it, or put the files there"
    return "`dsray download JOB.toml` fetches it"


def find_tokenizers(
    model: ModelSection, defaults: Mapping[str, str], entries: Sequence[Sequence[Path]]
) -> dict[str, Path | Found]:
    """Key of [model] -> the folder of the tokenizer or processor.

    The job's own, on disk or of a hub, else a folder beside the weights (the default's path in its repository, or the usual
    name), else the family's default. Those of a hub may still have to be downloaded.
    """
    chosen: dict[str, Path | Found] = {}
    ids = tokenizer_ids(model)
    for key, name in _FOLDERS.items():
        given = getattr(model, key)
        if key in ids:
            assert model.base_path is not None  # resolve fills it in where there are ids
            chosen[key] = find(parse_folder(ids[key]), model.base_path)
        elif given is not None:
            chosen[key] = Path(given)
        elif key in defaults:
            origin = parse_origin(defaults[key])
            found = find(origin, model.base_path) if model.base_path is not None else None
            beside = _beside(entries, (origin.pattern, name))
            # The default itself may be that folder; then its list says whether all of it is there.
            if beside is not None and (found is None or beside != found.directory / origin.pattern):
                chosen[key] = beside
            elif found is not None:
                chosen[key] = found
    return chosen


def _beside(entries: Sequence[Sequence[Path]], names: Sequence[str]) -> Path | None:
    """The first folder of these names in the folder of some weights, or in the one above it."""
    for entry in entries:
        for root in (entry[0].parent, entry[0].parent.parent):
            for folder in (root / name for name in names):
                if folder.is_dir() and any(_is_whole(path) for path in folder.iterdir()):
                    return folder
    return None


def _is_whole(path: Path) -> bool:
    return path.is_file() and not _UNFINISHED.fullmatch(path.name)


def tokenizer_folders(model: ModelSection, chosen: Mapping[str, Path | Found]) -> dict[str, Path]:
    """The folders themselves; raises ModelError for one of a hub that is not here."""
    folders = {}
    for key, where in chosen.items():
        if isinstance(where, Found):
            if where.missing is not None:
                which = f"model.{key}:" if getattr(model, key) else f"model.{key} is not set, and the default"
                raise ModelError(
                    f"{which} {where.origin} is not complete in {where.directory}: {where.missing}",
                    hint=f"{_hint(model)}; or set model.{key} to a folder",
                )
            folders[key] = where.directory / where.origin.pattern
        else:
            folders[key] = where
    return folders


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
