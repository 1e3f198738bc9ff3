"""DiffSynth-Studio's split caches, `{rank}/{i}.pth`, into a cache of ours.

Such a file is a pickle of (shared, positive, negative) inputs of its pipeline: latents and prompt embeddings among the picture,
the noise and settings. It is read by torch's restricted unpickler, which runs no code of the file; besides tensors and plain
values only PIL images are let through, and only where the user trusts the files. What encoded them is not recorded there, so
that the data set is known by its content, and training compares no encoder.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffsynth_ray.data.cache import Cache, Entry, Kind, entry_key, pack_entry
from diffsynth_ray.data.manifest import Manifest, ManifestRow, write_manifest
from diffsynth_ray.errors import DataError, first_line, listed
from diffsynth_ray.models.family import MASK_SUFFIX
from diffsynth_ray.train.split import LATENTS, tensor_bytes

CONDITION_NAMES: dict[str, dict[str, str]] = {"qwen_image": {"prompt_emb": "prompt_embeds"}}
"""By family: its name of a condition -> ours. A mask has the suffix `_mask` in both."""
_PIXELS_PER_LATENT = {"qwen_image": 8}
_LATENTS = "input_latents"
_DRAWN_ANEW = {"latents", "noise"}
_PRECISIONS = {"BF16": "bf16", "F32": "fp32"}
_SHARD_ENTRIES = 64
_SAY_S = 5.0


@dataclass
class Imported:
    """What was taken."""

    manifest_id: str
    num_rows: int
    refused: list[str] = field(default_factory=list)
    """File and reason."""


def import_cache(folder: Path, cache: Cache, *, family: str, trust_pickles: bool, say: Callable[[str], object]) -> Imported:
    """Take every file that can be taken. Raises DataError where there are none, or none can."""
    if family not in CONDITION_NAMES:
        known = ", ".join(CONDITION_NAMES)
        raise DataError(f"caches of the family {family!r} cannot be imported; known: {known}")
    paths = sorted(folder.glob("*/*.pth"), key=lambda path: (path.parent.name, len(path.stem), path.stem))
    if not paths:
        raise DataError(f"{folder}: no {{rank}}/{{i}}.pth files", hint="name the --output_path of its sft:data_process")
    rows: list[ManifestRow] = []
    refused: list[str] = []
    dtypes: set[str] = set()
    writer = _Writer(cache)
    said = time.monotonic()
    for number, path in enumerate(paths):
        if time.monotonic() - said > _SAY_S:
            said = time.monotonic()
            say(f"imported {number}/{len(paths)} files")
        try:
            sample = _read_sample(path, family=family, trust_pickles=trust_pickles)
        except DataError as error:
            refused.append(error.message)
            continue
        dtypes |= {tensor.dtype for tensor in (*sample.text.values(), *sample.image.values())}
        text, image = writer.add("text", sample.text), writer.add("image", sample.image)
        rows.append(ManifestRow(sample.prompt, text, image, sample.height, sample.width, sample.num_frames))
    writer.flush()
    if not rows:
        shown = "\n  ".join([f"{folder}: none of {len(paths)} files can be taken:", *listed(refused)])
        raise DataError(shown, hint=_hint(trust_pickles))
    if len(dtypes) != 1 or not dtypes <= _PRECISIONS.keys():
        raise DataError(f"{folder}: its tensors are {', '.join(sorted(dtypes))}; all must be BF16, or all F32")
    manifest = Manifest(
        tuple(rows),
        source={"imported": str(folder.absolute())},
        family=family,
        dtype=_PRECISIONS[dtypes.pop()],
        created=time.time(),
    )
    write_manifest(cache, manifest)
    return Imported(manifest.id, len(rows), refused)


def _hint(trust_pickles: bool) -> str | None:
    if trust_pickles:
        return None
    return "--trust-pickles also takes files that hold a PIL image, as its caches usually do"


@dataclass(frozen=True)
class _Sample:
    prompt: str
    text: Entry
    image: Entry
    height: int
    width: int
    num_frames: int


class _Writer:
    """Collects entries into shards, each entry once."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.known = set(cache.index().table["key"].to_pylist())
        self.waiting: dict[Kind, dict[str, Entry]] = {"text": {}, "image": {}}
        self.index_files: list[str] = []

    def add(self, kind: Kind, entry: Entry) -> str:
        """The entry's key, which names its content."""
        layout, data = pack_entry(entry)
        key = entry_key(imported=layout, sha256=hashlib.sha256(data).hexdigest())
        if key not in self.known:
            self.known.add(key)
            self.waiting[kind][key] = entry
            if len(self.waiting[kind]) == _SHARD_ENTRIES:
                self._write(kind)
        return key

    def flush(self) -> None:
        """Write what waits, and one index for all."""
        for kind in self.waiting:
            self._write(kind)
        self.cache.merge_index_files(self.index_files)

    def _write(self, kind: Kind) -> None:
        if self.waiting[kind]:
            self.index_files.append(self.cache.write(kind, self.waiting[kind], encoder="imported"))
            self.waiting[kind] = {}


