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

from diffsynth_ray.config.origins import Origin
from diffsynth_ray.config.schema import Job, ModelSection
from diffsynth_ray.errors import JobFileError, ModelError
from diffsynth_ray.models import layouts, sources
from diffsynth_ray.models.family import ComponentFiles, detect_component, get_family, key_layouts
from diffsynth_ray.models.fp8_entries import fp8_components, fp8_problems, names_entries
from diffsynth_ray.models.weight_source import (
    SCALE_SUFFIXES,
    UNUSED_FP8_KEYS,
    FileWeights,
    GivenWeights,
    MemoryTensors,
    RandomWeights,
    WeightSource,
)

TORCH_SUFFIXES = tuple(suffix for suffix in sources.WEIGHT_SUFFIXES if suffix != ".safetensors")


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


def _read_shapes_of_file(path: Path) -> layouts.Shapes:
    if path.suffix in TORCH_SUFFIXES:
        return {key: shape for key, shape, _ in _read_file(path)}
    return layouts.read_header(path)


def read_shapes(paths: Sequence[Path], *, family: str | None = None) -> layouts.Shapes:
    """Key -> shape over all shards of one component, from the headers alone.

    Shards that do not belong together are an error.
    """
    known = key_layouts() if family is None else {family: get_family(family).key_layouts}
    return layouts.join_shards(((path, _read_shapes_of_file(path)) for path in paths), known)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file of any kind (a LoRA, an export) on the CPU."""
    return {key: read() for key, _, read in _read_file(path)}


def load_components(
    entries: Sequence[str | Path | Sequence[str | Path]], *, family: str | None = None
) -> tuple[str, dict[str, ComponentFiles]]:
    """(family, component -> files and configuration) of the job file's `paths`: entries are files or lists of shards.

    Only headers are read. `family` None = inferred; all entries must then be of one family.
    """
    found: dict[str, ComponentFiles] = {}
    shards = [tuple(Path(path) for path in ([entry] if isinstance(entry, str | Path) else entry)) for entry in entries]
    if not all(shards):
        raise ModelError("[model] paths: an entry is an empty list")
    tensors = [read_shapes(paths, family=family) for paths in shards]
    family = family or layouts.common_family(tensors, key_layouts())
    for paths, shapes in zip(shards, tensors, strict=True):
        try:
            family, component = detect_component(shapes, family=family)
        except ModelError as error:
            raise ModelError(f"{_names(paths)}: {error}") from error
        for name, own in layouts.parts_of(shapes, get_family(family).key_layouts, component).items():
            if name in found:
                raise ModelError(f"component {name} is given twice: {_names(found[name].paths)} and {_names(paths)}")
            found[name] = ComponentFiles(_find_config(family, name, paths, own), paths, own)
    if family is None:
        raise ModelError("[model] paths names no weights")
    return family, found


def find_fp8_components(job: Job) -> list[str]:
    """`model.fp8_models` by components; its entries must be here. Raises JobFileError where one of them is trained."""
    if not names_entries(job):
        return job.model.fp8_models
    entries = sources.model_entries(job.model)
    names = fp8_components(
        job, {number: load_components([paths], family=job.model.family)[1] for number, paths in enumerate(entries)}
    )
    if problems := fp8_problems(job, names):
        raise JobFileError(f"job {job.name}", problems)
    return names


def find_model(
    model: ModelSection, *, bring: Callable[[Origin], object] | None = None
) -> tuple[str, dict[str, ComponentFiles], dict[str, Path]]:
    """(family, its components' files, its tokenizers' folders) of a job's [model], all on this machine.

    `bring` is called with every id and default tokenizer before it is looked for. Raises ModelError for what is not here.
    """
    if bring is not None:
        for origin in sources.model_origins(model):
            bring(origin)
    entries = sources.model_entries(model)
    family, files = load_components(entries, family=model.family)
    needs_text = bool(set(get_family(family).text_components) & files.keys())
    defaults = get_family(family).default_tokenizers if needs_text else {}
    chosen = sources.find_tokenizers(model, defaults, entries)
    if bring is not None:
        for where in chosen.values():
            if isinstance(where, sources.Found):
                bring(where.origin)
        chosen = sources.find_tokenizers(model, defaults, entries)
    return family, files, sources.tokenizer_folders(model, chosen)


def read_folder(folder: Path) -> ComponentFiles:
    """A component's one weight file and its config.json, as diffusers saves them."""
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "diffusion_pytorch_model.safetensors"
    return ComponentFiles({key: value for key, value in config.items() if not key.startswith("_")}, (weights,))


