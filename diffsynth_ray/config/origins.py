"""`[model] id_with_origin_paths`: files of a model hub as "owner/name:pattern", and where they are kept on disk.

The layout is DiffSynth-Studio's, `{base_path}/{owner}/{name}/{path in the repository}`, so that what it has downloaded is
found. Standard library only: resolving and planning need it.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffsynth_ray.errors import ModelError

if TYPE_CHECKING:
    from diffsynth_ray.config.schema import ModelSection

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TOKENIZER_KEYS = ("tokenizer_path", "tokenizer_1_path", "tokenizer_2_path", "processor_path")
"""Keys of [model] with a folder on disk or of a hub."""
_EXAMPLE = 'as in "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"'

CONVERTED_REPO = "DiffSynth-Studio/Wan-Series-Converted-Safetensors"
_CONVERTED = (
    "models_t5_umt5-xxl-enc-bf16.pth",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "Wan2.1_VAE.pth",
    "Wan2.2_VAE.pth",
)


@dataclass(frozen=True)
class Origin:
    """Files of one repository of a hub."""

    repo: str
    """owner/name."""
    pattern: str
    """Path in the repository: `*`, `?` and `[...]` match within a folder, an ending `/` is everything below it, "" is all."""

    def __str__(self) -> str:
        return f"{self.repo}:{self.pattern}"

    def matches(self, path: str) -> bool:
        """Whether the pattern takes a file of the repository."""
        wanted, given = self.pattern.split("/"), path.split("/")
        if wanted[-1] == "":
            wanted.pop()
            if len(given) <= len(wanted):
                return False
        elif len(given) != len(wanted):
            return False
        return all(fnmatch.fnmatchcase(part, glob) for part, glob in zip(given, wanted, strict=False))

    def alternatives(self) -> tuple[Origin, ...]:
        """Where the files may come from, best first: Wan's .pth files exist as safetensors in a repository of their own."""
        name = self.pattern.rpartition("/")[2]
        if name not in _CONVERTED:
            return (self,)
        return (Origin(CONVERTED_REPO, f"{name.removesuffix('.pth')}.safetensors"), self)


def tokenizer_ids(model: ModelSection) -> dict[str, str]:
    """Tokenizers and processors that are given as folders of a hub, "owner/name:folder/", by key of [model]."""
    given = {key: getattr(model, key) for key in TOKENIZER_KEYS}
    return {key: text for key, text in given.items() if text is not None and _REPO.fullmatch(text.rpartition(":")[0])}


def local_tokenizer(model: ModelSection) -> str | None:
    """`tokenizer_path` where it is a folder on disk."""
    return None if "tokenizer_path" in tokenizer_ids(model) else model.tokenizer_path


def parse_folder(text: str) -> Origin:
    """ "owner/name:folder/", with or without the last slash, as all that is below it. Raises ModelError like `parse_origin`."""
    origin = parse_origin(text)
    return Origin(origin.repo, origin.pattern if origin.pattern == "" else origin.pattern.rstrip("/") + "/")


def parse_origin(text: str) -> Origin:
    """ "owner/name:pattern", split at the last colon. Raises ModelError that says what is wrong with it."""
    repo, colon, pattern = text.rpartition(":")
    if not colon:
        raise ModelError(f"got {text!r}; expected a repository, a colon and a pattern, {_EXAMPLE}")
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise ModelError(f"got {text!r}; {repo!r} is no repository (owner/name), {_EXAMPLE}")
    pattern = pattern.removeprefix("./")
    if pattern.startswith("/") or ".." in pattern.split("/") or "\\" in pattern:
        raise ModelError(f"got {text!r}; {pattern!r} must be a path inside the repository, {_EXAMPLE}")
    return Origin(repo, pattern)