def _read_sample(path: Path, *, family: str, trust_pickles: bool) -> _Sample:
    inputs = _merge(path, _load(path, trust_pickles=trust_pickles))
    names = CONDITION_NAMES[family]
    known = {_LATENTS, *_DRAWN_ANEW, *names, *(name + MASK_SUFFIX for name in names)}
    if unknown := sorted(name for name, value in inputs.items() if name not in known and _has_tensor(value)):
        raise DataError(f"{path}: it is conditioned on {', '.join(unknown)}, which this version does not train with")
    if missing := [name for name in (_LATENTS, *names) if not isinstance(inputs.get(name), Tensor)]:
        raise DataError(f"{path}: no {', '.join(missing)} in it; it is no cache of {family}'s training")
    latents = inputs[_LATENTS]
    if latents.ndim not in (4, 5) or latents.shape[0] != 1:
        raise DataError(f"{path}: {_LATENTS} has shape {list(latents.shape)}; one sample a file is taken")
    text = {ours: _unpadded(inputs[theirs], inputs.get(theirs + MASK_SUFFIX)) for theirs, ours in names.items()}
    factor = _PIXELS_PER_LATENT[family]
    prompt = inputs.get("prompt")
    return _Sample(
        prompt=prompt if isinstance(prompt, str) else "",
        text={name: tensor_bytes(tensor) for name, tensor in text.items()},
        image={LATENTS: tensor_bytes(latents[0])},
        height=latents.shape[-2] * factor,
        width=latents.shape[-1] * factor,
        num_frames=1,
    )


def _load(path: Path, *, trust_pickles: bool) -> Any:
    allowed: list[Any] = [Image.Image] if trust_pickles else []
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise DataError(f"{path}: it holds more than tensors{_what(refused)}; it is not unpickled") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); truncated?") from error


def _what(line: str) -> str:
    words = line.split("GLOBAL ")
    return f" ({words[1].split()[0]})" if len(words) > 1 else ""


def _merge(path: Path, content: Any) -> dict[str, Any]:
    """The shared and the positive inputs; the negative ones play no part in training."""
    if isinstance(content, tuple | list) and len(content) == 3 and all(isinstance(part, dict) for part in content):
        shared, positive, _ = content
        return {**shared, **positive}
    raise DataError(f"{path}: expected three dictionaries of inputs, got {type(content).__name__}")


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, dict):
        return any(_has_tensor(each) for each in value.values())
    return isinstance(value, list | tuple) and any(_has_tensor(each) for each in value)


def _unpadded(embeds: Tensor, mask: Any) -> Tensor:
    """[1, n, d] -> [n, d] without padding."""
    return embeds[0][mask[0].bool()] if isinstance(mask, Tensor) else embeds[0]
