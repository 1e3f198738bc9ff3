"""T5 and umt5 as text encoders: transformers' encoder half with gated GELU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffsynth_ray.models.library_family import TINY_DIR, Shapes, count_blocks

EMBEDDING, SECOND_NAME = "encoder.embed_tokens.weight", "shared.weight"
"""The token embeddings have two names in transformers; files may have either."""

TINY_TOKENIZER = TINY_DIR / "t5" / "tokenizer"
TINY: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
}


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration from the shapes under the names in memory."""
    vocab_size, d_model = shapes[EMBEDDING]
    buckets, num_heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // num_heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count_blocks(shapes, "encoder.block."),
        "num_heads": num_heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


class _GatedUnit(nn.Module):
    """wo(act(wi_0 x) * wi_1 x) in the number format of x. transformers' own casts to that of wo's weight, which may be FP8."""

    def __init__(self, unit: Any) -> None:
        super().__init__()
        self.wi_0, self.wi_1, self.wo, self.act = unit.wi_0, unit.wi_1, unit.wo, unit.act

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model]."""
        gated: Tensor = self.wo(self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states))
        return gated


def adapted(encoder: Any) -> nn.Module:
    """The encoder with its token embeddings under the name that the forward pass uses, once, and without casts to a weight's
    number format."""
    encoder.shared = nn.Identity()
    for block in encoder.encoder.block:
        block.layer[-1].DenseReluDense = _GatedUnit(block.layer[-1].DenseReluDense)
    module: nn.Module = encoder
    return module


def load_tokenizer(path: Path) -> Any:
    """The tokenizer exactly as its tokenizer.json says, whatever class a configuration names."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
