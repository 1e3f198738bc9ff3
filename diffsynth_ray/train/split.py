"""Split training without Ray: what each stage loads, what an encoded sample is called in the cache, and the encoding itself.

Everything follows from the family's graph and from what is trained: an encoder that is trained gives other numbers after
every step, so that its half of a sample (text or image) is not cached but encoded inside the step, as in combined mode.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsynth_ray.config.schema import DatasetSection, Job
from diffsynth_ray.data.cache import Entry, Kind, TensorBytes, entry_key
from diffsynth_ray.data.digests import file_digests
from diffsynth_ray.data.samples import SampleRule
from diffsynth_ray.data.store import Store
from diffsynth_ray.errors import DataError, JobFileError, Problem
from diffsynth_ray.models.family import ComponentFiles, ModelFamily, split_conditions
from diffsynth_ray.models.fp8_entries import entry_number
from diffsynth_ray.models.layouts import TRAINED_TINY
from diffsynth_ray.models.weight_source import SAFETENSORS_DTYPES, SAFETENSORS_NAMES
from diffsynth_ray.schedule import trained_components
from diffsynth_ray.train.graph import extra_inputs
from diffsynth_ray.train.initial import merge_presets, preset_loras
from diffsynth_ray.train.residency import Residency, settle
from diffsynth_ray.train.trainer import fastest_attention, load_family

DECODE_VERSION = 1
"""Raised whenever a file begins to be decoded, resized or cut to other pixels."""
_KINDS: tuple[Kind, ...] = ("text", "image", "extra")
LATENTS = "latents"
"""Name of an image entry's tensor."""


@dataclass(frozen=True)
class SplitParts:
    """Which stage needs which components."""

    text: tuple[str, ...]
    """Components of stage one for texts; empty where texts are encoded in the training step."""
    image: tuple[str, ...]
    """Components of stage one for images; empty where images are encoded in the training step."""
    extra: tuple[str, ...]
    """Components of stage one for extra inputs; empty without any."""
    train: tuple[str, ...]
    """Components of stage two, in the family's order."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is cached."""
        return tuple(kind for kind in _KINDS if getattr(self, kind))

    def components(self, kinds: Sequence[Kind]) -> tuple[str, ...]:
        """Components that encode these kinds, each once."""
        return tuple(dict.fromkeys(name for kind in _KINDS if kind in kinds for name in getattr(self, kind)))


def split_parts(family: type[ModelFamily], job: Job, *, present: Collection[str] = ()) -> SplitParts:
    """What follows from the family's graph and the trained components; `present` are those that the model has.

    Raises JobFileError where nothing can be cached.
    """
    trained = trained_components(job)
    text = () if set(trained) & set(family.text_components) else family.text_components
    image = () if set(trained) & set(family.image_components) else family.image_components
    extra = _extra_components(family, job, present)
    problems = [
        Problem("model.fp8_models", f"the family {family.name} has no component {name!r}")
        for name in job.model.fp8_models
        if name not in family.component_names and entry_number(job.model, name) is None
    ]
    encoders = {*family.text_components, *family.image_components, *extra}
    if extra and (both := [name for name in trained if name in encoders]):
        message = f"{', '.join(both)} is trained: with split.enabled extra inputs need frozen encoders; set it to false"
        problems.append(Problem("model.extra_inputs", message))
    elif not text and not image:
        message = f"every encoder is trained ({', '.join(trained)}): nothing can be encoded beforehand; set it to false"
        problems.append(Problem("split.enabled", message))
    if problems:
        raise JobFileError(f"job {job.name}", problems)
    # What only some models of the family have is there where the extra inputs are those that it reads.
    chosen = family.tiny_components(job.model.extra_inputs)
    train = {
        *(name for name in family.predict_components if name not in family.optional_components or name in chosen),
        *trained,
        *(() if text else family.text_components),
        *(() if image and not job.validation.prompts else family.image_components),  # samples are decoded
    }
    in_stage_two = tuple(name for name in family.component_names if name in train)
    return SplitParts(() if extra and family.text_reads_extra else text, image, extra, in_stage_two)


def sample_prompts(family: type[ModelFamily], job: Job, parts: SplitParts) -> tuple[str, ...]:
    """The texts that stage one encodes for samples; none where the text encoder is trained, and loaded in stage two."""
    validation = job.validation
    if not parts.text or not validation.prompts:
        return ()
    negative = [family.negative_prompt] if validation.guidance_scale > 1 else []
    return tuple(dict.fromkeys([*validation.prompts, *negative]))


