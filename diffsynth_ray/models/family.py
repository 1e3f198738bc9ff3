"""What the trainer knows of a model: the `ModelFamily` interface, `EncodedBatch`, and the registry of families.

A family is a set of components (`dit`, `text_encoder`, `vae`) and the way from a prompt and pixels to a prediction.
This module imports neither diffusers nor transformers; a family's own module is imported when it is first asked for.

Shapes: b batch, c latent channels, f latent frames, h/w latent height and width, n text tokens, d embedding width.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import layouts
from diffsynth_ray.models.layer_names import LayerNames
from diffsynth_ray.models.layouts import KeyLayout

if TYPE_CHECKING:
    from diffsynth_ray.models.sampling import Frames, SampleRequest

MASK_SUFFIX = "_mask"
FIRST_FRAME = "first_frame_latents"
"""Condition [b, c, 1, h, w]: the latents' first frame as it is given to the DiT without noise, and left out of the loss."""
REFERENCE = "reference_latents"
"""Condition [b, c, 1, h, w]: a picture's latents that are put before the clip's own frames, and are noised and trained with
them."""


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a micro batch before the encoders."""

    num_samples: int
    height: int
    width: int
    num_frames: int = 1
    text_tokens: int = 256


@dataclass(frozen=True)
class EncodedBatch:
    """Samples after the encoders: what stage one writes, stage two reads, and the train step consumes."""

    latents: Tensor
    """[b, c, h, w] for images, [b, c, f, h, w] for videos; normalised as the DiT wants them."""
    conditions: dict[str, Tensor]
    """By name, e.g. `prompt_embeds` [b, n, d] and, only where lengths differ, `prompt_embeds_mask` [b, n] bool."""
    sample_ids: tuple[int | str, ...] = ()
    """One a sample; for messages and the cache only."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> EncodedBatch:
        """The same batch on `device`; floating tensors in `dtype` where given, masks and ids untouched."""

        def move(tensor: Tensor) -> Tensor:
            cast = dtype if tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=cast, non_blocking=True)

        conditions = {name: move(tensor) for name, tensor in self.conditions.items()}
        return EncodedBatch(move(self.latents), conditions, self.sample_ids)

    def with_reference(self) -> EncodedBatch:
        """The batch as it is trained: a reference's latents become the first frame of the latents."""
        if REFERENCE not in self.conditions:
            return self
        conditions = dict(self.conditions)
        latents = torch.cat([conditions.pop(REFERENCE).to(self.latents), self.latents], dim=2)
        return EncodedBatch(latents, conditions, self.sample_ids)

    def samples(self) -> list[EncodedBatch]:
        """The batch as batches of one, padding taken off: what a cache stores."""
        return [
            EncodedBatch(self.latents[index : index + 1], conditions, self.sample_ids[index : index + 1])
            for index, conditions in enumerate(split_conditions(self.conditions, num_samples=self.latents.shape[0]))
        ]


