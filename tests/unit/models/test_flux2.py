import numpy as np
import pytest
import torch
from PIL import Image
from random_lora import with_random_lora
from safetensors.torch import load_file, save_file

from diffsynth_ray.data.media import resize_and_crop
from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import edit_pictures
from diffsynth_ray.models import flux2_configs as configs
from diffsynth_ray.models.family import BatchShape, detect_component
from diffsynth_ray.models.flux2 import Flux2
from diffsynth_ray.models.flux2_names import ORIGINAL
from diffsynth_ray.models.layer_names import tensors_from_memory
from diffsynth_ray.models.lora import load_lora, lora_state_dict, resolve_lora_targets
from diffsynth_ray.models.names import LORA_FORMATS, lora_from_memory, lora_to_memory
from diffsynth_ray.models.sampling import SampleRequest
from diffsynth_ray.models.weight_source import seeded_generator
from diffsynth_ray.models.weights import load_components, randomize_weights
from diffsynth_ray.train.graph import SampleBatch, TrainGraph

torch.set_num_threads(1)
PROMPTS = ["a cat", "a small dog in the house [IMG]"]
TIMES = torch.tensor([900.0, 30.0])
NAMES = Flux2.layer_names("dit")
LAYERS = (1, 2, 3)  # of 4; 9, 18, 27 of Qwen3's 36; 10, 20, 30 of Mistral's 40
# As in the released tokenizers, for the messages that there are here.
QWEN3_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% set tag = 'SYSTEM_PROMPT' if m.role == 'system' else 'INST' %}"
    "[{{ tag }}]{{ m.content[0].text }}[/{{ tag }}]{% endfor %}"
)
MISTRAL = {
    "model_type": "mistral", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e9,
    "sliding_window": None,
}  # fmt: skip
VISION = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "head_dim": 32, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def pixels(batch=2):
    return torch.randint(0, 256, (batch, 1, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def with_statistics(family):
    """A trained VAE's batch norm has seen pictures."""
    bn, generator = family.components["vae"].bn, torch.Generator().manual_seed(5)
    bn.running_mean.copy_(torch.randn(128, generator=generator) * 0.3)
    bn.running_var.copy_(torch.rand(128, generator=generator) + 0.5)
    return family


@pytest.fixture(scope="module")
def klein():
    return with_statistics(Flux2.build_tiny(0))


@pytest.fixture(scope="module")
def mistral_folder(tmp_path_factory):
    """FLUX.2-dev's text encoder and tokenizer as they are released, tiny."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("dev")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tags = [f"[{end}{name}]" for name in ("SYSTEM_PROMPT", "INST") for end in ("", "/")]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", additional_special_tokens=tags,
        padding_side="left", chat_template=MISTRAL_CHAT,
    ).save_pretrained(folder / "tokenizer")  # fmt: skip
    torch.manual_seed(3)
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=MISTRAL, vision_config=VISION)).eval()
    encoder.save_pretrained(folder / "text_encoder")
    return folder


def build_dit(**changes):
    dit = Flux2.build_component("dit", configs.TINY["dit"] | changes)
    randomize_weights(dit, seed=0, component="dit", dtype=torch.float32, device="cpu")
    return dit


@pytest.fixture(scope="module")
def dev(klein, mistral_folder):
    """dev: Mistral, and a transformer that is told its guidance."""
    _, files = load_components([mistral_folder / "text_encoder" / "model.safetensors"], family="flux2")
    tokenizer = {"tokenizer_path": mistral_folder / "tokenizer"}
    encoder = Flux2.load(files, dtype=torch.float32, tokenizer_paths=tokenizer).components["text_encoder"]
    parts = {"dit": build_dit(guidance_embeds=True), "text_encoder": encoder, "vae": klein.components["vae"]}
    return Flux2(parts, dtype=torch.float32, device="cpu", tokenizer_paths=tokenizer)


@pytest.fixture(scope="module")
def batch(klein):
    return klein.encode(PROMPTS, pixels())


def predict(family, batch, times=TIMES):
    with torch.no_grad():
        return family.predict(batch, batch.latents, times)


def write_released(family, folder, *, with_configs=True, original_dit=False):
    """As black-forest-labs/FLUX.2-klein-4B has them: diffusers' layout and, beside it, the transformer as first released."""
    entries = []
    for component, module in family.components.items():
        name = {"dit": "transformer"}.get(component, component)
        module.save_pretrained(folder / name)
        path = next((folder / name).glob("*.safetensors"))
        if component == "text_encoder":
            save_file({f"model.{key.removeprefix('model.')}": t for key, t in load_file(path).items()}, path)
        if component == "dit" and original_dit:
            path = folder / "flux-2-klein-4b.safetensors"
            state = tensors_from_memory(ORIGINAL, module.state_dict())
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
        if not with_configs:
            (folder / name / "config.json").unlink()
        entries.append(str(path))
    return entries


@pytest.mark.parametrize("how", [{}, {"with_configs": False}, {"with_configs": False, "original_dit": True}])
def test_released_files_load(how, tmp_path, klein, batch):
    entries = write_released(klein, tmp_path, **how)
    name, files = load_components(entries)
    assert (name, set(files)) == ("flux2", set(Flux2.component_names))
    loaded = Flux2.load(files, dtype=torch.float32, tokenizer_paths=Flux2.tiny_tokenizers)
    for component, module in klein.components.items():
        state = loaded.components[component].state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items()), component
    again = loaded.encode(PROMPTS, pixels())
    assert torch.equal(again.latents, batch.latents)
    assert torch.equal(again.conditions["prompt_embeds"], batch.conditions["prompt_embeds"])
    assert torch.equal(predict(loaded, batch), predict(klein, batch))
    # Stage one of split training has no transformer to tell the family by.
    assert load_components(entries[1:])[0] == "flux2"


def test_the_first_release_is_converted_as_diffusers_does_it():
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    state = build_dit(guidance_embeds=True).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors_from_memory(ORIGINAL, state).items()}
    original = {key: torch.randn(shape, generator=seeded_generator(0, key)) for key, shape in shapes.items()}
    expected = convert_flux2_transformer_checkpoint_to_diffusers(dict(original))
    ours = {name: tensor for key, whole in original.items() for name, tensor in Flux2.memory_tensors("dit", key, whole).items()}
    assert ours.keys() == expected.keys() == state.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_klein_s_text_is_encoded_as_the_pipeline_does(klein, batch):
    from diffusers import Flux2KleinPipeline

    tokenizer = klein.tokenizers["tokenizer_path"]
    tokenizer.chat_template = QWEN3_CHAT
    expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        klein.components["text_encoder"], tokenizer, PROMPTS, hidden_states_layers=LAYERS
    )
    assert expected.shape == (2, 512, 192)
    assert (batch.conditions["prompt_embeds"] - expected).abs().max() < 1e-5


