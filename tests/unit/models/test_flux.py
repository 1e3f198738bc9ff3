import pytest
import torch
from random_lora import with_random_lora
from safetensors.torch import load_file, save_file

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import flux_configs as configs
from diffsynth_ray.models.family import detect_component
from diffsynth_ray.models.flux import Flux
from diffsynth_ray.models.flux_names import ORIGINAL
from diffsynth_ray.models.layer_names import tensors_from_memory
from diffsynth_ray.models.lora import load_lora, lora_state_dict, merge_lora, resolve_lora_targets
from diffsynth_ray.models.names import LORA_FORMATS, lora_from_memory, lora_to_memory
from diffsynth_ray.models.weight_source import seeded_generator
from diffsynth_ray.models.weights import load_components
from diffsynth_ray.train.graph import SampleBatch, TrainGraph
from diffsynth_ray.train.initial import load_exported

torch.set_num_threads(1)
PROMPTS = ["a cat", "a small dog in the house"]
TIMES = torch.tensor([900.0, 30.0])
TOKENIZERS = Flux.tiny_tokenizers
NAMES = Flux.layer_names("dit")


def pixels(batch=2):
    return torch.randint(0, 256, (batch, 1, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def family():
    return Flux.build_tiny(0)


@pytest.fixture(scope="module")
def batch(family):
    return family.encode(PROMPTS, pixels())


def predict(family, batch, times=TIMES):
    with torch.no_grad():
        return family.predict(batch, batch.latents, times)


def write_text_encoders(family, folder):
    from transformers import T5Config, T5EncoderModel

    family.components["text_encoder_1"].save_pretrained(folder / "text_encoder")
    t5 = T5EncoderModel(T5Config(**configs.TINY["text_encoder_2"]))
    state = family.components["text_encoder_2"].state_dict()
    t5.load_state_dict({**state, "shared.weight": state["encoder.embed_tokens.weight"]})
    t5.save_pretrained(folder / "text_encoder_2")
    return [str(folder / name / "model.safetensors") for name in ("text_encoder", "text_encoder_2")]


def write_original(family, folder):
    """flux1-dev.safetensors and ae.safetensors; CLIP as it was saved before transformers 5."""
    entries = write_text_encoders(family, folder)
    clip = load_file(entries[0])
    save_file({f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in clip.items()}, entries[0])
    dit = tensors_from_memory(ORIGINAL, family.components["dit"].state_dict())
    vae = Flux.checkpoint_tensors("vae", family.components["vae"].state_dict())
    for name, state in (("flux1-dev", dit), ("ae", vae)):
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors")
        entries.append(str(folder / f"{name}.safetensors"))
    return entries


def write_diffusers(family, folder):
    entries = write_text_encoders(family, folder)
    for component, name in (("dit", "transformer"), ("vae", "vae")):
        family.components[component].save_pretrained(folder / name)
        entries.append(str(folder / name / "diffusion_pytorch_model.safetensors"))
    return entries


@pytest.mark.parametrize("layout", [write_original, write_diffusers])
def test_both_layouts_load(layout, tmp_path, family, batch):
    name, files = load_components(layout(family, tmp_path), family="flux")
    assert (name, set(files)) == ("flux", set(Flux.component_names))
    loaded = Flux.load(files, dtype=torch.float32, tokenizer_paths=TOKENIZERS)
    for component, module in family.components.items():
        state = loaded.components[component].state_dict()
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[key]), (component, key)
    again = loaded.encode(PROMPTS, pixels())
    assert torch.equal(again.latents, batch.latents)
    assert all(torch.equal(again.conditions[key], batch.conditions[key]) for key in batch.conditions)


def test_flux1_dev_is_converted_as_diffusers_does_it():
    """diffusers' function has the width 3072 in it; columns do not matter to either."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    dit = Flux.build_component("dit", configs.TINY["dit"] | {"num_attention_heads": 24, "attention_head_dim": 128}
                               | {"axes_dims_rope": (16, 56, 56), "num_layers": 1, "num_single_layers": 1})  # fmt: skip
    meta = tensors_from_memory(ORIGINAL, dit.state_dict())
    original = {}
    for key, tensor in meta.items():
        shape = (tensor.shape[0], 1) if tensor.ndim == 2 else tuple(tensor.shape)
        original[key] = torch.randn(shape, generator=seeded_generator(0, key))
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    ours = {name: t for key, whole in original.items() for name, t in Flux.memory_tensors("dit", key, whole).items()}
    assert ours.keys() == expected.keys() == dit.state_dict().keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_ae_is_converted_as_diffusers_does_it(family):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = family.components["vae"].state_dict()
    original = Flux.checkpoint_tensors("vae", state)
    expected = convert_ldm_vae_checkpoint(dict(original), dict(family.components["vae"].config))
    assert expected.keys() == state.keys()
    assert all(torch.equal(expected[key], state[key]) for key in state)


def test_the_text_is_encoded_as_the_pipeline_does(family, batch):
    from diffusers import FluxPipeline

    parts = {"scheduler": None, "vae": None, "transformer": None}
    pipe = FluxPipeline(
        text_encoder=family.components["text_encoder_1"],
        tokenizer=family.tokenizers["tokenizer_1_path"],
        text_encoder_2=family.components["text_encoder_2"],
        tokenizer_2=family.tokenizers["tokenizer_2_path"],
        **parts,
    )
    embeds, pooled, _ = pipe.encode_prompt(PROMPTS, None, device="cpu", max_sequence_length=512)
    assert (batch.conditions["prompt_embeds"] - embeds).abs().max() < 1e-5
    assert (batch.conditions["pooled_prompt_embeds"] - pooled).abs().max() < 1e-5


def test_the_vae_is_diffusers(family, batch):
    mode = family.components["vae"].encode(pixels()[:, 0].permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
    assert (batch.latents - (mode - 0.1159) * 0.3611).abs().max() < 1e-5
    assert batch.latents.shape[1:] == family.latents_shape(32, 48)


def reference_prediction(dit, batch, noisy, times, *, guidance):
    """diffusers' transformer, called as its pipeline calls it."""
    from diffusers import FluxPipeline

    b, c, h, w = noisy.shape
    packed = FluxPipeline._pack_latents(noisy, b, c, h, w)
    ids = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32)
    output = dit(
        hidden_states=packed,
        timestep=times / 1000,
        guidance=torch.full((b,), guidance),
        pooled_projections=batch.conditions["pooled_prompt_embeds"],
        encoder_hidden_states=batch.conditions["prompt_embeds"],
        txt_ids=torch.zeros(512, 3),
        img_ids=ids,
    ).sample
    return FluxPipeline._unpack_latents(output, h * 8, w * 8, 8)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_the_dit_is_diffusers(family, batch, guidance):
    options = {} if guidance == 1 else {"embedded_guidance": guidance}
    same = Flux(family.components, dtype=torch.float32, device="cpu", tokenizer_paths=TOKENIZERS, options=options)
    expected = reference_prediction(family.components["dit"], batch, batch.latents, TIMES, guidance=guidance)
    assert (predict(same, batch) - expected).abs().max() < 1e-5
    assert expected.std() > 0.05
    with pytest.raises(ModelError, match="embedded_guidance"):
        Flux.build_tiny(0, options={"guidance": 1})


