"""What a weight file holds, told from the names and shapes of its tensors. Without torch: `plan` reads headers too.

A family keeps its layouts here, where they can be read without importing it, or (families of other packages) in its class
alone; then only the cluster can tell.
"""

from __future__ import annotations

import difflib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from diffsynth_ray.errors import ModelError

Shapes = dict[str, tuple[int, ...]]
"""Key -> shape."""

_MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit


@dataclass(frozen=True)
class KeyLayout:
    """How a component's weight files are told from others."""

    prefixes: tuple[str, ...]
    """Every key of every shard begins with one of these."""
    markers: tuple[tuple[str, ...], ...]
    """Alternatives: the component is recognised when all keys of one of them are there."""
    shapes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    """Shapes that these tensors must have where they are there; None = any size."""
    has_module_names: bool = False
    """The files' keys end as the module names do that LoRA targets speak of."""
    lies_in: str | None = None
    """The component whose files hold this one too; see `parts_of`."""


Layouts = Mapping[str, Mapping[str, KeyLayout]]
"""Family -> component -> layout."""

_QWEN3 = KeyLayout(
    prefixes=("model.", "lm_head."),
    markers=(("model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight"),),
)
"""The text encoder of Z-Image and FLUX.2 klein."""
_IMAGE_VAE = KeyLayout(
    prefixes=("encoder.", "decoder."),
    markers=(
        ("encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight", "encoder.mid.attn_1.q.weight"),
        (
            "encoder.down_blocks.0.resnets.0.conv1.weight",
            "decoder.up_blocks.0.resnets.0.conv1.weight",
            "encoder.mid_block.attentions.0.to_q.weight",
        ),
    ),
    shapes={"decoder.conv_in.weight": (None, 16, None, None)},
)
"""AutoencoderKL, of FLUX.1 and Z-Image alike, in either layout."""
_VACE = (
    *("vace_blocks.", "vace_patch_embedding."),
    *("model.diffusion_model.vace_blocks.", "model.diffusion_model.vace_patch_embedding."),
)
"""Prefixes of what VACE's files have beside a DiT."""