def test_dev_s_text_is_encoded_as_the_pipeline_does(dev, mistral_folder):
    from diffusers import Flux2Pipeline
    from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

    released = load_file(mistral_folder / "text_encoder" / "model.safetensors")
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in released
    expected = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
        Mistral3ForConditionalGeneration.from_pretrained(mistral_folder / "text_encoder"),
        AutoTokenizer.from_pretrained(mistral_folder / "tokenizer"),
        PROMPTS,
        hidden_states_layers=LAYERS,
    )
    found = dev.encode_text(PROMPTS)["prompt_embeds"]
    assert found.shape == (2, 512, 192)
    assert (found - expected).abs().max() < 1e-5
    exported = Flux2.checkpoint_tensors("text_encoder", dev.components["text_encoder"].state_dict())
    again = {name for key, tensor in exported.items() for name in Flux2.memory_tensors("text_encoder", key, tensor)}
    assert again == dev.components["text_encoder"].state_dict().keys()
    assert "model.language_model.embed_tokens.weight" in exported


def test_a_bare_file_of_mistral_loads(mistral_folder, tmp_path, dev):
    path = tmp_path / "mistral.safetensors"
    path.write_bytes((mistral_folder / "text_encoder" / "model.safetensors").read_bytes())
    _, files = load_components([path], family="flux2")
    tokenizer = {"tokenizer_path": mistral_folder / "tokenizer"}
    bare = Flux2.load(files, dtype=torch.float32, tokenizer_paths=tokenizer)
    assert torch.equal(bare.encode_text(PROMPTS)["prompt_embeds"], dev.encode_text(PROMPTS)["prompt_embeds"])


