"""Weights that are read one tensor at a time, when and where they are needed.

A safetensors file is read with plain reads, not mapped: a mapped file counts as the process's memory until it is closed, so
that a 40 GB model would seem to take 80. A tensor can be read straight to where it is wanted: memory that is new to the process
costs as much as what is read into it. Reading is safe from several threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Number formats by their names in a safetensors header."""
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
"""Beside NAME.weight in FP8 files: what its values are multiplied by; one number, or one an output channel."""
UNUSED_FP8_KEYS = ("scaled_fp8", ".scale_input", ".input_scale")
"""Endings of keys in FP8 files that only matter to FP8 matrix products of other tools."""


MemoryTensors = Callable[[str, Tensor], Mapping[str, Tensor]]
"""A file's key and tensor -> parameters in memory by name (`ModelFamily.memory_tensors`)."""


class WeightSource(Protocol):
    """Where the weights of one component come from."""

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """The parameter of this in-memory name, in the dtype it computes in.

        It has memory of its own, or is `into`: memory on the CPU of the result's shape and dtype, which may be written over.
        """
        ...


class SafetensorsFile:
    """One safetensors file, read tensor by tensor. Its header has been checked before (`weights.read_shapes`)."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        self._begin = 8 + length
        self._header = json.loads(os.pread(self._fd, length, 8))

    def read(self, key: str, into: Tensor | None = None) -> Tensor:
        """The tensor, in `into` where that has its dtype and size, else in memory of its own."""
        entry = self._header[key]
        start, stop = entry["data_offsets"]
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        if into is not None and into.dtype == dtype and into.nbytes == stop - start and into.is_contiguous():
            raw = into.detach().view(-1).view(torch.uint8)
        else:
            raw = torch.empty(stop - start, dtype=torch.uint8)
        view, done = memoryview(raw.numpy().data), 0
        while done < stop - start:
            count = os.preadv(self._fd, [view[done:]], self._begin + start + done)
            if count <= 0:
                raise OSError(f"the file ends inside {key!r}")
            done += count
        return raw.view(dtype).reshape(entry["shape"])

    def __del__(self) -> None:
        os.close(self._fd)


class FileWeights:
    """A component's weights in its files."""

    def __init__(
        self,
        keys: Mapping[str, tuple[Path, str]],
        scales: Mapping[str, tuple[Path, str]],
        *,
        memory_tensors: MemoryTensors,
        dtype: torch.dtype,
    ) -> None:
        """`keys`: in-memory name -> file and key there; `scales`: the same for the scale of an FP8 weight."""
        self._keys, self._scales, self._memory_tensors, self._dtype = keys, scales, memory_tensors, dtype
        self._files: dict[Path, SafetensorsFile | Mapping[str, Tensor]] = {}
        num_names = Counter(keys.values())
        self._fused = {place: Lock() for place, count in num_names.items() if count > 1}
        self._waiting: dict[str, Tensor] = {}
        """Parts of a fused tensor that was read for another part of it."""

    def add_torch_file(self, path: Path, state: Mapping[str, Tensor]) -> None:
        """A mapped torch file, which the reader of safetensors cannot read."""
        self._files[path] = state

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """See WeightSource."""
        place = self._keys[name]
        if place not in self._fused:
            found = self._read_parts(name, into)[name]
            return found if into is None or not _overlaps(found, into) else found.clone()
        with self._fused[place]:
            if name not in self._waiting:
                # Copies, so that what one part is used for does not keep the others in memory.
                self._waiting |= {part: tensor.clone() for part, tensor in self._read_parts(name).items()}
            return self._waiting.pop(name)

    def _read_parts(self, name: str, into: Tensor | None = None) -> Mapping[str, Tensor]:
        """The file's tensor that a name is in, as the parameters in memory."""
        path, key = self._keys[name]
        tensor = self._read(path, key, into)
        if tensor.dtype in _FP8 and name in self._scales:
            scale = self._read(*self._scales[name]).float()
            tensor = tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))
        if tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        return self._memory_tensors(key, tensor)

    def _read(self, path: Path, key: str, into: Tensor | None = None) -> Tensor:
        file = self._files.get(path)
        if file is None:
            file = self._files.setdefault(path, SafetensorsFile(path))
        if isinstance(file, SafetensorsFile):
            return file.read(key, into)
        return file[key].clone()  # a parameter must not live in a file's pages


def _overlaps(found: Tensor, into: Tensor) -> bool:
    """Whether a tensor lies in memory of `into`, but not as `into` does (the layout in memory is another than the file's)."""
    same = found.data_ptr() == into.data_ptr() and found.shape == into.shape and found.stride() == into.stride()
    return not same and found.untyped_storage().data_ptr() == into.untyped_storage().data_ptr()


class RandomWeights:
    """Random weights that depend on (seed, component, name) alone.

    Norms are 1, biases N(0, 0.02^2), everything else N(0, 1 / fan_in), which keeps activations at one scale.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, seed: int, component: str, dtype: torch.dtype) -> None:
        self._shapes, self._seed, self._component, self._dtype = shapes, seed, component, dtype

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """See WeightSource."""
        shape = self._shapes[name]
        if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
            return torch.ones(shape, dtype=self._dtype)
        std = 0.02 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
        generator = seeded_generator(self._seed, f"{self._component}.{name}")
        return (torch.randn(shape, generator=generator) * std).to(self._dtype)


class GivenWeights:
    """Some weights that are given, the rest from elsewhere."""

    def __init__(self, values: Mapping[str, Tensor], rest: WeightSource, *, dtype: torch.dtype) -> None:
        self._values, self._rest, self._dtype = values, rest, dtype

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """See WeightSource."""
        return self._values[name].to(self._dtype, copy=True) if name in self._values else self._rest.read(name, into)


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one parameter: depends on (seed, name), not on the order in which parameters are made."""
    digest = hashlib.blake2b(f"parameter {seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
