"""The released files at full size, on the meta device: do the conversions expect exactly the keys and shapes that they have?

The digests are those by which DiffSynth-Studio recognises the files (its configs/model_configs.py): md5 over the sorted
names, each once with its shape and once without. They stand for the key lists of the real files.
"""

import hashlib

import pytest
import torch

from diffsynth_ray.models.family import get_family
from diffsynth_ray.models.layer_names import tensors_from_memory

UMT5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
T5 = UMT5 | {"vocab_size": 32128}
GATED = {"relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu"}
WAN_13 = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
WAN_22_VAE = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2}
CLIP = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
QWEN3 = {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "use_quant_conv": False,
    "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
KLEIN_4B = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False,
}  # fmt: skip
KLEIN_9B = {"num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False}
QWEN3_8B = QWEN3 | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
    "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "head_dim": 64, "image_size": 1540, "patch_size": 14,
}  # fmt: skip

FILES = {
    "Wan2.1-T2V-1.3B": ("wan", "dit", WAN_13, "9269f8db9040a9d860eaca435be61814"),
    "Wan2.1-T2V-14B": ("wan", "dit", {}, "aafcfd9672c3a2456dc46e1cb6e52c70"),
    "Wan2.1-I2V-14B": ("wan", "dit", IMAGE, "6bfcfb3b342cb286ce886889d519a77e"),
    "Wan2.1-FLF2V-14B": ("wan", "dit", IMAGE | {"pos_embed_seq_len": 514}, "3ef3b1f8e1dab83d5b71fd7b617f859f"),
    "Wan2.2-I2V-A14B": ("wan", "dit", {"in_channels": 36}, "5b013604280dd715f8457c6ed6d6a626"),
    "Wan2.2-TI2V-5B": (
        "wan", "dit",
        {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30},
        "1f5ab7703c6fc803fdded85ff040c316",
    ),
    "Wan2.1_VAE": ("wan", "vae", {}, "ccc42284ea13e1ad04693284c7a09be6"),
    "Wan2.2_VAE": ("wan", "vae", WAN_22_VAE | {"in_channels": 12, "out_channels": 12}, "e1de6c02cdac79f8b739f4d3698cd216"),
    "umt5-xxl": ("wan", "text_encoder", UMT5 | GATED, "9c8818c2cbea55eca56c7b447df170da"),
    "flux1-dev": ("flux", "dit", {"guidance_embeds": True}, "a29710fea6dddb0314663ee823598e50"),
    "FLUX.1 CLIP": ("flux", "text_encoder_1", CLIP, "94eefa3dac9cec93cb1ebaf1747d7b78"),
    "FLUX.1 T5": ("flux", "text_encoder_2", T5 | GATED, "22540b49eaedbc2f2784b2091a234c7c"),
    "FLUX.1 ae": ("flux", "vae", VAE, "21ea55f476dfc4fd135587abb59dfe5d"),
    "Z-Image": ("z_image", "dit", {}, "fc3a8a1247fe185ce116ccbe0e426c28"),
    "Z-Image Qwen3": (
        "z_image", "text_encoder", QWEN3 | {"num_attention_heads": 32, "num_key_value_heads": 8},
        "0f050f62a88876fea6eae0a18dac5a2e",
    ),
    "Z-Image vae": ("z_image", "vae", VAE, "1aafa3cc91716fb6b300cc1cd51b85a3"),
    "FLUX.2-dev": ("flux2", "dit", {}, "d38e1d5c5aec3b0a11e79327ac6e3b0f"),
    "FLUX.2-klein-4B": ("flux2", "dit", KLEIN_4B, "3bde7b817fec8143028b6825a63180df"),
    "FLUX.2-klein-9B": ("flux2", "dit", KLEIN_9B, "39c6fc48f07bebecedbbaa971ff466c8"),
    "FLUX.2-klein-4B Qwen3": (
        "flux2", "text_encoder", QWEN3 | {"num_attention_heads": 32, "num_key_value_heads": 8},
        "0f050f62a88876fea6eae0a18dac5a2e",
    ),
    "FLUX.2-klein-9B Qwen3": ("flux2", "text_encoder", QWEN3_8B, "9195f3ea256fcd0ae6d929c203470754"),
    "FLUX.2-dev Mistral": ("flux2", "text_encoder", MISTRAL, "28fca3d8e5bf2a2d1271748a773f6757"),
    "FLUX.2 vae": ("flux2", "vae", {}, "c54288e3ee12ca215898840682337b95"),
}  # fmt: skip


def released_keys(family, component, module):
    """Key -> shape in the released file."""
    state = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
    if (family.name, component) in (("z_image", "vae"), ("flux2", "dit"), ("flux2", "vae")):
        return {key: list(tensor.shape) for key, tensor in state.items()}  # diffusers' layout
    if (family.name, component) == ("flux", "dit"):
        return {key: list(t.shape) for key, t in tensors_from_memory(family.layer_names("dit").original, state).items()}
    if getattr(module.config, "model_type", None) == "mistral":
        return mistral3_keys()
    keys = {key: list(tensor.shape) for key, tensor in family.checkpoint_tensors(component, state).items()}
    if keys.get("model.embed_tokens.weight") == [151936, 4096]:
        return {"lm_head.weight": [151936, 4096], **keys}  # Qwen3-8B's is not tied
    if family.name == "wan":
        return {key.removeprefix("model."): shape for key, shape in keys.items()}
    if component == "text_encoder_1":
        return {f"text_model.{key}": shape for key, shape in keys.items()}
    if component == "text_encoder_2":
        return {"shared.weight": keys.pop("encoder.embed_tokens.weight"), **keys}
    return keys


def mistral3_keys():
    """The whole model, of which the language half is loaded."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(text_config=MISTRAL, vision_config=PIXTRAL, multimodal_projector_bias=False, spatial_merge_size=2)
    with torch.device("meta"):
        state = Mistral3ForConditionalGeneration(config).state_dict()
    released = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.": ""}
    return {
        next(new + key.removeprefix(old) for old, new in released.items() if key.startswith(old)): list(tensor.shape)
        for key, tensor in state.items()
    }


def digest(shapes):
    parts = sorted([f"{key}:{'_'.join(map(str, shape))}" for key, shape in shapes.items()] + list(shapes))
    return hashlib.md5(",".join(parts).encode()).hexdigest()


# Seconds each, and like others in kind: by hand.
SLOW = {"Wan2.1-T2V-14B", "Wan2.1-I2V-14B", "Wan2.1-FLF2V-14B", "Wan2.2-I2V-A14B"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FILES])
def test_released_files_have_the_keys_that_are_expected(name):
    family_name, component, config, expected = FILES[name]
    family = get_family(family_name)
    with torch.device("meta"):
        module = family.build_component(component, config)
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    shapes = {key: tuple(shape) for key, shape in released_keys(family, component, module).items()}
    assert digest(shapes) == expected
    # Read back, they are the module's; and the configuration that follows from them alone builds the same module.
    read = {}
    for key, shape in shapes.items():
        read |= family.memory_tensors(component, key, torch.empty(shape, device="meta"))
    assert {key: tuple(tensor.shape) for key, tensor in read.items()} == wanted
    inferred = family.infer_config(component, shapes)
    with torch.device("meta"):
        again = family.build_component(component, inferred)
    assert {key: tuple(tensor.shape) for key, tensor in again.state_dict().items()} == wanted
    for key, value in config.items():
        assert getattr(again.config, key) == value or list(getattr(again.config, key)) == value, key
