"""Qwen3 as a text encoder (Z-Image, FLUX.2 klein): its hidden states only, the language head is not loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffsynth_ray.models.library_family import TINY_DIR, Shapes, count_blocks, missing_tokenizer

TINY_TOKENIZER = TINY_DIR / "qwen_image" / "tokenizer"
USER_TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""The chat template for one message, with thinking left on."""
NO_THOUGHTS = "<think>\n\n</think>\n\n"
"""What the chat template begins the answer with where thinking is off."""
_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}


def tiny_config(num_hidden_layers: int) -> dict[str, Any]:
    """A configuration of width 64."""
    return {
        "vocab_size": 576,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rope_parameters": _ROPE,
    }


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration from the shapes under the names in memory."""
    vocab_size, hidden = shapes["embed_tokens.weight"]
    head_dim = shapes["layers.0.self_attn.q_norm.weight"][0]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": shapes["layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": count_blocks(shapes, "layers."),
        "num_attention_heads": shapes["layers.0.self_attn.q_proj.weight"][0] // head_dim,
        "num_key_value_heads": shapes["layers.0.self_attn.k_proj.weight"][0] // head_dim,
        "head_dim": head_dim,
        "max_position_embeddings": 40960,
        "rope_parameters": _ROPE,
    }


def build(config: Mapping[str, Any]) -> nn.Module:
    """The module; call it under `meta_parameters`."""
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**config))


def memory_key(key: str) -> str | None:
    """Key in a file -> name in memory."""
    return None if key.startswith("lm_head.") else key.removeprefix("model.")


def checkpoint_key(name: str) -> str:
    """Name in memory -> key in a file."""
    return f"model.{name}"


def load_tokenizer(family: str, key: str, path: Path | None) -> Any:
    """Qwen's tokenizer."""
    if path is None or not (path / "tokenizer_config.json").is_file():
        raise missing_tokenizer(family, key, path, "tokenizer_config.json, vocab.json and merges.txt")
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(str(path), local_files_only=True)
