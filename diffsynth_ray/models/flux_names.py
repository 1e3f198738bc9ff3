"""How the tools call the layers of FLUX.1's transformer.

The first release and DiffSynth-Studio keep q, k, v (and, in the single blocks, the MLP's first layer) as one matrix, and
the final modulation as (shift, scale), which diffusers has as (scale, shift).
"""

from __future__ import annotations

from diffsynth_ray.models import image_vae
from diffsynth_ray.models.layer_names import LayerNames, NameTable

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_IMAGE_QKV = tuple(f"{_DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
_TEXT_QKV = tuple(f"{_DOUBLE}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))
_QKV_MLP = (*(f"{_SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v")), f"{_SINGLE}.proj_mlp")
_QKV_MLP_SHARES = (1, 1, 1, 4)
_EMBEDDERS = {"time": "timestep_embedder", "guidance": "guidance_embedder"}

ORIGINAL = NameTable(
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        **{f"{name}_in.in_layer": f"time_text_embed.{inner}.linear_1" for name, inner in _EMBEDDERS.items()},
        **{f"{name}_in.out_layer": f"time_text_embed.{inner}.linear_2" for name, inner in _EMBEDDERS.items()},
        "double_blocks.{}.img_mod.lin": f"{_DOUBLE}.norm1.linear",
        "double_blocks.{}.txt_mod.lin": f"{_DOUBLE}.norm1_context.linear",
        "double_blocks.{}.img_attn.qkv": _IMAGE_QKV,
        "double_blocks.{}.txt_attn.qkv": _TEXT_QKV,
        "double_blocks.{}.img_attn.norm.query_norm.scale": f"{_DOUBLE}.attn.norm_q.weight",
        "double_blocks.{}.img_attn.norm.key_norm.scale": f"{_DOUBLE}.attn.norm_k.weight",
        "double_blocks.{}.txt_attn.norm.query_norm.scale": f"{_DOUBLE}.attn.norm_added_q.weight",
        "double_blocks.{}.txt_attn.norm.key_norm.scale": f"{_DOUBLE}.attn.norm_added_k.weight",
        "double_blocks.{}.img_attn.proj": f"{_DOUBLE}.attn.to_out.0",
        "double_blocks.{}.txt_attn.proj": f"{_DOUBLE}.attn.to_add_out",
        "double_blocks.{}.img_mlp.0": f"{_DOUBLE}.ff.net.0.proj",
        "double_blocks.{}.img_mlp.2": f"{_DOUBLE}.ff.net.2",
        "double_blocks.{}.txt_mlp.0": f"{_DOUBLE}.ff_context.net.0.proj",
        "double_blocks.{}.txt_mlp.2": f"{_DOUBLE}.ff_context.net.2",
        "single_blocks.{}.modulation.lin": f"{_SINGLE}.norm.linear",
        "single_blocks.{}.linear1": _QKV_MLP,
        "single_blocks.{}.linear2": f"{_SINGLE}.proj_out",
        "single_blocks.{}.norm.query_norm.scale": f"{_SINGLE}.attn.norm_q.weight",
        "single_blocks.{}.norm.key_norm.scale": f"{_SINGLE}.attn.norm_k.weight",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    shares={"single_blocks.{}.linear1": _QKV_MLP_SHARES},
    swapped=("final_layer.adaLN_modulation.1",),
)

DIFFSYNTH = NameTable(
    {
        "pooled_text_embedder.0": "time_text_embed.text_embedder.linear_1",
        "pooled_text_embedder.2": "time_text_embed.text_embedder.linear_2",
        **{f"{name}_embedder.timestep_embedder.0": f"time_text_embed.{inner}.linear_1" for name, inner in _EMBEDDERS.items()},
        **{f"{name}_embedder.timestep_embedder.2": f"time_text_embed.{inner}.linear_2" for name, inner in _EMBEDDERS.items()},
        "blocks.{}.norm1_a.linear": f"{_DOUBLE}.norm1.linear",
        "blocks.{}.norm1_b.linear": f"{_DOUBLE}.norm1_context.linear",
        "blocks.{}.attn.a_to_qkv": _IMAGE_QKV,
        "blocks.{}.attn.b_to_qkv": _TEXT_QKV,
        "blocks.{}.attn.norm_q_a": f"{_DOUBLE}.attn.norm_q",
        "blocks.{}.attn.norm_k_a": f"{_DOUBLE}.attn.norm_k",
        "blocks.{}.attn.norm_q_b": f"{_DOUBLE}.attn.norm_added_q",
        "blocks.{}.attn.norm_k_b": f"{_DOUBLE}.attn.norm_added_k",
        "blocks.{}.attn.a_to_out": f"{_DOUBLE}.attn.to_out.0",
        "blocks.{}.attn.b_to_out": f"{_DOUBLE}.attn.to_add_out",
        "blocks.{}.ff_a.0": f"{_DOUBLE}.ff.net.0.proj",
        "blocks.{}.ff_a.2": f"{_DOUBLE}.ff.net.2",
        "blocks.{}.ff_b.0": f"{_DOUBLE}.ff_context.net.0.proj",
        "blocks.{}.ff_b.2": f"{_DOUBLE}.ff_context.net.2",
        "single_blocks.{}.norm.linear": f"{_SINGLE}.norm.linear",
        "single_blocks.{}.to_qkv_mlp": _QKV_MLP,
        "single_blocks.{}.proj_out": f"{_SINGLE}.proj_out",
        "single_blocks.{}.norm_q_a": f"{_SINGLE}.attn.norm_q",
        "single_blocks.{}.norm_k_a": f"{_SINGLE}.attn.norm_k",
        "final_proj_out": "proj_out",
        "final_norm_out.linear": "norm_out.linear",
    },
    shares={"single_blocks.{}.to_qkv_mlp": _QKV_MLP_SHARES},
    swapped=("final_norm_out.linear",),
)

NAMES: dict[str, LayerNames] = {"dit": LayerNames(DIFFSYNTH, ORIGINAL), "vae": image_vae.NAMES}
