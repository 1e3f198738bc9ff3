"""Checkpoints: the resume state of a run, and the only truth about where it is.

`checkpoints/step-{n}/` holds `state.safetensors` (float32 masters and optimizer state by full parameter name, the same for
every strategy and number of workers) and `manifest.json`, written last: step, sizes, checksums and the token of the attempt.
A directory without a manifest, or whose files do not match it, is not a checkpoint. Noise, timesteps and order are pure
functions of seed and step, so that no random state is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from diffsynth_ray.errors import ModelError
from diffsynth_ray.run_dir import RunDir, write_whole
from diffsynth_ray.train.export import write_tensors

_STATE_FILE = "state.safetensors"
_MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    step: int
    path: Path
    manifest: dict[str, Any]


def save_checkpoint(run_dir: RunDir, *, step: int, tensors: Mapping[str, Tensor], token: str, keep: int) -> Path | None:
    """Write the checkpoint of optimizer step `step`, then drop all but the newest `keep`.

    Returns its path, or None where the attempt no longer holds the token and may commit nothing.
    """
    path = run_dir.checkpoints_dir / f"step-{step}"
    if not run_dir.holds_token(token):
        return None
    shutil.rmtree(path, ignore_errors=True)  # what an attempt that died here has left
    path.mkdir(parents=True)
    state_path = write_tensors(
        path / _STATE_FILE, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    )
    files = {_STATE_FILE: {"bytes": state_path.stat().st_size, "sha256": _sha256(state_path)}}
    if not run_dir.holds_token(token):
        return None
    write_whole(path / _MANIFEST_FILE, json.dumps({"step": step, "token": token, "files": files}))
    # A checkpoint of a later step than this one was damaged and passed over: it does not count as kept.
    others = [found for found in find_checkpoints(run_dir) if found.step != step]
    kept = [found for found in others if found.step < step][: keep - 1]
    for old in (found for found in others if found not in kept):
        # The manifest goes first: a half-deleted directory must not look whole.
        (old.path / _MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(old.path, ignore_errors=True)
    return path


def find_checkpoints(run_dir: RunDir) -> list[Checkpoint]:
    """All checkpoints with a manifest, newest first; their files are checked when they are read."""
    found = []
    if not run_dir.checkpoints_dir.is_dir():
        return []
    for path in run_dir.checkpoints_dir.iterdir():
        match = re.fullmatch(r"step-(\d+)", path.name)
        try:
            manifest = json.loads((path / _MANIFEST_FILE).read_text())
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            continue
        if match and manifest.get("step") == int(match[1]):
            found.append(Checkpoint(step=int(match[1]), path=path, manifest=manifest))
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def find_restorable(run_dir: RunDir, say: Callable[[str], object]) -> Checkpoint | None:
    """The newest checkpoint whose files match their manifest; damaged ones are named and passed over."""
    for checkpoint in find_checkpoints(run_dir):
        damage = _damage(checkpoint)
        if damage is None:
            return checkpoint
        say(f"checkpoint {checkpoint.path} is damaged ({damage}); the one before is used")
    return None


def read_checkpoint(run_dir: RunDir, step: int, *, expected_masters: set[str]) -> dict[str, Tensor]:
    """The tensors of the checkpoint of `step`; raises ModelError where it is of another model."""
    path = run_dir.checkpoints_dir / f"step-{step}"
    tensors = load_file(path / _STATE_FILE)
    names = {name.partition("/")[2] for name in tensors if name.startswith("master/")}
    if names != expected_masters:
        missing, extra = sorted(expected_masters - names), sorted(names - expected_masters)
        raise ModelError(
            f"checkpoint {path} does not fit the trained parameters: {len(missing)} are missing there "
            f"(first: {missing[:2]}), {len(extra)} are not trained now (first: {extra[:2]})"
        )
    return tensors


def _damage(checkpoint: Checkpoint) -> str | None:
    for name, entry in checkpoint.manifest["files"].items():
        path = checkpoint.path / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if _sha256(path) != entry["sha256"]:
            return f"{name} has another checksum"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return hashlib.file_digest(file, "sha256").hexdigest()
