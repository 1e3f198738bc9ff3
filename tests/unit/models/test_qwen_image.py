import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffsynth_ray.data.media import decode
from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import qwen_image_configs
from diffsynth_ray.models.family import EncodedBatch, detect_component, get_family, stack_conditions
from diffsynth_ray.models.packing import pack_latents, unpack_latents
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.models.weights import load_components

torch.set_num_threads(1)
ASSETS = Path(__file__).parents[2] / "assets"
TINY = ASSETS / "qwen_image_tiny"
ENTRIES = [
    [str(TINY / f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors") for i in (1, 2)],
    [str(TINY / f"text_encoder/model-0000{i}-of-00002.safetensors") for i in (1, 2)],
    str(TINY / "vae/diffusion_pytorch_model.safetensors"),
]
PROMPTS = ["a photo of a red square on white background", "a small dog in the house", ""]


@pytest.fixture(scope="module")
def family():
    _, files = load_components(ENTRIES)
    return QwenImage.load(files, dtype=torch.float32)


@pytest.fixture(scope="module")
def record():
    return load_file(ASSETS / "records" / "compare_tensors.safetensors")


def test_vae_latents_are_the_recorded_ones(family, record):
    image = (record["fp32.image"] + 1) * 127.5
    pixels = image.round().to(torch.uint8)
    assert (pixels - image).abs().max() < 1e-3
    latents = family.encode_image(pixels.permute(0, 2, 3, 1)[:, None])
    assert latents.shape[1:] == family.latents_shape(64, 96)
    for recorded in ("fp32.vae.latents_peer", "fp32.vae.latents_diffusers"):
        assert (latents - record[recorded]).abs().max() < 1e-5


def test_prompt_embeds_are_the_recorded_ones(family, record):
    conditions = family.encode_text(PROMPTS[:1])
    assert set(conditions) == {"prompt_embeds"}
    assert (conditions["prompt_embeds"] - record["fp32.prompt_emb_peer"]).abs().max() < 1e-5
    assert family.encode_text([""])["prompt_embeds"].shape == (1, 5, 64)


@pytest.mark.parametrize(("name", "timestep"), [("t950", 950.0), ("t500", 500.0), ("t23", 23.4375)])
def test_dit_output_is_the_recorded_one(family, record, name, timestep):
    latents = record["fp32.dit.in_latents"]
    batch = EncodedBatch(latents, {"prompt_embeds": record["fp32.prompt_emb_peer"]})
    pred = family.predict(batch, latents, torch.tensor([timestep]))
    assert pred.shape == latents.shape
    assert (pred - record[f"fp32.dit.out_diffusers.{name}"]).abs().max() < 1e-5


def test_a_batch_equals_its_samples(family):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (3, 1, 32, 48, 3), dtype=torch.uint8)
    batch = family.encode(PROMPTS, pixels, sample_ids=(7, 8, 9))
    assert batch.conditions["prompt_embeds_mask"].dtype == torch.bool
    singles = [family.encode([prompt], pixels[i : i + 1]) for i, prompt in enumerate(PROMPTS)]
    timesteps = torch.tensor([900.0, 500.0, 30.0])
    together = family.predict(batch, batch.latents, timesteps)
    for i, (single, part) in enumerate(zip(singles, batch.samples(), strict=True)):
        assert torch.equal(single.latents, part.latents)
        assert torch.equal(single.conditions["prompt_embeds"], part.conditions["prompt_embeds"])
        assert part.sample_ids == (7 + i,)
        alone = family.predict(single, single.latents, timesteps[i : i + 1])
        assert (alone[0] - together[i]).abs().max() < 1e-5
    stacked = stack_conditions([part.conditions for part in batch.samples()])
    assert stacked.keys() == batch.conditions.keys()
    assert all(torch.equal(stacked[name], batch.conditions[name]) for name in stacked)


def test_attention_is_diffusers_attention(family):
    """With and without a mask, against diffusers' own processor and complex tables."""
    from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

    dit = family.components["dit"]
    batch = EncodedBatch(
        torch.randn(2, 16, 6, 4), {"prompt_embeds": torch.randn(2, 5, 64), "prompt_embeds_mask": torch.ones(2, 5).bool()}
    )
    batch.conditions["prompt_embeds_mask"][1, 3:] = False
    timesteps = torch.tensor([500.0, 20.0])
    ours = family.predict(batch, batch.latents, timesteps)
    processors = dit.attn_processors
    rope = dit.pos_embed
    try:
        dit.set_attn_processor(QwenDoubleStreamAttnProcessor2_0())
        dit.pos_embed = rope.complex_rope
        theirs = family.predict(batch, batch.latents, timesteps)
    finally:
        dit.pos_embed = rope
        dit.set_attn_processor(processors)
    assert (ours - theirs).abs().max() < 1e-5
    assert torch.equal(family.predict(batch, batch.latents, timesteps), ours)


def test_everything_is_loaded_frozen_and_nothing_on_meta(family):
    for name, module in family.components.items():
        tensors = [*module.parameters(), *module.buffers()]
        assert tensors, name
        assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
        assert not module.training


def test_sizes_are_checked(family):
    with pytest.raises(ModelError, match="multiples of 16"):
        family.latents_shape(60, 64)
    with pytest.raises(ModelError, match="takes images"):
        family.encode_image(torch.zeros(1, 5, 32, 32, 3, dtype=torch.uint8))


def test_packing_round_trips():
    latents = torch.randn(2, 16, 6, 4)
    assert torch.equal(unpack_latents(pack_latents(latents), height=6, width=4), latents)


def test_tiny_depends_on_the_seed_and_names_only():
    torch.manual_seed(1)
    whole = QwenImage.build_tiny(3)
    torch.manual_seed(2)
    dit = QwenImage.build_tiny(3, components=["dit"]).components["dit"]
    for name, tensor in whole.components["dit"].state_dict().items():
        assert torch.equal(tensor, dit.state_dict()[name])
    other = QwenImage.build_tiny(4, components=["dit"]).components["dit"]
    assert not torch.equal(other.img_in.weight, dit.img_in.weight)


def test_tiny_works_from_prompt_to_prediction():
    tiny = QwenImage.build_tiny(0)
    pixels = torch.randint(0, 256, (2, 1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = tiny.encode(PROMPTS[:2], pixels)
    assert (batch.latents[0] - batch.latents[1]).std() > 0.01
    pred = tiny.predict(batch, batch.latents, torch.tensor([10.0, 990.0]))
    assert pred.isfinite().all()
    assert 0.05 < pred.std() < 20


def test_tiny_has_the_reference_checkpoint_s_layout(family):
    tiny = QwenImage.build_tiny(0)
    for name, module in family.components.items():
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in tiny.components[name].state_dict().items()}
    # The tiny configuration, which is built as the 7 B one is, computes what the checkpoint's config.json does.
    tiny.components["text_encoder"].load_state_dict(family.components["text_encoder"].state_dict())
    assert torch.equal(tiny.encode_text(PROMPTS[:1])["prompt_embeds"], family.encode_text(PROMPTS[:1])["prompt_embeds"])


def test_inferred_configurations_are_the_written_ones():
    _, files = load_components(ENTRIES)
    for component in ("dit", "vae"):
        inferred = QwenImage.infer_config(component, files[component].tensors)
        for key, value in inferred.items():
            written = files[component].config[key]
            assert list(written) == list(value) if isinstance(value, tuple) else written == value


def test_full_size_text_encoder_is_seven_billion():
    config = qwen_image_configs.INFER["text_encoder"]({"model.embed_tokens.weight": (152064, 3584)})
    encoder = QwenImage.build_component("text_encoder", config)
    # Without the language head.
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 8_292_166_656 - 152064 * 3584
    with pytest.raises(ModelError, match=r"config\.json"):
        qwen_image_configs.INFER["text_encoder"]({"model.embed_tokens.weight": (576, 64)})


def test_text_encoder_names():
    for key in ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"):
        name = QwenImage.memory_key("text_encoder", key)
        assert name == "model.language_model.layers.0.mlp.up_proj.weight"
        assert QwenImage.checkpoint_key("text_encoder", name) == name
        assert QwenImage.memory_key("text_encoder", name) == name
    assert QwenImage.memory_key("text_encoder", "visual.merger.ln_q.weight") == "model.visual.merger.ln_q.weight"
    assert QwenImage.memory_key("text_encoder", "lm_head.weight") is None


def test_components_are_recognised_by_their_keys():
    tiny = QwenImage.build_tiny(0)
    for name, module in tiny.components.items():
        assert detect_component({key: tuple(value.shape) for key, value in module.state_dict().items()}) == (
            "qwen_image",
            name,
        )
    with pytest.raises(ModelError, match="no component"):
        detect_component({"foo.weight": (1,)})


def test_unknown_family_and_missing_component():
    with pytest.raises(ModelError, match="qwen_image"):
        get_family("qwenimage")
    tiny = QwenImage.build_tiny(0, components=["dit"])
    with pytest.raises(ModelError, match="'vae' is needed"):
        tiny.encode_image(torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8))


def test_bad_tokenizer_is_named(tmp_path):
    _, files = load_components(ENTRIES)
    with pytest.raises(ModelError, match="tokenizer_path"):
        QwenImage.load(files, components=["text_encoder"], tokenizer_paths={"tokenizer_path": tmp_path})


def test_the_interface_imports_no_model_library():
    code = (
        "import sys, diffsynth_ray.models.family as f; f.get_family('qwen_image');"
        "assert not {'diffusers', 'transformers', 'peft', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_shipped_vae_gives_photographs_back(photos):
    family = QwenImage.build_tiny(0, components=["vae"], options={"trained_vae": True})
    pixels = torch.from_numpy(np.stack([decode(str(path), height=64, width=64) for path in sorted(photos.glob("*.jpg"))]))
    latents = family.encode_image(pixels)
    assert latents.mean().abs() < 0.1
    assert abs(latents.std() - 1) < 0.1
    vae = family.component("vae")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    back = vae.decode(latents[:, :, None] * std + mean).sample[:, :, 0].permute(0, 2, 3, 1).clamp(-1, 1)
    error = (back - (pixels[:, 0].float() / 127.5 - 1)).square().mean()
    assert -10 * math.log10(error / 4) > 24, "dB"
    other = QwenImage.build_tiny(0, components=["vae"]).component("vae")
    assert not torch.equal(other.state_dict()["decoder.conv_in.weight"], vae.state_dict()["decoder.conv_in.weight"])
    with pytest.raises(ModelError, match="trained_vae is for the tiny size"):
        QwenImage.load({}, options={"trained_vae": True})
