"""Shard files of the resume state: every worker writes its part of every tensor, and any number of workers reads it back.

A shard is a safetensors file. A tensor in it is a 1-d part of a flattened tensor of the state, under the whole tensor's name;
the metadata entry "slices" (JSON) gives for each name its `start` in the flattened whole and the whole's `shape`. Together
the shards of a checkpoint hold every element once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.weight_source import SAFETENSORS_DTYPES, SAFETENSORS_NAMES
from diffsynth_ray.train.storage import Storage
from diffsynth_ray.train.strategy.base import StateSlice

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Shard:
    """A written shard, as the manifest lists it."""

    name: str
    num_bytes: int
    sha256: str


def balanced_slices(tensors: Mapping[str, Tensor], *, rank: int, world_size: int) -> dict[str, StateSlice]:
    """This rank's part of state that every rank has whole: an even share of all elements, in the order of the names."""
    total = sum(tensor.numel() for tensor in tensors.values())
    first, end = total * rank // world_size, total * (rank + 1) // world_size
    slices = {}
    offset = 0
    for name, tensor in tensors.items():
        start, stop = max(first - offset, 0), min(end - offset, tensor.numel())
        offset += tensor.numel()
        if start < stop or (rank == 0 and tensor.numel() == 0):
            slices[name] = StateSlice(tensor.reshape(-1)[start:stop], start, tuple(tensor.shape))
    return slices


def write_shard(storage: Storage, name: str, slices: Mapping[str, StateSlice]) -> Shard:
    """Write slices (on the CPU, contiguous) as one file, hashed on the way: nothing is read again or held twice."""
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "slices": json.dumps({key: {"start": part.start, "shape": part.shape} for key, part in slices.items()}),
        }
    }
    # The widest types first, so that every tensor is aligned.
    ordered = sorted(slices, key=lambda key: -slices[key].values.element_size())
    offset = 0
    for key in ordered:
        values = slices[key].values
        num_bytes = values.numel() * values.element_size()
        header[key] = {
            "dtype": SAFETENSORS_NAMES[values.dtype],
            "shape": [values.numel()],
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    written = 0
    with storage.writing(name) as file:
        start: list[Any] = [len(head).to_bytes(8, "little"), head]
        for block in chain(start, _blocks(slices[key].values for key in ordered)):
            digest.update(block)
            file.write(block)
            written += len(block)
    return Shard(name, written, digest.hexdigest())


def _blocks(tensors: Iterator[Tensor]) -> Iterator[Any]:
    for tensor in tensors:
        values = tensor.view(torch.uint8).numpy()
        for start in range(0, len(values), _CHUNK_BYTES):
            yield values[start : start + _CHUNK_BYTES]


@dataclass(frozen=True)
class _Part:
    """Where the elements [start, stop) of a tensor are."""

    start: int
    stop: int
    dtype: torch.dtype
    file: Any
    offset: int
    """Of the first element in the file, in bytes."""


class ShardedState:
    """A StateReader over shard files. Only the parts that are asked for are read; on local disk they are mapped."""

    def __init__(self, storage: Storage, names: Sequence[str]) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[_Part]] = {}
        self._where = storage.path("")
        for name in names:
            self._add_file(storage, name)
        for name, parts in self._parts.items():
            parts.sort(key=lambda part: part.start)
            bounds = [0, *(part.stop for part in parts)]
            starts = [*(part.start for part in parts), math.prod(self._shapes[name])]
            if bounds != starts:
                raise ModelError(f"{self._where}: the shards do not hold {name!r} exactly once")

    def _add_file(self, storage: Storage, name: str) -> None:
        file = storage.open(name)
        head_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(bytes(file.read(head_bytes)))
        slices = json.loads(header.pop("__metadata__")["slices"])
        for key, entry in header.items():
            start, shape = slices[key]["start"], tuple(slices[key]["shape"])
            if self._shapes.setdefault(key, shape) != shape:
                raise ModelError(f"{self._where}: the shards disagree about the shape of {key!r}")
            part = _Part(
                start=start,
                stop=start + entry["shape"][0],
                dtype=SAFETENSORS_DTYPES[entry["dtype"]],
                file=file,
                offset=8 + head_bytes + entry["data_offsets"][0],
            )
            self._parts.setdefault(key, []).append(part)

    def names(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        return dict(self._shapes)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened tensor, as a new 1-d tensor on the CPU."""
        parts = self._parts[name]
        stop = math.prod(self._shapes[name]) if stop is None else stop
        values = torch.empty(stop - start, dtype=parts[0].dtype)
        into = values.view(torch.uint8).numpy()
        size = values.element_size()
        for part in parts:
            low, high = max(start, part.start), min(stop, part.stop)
            if low >= high:
                continue
            part.file.seek(part.offset + (low - part.start) * size)
            found = part.file.read_buffer((high - low) * size)
            into[(low - start) * size : (high - start) * size] = np.frombuffer(found, dtype=np.uint8)
        return values

    def close(self) -> None:
        """Close the files."""
        for file in {id(part.file): part.file for parts in self._parts.values() for part in parts}.values():
            with suppress(OSError):
                file.close()