def test_the_tokenizer_of_the_other_models_is_refused(klein, dev, mistral_folder):
    qwen3 = Flux2.tiny_tokenizers["tokenizer_path"]
    for family, path, repo in ((klein, mistral_folder / "tokenizer", "klein-4B"), (dev, qwen3, "dev")):
        with pytest.raises(ModelError, match=f"is another's; set .*FLUX.2-{repo}:tokenizer/"):
            Flux2(family.components, dtype=torch.float32, device="cpu", tokenizer_paths={"tokenizer_path": path})
    with pytest.raises(ModelError, match="tokenizer_path"):
        Flux2.load_tokenizer("tokenizer_path", None)


def reference_pipeline(family, **changes):
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline

    # The released scheduler's configuration.
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15, shift=3.0, use_dynamic_shifting=True
    )
    kind = Flux2Pipeline if family.components["dit"].config.guidance_embeds else Flux2KleinPipeline
    pipeline = kind(scheduler, family.components["vae"], None, None, family.components["dit"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def test_the_vae_is_the_pipeline_s(klein, batch):
    floats = pixels()[:, 0].permute(0, 3, 1, 2) / 127.5 - 1
    expected = reference_pipeline(klein)._encode_vae_image(floats, torch.Generator())
    assert (batch.latents - expected).abs().max() < 1e-5
    assert batch.latents.shape[1:] == klein.latents_shape(32, 48) == (128, 2, 3)
    with pytest.raises(ModelError, match="multiples of 16"):
        klein.latents_shape(32, 40)


def reference_prediction(family, batch, noisy, times, *, guidance=None, given=()):
    """diffusers' transformer, called as its pipelines call it; `given` [1, 128, h, w] are the latents of pictures to edit."""
    from diffusers import Flux2Pipeline

    b, _, h, w = noisy.shape
    tokens = [Flux2Pipeline._pack_latents(latents) for latents in (noisy, *given)]
    ids = [Flux2Pipeline._prepare_latent_ids(noisy)]
    if given:
        ids.append(Flux2Pipeline._prepare_image_ids(list(given)))
    text = batch.conditions["prompt_embeds"]
    output = family.components["dit"](
        hidden_states=torch.cat(tokens, dim=1),
        timestep=times / 1000,
        guidance=None if guidance is None else torch.full((b,), guidance),
        encoder_hidden_states=text,
        txt_ids=Flux2Pipeline._prepare_text_ids(text),
        img_ids=torch.cat(ids, dim=1),
    ).sample[:, : h * w]
    return Flux2Pipeline._unpack_latents_with_ids(output, ids[0][:, : h * w])


@torch.no_grad()
def test_the_dit_is_diffusers(klein, batch):
    expected = reference_prediction(klein, batch, batch.latents, TIMES)
    assert (predict(klein, batch) - expected).abs().max() < 1e-5
    assert expected.std() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_dev_is_told_its_guidance(dev, guidance, mistral_folder):
    options = {} if guidance == 1 else {"embedded_guidance": guidance}
    tokenizer = {"tokenizer_path": mistral_folder / "tokenizer"}
    same = Flux2(dev.components, dtype=torch.float32, device="cpu", tokenizer_paths=tokenizer, options=options)
    batch = same.encode(PROMPTS, pixels())
    expected = reference_prediction(dev, batch, batch.latents, TIMES, guidance=guidance)
    assert (predict(same, batch) - expected).abs().max() < 1e-5
    other = reference_prediction(dev, batch, batch.latents, TIMES, guidance=guidance + 1)
    assert (other - expected).abs().max() > 1e-3
    with pytest.raises(ModelError, match="embedded_guidance"):
        Flux2.build_tiny(0, options={"guidance": 1})


def reference_losses(pred, noise, latents, ids):
    weights = reference_table()[1]
    return ((pred - (noise - latents)) ** 2).mean(dim=(1, 2, 3)) * weights[ids]


def reference_table():
    even = torch.linspace(1, 0.001, 1000)
    sigmas = np.exp(0.8) / (np.exp(0.8) + (1 / even - 1))
    bell = torch.exp(-2 * ((sigmas * 1000 - 500) / 1000) ** 2)
    return sigmas, (bell - bell.min()) * 1000 / (bell - bell.min()).sum()


def test_the_loss_is_the_reference(klein, batch):
    graph = TrainGraph(klein, trained=["dit"])
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([100, 700])
    losses = graph(SampleBatch(pixels().numpy(), tuple(PROMPTS), (0, 1)), noise, ids)
    sigma = reference_table()[0][ids]
    noisy = (1 - sigma.view(2, 1, 1, 1)) * batch.latents + sigma.view(2, 1, 1, 1) * noise
    pred = reference_prediction(klein, batch, noisy, sigma * 1000)
    assert losses.detach() == pytest.approx(reference_losses(pred, noise, batch.latents, ids).detach(), rel=1e-5)


def test_inferred_configurations_and_detection(klein, dev):
    for family in (klein, dev):
        for component, module in family.components.items():
            state = module.state_dict()
            shapes = {key: tuple(tensor.shape) for key, tensor in Flux2.checkpoint_tensors(component, state).items()}
            inferred = Flux2.infer_config(component, shapes)
            again = Flux2.build_component(component, inferred)
            assert {key: tuple(t.shape) for key, t in state.items()} == {
                key: tuple(t.shape) for key, t in again.state_dict().items()
            }
    shapes = {key: tuple(t.shape) for key, t in dev.components["dit"].state_dict().items()}
    assert Flux2.infer_config("dit", shapes).items() >= (configs.TINY["dit"] | {"guidance_embeds": True}).items()
    for state in (shapes, tensors_from_memory(ORIGINAL, dev.components["dit"].state_dict())):
        assert detect_component({key: (1,) for key in state}) == ("flux2", "dit")
    with pytest.raises(ModelError, match="heads of width 16 are not known"):
        Flux2.infer_config("dit", shapes | {"transformer_blocks.0.attn.norm_q.weight": (16,)})


def test_files_of_flux1_and_flux2_are_told_apart(klein):
    original = {key: (1,) for key in tensors_from_memory(ORIGINAL, klein.components["dit"].state_dict())}
    with pytest.raises(ModelError, match="this is a dit of family flux2, the job says flux"):
        detect_component(original, family="flux")
    vae = {key: tuple(tensor.shape) for key, tensor in klein.components["vae"].state_dict().items()}
    assert detect_component(vae) == ("flux2", "vae")
    with pytest.raises(ModelError, match=r"decoder\.conv_in\.weight is \[32, 32, 3, 3\], not \[any, 16, any, any\]"):
        detect_component(vae, family="z_image")
    first = dict.fromkeys(["bn.running_mean", "encoder.down.0.block.0.conv1.weight", "encoder.quant_conv.weight"], (1,))
    with pytest.raises(ModelError, match=r"this is the VAE of FLUX\.2's first release, of which diffusers' layout is read"):
        detect_component(first, family="flux2")


def with_lora(targets=None, seed=0):
    return with_random_lora(Flux2, targets=targets, seed=seed)


def test_the_recipe_s_lora_is_diffsynth_s():
    state = lora_from_memory(lora_state_dict(with_lora()), target="diffsynth", names=NAMES)
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    double = [*(f"attn.{name}" for name in attention)]
    double += [f"{part}.{name}" for part in ("ff", "ff_context") for name in ("linear_in", "linear_out")]
    layers = {f"transformer_blocks.{n}.{layer}" for n in range(2) for layer in double}
    layers |= {f"single_transformer_blocks.{n}.attn.{layer}" for n in range(2) for layer in ("to_qkv_mlp_proj", "to_out")}
    assert set(state) == {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}
    # Its recipes name the last layers of the single blocks one by one.
    dit = Flux2.build_tiny(0, components=["dit"]).components["dit"]
    last = [f"single_transformer_blocks.{n}.attn.to_out" for n in range(2)]
    named = [*attention, "linear_in", "linear_out", "to_qkv_mlp_proj", *last]
    assert set(resolve_lora_targets(dit, named, names=NAMES)) == layers
    fused, apart = (resolve_lora_targets(dit, targets, names=NAMES) for targets in (["img_attn.qkv"], ["to_q", "to_k", "to_v"]))
    assert fused == apart


def test_first_key_of_each_format():
    state = lora_state_dict(with_lora(["to_qkv_mlp_proj"]))
    first = {target: next(iter(lora_from_memory(state, target=target, names=NAMES))) for target in LORA_FORMATS}
    assert first == {
        "diffsynth": "single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.default.weight",
        "diffusers": "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight",
        "comfyui": "diffusion_model.single_blocks.0.linear1.lora_A.weight",
        "kohya": "lora_unet_single_blocks_0_linear1.lora_down.weight",
    }


@pytest.mark.parametrize("targets", [None, ["to_q", "to_k"], ["norm_out.linear", "x_embedder"]])
@pytest.mark.parametrize("target", LORA_FORMATS)
def test_lora_names_round_trip(target, targets):
    """Exact: the same tensors, but for layers that a fused matrix has zeros for."""
    state = lora_state_dict(with_lora(targets))
    there = lora_from_memory(state, target=target, names=NAMES)
    back = lora_to_memory(there, names=NAMES, modules=[key.partition(".lora_")[0] for key in state])
    for key, tensor in state.items():
        other, own = key.replace(".lora_A.", ".lora_B."), key.replace(".lora_B.", ".lora_A.")
        if back[key].shape == tensor.shape:
            assert torch.equal(back[key], tensor), key
        else:
            assert torch.allclose(back[other] @ back[own], state[other] @ state[own], atol=1e-6), key
    assert all(not back[key].any() for key in back if key not in state and ".lora_B." in key)
    loaded = with_lora(targets, seed=1)
    if targets is None:
        load_lora(loaded, there, names=NAMES)
        assert all(torch.equal(tensor, state[key]) for key, tensor in lora_state_dict(loaded).items())


@pytest.mark.parametrize("target", ["diffusers", "comfyui", "kohya"])
def test_diffusers_loads_the_export(batch, target):
    from diffusers import Flux2KleinPipeline

    trained = with_lora()
    plain = Flux2.build_tiny(0, components=["dit"])
    before = predict(plain, batch)
    state = lora_from_memory(lora_state_dict(trained), target=target, names=NAMES)
    Flux2KleinPipeline(None, None, None, None, plain.components["dit"]).load_lora_weights(dict(state))
    after = predict(plain, batch)
    assert (after - before).abs().max() > 1e-2
    assert (after - predict(Flux2({"dit": trained}, dtype=torch.float32, device="cpu"), batch)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["klein", "klein, unguided", "dev"])
def test_the_sample_is_the_pipelines(kind, klein, dev):
    family = dev if kind == "dev" else klein
    scale = 1.0 if kind == "klein, unguided" else 3.0
    request = SampleRequest("a cat", 32, 48, 1, 2, scale, 0)
    made = family.sample(request)[0]
    text = family.encode_text(["a cat", ""])["prompt_embeds"]
    negative = {"negative_prompt_embeds": text[1:]} if kind == "klein" else {}
    expected = reference_pipeline(family)(
        height=32, width=48, num_inference_steps=2, guidance_scale=scale, generator=request.generator(), output_type="np",
        prompt_embeds=text[:1], **negative,
    ).images[0]  # fmt: skip
    assert np.abs(made.astype(float) - expected * 255).max() <= 1
    assert made.std() > 1
    other = family.sample(SampleRequest("a cat", 32, 48, 1, 2, scale + 3, 0))[0]
    assert (other != made).any()


def test_the_layers_that_are_read_are_the_pipelines():
    """A quarter, half and three quarters of Qwen3's 36 and Mistral's 40 layers."""
    from inspect import signature

    from diffusers import Flux2KleinPipeline, Flux2Pipeline

    for depth, read in (
        (36, Flux2KleinPipeline._get_qwen3_prompt_embeds),
        (40, Flux2Pipeline._get_mistral_3_small_prompt_embeds),
    ):
        assert signature(read).parameters["hidden_states_layers"].default == tuple(depth * n // 4 for n in (1, 2, 3))


# Pictures to edit.


def picture(seed, height=64, width=96):
    return np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


ONE = {"edit_image": ((picture(0),), (picture(1),))}
SEVERAL = {"edit_image": ((picture(0),), (picture(1), picture(2, 50, 90)))}


@pytest.fixture
def small_pictures(monkeypatch):
    """About 96 x 64 pixels instead of 1024 x 1024."""
    monkeypatch.setattr(edit_pictures, "AREA", 96 * 64)


def latents_of(family, array):
    """The picture's latents as DiffSynth-Studio gets them: sides of multiples of 32, covered and cut."""
    area, ratio = 96 * 64, array.shape[2] / array.shape[1]
    width = round((area * ratio) ** 0.5 / 32) * 32
    height = round((area * ratio) ** 0.5 / ratio / 32) * 32
    cut = resize_and_crop(Image.fromarray(array[0]), height, width)
    return family.encode_image(torch.from_numpy(np.array(cut))[None, None])


@torch.no_grad()
@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize("extra", [ONE, SEVERAL], ids=["one", "several"])
def test_pictures_to_edit_are_seen_as_by_the_pipeline(klein, extra):
    batch = klein.encode(PROMPTS, pixels(), extra=extra)
    found = klein.predict(batch, batch.latents, TIMES)
    parts = []
    for number, sample in enumerate(batch.samples()):
        given = [latents_of(klein, array) for array in extra["edit_image"][number]]
        parts.append(reference_prediction(klein, sample, sample.latents, TIMES[number : number + 1], given=given))
    assert (found - torch.cat(parts)).abs().max() < 1e-5
    other = klein.encode(PROMPTS, pixels(), extra={"edit_image": ((picture(5),), (picture(6),))})
    assert (klein.predict(other, other.latents, TIMES) - found).abs().max() > 1e-3
    graph = TrainGraph(klein, trained=["dit"], extra_inputs=["edit_image"])
    noise, ids = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([100, 700])
    losses = graph(SampleBatch(pixels().numpy(), tuple(PROMPTS), (0, 1), extra), noise, ids)
    sigma = reference_table()[0][ids]
    noisy = (1 - sigma.view(2, 1, 1, 1)) * batch.latents + sigma.view(2, 1, 1, 1) * noise
    pred = klein.predict(batch, noisy, sigma * 1000)
    assert losses == pytest.approx(reference_losses(pred, noise, batch.latents, ids), rel=1e-5)


@pytest.mark.usefixtures("small_pictures")
def test_a_blank_batch_is_like_a_real_one(klein):
    blank = klein.blank_batch(BatchShape(2, 64, 96), extra_inputs=["edit_image"])
    photos = torch.randint(0, 256, (2, 1, 64, 96, 3), dtype=torch.uint8)
    real = klein.encode(PROMPTS, photos, extra=ONE)
    assert blank.latents.shape == real.latents.shape
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in one.conditions.items()} for one in (blank, real)]
    assert shapes[0] == shapes[1]
    assert blank.conditions[edit_pictures.EDIT_SHAPES].tolist() == real.conditions[edit_pictures.EDIT_SHAPES].tolist()


@pytest.mark.usefixtures("small_pictures")
def test_an_edited_sample_is_the_pipelines(klein):
    given = Image.fromarray(picture(3, 128, 192)[0])
    request = SampleRequest("make it red", 32, 48, 1, 2, 1.0, 0, (given,))
    made = klein.sample(request)[0]
    expected = reference_pipeline(klein)(
        image=resize_and_crop(given, 64, 96), height=32, width=48, num_inference_steps=2, guidance_scale=1.0,
        generator=request.generator(), output_type="np", **klein.encode_text(["make it red"]),
    ).images[0]  # fmt: skip
    assert np.abs(made.astype(float) - expected * 255).max() <= 1
    assert (klein.sample(SampleRequest("make it red", 32, 48, 1, 2, 1.0, 0))[0] != made).any()


def test_what_is_wrong_with_extra_inputs_is_said(klein):
    for build in (lambda: Flux2.build_tiny(0, extra_inputs=["kontext_images"]),
                  lambda: klein.encode(PROMPTS, pixels(), extra={"kontext_images": ONE["edit_image"]})):  # fmt: skip
        with pytest.raises(ModelError, match="flux2 takes edit_image, got kontext_images"):
            build()
    with pytest.raises(ModelError, match=r"edit_image takes pictures, got 'a.png'; is it in dataset.data_file_keys"):
        klein.encode(PROMPTS, pixels(), extra={"edit_image": ("a.png", "b.png")})