def _extra_components(family: type[ModelFamily], job: Job, present: Collection[str]) -> tuple[str, ...]:
    if not job.model.extra_inputs:
        return ()
    wanted = (*(family.text_components if family.text_reads_extra else ()), *family.extra_components)
    return tuple(name for name in wanted if name in present or name not in family.optional_components)


def job_of_stage(job: Job, components: Sequence[str]) -> Job:
    """The job as a stage loads it: what it says of components that the stage does not load is left out."""
    fp8 = [name for name in job.model.fp8_models if name in components]
    presets = [(path, name) for path, name in preset_loras(job) if name in components]
    lora = {"preset_path": [path for path, _ in presets], "preset_model": [name for _, name in presets]}
    return job.with_keys(model={"fp8_models": fp8}, lora=lora)


def encoder_digests(
    family: type[ModelFamily],
    job: Job,
    files: Mapping[str, ComponentFiles],
    *,
    tokenizers: Mapping[str, Path],
    parts: SplitParts,
    store: Store,
    say: Callable[[str], object],
) -> dict[Kind, str]:
    """What encodes each kind, as one hash: weights, configuration, tokenizer, number format and code.

    `tokenizers` are their folders by job key. A kind whose weights the job does not name (it only trains from the cache) is
    left out.
    """
    digests: dict[Kind, str] = {}
    for kind in parts.kinds:
        components = parts.components([kind])
        if not job.model.tiny and not all(name in files for name in components):
            continue
        digests[kind] = entry_key(
            family=family.name,
            code=family.encode_version,
            dtype=job.training.precision,
            options=job.model.options,
            components={name: _component_identity(family, job, name, files, store=store, say=say) for name in components},
            tokenizers=_tokenizer_identity(tokenizers, store=store, say=say) if kind != "image" else {},
            extra_inputs=sorted(job.model.extra_inputs) if kind == "extra" else [],
        )
    return digests


def _component_identity(
    family: type[ModelFamily],
    job: Job,
    name: str,
    files: Mapping[str, ComponentFiles],
    *,
    store: Store,
    say: Callable[[str], object],
) -> dict[str, object]:
    presets = [path for path, component in preset_loras(job) if component == name]
    shared: dict[str, object] = {
        "fp8": name in job.model.fp8_models,
        "presets": _raise_first(file_digests(presets, store, say)),
    }
    if job.model.tiny and not (name in family.tiny_weights and job.model.options.get(TRAINED_TINY)):
        return shared | {"tiny": True, "seed": job.seed}
    if job.model.tiny:
        paths = [str(path) for path in family.tiny_weights[name].iterdir() if path.is_file()]
        return shared | {"tiny": True, "files": sorted(_raise_first(file_digests(paths, store, say)))}
    paths = [str(path) for path in files[name].paths]
    total = sum(Path(path).stat().st_size for path in paths)
    if total > 1 << 30:
        say(f"hashing {name} ({total / 1e9:.1f} GB), where that was not done before")
    return shared | {"files": sorted(_raise_first(file_digests(paths, store, say))), "config": files[name].config}


def _tokenizer_identity(
    tokenizers: Mapping[str, Path], *, store: Store, say: Callable[[str], object]
) -> dict[str, dict[str, str]]:
    """Job key -> file -> hash. Names below the folder alone: the same tokenizer in another folder is the same."""
    identity = {}
    for key, folder in sorted(tokenizers.items()):
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        # What a hub's client leaves beside the files is none of them.
        names = [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]
        digests = _raise_first(file_digests([str(folder / name) for name in names], store, say))
        identity[key] = dict(zip(names, digests, strict=True))
    return identity


def _raise_first(digests: Sequence[str | DataError]) -> list[str]:
    for digest in digests:
        if isinstance(digest, DataError):
            raise digest
    return [digest for digest in digests if isinstance(digest, str)]


def text_key(encoder: str, prompt: str) -> str:
    """Key of an encoded text."""
    return entry_key(encoder=encoder, prompt=prompt)


