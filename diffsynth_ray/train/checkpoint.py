"""Checkpoints: the resume state of a run, and the only truth about where it is.

`checkpoints/step-{n}/` holds the shards of all workers, `state-{rank}-of-{workers}-{writer}.safetensors` (see `shards`), and
`manifest.json`, written last: step, sizes, checksums, the token of the attempt. A folder without a manifest, or whose files do
not match it, is not a checkpoint. Noise, timesteps, order and learning rate are pure functions of seed and step, so that no
random state and no scheduler state is kept; frozen weights are not kept either.

The writer's name in the file names keeps two attempts that are alive at once from touching each other's files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffsynth_ray.errors import ModelError
from diffsynth_ray.train.shards import Shard, ShardedState
from diffsynth_ray.train.storage import Storage

_MANIFEST = "manifest.json"
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class TrainedOn:
    """The data set of the steps before a checkpoint: a run that goes on with another has another order from there."""

    num_rows: int
    digest: str
    """Of the order, see SampleOrder."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    step: int
    token: str
    """Of the attempt that wrote it."""
    shards: tuple[Shard, ...]
    trained_on: TrainedOn | None = None
    """None: written by a version that did not keep it."""

    @property
    def folder(self) -> str:
        """Relative to the storage."""
        return folder_of(self.step)


def folder_of(step: int) -> str:
    """Folder of the checkpoint of optimizer step `step`."""
    return f"step-{step}"


def shard_name(step: int, *, rank: int, world_size: int, writer: str) -> str:
    """Name of a worker's shard. `writer` is drawn anew whenever a group of workers starts."""
    return f"{folder_of(step)}/state-{rank:05d}-of-{world_size:05d}-{writer}.safetensors"


def commit_checkpoint(
    storage: Storage,
    *,
    step: int,
    shards: Sequence[Shard],
    token: str,
    may_commit: Callable[[], bool],
    keep: int,
    trained_on: TrainedOn | None = None,
) -> bool:
    """Make the written shards a checkpoint, then drop all but the newest `keep`; False where `may_commit` forbids it."""
    if not may_commit():
        return False
    manifest: dict[str, Any] = {"step": step, "token": token, "shards": [asdict(shard) for shard in shards]}
    if trained_on is not None:
        manifest["trained_on"] = asdict(trained_on)
    storage.write_text(f"{folder_of(step)}/{_MANIFEST}", json.dumps(manifest))
    drop_checkpoints(storage, step=step, keep=keep)
    return True


def drop_checkpoints(storage: Storage, *, step: int, keep: int) -> None:
    """Keep the checkpoint of `step` and the newest before it, `keep` in all, and delete whatever else is there.

    A checkpoint of a later step was damaged and passed over; a folder without manifest is what a dead attempt has left.
    """
    try:
        found = find_checkpoints(storage)
    except OSError:
        return  # what cannot be looked at now may be whole: the next checkpoint's turn
    kept = {checkpoint.folder: checkpoint for checkpoint in [c for c in found if c.step <= step][:keep]}
    for name in storage.list():
        if not re.fullmatch(r"step-\d+", name):
            continue
        if name not in kept:
            # The manifest goes first: a half-deleted folder must not look whole.
            storage.delete(f"{name}/{_MANIFEST}")
            storage.delete_folder(name)
        elif name == folder_of(step):
            listed = {shard.name for shard in kept[name].shards} | {f"{name}/{_MANIFEST}"}
            for file in storage.list(name):
                if f"{name}/{file}" not in listed:
                    storage.delete(f"{name}/{file}")


def find_checkpoints(storage: Storage, *, say: Callable[[str], object] = lambda line: None) -> list[Checkpoint]:
    """All checkpoints with a manifest, newest first; their files are checked by `damage_of`. Damaged manifests are named.

    Raises OSError where the storage does not answer: a checkpoint that cannot be read now is not one that is not there.
    """
    found = []
    for name in storage.list():
        match = re.fullmatch(r"step-(\d+)", name)
        if match is None:
            continue
        try:
            manifest = json.loads(storage.read_text(f"{name}/{_MANIFEST}"))
            shards = tuple(Shard(**entry) for entry in manifest["shards"])
            trained_on = TrainedOn(**manifest["trained_on"]) if "trained_on" in manifest else None
            checkpoint = Checkpoint(int(manifest["step"]), manifest["token"], shards, trained_on)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (ValueError, KeyError, TypeError):
            say(f"checkpoint {name} is damaged ({name}/{_MANIFEST} is not what was written) and passed over")
            continue
        if checkpoint.step == int(match[1]):
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def find_restorable(
    checkpoints: Iterable[Checkpoint],
    damage_of: Callable[[Checkpoint], str | None],
    *,
    say: Callable[[str], object],
) -> Checkpoint | None:
    """The newest checkpoint without damage; damaged ones are named and passed over."""
    for checkpoint in checkpoints:
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint
        say(f"checkpoint {checkpoint.folder} is damaged ({damage}) and passed over")
    return None


def damage_of(storage: Storage, shards: Iterable[Shard]) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Reads them once."""
    for shard in shards:
        size = storage.size(shard.name)
        if size is None:
            return f"{shard.name} is missing"
        if size != shard.num_bytes:
            return f"{shard.name} has {size} bytes instead of {shard.num_bytes}"
        if _sha256(storage, shard.name) != shard.sha256:
            return f"{shard.name} has another checksum"
    return None


def read_checkpoint(storage: Storage, checkpoint: Checkpoint, *, expected_masters: set[str]) -> ShardedState:
    """The state of a checkpoint, read in parts on demand; raises ModelError where it is of another model."""
    state = ShardedState(storage, [shard.name for shard in checkpoint.shards])
    names = {name.partition("/")[2] for name in state.names() if name.startswith("master/")}
    if names != expected_masters:
        missing, extra = sorted(expected_masters - names), sorted(names - expected_masters)
        raise ModelError(
            f"checkpoint {storage.path(checkpoint.folder)} does not fit the trained parameters: {len(missing)} are missing "
            f"there (first: {missing[:2]}), {len(extra)} are not trained now (first: {extra[:2]})"
        )
    return state


def _sha256(storage: Storage, name: str) -> str:
    digest = hashlib.sha256()
    with storage.open(name) as file:
        while block := file.read_buffer(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()
