"""How Wan's first release calls what diffusers and transformers have, by component."""

from __future__ import annotations

from collections.abc import Iterator

from diffsynth_ray.models.layer_names import LayerNames, NameTable

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}

_BLOCK = {
    **{f"self_attn.{name}": f"attn1.{inner}" for name, inner in _ATTENTION.items()},
    **{f"cross_attn.{name}": f"attn2.{inner}" for name, inner in _ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}

DIT = NameTable(
    {
        "patch_embedding": "patch_embedding",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        **{f"blocks.{{}}.{name}": f"blocks.{{}}.{inner}" for name, inner in _BLOCK.items()},
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
    }
)

VACE = NameTable(
    {
        f"vace_blocks.{{}}.{name}": f"vace_blocks.{{}}.{inner}"
        for name, inner in {**_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"}.items()
    }
)

_UMT5_BLOCK = "encoder.block.{}.layer"
TEXT_ENCODER = NameTable(
    {
        "token_embedding": "encoder.embed_tokens",
        "blocks.{}.norm1": f"{_UMT5_BLOCK}.0.layer_norm",
        **{f"blocks.{{}}.attn.{name}": f"{_UMT5_BLOCK}.0.SelfAttention.{name}" for name in "qkvo"},
        "blocks.{}.pos_embedding.embedding": f"{_UMT5_BLOCK}.0.SelfAttention.relative_attention_bias",
        "blocks.{}.norm2": f"{_UMT5_BLOCK}.1.layer_norm",
        "blocks.{}.ffn.gate.0": f"{_UMT5_BLOCK}.1.DenseReluDense.wi_0",
        "blocks.{}.ffn.fc1": f"{_UMT5_BLOCK}.1.DenseReluDense.wi_1",
        "blocks.{}.ffn.fc2": f"{_UMT5_BLOCK}.1.DenseReluDense.wo",
        "norm": "encoder.final_layer_norm",
    }
)

IMAGE_ENCODER = NameTable(
    {
        "visual.cls_embedding": "embeddings.class_embedding",
        "visual.patch_embedding": "embeddings.patch_embedding",
        "visual.pos_embedding": "embeddings.position_embedding.weight",
        "visual.pre_norm": "pre_layrnorm",
        "visual.transformer.{}.norm1": "encoder.layers.{}.layer_norm1",
        "visual.transformer.{}.attn.to_qkv": tuple(f"encoder.layers.{{}}.self_attn.{name}_proj" for name in "qkv"),
        "visual.transformer.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
        "visual.transformer.{}.norm2": "encoder.layers.{}.layer_norm2",
        "visual.transformer.{}.mlp.0": "encoder.layers.{}.mlp.fc1",
        "visual.transformer.{}.mlp.2": "encoder.layers.{}.mlp.fc2",
        "visual.post_norm": "post_layernorm",
    }
)


def _residual(name: str, inner: str) -> dict[str, str]:
    layers = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
    return {f"{name}.{layer}": f"{inner}.{own}" for layer, own in {**layers, "shortcut": "conv_shortcut"}.items()}


def _resample(name: str, inner: str) -> dict[str, str]:
    return {f"{name}.{layer}": f"{inner}.{layer}" for layer in ("resample.1", "time_conv")}


def _around_the_blocks() -> Iterator[dict[str, str]]:
    """What both VAEs have before, after and in the middle of the blocks that change the resolution."""
    yield {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        yield {f"{side}.conv1": f"{side}.conv_in", f"{side}.head.0": f"{side}.norm_out", f"{side}.head.2": f"{side}.conv_out"}
        yield _residual(f"{side}.middle.0", f"{side}.mid_block.resnets.0")
        yield _residual(f"{side}.middle.2", f"{side}.mid_block.resnets.1")
        yield {f"{side}.middle.1.{layer}": f"{side}.mid_block.attentions.0.{layer}" for layer in ("norm", "to_qkv", "proj")}


def _blocks_21() -> Iterator[dict[str, str]]:
    """VAE of 2.1: four levels in one list, 2 residual blocks and a resampling down, 3 and one up."""
    for number in range(11):
        name, inner = f"encoder.downsamples.{number}", f"encoder.down_blocks.{number}"
        yield _residual(name, inner) | _resample(name, inner)
    for number in range(15):
        name, inner = f"decoder.upsamples.{number}", f"decoder.up_blocks.{number // 4}"
        resample = number % 4 == 3
        yield _resample(name, f"{inner}.upsamplers.0") if resample else _residual(name, f"{inner}.resnets.{number % 4}")


def _blocks_22() -> Iterator[dict[str, str]]:
    """VAE of 2.2: a list of lists, with the same blocks a level."""
    for level in range(4):
        name, inner = f"encoder.downsamples.{level}.downsamples", f"encoder.down_blocks.{level}"
        for number in range(2):
            yield _residual(f"{name}.{number}", f"{inner}.resnets.{number}")
        yield _resample(f"{name}.2", f"{inner}.downsampler")
        name, inner = f"decoder.upsamples.{level}.upsamples", f"decoder.up_blocks.{level}"
        for number in range(3):
            yield _residual(f"{name}.{number}", f"{inner}.resnets.{number}")
        yield _resample(f"{name}.3", f"{inner}.upsampler")


def _joined(*parts: Iterator[dict[str, str]]) -> dict[str, str]:
    return {name: inner for part in parts for layers in part for name, inner in layers.items()}


VAE_21 = NameTable(_joined(_around_the_blocks(), _blocks_21()))
VAE_22 = NameTable(_joined(_around_the_blocks(), _blocks_22()))

NAMES: dict[str, LayerNames] = {
    "dit": LayerNames(DIT, DIT),
    "vace": LayerNames(VACE, VACE),
    "text_encoder": LayerNames(TEXT_ENCODER, TEXT_ENCODER),
    "image_encoder": LayerNames(IMAGE_ENCODER, IMAGE_ENCODER),
    # To read, each of the two takes the names that the other does not know; to write, `Wan` picks one.
    "vae": LayerNames(VAE_21, VAE_22),
}