def _find_config(family: str, component: str, paths: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    path = paths[0].parent / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except (ValueError, OSError) as error:
            raise ModelError(f"{path}: not a readable JSON file ({error})") from error
        # Files of several components may lie in one folder; a config of another class says nothing about this one.
        believed = get_family(family).config_names[component]
        believed = (believed,) if isinstance(believed, str) else believed
        if {config.get("_class_name"), config.get("model_type")} & set(believed):
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
    memory_tensors: MemoryTensors,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Fill a module built under `meta_parameters` from its files, frozen and in eval mode.

    `memory_tensors` maps a file's key and tensor to the module's. Floating tensors become `dtype`. With the device "meta"
    nothing is read: the module's attribute `weight_source` reads its parameters later, one by one.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = files.tensors or read_shapes(files.paths)
    scales = _find_scales(shapes)
    got = {
        key: memory_tensors(key, torch.empty(shape, device="meta"))
        for key, shape in shapes.items()
        if key not in scales.values() and not key.endswith(UNUSED_FP8_KEYS)
    }
    _check_fit(
        wanted,
        {name: tuple(tensor.shape) for tensors in got.values() for name, tensor in tensors.items()},
        source=f"{component} ({_names(files.paths)})",
    )
    source = _open_files(files.paths, got, scales, memory_tensors=memory_tensors, dtype=dtype)
    _give_source(module, source, names=wanted, dtype=dtype, device=device)


def _find_scales(shapes: Iterable[str]) -> dict[str, str]:
    """Weight key -> key of the scale that FP8 files keep beside it."""
    keys = set(shapes)
    found = {f"{key.removesuffix(suffix)}.weight": key for key in keys for suffix in SCALE_SUFFIXES if key.endswith(suffix)}
    return {weight: scale for weight, scale in found.items() if weight in keys}


def _open_files(
    paths: Sequence[Path],
    got: Mapping[str, Collection[str]],
    scales: Mapping[str, str],
    *,
    memory_tensors: MemoryTensors,
    dtype: torch.dtype,
) -> FileWeights:
    """`got`: key in the files -> in-memory names."""
    places: dict[str, tuple[Path, str]] = {}
    torch_files = {path: _read_torch_file(path) for path in paths if path.suffix in TORCH_SUFFIXES}
    for path in paths:
        for key in torch_files[path] if path in torch_files else (key for key, _, _ in _read_file(path)):
            places[key] = (path, key)
    source = FileWeights(
        {name: places[key] for key, names in got.items() for name in names},
        {name: places[scales[key]] for key, names in got.items() if key in scales for name in names},
        memory_tensors=memory_tensors,
        dtype=dtype,
    )
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
        problems.append(f"{len(differing)} tensors have another shape: {examples}; does config.json belong to these files?")
    if problems:
        raise ModelError(f"{source}: " + "; ".join(problems))


def put_weights(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters other values: now, or where they are still on the meta device, when they are read."""
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            if not own[name].is_meta:
                own[name].copy_(value)
    if any(own[name].is_meta for name in values):
        later = {name: value for name, value in values.items() if own[name].is_meta}
        dtype = next(own[name].dtype for name in later)
        module.weight_source = GivenWeights(later, cast(Any, module).weight_source, dtype=dtype)  # type: ignore[assignment]


def randomize_weights(module: nn.Module, *, seed: int, component: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """Random weights (`RandomWeights`) for a module built under `meta_parameters`, frozen and in eval mode.

    On the meta device they are made later, as in `assign_weights`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if tensor.is_meta}
    source = RandomWeights(shapes, seed=seed, component=component, dtype=dtype)
    _give_source(module, source, names=shapes, dtype=dtype, device=device)
