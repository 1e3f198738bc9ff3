"""Mistral Small 3 as FLUX.2-dev's text encoder: the language half of Mistral3, without its eyes and its language head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffsynth_ray.models.library_family import Shapes, count_blocks

MODEL_TYPES = ("mistral3", "mistral")
"""`model_type` of the released configuration, whose `text_config` counts, and of that alone."""
_PREFIXES = ("language_model.model.", "model.language_model.")
"""Of the released files, and of transformers' class, by which DiffSynth-Studio exports."""
_UNUSED = ("vision_tower.", "multi_modal_projector.", "lm_head.", "language_model.lm_head.")


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration from the shapes under the names in memory."""
    vocab_size, hidden = shapes["embed_tokens.weight"]
    rows, key_rows = (shapes[f"layers.0.self_attn.{name}_proj.weight"][0] for name in "qk")
    # Mistral's heads are 128 wide; those of the tiny size 32.
    head_dim = 128 if rows % 128 == 0 and key_rows % 128 == 0 else 32
    return {
        "model_type": "mistral",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": shapes["layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": count_blocks(shapes, "layers."),
        "num_attention_heads": rows // head_dim,
        "num_key_value_heads": key_rows // head_dim,
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000000.0},
        "sliding_window": None,
    }


def build(config: Mapping[str, Any]) -> nn.Module:
    """The module; call it under `meta_parameters`."""
    from transformers import MistralConfig, MistralModel

    return MistralModel(MistralConfig(**config.get("text_config", config)))


def memory_key(key: str) -> str | None:
    """Key in a file -> name in memory; None for what is not loaded."""
    if key.removeprefix("model.").startswith(_UNUSED):
        return None
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
    return key.removeprefix(prefix)


def checkpoint_key(name: str) -> str:
    """Name in memory -> the key that DiffSynth-Studio exports it under."""
    return f"model.language_model.{name}"