def stack_conditions(conditions: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join conditions along the batch.

    Sequences [b, n, ...] of unequal n are padded with zeros and get a bool mask [b, n], True where there is a token.
    """
    names = {name for one in conditions for name in one if not name.endswith(MASK_SUFFIX)}
    stacked: dict[str, Tensor] = {}
    for name in sorted(names):
        if any(name not in one for one in conditions):
            raise ModelError(f"condition {name!r} is missing from some samples of a batch")
        tensors = [one[name] for one in conditions]
        masks = [one.get(name + MASK_SUFFIX) for one in conditions]
        if len({tuple(tensor.shape[1:]) for tensor in tensors}) == 1 and all(mask is None for mask in masks):
            stacked[name] = torch.cat(tensors)
            continue
        length = max(tensor.shape[1] for tensor in tensors)
        padded, padded_masks = [], []
        for tensor, mask in zip(tensors, masks, strict=True):
            valid = mask if mask is not None else tensor.new_ones(tensor.shape[:2], dtype=torch.bool)
            missing = length - tensor.shape[1]
            padded.append(torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], dim=1))
            padded_masks.append(torch.cat([valid, valid.new_zeros(valid.shape[0], missing)], dim=1))
        stacked[name] = torch.cat(padded)
        stacked[name + MASK_SUFFIX] = torch.cat(padded_masks)
    return stacked


def padded(embeds: Tensor, length: int) -> Tensor:
    """Text [b, n, d] with zeros up to `length` tokens."""
    return nn.functional.pad(embeds, (0, 0, 0, length - embeds.shape[1]))


def real_tensor(values: Sequence[Any]) -> Tensor:
    """A CPU tensor with values, also inside of a fake mode."""
    with unset_fake_temporarily():
        return torch.tensor(values)


def real_values(tensor: Tensor) -> list[Any]:
    """The values of a tensor as nested lists; of a real one also inside of a fake mode."""
    with unset_fake_temporarily():
        return list(tensor.tolist())


def split_conditions(conditions: Mapping[str, Tensor], *, num_samples: int) -> list[dict[str, Tensor]]:
    """The inverse of `stack_conditions`: one [1, n, ...] a sample, padding and masks taken off."""
    singles = []
    for index in range(num_samples):
        single = {}
        for name, tensor in conditions.items():
            if name.endswith(MASK_SUFFIX):
                continue
            mask = conditions.get(name + MASK_SUFFIX)
            row = tensor[index : index + 1]
            single[name] = row if mask is None else row[:, mask[index]]
        singles.append(single)
    return singles


@dataclass(frozen=True)
class ComponentFiles:
    """Where one component's weights are."""

    config: dict[str, Any]
    """Arguments of the component's class: config.json beside the weights, else inferred from tensor shapes."""
    paths: tuple[Path, ...]
    """All shards."""
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    """Key in the files -> shape."""


class ModelFamily(ABC):
    """One family of models. An instance holds the components that were loaded, all frozen and in eval mode.

    Methods never switch gradients off: frozen parameters record no graph, and a trained text encoder needs one.
    """

    name: ClassVar[str]
    component_names: ClassVar[tuple[str, ...]]
    key_layouts: ClassVar[dict[str, KeyLayout]]
    """By component."""
    config_names: ClassVar[dict[str, str | tuple[str, ...]]]
    """By component: `_class_name` or `model_type` (one or any of several) that its config.json must have to be believed."""
    default_tokenizers: ClassVar[dict[str, str]] = {}
    """Key of [model] (tokenizer_path, tokenizer_1_path, tokenizer_2_path, processor_path) -> "owner/name:folder/" that is
    used where the job names none."""
    scheduler_table: ClassVar[str]
    """Name of the sigma table in `flow_matching`."""
    draws_noise_in_float32: ClassVar[bool] = False
    """Whether DiffSynth-Studio's pipeline draws a seed's noise in float32; else in the model's number format."""
    default_lora_targets: ClassVar[dict[str, tuple[str, ...]]]
    """By component: module name endings, the family's recipe."""
    text_components: ClassVar[tuple[str, ...]]
    """Needed for `encode_text`."""
    image_components: ClassVar[tuple[str, ...]]
    """Needed for `encode_image`."""
    tiny_weights: ClassVar[dict[str, Path]] = {}
    """By component: folder of trained weights of the tiny size and their config.json; with the option TRAINED_TINY."""
    extra_components: ClassVar[tuple[str, ...]] = ()
    """Needed for `encode_extra`."""
    optional_components: ClassVar[tuple[str, ...]] = ()
    """Not every model of the family has them; what needs one goes without it then."""
    padded_text_tokens: ClassVar[int | None] = None
    """`predict` pads `prompt_embeds` with zeros to so many tokens, whatever their mask; None: it does not."""
    text_tokens_vary: ClassVar[bool] = False
    """Whether `predict` computes with as many tokens as a prompt has; else with the same number for all prompts."""
    predict_components: ClassVar[tuple[str, ...]]
    """Needed for `predict`."""
    encode_version: ClassVar[int] = 1
    """Raised whenever an encoding begins to give other numbers: older caches are then not used."""
    size_multiple: ClassVar[int]
    """Pixels; height and width must be multiples of it."""
    clip_step: ClassVar[int | None] = None
    """Clips have a multiple of this many frames and one more (4: 1, 5, 9 ...); None: the family takes images only."""
    extra_inputs: ClassVar[tuple[str, ...]] = ()
    """Columns that `encode_extra` knows (`[model] extra_inputs`)."""
    clip_inputs: ClassVar[tuple[str, ...]] = ()
    """Those of them that are clips, as long as the sample's own; the others are pictures."""
    reference_inputs: ClassVar[tuple[str, ...]] = ()
    """Those of them that become a REFERENCE."""
    text_reads_extra: ClassVar[bool] = False
    """Whether `encode_conditions` reads prompt and extra inputs together, so that neither can be cached without the other."""
    negative_prompt: ClassVar[str] = ""
    """What a guided sample is made against."""
    option_names: ClassVar[tuple[str, ...]] = ()
    """Keys of `[model] options`."""
    depth_keys: ClassVar[dict[str, dict[str, str]]] = {}
    """By component of a prediction: a list of blocks -> the key of its configuration that has their number. But for the first
    one they are alike."""

    def __init__(self, components: dict[str, nn.Module], *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.components = components
        self.dtype = dtype
        """What the components compute in."""
        self.device = torch.device(device)
        """Where inputs go; under CPU offload the weights may be elsewhere."""
        self.known_texts: dict[str, dict[str, Tensor]] = {}
        """Prompt -> its conditions, batch 1, for samples where the text encoder is not loaded."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        files: Mapping[str, ComponentFiles],
        *,
        components: Sequence[str] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        tokenizer_paths: Mapping[str, Path] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> ModelFamily:
        """Load `components` (None = all that `files` has). `tokenizer_paths` by job key: `tokenizer_path`, ..."""

    @classmethod
    @abstractmethod
    def build_tiny(
        cls,
        seed: int,
        *,
        components: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        extra_inputs: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> ModelFamily:
        """The family at a tiny size with random weights that depend on (seed, parameter name) alone.

        `extra_inputs` and `options` choose the variant, as in a job.
        """

    @classmethod
    def tiny_components(cls, extra_inputs: Sequence[str]) -> tuple[str, ...]:
        """The components of the tiny size that takes these extra inputs."""
        return cls.component_names

    @classmethod
    @abstractmethod
    def infer_config(cls, component: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The component's configuration from the shapes in its files, for files without a config.json beside them."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts -> conditions, batch b = len(prompts)."""

    def text_of_sample(self, prompt: str) -> dict[str, Tensor]:
        """A prompt's conditions, batch 1, encoded beforehand or now."""
        known = self.known_texts.get(prompt)
        if known is None:
            return self.encode_text([prompt])
        return {name: tensor.to(self.device) for name, tensor in known.items()}

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [b, f, h, w, 3] (f = 1 for images) -> latents."""

    @abstractmethod
    def latents_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """Shape of one sample's latents, without the batch, for a size in pixels and frames."""

    @abstractmethod
    def predict(self, batch: EncodedBatch, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The DiT's prediction, shaped like `noisy_latents`; `timesteps` [b] in 0..1000, float32."""

    @abstractmethod
    def repeated_blocks(self, component: str) -> list[nn.Module]:
        """The component's like blocks in forward order: units of compilation, offload and sharding."""

    @classmethod
    @abstractmethod
    def checkpoint_key(cls, component: str, name: str) -> str:
        """In-memory parameter name -> the key that DiffSynth-Studio exports it under (without `pipe.{component}.`)."""

    @classmethod
    @abstractmethod
    def memory_key(cls, component: str, key: str) -> str | None:
        """Key in a weight file, original or exported -> in-memory parameter name; None for a tensor not loaded."""

    @classmethod
    def memory_tensors(cls, component: str, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor of a weight file as the parameters in memory: none, one, or several where the file fuses layers.

        Also called with meta tensors, to learn names and shapes.
        """
        name = cls.memory_key(component, key)
        return {} if name is None else {name: tensor}

    @classmethod
    def checkpoint_tensors(cls, component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Trained parameters by their names in memory -> what DiffSynth-Studio exports; undone by `memory_tensors`."""
        return {cls.checkpoint_key(component, name): tensor for name, tensor in state.items()}

    @classmethod
    def layer_names(cls, component: str) -> LayerNames:
        """How the tools call the component's layers: LoRA files and `[lora] target_modules` go by it."""
        return LayerNames()

    def encode_extra(self, extra: Mapping[str, Any], *, pixels: Tensor) -> dict[str, Tensor]:
        """Extra inputs by column -> further conditions.

        A column has one entry a sample [b]: its files as uint8 [f, h, w, 3] each, of any size, or the cell's value.
        `pixels` [b, f, h, w, 3] are the samples themselves.
        """
        raise ModelError(f"{self.name} takes no extra inputs, got {', '.join(extra)}; check [model] extra_inputs")

    def encode_conditions(self, prompts: Sequence[str], *, pixels: Tensor, extra: Mapping[str, Any]) -> dict[str, Tensor]:
        """Everything that the DiT is told besides latents and timesteps."""
        conditions = self.encode_text(prompts)
        return {**conditions, **self.encode_extra(extra, pixels=pixels)} if extra else conditions

    def encode(
        self,
        prompts: Sequence[str],
        pixels: Tensor,
        *,
        extra: Mapping[str, Any] | None = None,
        sample_ids: Sequence[int | str] = (),
    ) -> EncodedBatch:
        """Prompts, uint8 pixels [b, f, h, w, 3] and extra inputs -> one encoded batch."""
        conditions = self.encode_conditions(prompts, pixels=pixels, extra=extra or {})
        return EncodedBatch(self.encode_image(pixels), conditions, tuple(sample_ids))

    def blank_batch(self, shape: BatchShape, *, extra_inputs: Sequence[str] = ()) -> EncodedBatch:
        """A batch of zeros in the shapes that the encoders give for samples of this size; only the DiT is needed for it."""
        raise ModelError(f"the family {self.name} does not say what its encoders give: memory and time cannot be estimated")

    def blank_latents(self, shape: BatchShape) -> Tensor:
        """Their part of it, for the families' `blank_batch`."""
        return torch.zeros(
            shape.num_samples, *self.latents_shape(shape.height, shape.width, shape.num_frames), dtype=self.dtype
        )

    def sample(self, request: SampleRequest) -> Frames:
        """One picture or clip, uint8 [f, h, w, 3], made by diffusers' pipeline with the weights as they are."""
        raise ModelError(f"the family {self.name} makes no sample pictures; remove validation.prompts")

    def component(self, name: str) -> Any:
        """A loaded component (typed Any: its attributes are its own class's), or an error that names what is loaded."""
        if name not in self.components:
            have = ", ".join(self.components) or "none"
            raise ModelError(f"{self.name}: component {name!r} is needed but not loaded (loaded: {have}); check [model] paths")
        return self.components[name]


# Name -> module; "register_family" runs when the module is imported.
_FAMILY_MODULES: dict[str, str] = {
    "flux": "diffsynth_ray.models.flux",
    "flux2": "diffsynth_ray.models.flux2",
    "qwen_image": "diffsynth_ray.models.qwen_image",
    "wan": "diffsynth_ray.models.wan",
    "z_image": "diffsynth_ray.models.z_image",
}
_FAMILIES: dict[str, type[ModelFamily]] = {}


def register_family(family: type[ModelFamily]) -> type[ModelFamily]:
    """Class decorator: make a family known under its name."""
    _FAMILIES[family.name] = family
    return family


def family_names() -> list[str]:
    """All families, imported or not, those of other packages too."""
    return sorted({*_FAMILY_MODULES, *_FAMILIES, *layouts.family_entry_points()})


def _load_entry_point(point: EntryPoint) -> None:
    package = point.dist.name if point.dist else point.value
    try:
        family = point.load()
    except (ImportError, AttributeError) as error:
        raise ModelError(f"model family {point.name!r} of the package {package} cannot be imported: {error}") from error
    if not (isinstance(family, type) and issubclass(family, ModelFamily) and family.name == point.name):
        raise ModelError(f"model family {point.name!r} of the package {package}: {point.value} is no ModelFamily of that name")
    register_family(family)


def get_family(name: str) -> type[ModelFamily]:
    """The family's class; imports its module, but neither diffusers nor transformers yet."""
    if name not in _FAMILIES and name in _FAMILY_MODULES:
        importlib.import_module(_FAMILY_MODULES[name])
    if name not in _FAMILIES and name in (points := layouts.family_entry_points()):
        _load_entry_point(points[name])
    if name not in _FAMILIES:
        raise ModelError(f"model family {name!r} is not known; known: {', '.join(family_names())}")
    return _FAMILIES[name]


def key_layouts() -> layouts.Layouts:
    """Layouts of all families, those of other packages too."""
    return {name: get_family(name).key_layouts for name in family_names()}


def detect_component(shapes: Mapping[str, tuple[int, ...]], *, family: str | None = None) -> tuple[str, str]:
    """(family, component) of a component's tensors, all shards together; `family` is what the job says."""
    return layouts.detect_component(shapes, key_layouts(), family=family)