def test_schnell_has_no_guidance(batch):
    config = {key: value for key, value in configs.TINY["dit"].items() if key != "guidance_embeds"}
    from diffsynth_ray.models.weights import randomize_weights

    dit = Flux.build_component("dit", config)
    randomize_weights(dit, seed=0, component="dit", dtype=torch.float32, device="cpu")
    schnell = Flux({"dit": dit}, dtype=torch.float32, device="cpu")
    assert predict(schnell, batch).isfinite().all()
    shapes = {key: tuple(t.shape) for key, t in tensors_from_memory(ORIGINAL, dit.state_dict()).items()}
    assert Flux.infer_config("dit", shapes)["guidance_embeds"] is False


def test_the_loss_is_the_reference(family, batch):
    graph = TrainGraph(family, trained=["dit"])
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([100, 700])
    losses = graph(SampleBatch(pixels().numpy(), tuple(PROMPTS), (0, 1)), noise, ids)
    even = torch.linspace(1, 0.003 / 1.002, 1000)
    sigmas = 3 * even / (1 + 2 * even)
    bell = torch.exp(-2 * ((sigmas * 1000 - 500) / 1000) ** 2)
    weights = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    sigma = sigmas[ids].view(2, 1, 1, 1)
    noisy = (1 - sigma) * batch.latents + sigma * noise
    pred = reference_prediction(family.components["dit"], batch, noisy, sigmas[ids] * 1000, guidance=1.0)
    expected = ((pred - (noise - batch.latents)) ** 2).mean(dim=(1, 2, 3)) * weights[ids]
    assert losses.detach() == pytest.approx(expected.detach(), rel=1e-5)


