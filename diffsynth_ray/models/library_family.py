"""What families made of diffusers' and transformers' classes have in common: loading, tiny sizes, names by table."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.family import ComponentFiles, ModelFamily
from diffsynth_ray.models.layer_names import (
    SAME_NAMES,
    LayerNames,
    split_key,
    tensors_from_memory,
    tensors_to_memory,
)
from diffsynth_ray.models.layouts import TRAINED_TINY
from diffsynth_ray.models.weights import assign_weights, randomize_weights, read_folder

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
InferConfig = Callable[[Shapes], dict[str, Any]]
TINY_DIR = Path(__file__).parent / "tiny"


class LibraryFamily(ModelFamily):
    """A family whose components are classes of diffusers and transformers."""

    names: ClassVar[dict[str, LayerNames]]
    """By component: how files call its layers; components that are missing have the names in memory."""
    infer_functions: ClassVar[dict[str, InferConfig]]
    """By component: shapes under the names in memory -> configuration."""
    tokenizer_keys: ClassVar[dict[str, tuple[str, tuple[str, ...]]]]
    """By job key: the component that needs the tokenizer, and folders beside the component's where it may be."""
    tiny_tokenizers: ClassVar[dict[str, Path]]
    """By job key: the tokenizer of the tiny size."""

    def __init__(
        self,
        components: dict[str, nn.Module],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        tokenizer_paths: Mapping[str, Path] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(components, dtype=dtype, device=device)
        self.options = dict(options or {})
        self.tokenizers: dict[str, Any] = {}
        for key, (component, _) in self.tokenizer_keys.items():
            if component in components:
                self.tokenizers[key] = self.load_tokenizer(key, (tokenizer_paths or {}).get(key))

    @classmethod
    @abstractmethod
    def build_component(cls, component: str, config: Mapping[str, Any]) -> nn.Module:
        """The component with its parameters on the meta device."""

    @classmethod
    @abstractmethod
    def load_tokenizer(cls, key: str, path: Path | None) -> Any:
        """The tokenizer (or processor) in a folder; ModelError that names the job's key where it is not there."""

    @classmethod
    @abstractmethod
    def tiny_configs(cls, extra_inputs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """By component: the tiny configuration of the model that takes these extra inputs."""

    @classmethod
    def load(
        cls,
        files: Mapping[str, ComponentFiles],
        *,
        components: Sequence[str] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        tokenizer_paths: Mapping[str, Path] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """See `ModelFamily.load`. Tokenizers default to the folders beside the component's files."""
        cls.check_options(options or {})
        if options and options.get(TRAINED_TINY):
            raise ModelError(f"[model] options: {TRAINED_TINY} is for the tiny size; remove it, or set tiny = true")
        modules: dict[str, nn.Module] = {}
        for component in files if components is None else components:
            if component not in files:
                raise ModelError(f"{cls.name} needs its {component}, and [model] paths has none")
            source = files[component]
            log.info("loading %s from %s", component, ", ".join(path.name for path in source.paths))
            module = cls.build_component(component, cls.component_config(component, source.config, options or {}))
            assign_weights(
                module,
                source,
                component=component,
                memory_tensors=partial(cls.memory_tensors, component),
                dtype=dtype,
                device=device,
            )
            modules[component] = module
        paths = dict(tokenizer_paths or {})
        for key, (component, folders) in cls.tokenizer_keys.items():
            if component in modules and key not in paths:
                here = files[component].paths[0].parent
                found = [path for folder in folders for path in (here.parent / folder, here / folder) if path.is_dir()]
                paths |= {key: found[0]} if found else {}
        return cls(modules, dtype=dtype, device=device, tokenizer_paths=paths, options=options)

    @classmethod
    def build_tiny(
        cls,
        seed: int,
        *,
        components: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        extra_inputs: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """See `ModelFamily.build_tiny`."""
        cls.check_options(options or {})
        configs = cls.tiny_configs(extra_inputs)
        wants_trained = bool(options and options.get(TRAINED_TINY))
        trained = {name: read_folder(folder) for name, folder in cls.tiny_weights.items()} if wants_trained else {}
        configs = {**configs, **{name: files.config for name, files in trained.items()}}
        modules = {}
        for component in cls.tiny_components(extra_inputs) if components is None else components:
            module = cls.build_component(component, cls.component_config(component, configs[component], options or {}))
            if component in trained:
                to_memory = partial(cls.memory_tensors, component)
                files = trained[component]
                assign_weights(module, files, component=component, memory_tensors=to_memory, dtype=dtype, device=device)
            else:
                randomize_weights(module, seed=seed, component=component, dtype=dtype, device=device)
            modules[component] = module
        return cls(modules, dtype=dtype, device=device, tokenizer_paths=cls.tiny_tokenizers, options=options)

    @classmethod
    def tiny_components(cls, extra_inputs: Sequence[str]) -> tuple[str, ...]:
        """See `ModelFamily.tiny_components`."""
        configs = cls.tiny_configs(extra_inputs)
        return tuple(name for name in cls.component_names if name in configs)

    @classmethod
    def check_extra_inputs(cls, names: Iterable[str]) -> None:
        """ModelError for `[model] extra_inputs` that the family does not have."""
        if unknown := [name for name in names if name not in cls.extra_inputs]:
            known = ", ".join(cls.extra_inputs) or "none"
            raise ModelError(f"[model] extra_inputs: {cls.name} takes {known}, got {', '.join(unknown)}")

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """ModelError for keys of `[model] options` that the family does not have."""
        unknown = sorted(set(options) - set(cls.option_names))
        if unknown:
            known = ", ".join(cls.option_names) or "none"
            raise ModelError(f"[model] options: {cls.name} has no option {', '.join(unknown)}; it has {known}")

    @classmethod
    def component_config(cls, component: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """A component's configuration as the options change it."""
        return dict(config)

    @classmethod
    def shallow_config(cls, component: str, config: Mapping[str, Any], depth: int) -> dict[str, Any]:
        """A component's configuration with this many blocks in every list of `depth_keys`."""
        return {**config, **dict.fromkeys(cls.depth_keys.get(component, {}).values(), depth)}

    @classmethod
    def infer_config(cls, component: str, shapes: Shapes) -> dict[str, Any]:
        """See `ModelFamily.infer_config`."""
        inner = {
            name: tuple(tensor.shape)
            for key, shape in shapes.items()
            for name, tensor in cls.memory_tensors(component, key, torch.empty(shape, device="meta")).items()
        }
        try:
            return cls.infer_functions[component](inner)
        except KeyError as error:
            raise ModelError(f"{cls.name} {component}: tensor {error} is missing; is a shard missing?") from error

    @classmethod
    def layer_names(cls, component: str) -> LayerNames:
        """See `ModelFamily.layer_names`."""
        return cls.names.get(component, LayerNames())

    @classmethod
    def memory_tensors(cls, component: str, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """See `ModelFamily.memory_tensors`."""
        name = cls.memory_key(component, key)
        if name is None:
            return {}
        table = cls.layer_names(component).table_of(split_key(key)[0])
        return {name: tensor} if table is SAME_NAMES else tensors_to_memory(table, key, tensor)

    @classmethod
    def checkpoint_tensors(cls, component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ModelFamily.checkpoint_tensors`."""
        return tensors_from_memory(cls.layer_names(component).diffsynth, state)

    @classmethod
    def memory_key(cls, component: str, key: str) -> str | None:
        """See `ModelFamily.memory_key`; of several layers that a file has as one, the first."""
        layer, suffix = split_key(key)
        return cls.layer_names(component).layers(layer)[0] + suffix

    @classmethod
    def checkpoint_key(cls, component: str, name: str) -> str:
        """See `ModelFamily.checkpoint_key`."""
        layer, suffix = split_key(name)
        return cls.layer_names(component).diffsynth.from_memory(layer).module + suffix


def _only_files(extra: Mapping[str, Any], name: str, *, kind: str) -> Iterator[Tensor]:
    """The column's one file a sample, [f, h, w, 3] each."""
    for files in extra[name]:
        if not isinstance(files, (tuple, list)) or len(files) != 1:
            got = f"{len(files)} files" if isinstance(files, (tuple, list)) else repr(files)
            raise ModelError(f"model.extra_inputs: {name} takes one {kind} a sample, got {got}; see dataset.data_file_keys")
        yield torch.as_tensor(files[0])


def extra_image(extra: Mapping[str, Any], name: str, *, height: int, width: int) -> Tensor:
    """The column's one picture a sample, uint8 [b, 1, height, width, 3], squeezed to this size where it has another."""
    pictures = []
    for file in _only_files(extra, name, kind="picture"):
        picture = file[0]
        if picture.shape[:2] != (height, width):
            resized = Image.fromarray(picture.cpu().numpy()).resize((width, height))
            picture = torch.from_numpy(np.array(resized)).to(picture.device)
        pictures.append(picture)
    return torch.stack(pictures)[:, None]


def extra_clip(extra: Mapping[str, Any], name: str, *, like: Tensor) -> Tensor:
    """The column's one clip a sample, uint8 [b, F, H, W, 3], which must be as long and as large as the samples `like`."""
    clips = []
    for clip in _only_files(extra, name, kind="clip"):
        if clip.shape != like.shape[1:]:
            got, wanted = (f"{f} frames of {w}x{h}" for f, h, w, _ in (clip.shape, like.shape[1:]))
            raise ModelError(
                f"model.extra_inputs: {name} must be like the clip that it belongs to, {wanted}, got {got}; give it a file of "
                "the same length, and both the same proportions or dataset.height and dataset.width"
            )
        clips.append(clip)
    return torch.stack(clips)


def missing_tokenizer(family: str, key: str, path: Path | None, needs: str) -> ModelError:
    """The error of a tokenizer that is not there."""
    where = "no folder given" if path is None else f"none in {path}"
    return ModelError(f"{family}: no tokenizer: {where}; set [model] {key} to the folder with {needs}")


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """Number of the blocks `prefix`0., `prefix`1., ..."""
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in shapes if key.startswith(prefix))
