"""How the tools call the layers of FLUX.2's transformer.

DiffSynth-Studio's names are diffusers'. The first release, by which ComfyUI and kohya's tools go, keeps q, k, v of the double
blocks as one matrix, and the final modulation as (shift, scale), which diffusers has as (scale, shift).
"""

from __future__ import annotations

from diffsynth_ray.models.layer_names import LayerNames, NameTable

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}.attn"
_EMBEDDERS = {"time": "timestep_embedder", "guidance": "guidance_embedder"}
_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")

ORIGINAL = NameTable(
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        **{f"{name}_in.in_layer": f"time_guidance_embed.{inner}.linear_1" for name, inner in _EMBEDDERS.items()},
        **{f"{name}_in.out_layer": f"time_guidance_embed.{inner}.linear_2" for name, inner in _EMBEDDERS.items()},
        **{f"{name}.lin": f"{name}.linear" for name in _MODULATIONS},
        "double_blocks.{}.img_attn.qkv": tuple(f"{_DOUBLE}.attn.to_{name}" for name in "qkv"),
        "double_blocks.{}.txt_attn.qkv": tuple(f"{_DOUBLE}.attn.add_{name}_proj" for name in "qkv"),
        "double_blocks.{}.img_attn.norm.query_norm.scale": f"{_DOUBLE}.attn.norm_q.weight",
        "double_blocks.{}.img_attn.norm.key_norm.scale": f"{_DOUBLE}.attn.norm_k.weight",
        "double_blocks.{}.txt_attn.norm.query_norm.scale": f"{_DOUBLE}.attn.norm_added_q.weight",
        "double_blocks.{}.txt_attn.norm.key_norm.scale": f"{_DOUBLE}.attn.norm_added_k.weight",
        "double_blocks.{}.img_attn.proj": f"{_DOUBLE}.attn.to_out.0",
        "double_blocks.{}.txt_attn.proj": f"{_DOUBLE}.attn.to_add_out",
        "double_blocks.{}.img_mlp.0": f"{_DOUBLE}.ff.linear_in",
        "double_blocks.{}.img_mlp.2": f"{_DOUBLE}.ff.linear_out",
        "double_blocks.{}.txt_mlp.0": f"{_DOUBLE}.ff_context.linear_in",
        "double_blocks.{}.txt_mlp.2": f"{_DOUBLE}.ff_context.linear_out",
        "single_blocks.{}.linear1": f"{_SINGLE}.to_qkv_mlp_proj",
        "single_blocks.{}.linear2": f"{_SINGLE}.to_out",
        "single_blocks.{}.norm.query_norm.scale": f"{_SINGLE}.norm_q.weight",
        "single_blocks.{}.norm.key_norm.scale": f"{_SINGLE}.norm_k.weight",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    swapped=("final_layer.adaLN_modulation.1",),
)

NAMES: dict[str, LayerNames] = {"dit": LayerNames(original=ORIGINAL)}