def test_inferred_configurations_and_detection(family):
    for component, module in family.components.items():
        shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        again = Flux.build_component(component, Flux.infer_config(component, shapes))
        assert shapes == {key: tuple(tensor.shape) for key, tensor in again.state_dict().items()}
        assert detect_component(shapes, family="flux") == ("flux", component)
    dit = {key: tuple(t.shape) for key, t in family.components["dit"].state_dict().items()}
    inferred = Flux.infer_config("dit", dit)
    assert all(inferred[key] == value for key, value in configs.TINY["dit"].items())
    with pytest.raises(ModelError, match="Fill"):
        Flux.infer_config("dit", dit | {"x_embedder.weight": (64, 384)})


def with_lora(targets=None, seed=0):
    return with_random_lora(Flux, targets=targets, rank=6, seed=seed)


def test_the_recipe_s_lora_is_diffsynth_s():
    state = lora_from_memory(lora_state_dict(with_lora()), target="diffsynth", names=NAMES)
    double = ("attn.a_to_qkv", "attn.b_to_qkv", "attn.a_to_out", "attn.b_to_out", "ff_a.0", "ff_a.2", "ff_b.0", "ff_b.2")
    layers = {f"blocks.{n}.{layer}" for n in range(2) for layer in (*double, "norm1_a.linear", "norm1_b.linear")}
    layers |= {f"single_blocks.{n}.{layer}" for n in range(2) for layer in ("to_qkv_mlp", "proj_out", "norm.linear")}
    assert set(state) == {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}
    assert state["blocks.0.attn.a_to_qkv.lora_A.default.weight"].shape == (6, 64)
    assert state["blocks.0.attn.a_to_qkv.lora_B.default.weight"].shape == (3 * 64, 6)
    assert state["single_blocks.0.to_qkv_mlp.lora_B.default.weight"].shape == (7 * 64, 6)


def test_fused_layers_have_one_a():
    dit = with_lora()
    attn = dit.transformer_blocks[0].attn
    assert attn.to_q.lora_A["default"].weight is attn.to_v.lora_A["default"].weight
    names = [name for name, parameter in dit.named_parameters() if parameter.requires_grad and ".attn.to_" in name]
    assert "transformer_blocks.0.attn.to_q.lora_A.default.weight" in names
    assert not any(".attn.to_k.lora_A" in name for name in names)
    alone = with_lora(["to_q", "to_k"]).transformer_blocks[0].attn
    assert alone.to_q.lora_A["default"] is not alone.to_k.lora_A["default"]


@pytest.mark.parametrize("targets", [None, ["a_to_qkv"], ["to_q"], ["to_q", "to_k", "proj_mlp"], ["norm_out.linear"]])
@pytest.mark.parametrize("target", LORA_FORMATS)
def test_lora_names_round_trip(target, targets):
    """Exact: the same tensors, but for layers that a fused matrix has zeros for."""
    state = lora_state_dict(with_lora(targets))
    there = lora_from_memory(state, target=target, names=NAMES)
    matrices = [tensor.data_ptr() for tensor in there.values() if tensor.ndim == 2]
    assert len(set(matrices)) == len(matrices), "tensors that share memory cannot be saved"
    modules = [key.partition(".lora_")[0] for key in state]
    back = lora_to_memory(there, names=NAMES, modules=modules)
    for key, tensor in state.items():
        other = key.replace(".lora_A.", ".lora_B.")
        own = key.replace(".lora_B.", ".lora_A.")
        if back[key].shape == tensor.shape:
            assert torch.equal(back[key], tensor), key
        else:  # layers with different A share a matrix of the ranks' sum: the product is the same
            product = back[other] @ back[own]
            assert torch.allclose(product, state[other] @ state[own], atol=1e-6), key
    assert all(not back[key].any() for key in back if key not in state and ".lora_B." in key)


@pytest.mark.parametrize("target", ["diffsynth", "kohya"])
def test_load_and_merge_lora(target, tmp_path, family, batch):
    trained = with_lora()
    there = lora_from_memory(lora_state_dict(trained), target=target, names=NAMES)
    save_file({key: tensor.clone() for key, tensor in there.items()}, tmp_path / "lora.safetensors")
    other, merged = Flux.build_tiny(0, components=["dit"]), Flux.build_tiny(0, components=["dit"], device="meta")
    other.components["dit"] = with_lora(seed=1)
    load_lora(other.components["dit"], tmp_path / "lora.safetensors", names=NAMES)
    base = merged.components["dit"]
    merge_lora(base, tmp_path / "lora.safetensors", names=NAMES)
    base.load_state_dict({name: base.weight_source.read(name) for name in base.state_dict()}, assign=True)
    merged.device = torch.device("cpu")
    expected = predict(Flux({"dit": trained}, dtype=torch.float32, device="cpu"), batch)
    assert torch.equal(predict(other, batch), expected)
    assert (predict(merged, batch) - expected).abs().max() < 1e-5
    assert (expected - predict(family, batch)).abs().max() > 1e-2


