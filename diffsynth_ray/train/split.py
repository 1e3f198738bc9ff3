"""Split training without Ray: what each stage loads, what an encoded sample is called in the cache, and the encoding itself.

Everything follows from the family's graph and from what is trained: an encoder that is trained gives other numbers after
every step, so that its half of a sample (text or image) is not cached but encoded inside the step, as in combined mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffsynth_ray.config.schema import Job
from diffsynth_ray.data.cache import Entry, Kind, TensorBytes, entry_key
from diffsynth_ray.data.digests import file_digests
from diffsynth_ray.data.store import Store
from diffsynth_ray.errors import DataError, JobFileError, Problem
from diffsynth_ray.models.family import ComponentFiles, ModelFamily, split_conditions
from diffsynth_ray.schedule import trained_components
from diffsynth_ray.train.initial import merge_presets, preset_loras
from diffsynth_ray.train.residency import Residency, settle
from diffsynth_ray.train.trainer import fastest_attention, load_family

DECODE_VERSION = 1
"""Raised whenever a file begins to be decoded, resized or cut to other pixels."""
LATENTS = "latents"
"""Name of an image entry's tensor."""

_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class SplitParts:
    """Which stage needs which components."""

    text: tuple[str, ...]
    """Components of stage one for texts; empty where texts are encoded in the training step."""
    image: tuple[str, ...]
    """Components of stage one for images; empty where images are encoded in the training step."""
    train: tuple[str, ...]
    """Components of stage two, in the family's order."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is cached."""
        return (*(("text",) if self.text else ()), *(("image",) if self.image else ()))

    def components(self, kinds: Sequence[Kind]) -> tuple[str, ...]:
        """Components that encode these kinds, each once."""
        needed = [*(self.text if "text" in kinds else ()), *(self.image if "image" in kinds else ())]
        return tuple(dict.fromkeys(needed))


def split_parts(family: type[ModelFamily], job: Job) -> SplitParts:
    """What follows from the family's graph and the trained components. Raises JobFileError where nothing can be cached."""
    trained = trained_components(job)
    text = () if set(trained) & set(family.text_components) else family.text_components
    image = () if set(trained) & set(family.image_components) else family.image_components
    problems = [
        Problem("model.fp8_models", f"the family {family.name} has no component {name!r}")
        for name in job.model.fp8_models
        if name not in family.component_names
    ]
    if not text and not image:
        message = f"every encoder is trained ({', '.join(trained)}): nothing can be encoded beforehand; set it to false"
        problems.append(Problem("split.enabled", message))
    if problems:
        raise JobFileError(f"job {job.name}", problems)
    train = {
        *family.predict_components,
        *trained,
        *(() if text else family.text_components),
        *(() if image else family.image_components),
    }
    return SplitParts(text, image, tuple(name for name in family.component_names if name in train))


def job_of_stage(job: Job, components: Sequence[str]) -> Job:
    """The job as a stage loads it: what it says of components that the stage does not load is left out."""
    fp8 = [name for name in job.model.fp8_models if name in components]
    presets = [(path, name) for path, name in preset_loras(job) if name in components]
    lora = job.lora.model_copy(
        update={"preset_path": [path for path, _ in presets], "preset_model": [name for _, name in presets]}
    )
    return job.model_copy(update={"model": job.model.model_copy(update={"fp8_models": fp8}), "lora": lora})


def encoder_digests(
    family: type[ModelFamily],
    job: Job,
    files: Mapping[str, ComponentFiles],
    *,
    parts: SplitParts,
    store: Store,
    say: Callable[[str], object],
) -> dict[Kind, str]:
    """What encodes each kind, as one hash: weights, configuration, tokenizer, number format and code.

    A kind whose weights the job does not name (it only trains from the cache) is left out.
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
            components={name: _component_identity(job, name, files, store=store, say=say) for name in components},
            tokenizers=_tokenizer_identity(job, store=store, say=say) if kind == "text" else {},
        )
    return digests


def _component_identity(
    job: Job, name: str, files: Mapping[str, ComponentFiles], *, store: Store, say: Callable[[str], object]
) -> dict[str, object]:
    presets = [path for path, component in preset_loras(job) if component == name]
    shared: dict[str, object] = {
        "fp8": name in job.model.fp8_models,
        "presets": _raise_first(file_digests(presets, store, say)),
    }
    if job.model.tiny:
        return shared | {"tiny": True, "seed": job.seed}
    paths = [str(path) for path in files[name].paths]
    total = sum(Path(path).stat().st_size for path in paths)
    if total > 1 << 30:
        say(f"hashing {name} ({total / 1e9:.1f} GB), where that was not done before")
    return shared | {"files": sorted(_raise_first(file_digests(paths, store, say))), "config": files[name].config}


def _tokenizer_identity(job: Job, *, store: Store, say: Callable[[str], object]) -> dict[str, str]:
    model = job.model
    folders = [model.tokenizer_path, model.tokenizer_1_path, model.tokenizer_2_path, model.processor_path]
    paths = [path for folder in folders if folder for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    digests = _raise_first(file_digests([str(path) for path in paths], store, say))
    # The names alone: the same tokenizer in another folder is the same.
    return {path.name: digest for path, digest in zip(paths, digests, strict=True)}


def _raise_first(digests: Sequence[str | DataError]) -> list[str]:
    for digest in digests:
        if isinstance(digest, DataError):
            raise digest
    return [digest for digest in digests if isinstance(digest, str)]


def text_key(encoder: str, prompt: str) -> str:
    """Key of an encoded text."""
    return entry_key(encoder=encoder, prompt=prompt)


def image_key(
    encoder: str, media: str, *, height: int, width: int, num_frames: int, frame_rate: float | None = None
) -> str:
    """Key of an encoded image or clip; `media` is the hash of the file's content, `frame_rate` that of a clip."""
    size = [height, width, num_frames]
    return entry_key(encoder=encoder, media=media, size=size, frame_rate=frame_rate, decode=DECODE_VERSION)


def tensor_bytes(tensor: Tensor) -> TensorBytes:
    """A tensor's bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return TensorBytes(_DTYPES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def bytes_tensor(stored: TensorBytes) -> Tensor:
    """The inverse of `tensor_bytes`."""
    flat = torch.frombuffer(bytearray(stored.data), dtype=_TORCH_DTYPES[stored.dtype])
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
        self.residency.begin()
        with fastest_attention():
            conditions = self.family.encode_text(prompts)
        singles = split_conditions(conditions, num_samples=len(prompts))
        return [{name: tensor_bytes(tensor[0]) for name, tensor in single.items()} for single in singles]

    @torch.no_grad()
    def encode_images(self, pixels: np.ndarray) -> list[Entry]:
        """An entry a sample: `latents` [c, (f,) h, w] of uint8 [b, f, h, w, 3]. A batch too large for the device is halved."""
        self.residency.begin()
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
