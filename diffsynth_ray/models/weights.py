"""Weight files -> modules.

A component is one file or a list of shards. What it is follows from its keys; its configuration from config.json beside
it, else from the tensors' shapes. Modules are built on the meta device and tensors assigned one by one, each converted
and placed as it is read, so that peak memory is one copy of the weights.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.family import ComponentFiles, detect_component, get_family, shard_candidates
from diffsynth_ray.models.weight_source import (
    SCALE_SUFFIXES,
    UNUSED_FP8_KEYS,
    FileWeights,
    RandomWeights,
    WeightSource,
)

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")


def _read_torch_file(path: Path) -> dict[str, Tensor]:
    try:
        # weights_only: a weight file must not be able to run code. mmap: tensors are paged in when they are used.
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path}: not a readable torch weight file ({error}); truncated, or with more than tensors inside?"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path}: expected a dictionary of tensors")
    return state


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _read_file(path: Path) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """(key, shape, tensor reader) of every tensor; the readers are valid until the next step of the iteration ends."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    if path.suffix in TORCH_SUFFIXES:
        for key, tensor in _read_torch_file(path).items():
            yield key, tuple(tensor.shape), partial(_identity, tensor)
        return
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                yield key, tuple(file.get_slice(key).get_shape()), partial(file.get_tensor, key)
    except SafetensorError as error:
        raise ModelError(f"{path}: not a complete safetensors file ({error}); truncated download?") from error


def read_shapes(paths: Sequence[Path], *, family: str | None = None) -> dict[str, tuple[int, ...]]:
    """Key -> shape over all shards of one component, from the headers alone.

    Shards that do not belong together are an error.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    origin: dict[str, Path] = {}
    candidates: set[tuple[str, str]] | None = None
    first = paths[0] if paths else Path()
    for path in paths:
        own = {key: shape for key, shape, _ in _read_file(path)}
        overlap = own.keys() & shapes.keys()
        if overlap:
            key = min(overlap)
            raise ModelError(
                f"{origin[key]} and {path} both hold {key!r} ({len(overlap)} keys in common): "
                "they are not shards of one component; list them as separate entries or remove one"
            )
        mine = shard_candidates(own, family=family)
        if candidates is not None and mine and candidates and not candidates & mine:
            raise ModelError(
                f"{first} is part of {_describe(candidates)}, {path} of {_describe(mine)}: "
                "they are not shards of one component; list them as separate entries"
            )
        candidates = mine if candidates is None else (candidates & mine or candidates)
        shapes.update(own)
        origin.update(dict.fromkeys(own, path))
    return shapes


def _describe(candidates: set[tuple[str, str]]) -> str:
    return " or ".join(f"{family} {component}" for family, component in sorted(candidates))


def load_state_dict(paths: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of one component's shards on the CPU, memory-mapped where the format allows it."""
    read_shapes(paths)
    return {key: read() for path in paths for key, _, read in _read_file(path)}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file of any kind (a LoRA, an export) on the CPU."""
    return {key: read() for key, _, read in _read_file(path)}


def load_components(
    entries: Sequence[str | Sequence[str]], *, family: str | None = None
) -> tuple[str, dict[str, ComponentFiles]]:
    """(family, component -> files and configuration) of the job file's `paths`: entries are files or lists of shards.

    Only headers are read. `family` None = inferred; all entries must then be of one family.
    """
    found: dict[str, ComponentFiles] = {}
    for entry in entries:
        paths = tuple(Path(path) for path in ([entry] if isinstance(entry, str | Path) else entry))
        if not paths:
            raise ModelError("[model] paths: an entry is an empty list")
        shapes = read_shapes(paths, family=family)
        try:
            family, component = detect_component(shapes, family=family)
        except ModelError as error:
            raise ModelError(f"{_names(paths)}: {error}") from error
        if component in found:
            raise ModelError(
                f"component {component} is given twice: {_names(found[component].paths)} and {_names(paths)}"
            )
        found[component] = ComponentFiles(_find_config(family, component, paths, shapes), paths, shapes)
    if family is None:
        raise ModelError("[model] paths names no weights")
    return family, found


def _find_config(
    family: str, component: str, paths: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    path = paths[0].parent / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except (ValueError, OSError) as error:
            raise ModelError(f"{path}: not a readable JSON file ({error})") from error
        # Files of several components may lie in one folder; a config of another class says nothing about this one.
        if get_family(family).config_names[component] in (config.get("_class_name"), config.get("model_type")):
            return {key: value for key, value in config.items() if not key.startswith("_")}
    return get_family(family).infer_config(component, shapes)


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(str(path) for path in paths)


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Modules built inside get their parameters on the meta device; other tensors (rotary tables) stay real."""

    def to_meta(module: nn.Module, name: str, param: nn.Parameter) -> nn.Parameter | None:
        if param is None or param.device.type == "meta":
            return None
        return nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    # torch types the hook as returning None, and documents that a returned parameter is used instead.
    hook = register_module_parameter_registration_hook(cast(Any, to_meta))
    try:
        yield
    finally:
        hook.remove()