def image_key(encoder: str, media: str, *, height: int, width: int, num_frames: int, frame_rate: float | None = None) -> str:
    """Key of an encoded image or clip; `media` is the hash of the file's content, `frame_rate` that of a clip."""
    size = [height, width, num_frames]
    return entry_key(encoder=encoder, media=media, size=size, frame_rate=frame_rate, decode=DECODE_VERSION)


def extra_key(
    encoder: str,
    *,
    prompt: str | None,
    image: str | None,
    size: tuple[int, int, int],
    inputs: Mapping[str, Any],
    dataset: DatasetSection,
    rule: SampleRule,
) -> str:
    """Key of a row's encoded extra inputs.

    `prompt` and `image` (what names the pixels that are trained on) where they are read too, `size` those pixels', `inputs` by
    column hashes of files or a value. The files have sizes of their own, which follow from the data set's keys and the rule.
    """
    sizing = [dataset.height, dataset.width, dataset.max_pixels, dataset.num_frames, dataset.frame_rate]
    return entry_key(
        encoder=encoder,
        prompt=prompt,
        image=image,
        size=size,
        inputs=inputs,
        sizing=[*sizing, rule.size_multiple, rule.clip_step],
        decode=DECODE_VERSION,
    )


def tensor_bytes(tensor: Tensor) -> TensorBytes:
    """A tensor's bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return TensorBytes(SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def bytes_tensor(stored: TensorBytes) -> Tensor:
    """The inverse of `tensor_bytes`."""
    flat = torch.frombuffer(bytearray(stored.data), dtype=SAFETENSORS_DTYPES[stored.dtype])
    return flat.reshape(stored.shape)


def load_encoders(job: Job, *, device: torch.device, components: Sequence[str]) -> tuple[ModelFamily, Residency]:
    """These components with their weights, where the job wants them: in FP8, or block by block from host memory."""
    job = job_of_stage(job, components)
    family = load_family(job, device=device, components=components)
    merge_presets(family, job, lambda line: None)
    for module in family.components.values():
        module.requires_grad_(False).eval()
    return family, settle(family, job, say=lambda line: None)


class SampleEncoder:
    """Encodes texts and images into entries, with what of a family is loaded."""

    def __init__(self, family: ModelFamily, residency: Residency | None = None) -> None:
        self.family, self.residency = family, residency or Residency()

    @torch.no_grad()
    def encode_texts(self, prompts: Sequence[str]) -> list[Entry]:
        """An entry a prompt: the conditions without the batch, `prompt_embeds` [n, d]."""
        self.residency.begin("texts")
        with fastest_attention():
            conditions = self.family.encode_text(prompts)
        singles = split_conditions(conditions, num_samples=len(prompts))
        return [{name: tensor_bytes(tensor[0]) for name, tensor in single.items()} for single in singles]

    @torch.no_grad()
    def encode_extra(self, prompt: str, *, pixels: Tensor, given: Mapping[str, tuple[Any, ...]], names: Sequence[str]) -> Entry:
        """One sample's conditions from the extra inputs `names`, and from the prompt where the family reads both together.

        `pixels` uint8 [1, f, h, w, 3] are what is trained on, `given` the metadata's columns among the names.
        """
        self.residency.begin("extra")
        moved = pixels.to(self.family.device)
        extra = extra_inputs(given, moved, names)
        with fastest_attention():
            if self.family.text_reads_extra:
                conditions = self.family.encode_conditions([prompt], pixels=moved, extra=extra)
            else:
                conditions = self.family.encode_extra(extra, pixels=moved)
        (single,) = split_conditions(conditions, num_samples=1)
        return {name: tensor_bytes(tensor[0]) for name, tensor in single.items()}

    @torch.no_grad()
    def encode_images(self, pixels: np.ndarray) -> list[Entry]:
        """An entry a sample: `latents` [c, (f,) h, w] of uint8 [b, f, h, w, 3]. A batch too large for the device is halved."""
        self.residency.begin("images")
        try:
            with fastest_attention():
                latents = self.family.encode_image(torch.from_numpy(pixels))
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
            latents = None
        if latents is None:
            # Outside of the handler, which would keep the tensors of the failed attempt alive.
            torch.cuda.empty_cache()
            middle = len(pixels) // 2
            return [*self.encode_images(pixels[:middle]), *self.encode_images(pixels[middle:])]
        return [{LATENTS: tensor_bytes(one)} for one in latents]