def test_a_lora_with_an_a_for_each_layer_loads(batch):
    """As diffusers' own training scripts write it."""
    names = ["to_q", "to_k", "to_v"]
    apart = lora_state_dict(with_lora(["to_q"])) | lora_state_dict(with_lora(["to_k"], seed=1))
    apart |= lora_state_dict(with_lora(["to_v"], seed=2))
    dit = with_lora(names, seed=3)
    assert dit.transformer_blocks[0].attn.to_q.lora_A["default"] is dit.transformer_blocks[0].attn.to_k.lora_A["default"]
    load_lora(dit, lora_from_memory(apart, target="diffusers"), names=NAMES)
    loaded = lora_state_dict(dit)
    assert all(torch.equal(loaded[key], apart[key]) for key in apart)
    trainable = [name for name, parameter in dit.named_parameters() if parameter.requires_grad]
    assert len(trainable) == len(apart)
    fused = lora_from_memory(loaded, target="diffsynth", names=NAMES)
    back = lora_to_memory(fused, names=NAMES)
    assert all(torch.equal(back[key], apart[key]) for key in apart if key.startswith("transformer_blocks"))


def test_targets_by_either_name():
    dit = Flux.build_tiny(0, components=["dit"]).components["dit"]
    assert resolve_lora_targets(dit, ["a_to_qkv"], names=NAMES) == [
        f"transformer_blocks.{n}.attn.{name}" for n in range(2) for name in ("to_q", "to_k", "to_v")
    ]
    # DiffSynth-Studio's proj_out are the single blocks', not the last layer, which has that name in diffusers.
    assert resolve_lora_targets(dit, ["proj_out"], names=NAMES) == [f"single_transformer_blocks.{n}.proj_out" for n in range(2)]
    assert resolve_lora_targets(dit, ["img_attn.qkv"], names=NAMES) == resolve_lora_targets(dit, ["a_to_qkv"], names=NAMES)


def test_first_key_of_each_format():
    state = lora_state_dict(with_lora(["to_qkv_mlp"]))
    first = {target: next(iter(lora_from_memory(state, target=target, names=NAMES))) for target in LORA_FORMATS}
    assert first == {
        "diffsynth": "single_blocks.0.to_qkv_mlp.lora_A.default.weight",
        "diffusers": "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight",
        "comfyui": "diffusion_model.single_blocks.0.linear1.lora_A.weight",
        "kohya": "lora_unet_single_blocks_0_linear1.lora_down.weight",
    }


def test_diffusers_loads_the_export(batch):
    from diffusers import FluxPipeline

    trained = with_lora()
    plain = Flux.build_tiny(0, components=["dit"])
    before = predict(plain, batch)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    state = lora_from_memory(lora_state_dict(trained), target="diffusers", names=NAMES)
    FluxPipeline(transformer=plain.components["dit"], **parts).load_lora_weights(state)
    after = predict(plain, batch)
    assert (after - before).abs().max() > 1e-2
    assert (after - predict(Flux({"dit": trained}, dtype=torch.float32, device="cpu"), batch)).abs().max() < 1e-5


def test_full_weights_round_trip(tmp_path, family):
    state = Flux.checkpoint_tensors("dit", family.components["dit"].state_dict())
    assert state["blocks.0.attn.a_to_qkv.weight"].shape == (3 * 64, 64)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "full.safetensors")
    other = Flux.build_tiny(7, components=["dit"])
    load_exported(other, ["dit"], [tmp_path / "full.safetensors"])
    for key, tensor in family.components["dit"].state_dict().items():
        assert torch.equal(other.components["dit"].state_dict()[key], tensor)


@pytest.mark.parametrize("key", ["tokenizer_1_path", "tokenizer_2_path"])
def test_a_tokenizer_that_is_missing(key, tmp_path):
    with pytest.raises(ModelError, match=key):
        Flux.load_tokenizer(key, tmp_path)