def assign_weights(
    module: nn.Module,
    files: ComponentFiles,
    *,
    component: str,
    memory_key: Callable[[str], str | None],
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Fill a module built under `meta_parameters` from its files, frozen and in eval mode.

    `memory_key` maps a file's key to the module's, None = not loaded. Floating tensors become `dtype`. With the device "meta"
    nothing is read: the module's attribute `weight_source` reads its parameters later, one by one.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = files.tensors or read_shapes(files.paths)
    names, scales = _split_scales(shapes, memory_key)
    _check_fit(
        wanted, {name: shapes[key] for key, name in names.items()}, source=f"{component} ({_names(files.paths)})"
    )
    source = _open_files(files.paths, names, scales, dtype=dtype)
    _give_source(module, source, names=wanted, dtype=dtype, device=device)


def _split_scales(
    shapes: Mapping[str, tuple[int, ...]], memory_key: Callable[[str], str | None]
) -> tuple[dict[str, str], dict[str, str]]:
    """In-memory names of a component's file keys, and of the scales that FP8 files keep beside them."""
    names: dict[str, str] = {}
    scales: dict[str, str] = {}
    for key in shapes:
        suffix = next((ending for ending in SCALE_SUFFIXES if key.endswith(ending)), None)
        weight = f"{key.removesuffix(suffix)}.weight" if suffix else key
        if key.endswith(UNUSED_FP8_KEYS) or (suffix and weight not in shapes):
            continue
        name = memory_key(weight)
        if name is not None:
            (scales if suffix else names)[key] = name
    return names, scales


def _open_files(
    paths: Sequence[Path], names: Mapping[str, str], scales: Mapping[str, str], *, dtype: torch.dtype
) -> FileWeights:
    keys: dict[str, tuple[Path, str]] = {}
    scale_keys: dict[str, tuple[Path, str]] = {}
    torch_files = {path: _read_torch_file(path) for path in paths if path.suffix in TORCH_SUFFIXES}
    for path in paths:
        for key in torch_files[path] if path in torch_files else (key for key, _, _ in _read_file(path)):
            if key in names:
                keys[names[key]] = (path, key)
            elif key in scales:
                scale_keys[scales[key]] = (path, key)
    source = FileWeights(keys, scale_keys, dtype=dtype)
    for path, state in torch_files.items():
        source.add_torch_file(path, state)
    return source


def _give_source(
    module: nn.Module, source: WeightSource, *, names: Collection[str], dtype: torch.dtype, device: torch.device | str
) -> None:
    """Read the tensors in `names` to `device`; on the meta device remember in `weight_source` where they are instead."""
    is_later = torch.device(device).type == "meta"
    state = module.state_dict()
    for name in names:
        if not (is_later and state[name].is_meta):
            state[name] = source.read(name).to("cpu" if is_later else device)
        elif state[name].is_floating_point():
            state[name] = state[name].to(dtype)
    module.load_state_dict(state, assign=True, strict=True)
    if is_later:
        module.weight_source = source  # type: ignore[assignment]  # a module takes any attribute
    else:
        module.to(device)  # what is left is buffers outside of the state dict
    module.requires_grad_(False).eval()


def _check_fit(wanted: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    missing = [name for name in wanted if name not in got]
    unexpected = [name for name in got if name not in wanted]
    differing = [name for name in wanted if name in got and wanted[name] != got[name]]
    problems = []
    if missing:
        problems.append(
            f"{len(missing)} of {len(wanted)} tensors are missing, first {', '.join(missing[:5])}; is a shard missing?"
        )
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are not part of this model, first {', '.join(unexpected[:5])}")
    if differing:
        examples = ", ".join(f"{name} (file {list(got[name])}, model {list(wanted[name])})" for name in differing[:5])
        problems.append(
            f"{len(differing)} tensors have another shape: {examples}; does config.json belong to these files?"
        )
    if problems:
        raise ModelError(f"{source}: " + "; ".join(problems))




def randomize_weights(
    module: nn.Module, *, seed: int, component: str, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Random weights (`RandomWeights`) for a module built under `meta_parameters`, frozen and in eval mode.

    On the meta device they are made later, as in `assign_weights`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if tensor.is_meta}
    source = RandomWeights(shapes, seed=seed, component=component, dtype=dtype)
    _give_source(module, source, names=shapes, dtype=dtype, device=device)