KEY_LAYOUTS: dict[str, dict[str, KeyLayout]] = {
    "qwen_image": {
        "dit": KeyLayout(
            prefixes=(
                *("transformer_blocks.", "time_text_embed.", "img_in.", "txt_in.", "txt_norm."),
                *("norm_out.", "proj_out."),
            ),
            markers=(("img_in.weight", "txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"),),
            shapes={"img_in.weight": (None, 64)},
            has_module_names=True,
        ),
        "text_encoder": KeyLayout(
            prefixes=("model.", "visual.", "lm_head."),
            markers=(
                ("model.layers.0.self_attn.q_proj.bias", "visual.patch_embed.proj.weight"),
                ("model.language_model.layers.0.self_attn.q_proj.bias", "model.visual.patch_embed.proj.weight"),
            ),
            has_module_names=True,
        ),
        "vae": KeyLayout(
            prefixes=("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
            markers=(("encoder.mid_block.attentions.0.to_qkv.weight", "quant_conv.weight", "encoder.norm_out.gamma"),),
            shapes={"encoder.conv_in.weight": (None, None, None, None, None)},
            has_module_names=True,
        ),
    },
    "wan": {
        "dit": KeyLayout(
            prefixes=(
                *("blocks.", "patch_embedding.", "text_embedding.", "time_embedding.", "time_projection.", "head."),
                *("img_emb.", "condition_embedder.", "proj_out.", "scale_shift_table", "model.diffusion_model."),
                *_VACE,
            ),
            markers=(
                ("blocks.0.self_attn.q.weight", "blocks.0.cross_attn.q.weight", "head.modulation"),
                ("blocks.0.attn1.to_q.weight", "blocks.0.attn2.to_q.weight", "condition_embedder.time_proj.weight"),
                ("model.diffusion_model.blocks.0.self_attn.q.weight", "model.diffusion_model.head.modulation"),
            ),
        ),
        "vace": KeyLayout(prefixes=_VACE, markers=(("vace_patch_embedding.weight",),), lies_in="dit"),
        "text_encoder": KeyLayout(
            prefixes=("token_embedding.", "blocks.", "norm.", "shared.", "encoder."),
            markers=(
                ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"),
                # Of T5's kin only umt5 has position biases in every block.
                ("shared.weight", "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
            ),
        ),
        "vae": KeyLayout(
            prefixes=("encoder.", "decoder.", "conv1.", "conv2.", "quant_conv.", "post_quant_conv.", "model."),
            markers=(
                ("encoder.middle.1.to_qkv.weight", "conv2.weight", "encoder.head.0.gamma"),
                ("model.encoder.middle.1.to_qkv.weight", "model.conv2.weight"),
                ("encoder.mid_block.attentions.0.to_qkv.weight", "quant_conv.weight", "encoder.norm_out.gamma"),
            ),
        ),
        "image_encoder": KeyLayout(
            prefixes=(
                *("visual.", "textual.", "log_scale", "vision_model."),
                *("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm."),
            ),
            markers=(
                ("visual.cls_embedding", "visual.transformer.0.attn.to_qkv.weight"),
                ("vision_model.embeddings.class_embedding", "vision_model.encoder.layers.0.self_attn.q_proj.weight"),
                ("embeddings.class_embedding", "encoder.layers.0.self_attn.q_proj.weight", "pre_layrnorm.weight"),
            ),
        ),
    },
    "flux": {
        "dit": KeyLayout(
            prefixes=(
                *("double_blocks.", "single_blocks.", "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in."),
                *("final_layer.", "transformer_blocks.", "single_transformer_blocks.", "time_text_embed.", "x_embedder."),
                *("context_embedder.", "norm_out.", "proj_out.", "model.diffusion_model."),
            ),
            markers=(
                # vector_in, because FLUX.2 has the other names too.
                ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "vector_in.in_layer.weight"),
                ("transformer_blocks.0.norm1_context.linear.weight", "single_transformer_blocks.0.proj_mlp.weight"),
                (
                    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
                    "model.diffusion_model.vector_in.in_layer.weight",
                ),
            ),
        ),
        "text_encoder_1": KeyLayout(
            prefixes=("text_model.", "embeddings.", "encoder.", "final_layer_norm."),
            markers=(
                ("text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.self_attn.q_proj.weight"),
                ("embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),
            ),
        ),
        "text_encoder_2": KeyLayout(
            prefixes=("shared.", "encoder."),
            markers=(
                (
                    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
                    "encoder.final_layer_norm.weight",
                ),
            ),
        ),
        "vae": _IMAGE_VAE,
    },
    "z_image": {
        "dit": KeyLayout(
            prefixes=(
                *("layers.", "noise_refiner.", "context_refiner.", "all_x_embedder.", "all_final_layer.", "t_embedder."),
                *("cap_embedder.", "x_pad_token", "cap_pad_token", "siglip_"),
            ),
            markers=(("cap_embedder.1.weight", "context_refiner.0.attention.to_q.weight", "layers.0.attention.to_q.weight"),),
        ),
        "text_encoder": _QWEN3,
        "vae": _IMAGE_VAE,
    },
    "flux2": {
        "dit": KeyLayout(
            prefixes=(
                *("double_blocks.", "single_blocks.", "img_in.", "txt_in.", "time_in.", "guidance_in.", "final_layer."),
                *("transformer_blocks.", "single_transformer_blocks.", "time_guidance_embed.", "x_embedder."),
                *("context_embedder.", "double_stream_modulation_", "single_stream_modulation.", "norm_out.", "proj_out."),
                "model.diffusion_model.",
            ),
            markers=(
                ("double_blocks.0.img_attn.qkv.weight", "single_stream_modulation.lin.weight"),
                ("single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight", "single_stream_modulation.linear.weight"),
                ("model.diffusion_model.single_stream_modulation.lin.weight",),
            ),
        ),
        "text_encoder": KeyLayout(
            prefixes=(*_QWEN3.prefixes, "language_model.", "vision_tower.", "multi_modal_projector."),
            markers=(
                *_QWEN3.markers,
                ("language_model.model.layers.0.self_attn.q_proj.weight", "multi_modal_projector.linear_1.weight"),
                # As DiffSynth-Studio exports it; the other encoder that has such names has biases there.
                ("model.language_model.layers.0.self_attn.q_proj.weight", "model.multi_modal_projector.linear_1.weight"),
            ),
        ),
        "vae": KeyLayout(
            prefixes=("encoder.", "decoder.", "bn.", "quant_conv.", "post_quant_conv."),
            markers=(("bn.running_mean", "encoder.mid_block.attentions.0.to_q.weight", "decoder.conv_in.weight"),),
        ),
    },
}
"""Of the families in this package."""

DEFAULT_TOKENIZERS: dict[str, dict[str, str]] = {
    "qwen_image": {"tokenizer_path": "Qwen/Qwen-Image:tokenizer/"},
    "wan": {"tokenizer_path": "Wan-AI/Wan2.1-T2V-1.3B:google/umt5-xxl/"},
    "flux": {
        "tokenizer_1_path": "black-forest-labs/FLUX.1-dev:tokenizer/",
        "tokenizer_2_path": "black-forest-labs/FLUX.1-dev:tokenizer_2/",
    },
    "z_image": {"tokenizer_path": "Tongyi-MAI/Z-Image-Turbo:tokenizer/"},
    "flux2": {"tokenizer_path": "black-forest-labs/FLUX.2-dev:tokenizer/"},
}
"""Family -> key of [model] -> origin; the families' `default_tokenizers`."""

TRAINED_TINY = "trained_vae"
"""Option of families that have `tiny_weights`: take them instead of random ones."""

EXTRA_INPUTS: dict[str, tuple[str, ...]] = {
    "qwen_image": ("edit_image",),
    "wan": ("input_image", "end_image", "vace_video", "vace_video_mask", "vace_reference_image"),
    "flux": ("kontext_images",),
    "z_image": (),
    "flux2": ("edit_image",),
}
"""Family -> what [model] extra_inputs may name; the families' `extra_inputs`."""

EDIT_PROMPTS = ("auto", "numbered")
"""See `qwen_image_edit.PROMPT_STYLES`."""

OPTIONS: dict[str, dict[str, type | tuple[str, ...]]] = {
    "qwen_image": {"zero_cond_t": bool, "edit_prompt": EDIT_PROMPTS, TRAINED_TINY: bool},
    "wan": {},
    "flux": {"embedded_guidance": float},
    "z_image": {},
    "flux2": {"embedded_guidance": float},
}
"""Family -> keys of [model] options, the families' `option_names` -> what they may be: of a type, or one of several texts."""


@dataclass(frozen=True)
class FamilyCalls:
    """How a family calls its components and what sizes it takes, as far as a plan refuses by it; see `ModelFamily`."""

    predict_components: tuple[str, ...] = ("dit",)
    image_components: tuple[str, ...] = ("vae",)
    size_multiple: int = 16
    clip_step: int | None = None


CALLS: dict[str, FamilyCalls] = {
    "qwen_image": FamilyCalls(),
    "wan": FamilyCalls(predict_components=("dit", "vace"), clip_step=4),
    "flux": FamilyCalls(),
    "z_image": FamilyCalls(),
    "flux2": FamilyCalls(),
}
"""By family; the class attributes of the same names."""


def family_entry_points() -> dict[str, EntryPoint]:
    """Families of other packages: name -> the class, under `[project.entry-points."diffsynth_ray.families"]`."""
    return {point.name: point for point in entry_points(group="diffsynth_ray.families")}


_OTHERS: dict[str, tuple[str, ...]] = {
    "a Stable Diffusion checkpoint": ("model.diffusion_model.input_blocks.0.0.weight",),
    "the VAE of FLUX.2's first release, of which diffusers' layout is read (vae/diffusion_pytorch_model.safetensors)": (
        *("bn.running_mean", "encoder.down.0.block.0.conv1.weight"),
    ),
    "a Stable Diffusion UNet": ("down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight"),
}
"""What else people have, by keys that tell it: said by name where no family takes the file."""


def read_header(path: Path) -> Shapes:
    """Key -> shape of a safetensors file, in the order of the file. Raises ModelError where it is not a whole one."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a complete safetensors file ({error}); truncated download?") from error
    if size != 8 + length + end:
        raise ModelError(
            f"{path}: not a complete safetensors file ({size} bytes, its header says {8 + length + end}); truncated download?"
        )
    return shapes


def join_shards(shards: Iterable[tuple[Path, Shapes]], layouts: Layouts) -> Shapes:
    """Key -> shape over all shards of one component. Shards that do not belong together are a ModelError."""
    shapes: Shapes = {}
    origin: dict[str, Path] = {}
    candidates: set[tuple[str, str]] | None = None
    first = Path()
    for path, own in shards:
        overlap = own.keys() & shapes.keys()
        if overlap:
            key = min(overlap)
            raise ModelError(
                f"{origin[key]} and {path} both hold {key!r} ({len(overlap)} keys in common): "
                "they are not shards of one component; list them as separate entries or remove one"
            )
        mine = shard_candidates(own, layouts)
        if candidates is None:
            first, candidates = path, mine
        elif mine and candidates and not candidates & mine:
            raise ModelError(
                f"{first} is part of {_describe(candidates)}, {path} of {_describe(mine)}: "
                "they are not shards of one component; list them as separate entries"
            )
        else:
            candidates = candidates & mine or candidates
        shapes.update(own)
        origin.update(dict.fromkeys(own, path))
    return shapes


def _describe(candidates: set[tuple[str, str]]) -> str:
    return " or ".join(f"{family} {component}" for family, component in sorted(candidates))


def shard_candidates(keys: Iterable[str], layouts: Layouts) -> set[tuple[str, str]]:
    """The (family, component) pairs that a shard with these keys may be a part of."""
    keys = list(keys)
    return {
        (family, component)
        for family, components in layouts.items()
        for component, layout in components.items()
        if keys and all(key.startswith(layout.prefixes) for key in keys)
    }


def detect_component(shapes: Mapping[str, tuple[int, ...]], layouts: Layouts, *, family: str | None = None) -> tuple[str, str]:
    """(family, component) of all shards of one component.

    `family` is what the job says, None = any. Raises ModelError that names what the weights are instead.
    """
    matches = _matches(shapes, layouts)
    fitting = [match for match in matches if family in (None, match[0])]
    for match in fitting:
        if not _wrong_shapes(shapes, layouts[match[0]][match[1]]):
            return match
    if fitting:
        name, component = fitting[0]
        wrong = "; ".join(_wrong_shapes(shapes, layouts[name][component]))
        raise ModelError(f"these weights have the key names of {name}'s {component}, but not its shapes: {wrong}")
    if matches:
        name, component = matches[0]
        raise ModelError(
            f"this is a {component} of family {name}, the job says {family}; set model.family = {name!r} or give "
            f"{family}'s own files"
        )
    says = f", the job says {family}" if family else f"; families here: {', '.join(sorted(layouts))}"
    if what := _name_of_other(shapes):
        raise ModelError(f"this is {what}{says}")
    # An incomplete set of shards may lack the markers; the prefixes still say what it is, and the missing keys are
    # reported when it is loaded.
    candidates = shard_candidates(shapes, layouts)
    mine = {match for match in candidates if family in (None, match[0])}
    if len(mine) == 1:
        return mine.pop()
    if candidates:
        cure = f"{says}; is a shard missing?" if family else "; set model.family"
        raise ModelError(f"this looks like a part of {_describe(mine or candidates)}{cure}")
    raise ModelError(
        f"these weights belong to no component known here (families: {family or ', '.join(sorted(layouts))}); "
        f"{len(shapes)} keys, first: {', '.join(sorted(shapes)[:5]) or 'none'}"
    )


def parts_of(shapes: Mapping[str, tuple[int, ...]], components: Mapping[str, KeyLayout], component: str) -> dict[str, Shapes]:
    """What files recognised as `component`'s hold: it, and the components that lie in its files, each with its keys."""
    rest = dict(shapes)
    parts: dict[str, Shapes] = {component: rest}
    for name, layout in components.items():
        own = {key: shape for key, shape in shapes.items() if layout.lies_in == component and key.startswith(layout.prefixes)}
        if own:
            parts[name] = own
            for key in own:
                del rest[key]
    return parts


def common_family(entries: Sequence[Mapping[str, tuple[int, ...]]], layouts: Layouts) -> str | None:
    """The one family that all entries of a job fit into, each with all its shards; None where none or several do.

    One entry alone may fit several: Qwen-Image's VAE has the key names of Wan's.
    """
    fitting = [
        {name for name, component in _matches(shapes, layouts) if not _wrong_shapes(shapes, layouts[name][component])}
        for shapes in entries
    ]
    common = set.intersection(*fitting) if fitting else set()
    return common.pop() if len(common) == 1 else None


def _matches(shapes: Iterable[str], layouts: Layouts) -> list[tuple[str, str]]:
    keys = set(shapes)
    return [
        (family, component)
        for family, components in layouts.items()
        for component, layout in components.items()
        if any(keys.issuperset(marker) for marker in layout.markers)
    ]


def _wrong_shapes(shapes: Mapping[str, tuple[int, ...]], layout: KeyLayout) -> list[str]:
    wrong = []
    for key, expected in layout.shapes.items():
        got = shapes.get(key)
        if got is None:
            continue
        if len(got) != len(expected) or any(want not in (None, size) for want, size in zip(expected, got, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            wrong.append(f"{key} is {list(got)}, not [{wanted}]")
    return wrong


def _name_of_other(keys: Iterable[str]) -> str | None:
    keys = set(keys)
    if any(".lora_A." in key or ".lora_down." in key for key in keys):
        return "a LoRA (give it as lora.checkpoint, and the model's own files here)"
    return next((what for what, marker in _OTHERS.items() if keys.issuperset(marker)), None)


def unmatched_targets(shapes: Mapping[str, tuple[int, ...]], targets: Sequence[str]) -> dict[str, list[str]]:
    """LoRA target -> names like it, for each target that no matrix of the files can be meant by."""
    modules = [key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2]
    endings = {".".join(name.split(".")[start:]) for name in modules for start in range(name.count(".") + 1)}
    return {target: difflib.get_close_matches(target, endings, n=3, cutoff=0.7) for target in targets if target not in endings}
