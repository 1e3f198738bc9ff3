import pytest
import torch
from random_lora import with_random_lora
from safetensors.torch import save_file
from torch import nn

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import wan_configs as configs
from diffsynth_ray.models.family import FIRST_FRAME, detect_component
from diffsynth_ray.models.lora import load_lora, lora_state_dict, resolve_lora_targets
from diffsynth_ray.models.names import LORA_FORMATS, lora_from_memory, lora_to_memory
from diffsynth_ray.models.wan import Wan, clean_prompt
from diffsynth_ray.models.weights import load_components, randomize_weights
from diffsynth_ray.train.graph import SampleBatch, TrainGraph
from diffsynth_ray.train.initial import load_exported

torch.set_num_threads(1)
PROMPTS = ["a big rabbit", "a small dog in the house"]
TIMES = torch.tensor([900.0, 30.0])
TINY_22 = {
    "dit": configs.TINY_DIT | {"in_channels": 48, "out_channels": 48},
    "vae": {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12}
    | {"patch_size": 2, "scale_factor_spatial": 16, **configs.LATENTS_22},
}


def pixels(num_frames=5, height=32, width=32, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, num_frames, height, width, 3), dtype=torch.uint8, generator=generator)


def frames(clip, number):
    """One frame of each clip in the form of an extra input."""
    return tuple((one[number][None],) for one in clip)


def build(component, config, seed=0):
    module = Wan.build_component(component, config)
    randomize_weights(module, seed=seed, component=component, dtype=torch.float32, device="cpu")
    return module


@pytest.fixture(scope="module")
def text_to_video():
    return Wan.build_tiny(0)


@pytest.fixture(scope="module")
def image_to_video():
    return Wan.build_tiny(0, extra_inputs=["input_image"])


@pytest.fixture(scope="module")
def ti2v():
    tiny = Wan.build_tiny(0, components=["text_encoder"])
    tiny.components |= {name: build(name, config) for name, config in TINY_22.items()}
    return tiny


def write_original(family, folder):
    """The components as the first release has them: a sharded DiT, everything else as .pth; entries of [model] paths."""
    entries = []
    for component, module in family.components.items():
        state = {key: tensor.clone() for key, tensor in Wan.checkpoint_tensors(component, module.state_dict()).items()}
        if component == "dit":
            keys = sorted(state)
            entries.append([])
            for number, part in enumerate((keys[::2], keys[1::2]), start=1):
                path = folder / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
                save_file({key: state[key] for key in part}, path)
                entries[-1].append(str(path))
            continue
        if component == "image_encoder":
            state["textual.head.0.weight"] = torch.zeros(2)
            state["log_scale"] = torch.zeros(())
            state["model.visual.cls_embedding"] = state["model.visual.cls_embedding"].view(1, 1, -1)
            state["model.visual.pos_embedding"] = state["model.visual.pos_embedding"][None]
        torch.save({key.removeprefix("model."): tensor for key, tensor in state.items()}, folder / f"{component}.pth")
        entries.append(str(folder / f"{component}.pth"))
    return entries


def write_diffusers(family, folder):
    """The components as diffusers' and transformers' own save_pretrained writes them."""
    from transformers import UMT5Config, UMT5EncoderModel

    names = {"dit": "transformer", "vae": "vae", "text_encoder": "text_encoder", "image_encoder": "image_encoder"}
    entries = []
    for component, module in family.components.items():
        if component == "text_encoder":
            whole = UMT5EncoderModel(UMT5Config(**configs.TINY_TEXT_ENCODER))
            state = module.state_dict()
            whole.load_state_dict({**state, "shared.weight": state["encoder.embed_tokens.weight"]})
            module = whole
        module.save_pretrained(folder / names[component])
        entries.append(str(next((folder / names[component]).glob("*.safetensors"))))
    return entries


@pytest.mark.parametrize("layout", [write_original, write_diffusers])
@pytest.mark.parametrize("which", ["text_to_video", "image_to_video", "ti2v"])
def test_both_layouts_load(layout, which, tmp_path, request):
    family = request.getfixturevalue(which)
    entries = layout(family, tmp_path)
    name, files = load_components(entries, family="wan")
    assert (name, set(files)) == ("wan", set(family.components))
    loaded = Wan.load(files, dtype=torch.float32, tokenizer_paths=Wan.tiny_tokenizers)
    for component, module in family.components.items():
        state = loaded.components[component].state_dict()
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[key]), (component, key)
    extra = {"input_image": frames(pixels(batch=1), 0)} if which != "text_to_video" else {}
    batch, again = (one.encode(PROMPTS[:1], pixels(batch=1), extra=extra) for one in (family, loaded))
    assert torch.equal(batch.latents, again.latents)
    assert all(torch.equal(batch.conditions[key], again.conditions[key]) for key in batch.conditions)


def test_the_first_release_s_files_are_what_diffusers_converts(image_to_video, tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

    for component, convert in (("dit", convert_wan_transformer_to_diffusers), ("vae", convert_wan_vae_to_diffusers)):
        state = image_to_video.components[component].state_dict()
        original = {key.removeprefix("model."): t for key, t in Wan.checkpoint_tensors(component, state).items()}
        assert not set(original) & set(state) - {"patch_embedding.weight", "patch_embedding.bias"}
        converted = convert(dict(original))
        assert converted.keys() == state.keys()
        assert all(torch.equal(converted[key], state[key]) for key in state)


def test_the_vae_is_diffusers(text_to_video, ti2v):
    clip = pixels()
    for family, factor in ((text_to_video, 8), (ti2v, 16)):
        vae = family.components["vae"]
        latents = family.encode_image(clip)
        assert latents.shape[1:] == family.latents_shape(32, 32, 5)
        assert latents.shape[3] == 32 // factor
        mode = vae.encode(clip.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).latent_dist.mode()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        assert (latents - (mode - mean) / std).abs().max() < 1e-5
        assert torch.equal(family.encode_image(clip[1:]), latents[1:])


def test_the_text_is_encoded_as_the_pipeline_does(text_to_video):
    from diffusers import WanPipeline

    encoder, tokenizer = text_to_video.components["text_encoder"], text_to_video.tokenizers["tokenizer_path"]
    parts = dict.fromkeys(("vae", "transformer", "scheduler"))
    pipe = WanPipeline(text_encoder=encoder, tokenizer=tokenizer, **parts)
    prompts = ["a  small dog &amp; “cat”", ""]
    expected = pipe._get_t5_prompt_embeds(prompts, max_sequence_length=512, device=torch.device("cpu"))
    conditions = text_to_video.encode_text(prompts)
    embeds = nn.functional.pad(conditions["prompt_embeds"], (0, 0, 0, 512 - conditions["prompt_embeds"].shape[1]))
    assert (embeds - expected).abs().max() < 1e-5
    assert clean_prompt("ｆｕｌｌ　ｗｉｄｔｈ“ &lt;b&gt;\n x ") == 'full width" <b> x'


def reference_prediction(dit, batch, noisy, timesteps, **kwargs):
    text = batch.conditions["prompt_embeds"]
    padded = torch.zeros(len(text), 512, text.shape[2])
    padded[:, : text.shape[1]] = text
    return dit(noisy, timestep=timesteps, encoder_hidden_states=padded, **kwargs).sample


def test_the_dit_is_diffusers(text_to_video):
    batch = text_to_video.encode(PROMPTS, pixels())
    pred = text_to_video.predict(batch, batch.latents, TIMES)
    expected = reference_prediction(text_to_video.components["dit"], batch, batch.latents, TIMES)
    assert (pred - expected).abs().max() < 1e-5
    single = text_to_video.encode(PROMPTS[:1], pixels()[:1])
    alone = text_to_video.predict(single, single.latents, TIMES[:1])
    assert (alone[0] - pred[0]).abs().max() < 1e-5
    assert pred.std() > 0.05


@pytest.mark.parametrize("last_too", [False, True])
def test_image_to_video_is_the_pipeline_s(image_to_video, last_too):
    from diffusers import WanImageToVideoPipeline

    clip = pixels()
    extra = {"input_image": frames(clip, 0)} | ({"end_image": frames(clip, -1)} if last_too else {})
    batch = image_to_video.encode(PROMPTS, clip, extra=extra)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "scheduler", "image_encoder", "image_processor"))
    pipe = WanImageToVideoPipeline(vae=image_to_video.components["vae"], transformer=image_to_video.components["dit"], **parts)
    floats = clip.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    conditions = [
        pipe.prepare_latents(
            one[:, :, 0], 1, height=32, width=32, num_frames=5, dtype=torch.float32, device="cpu",
            generator=torch.Generator(), last_image=one[:, :, -1] if last_too else None,
        )[1]
        for one in floats.split(1)
    ]  # fmt: skip
    condition = torch.cat(conditions)
    assert (batch.conditions["image_latents"] - condition).abs().max() < 1e-5
    image = batch.conditions["image_embeds"][:, 0]
    pred = image_to_video.predict(batch, batch.latents, TIMES)
    expected = reference_prediction(
        image_to_video.components["dit"],
        batch,
        torch.cat([batch.latents, condition], dim=1),
        TIMES,
        encoder_hidden_states_image=image,
    )
    assert (pred - expected).abs().max() < 1e-5


def test_clip_sees_the_image_as_wan_was_trained(image_to_video):
    clip = pixels()
    embeds = image_to_video.encode_extra({"input_image": frames(clip, 0)}, pixels=clip)["image_embeds"]
    floats = clip[:, 0].permute(0, 3, 1, 2).float() / 127.5 - 1
    square = nn.functional.interpolate(floats, size=(28, 28), mode="bicubic")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    output = image_to_video.components["image_encoder"](pixel_values=((square + 1) / 2 - mean) / std, output_hidden_states=True)
    assert (embeds[:, 0] - output.hidden_states[1]).abs().max() < 1e-5  # of two blocks: the state before the last


def test_first_and_last_frame_with_positions_for_both():
    dit = build("dit", configs.TINY_IMAGE_DIT | {"pos_embed_seq_len": 10})
    family = Wan.build_tiny(0, extra_inputs=["input_image"])
    family.components["dit"] = dit
    clip = pixels()
    extra = {"input_image": frames(clip, 0), "end_image": frames(clip, -1)}
    batch = family.encode(PROMPTS, clip, extra=extra)
    pred = family.predict(batch, batch.latents, TIMES)
    for index in range(2):
        one = batch.samples()[index]
        hidden = torch.cat([one.latents, one.conditions["image_latents"]], dim=1)
        image = one.conditions["image_embeds"][0]  # two images along the batch, as the pipeline does it
        expected = reference_prediction(dit, one, hidden, TIMES[index : index + 1], encoder_hidden_states_image=image)
        assert (pred[index] - expected[0]).abs().max() < 1e-5
    only_first = family.encode(PROMPTS, clip, extra={"input_image": frames(clip, 0)})
    with pytest.raises(ModelError, match="end_image"):
        family.predict(only_first, only_first.latents, TIMES)


def reference_loss(family, batch, noise, ids):
    """Flow matching with Wan's shifted table, weighted, in plain words."""
    even = torch.linspace(1, 0, 1001)[:-1]
    sigmas = 5 * even / (1 + 4 * even)
    bell = torch.exp(-2 * ((sigmas * 1000 - 500) / 1000) ** 2)
    weights = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    losses = []
    for index, number in enumerate(ids.tolist()):
        one, sigma = batch.samples()[index], sigmas[number]
        noisy = (1 - sigma) * one.latents + sigma * noise[index : index + 1]
        target = noise[index : index + 1] - one.latents
        hidden, kwargs, time = noisy, {}, sigmas[number : number + 1] * 1000
        if "image_latents" in one.conditions:
            hidden = torch.cat([noisy, one.conditions["image_latents"]], dim=1)
            kwargs["encoder_hidden_states_image"] = one.conditions["image_embeds"][:, 0]
        if FIRST_FRAME in one.conditions:
            hidden = torch.cat([one.conditions[FIRST_FRAME], noisy[:, :, 1:]], dim=2)
            tokens = noisy.shape[3] * noisy.shape[4] // 4
            time = torch.cat([torch.zeros(tokens), time.repeat(tokens * (noisy.shape[2] - 1))])[None]
        pred = reference_prediction(family.components["dit"], one, hidden, time, **kwargs)
        if FIRST_FRAME in one.conditions:
            pred, target = pred[:, :, 1:], target[:, :, 1:]
        losses.append(((pred - target) ** 2).mean() * weights[number])
    return torch.stack(losses)


@pytest.mark.parametrize("which", ["text_to_video", "image_to_video", "ti2v"])
def test_the_loss_is_the_reference(which, request):
    family = request.getfixturevalue(which)
    extra = () if which == "text_to_video" else ("input_image",)
    graph = TrainGraph(family, trained=["dit"], extra_inputs=extra)
    samples = SampleBatch(pixels().numpy(), tuple(PROMPTS), (0, 1))
    batch = graph.encode(samples)
    assert (FIRST_FRAME in batch.conditions) == (which == "ti2v")
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([100, 700])
    losses = graph(samples, noise, ids)
    assert losses.detach() == pytest.approx(reference_loss(family, batch, noise, ids).detach(), rel=1e-5)
    # What a step as a CUDA graph computes from: texts of one length, whatever the prompts.
    tensors = graph.to_tensors(samples, noise, ids)
    assert torch.equal(graph.from_tensors(tensors), losses)
    short = graph.to_tensors(SampleBatch(samples.pixels, ("a", "b"), (0, 1)), noise, ids)
    assert {name: one.shape for name, one in short.items()} == {name: one.shape for name, one in tensors.items()}
    if extra:  # a column of its own is taken instead of the video's first frame
        other = SampleBatch(samples.pixels, samples.prompts, (0, 1), {"input_image": frames(pixels(), 2)})
        assert not torch.allclose(graph(other, noise, ids), losses)


def test_inputs_that_do_not_fit_the_variant(text_to_video, image_to_video, ti2v):
    clip = pixels()
    batch = text_to_video.encode(PROMPTS, clip)
    with pytest.raises(ModelError, match=r"takes input_image \(36 input channels\), and it was not given"):
        image_to_video.predict(batch, batch.latents, TIMES)
    batch = image_to_video.encode(PROMPTS, clip, extra={"input_image": frames(clip, 0)})
    with pytest.raises(ModelError, match="takes no input_image"):
        text_to_video.predict(batch, batch.latents, TIMES)
    with pytest.raises(ModelError, match=r"4n \+ 1"):
        text_to_video.encode_image(pixels(num_frames=4))
    with pytest.raises(ModelError, match="multiples of 32"):
        ti2v.latents_shape(48, 64, 5)
    with pytest.raises(ModelError, match="input_image"):
        image_to_video.encode_extra({"end_image": frames(clip, 0)}, pixels=clip)
    with pytest.raises(ModelError, match="TI2V-5B"):
        ti2v.encode_extra({"input_image": frames(clip, 0), "end_image": frames(clip, 0)}, pixels=clip)
    with pytest.raises(ModelError, match="no option zero_cond_t"):
        Wan.build_tiny(0, options={"zero_cond_t": True})


def test_a14b_takes_the_image_without_clip():
    family = Wan.build_tiny(0, extra_inputs=["input_image"], components=["text_encoder", "vae"])
    family.components["dit"] = build("dit", configs.TINY_DIT | {"in_channels": 36})
    clip = pixels()
    batch = family.encode(PROMPTS, clip, extra={"input_image": frames(clip, 0)})
    assert "image_embeds" not in batch.conditions
    pred = family.predict(batch, batch.latents, TIMES)
    expected = reference_prediction(
        family.components["dit"], batch, torch.cat([batch.latents, batch.conditions["image_latents"]], dim=1), TIMES
    )
    assert (pred - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("extra_key", "variant"),
    [("control_adapter.conv.weight", "Camera"), ("face_adapter.x", "Animate")],
)
def test_other_variants_are_refused_by_name(text_to_video, extra_key, variant):
    state = Wan.checkpoint_tensors("dit", text_to_video.components["dit"].state_dict())
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    with pytest.raises(ModelError, match=variant):
        Wan.infer_config("dit", shapes | {extra_key: (1, 1)})
    with pytest.raises(ModelError, match="Fun-Control"):
        Wan.infer_config("dit", shapes | {"patch_embedding.weight": (64, 48, 1, 2, 2)})


def test_inferred_configurations_build_the_same(image_to_video, ti2v):
    for family in (image_to_video, ti2v):
        for component, module in family.components.items():
            shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
            again = Wan.build_component(component, Wan.infer_config(component, shapes))
            assert shapes == {key: tuple(tensor.shape) for key, tensor in again.state_dict().items()}
            if component in ("dit", "vae"):
                given = {key: value for key, value in module.config.items() if not key.startswith("_")}
                assert given == {key: again.config[key] for key in given}


def test_components_are_recognised(image_to_video, ti2v):
    for family in (image_to_video, ti2v):
        for component, module in family.components.items():
            original = Wan.checkpoint_tensors(component, module.state_dict())
            for keys in (original, {key.removeprefix("model.") for key in original}):
                if not (component == "image_encoder" and "model.visual.cls_embedding" in keys):
                    assert detect_component(keys, family="wan") == ("wan", component)


def with_lora(targets=None, seed=0):
    return with_random_lora(Wan, targets=targets, seed=seed)


def test_the_recipe_s_targets_are_diffsynth_s():
    state = lora_from_memory(lora_state_dict(with_lora()), target="diffsynth", names=Wan.layer_names("dit"))
    layers = [f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
    assert set(state) == {
        f"blocks.{block}.{layer}.lora_{part}.default.weight" for block in range(2) for layer in layers for part in "AB"
    }


def test_targets_by_either_name_adapt_the_same_layers():
    dit, names = Wan.build_tiny(0, components=["dit"]).components["dit"], Wan.layer_names("dit")
    original = resolve_lora_targets(dit, ["q", "k", "v", "o", "ffn.0", "ffn.2"], names=names)
    own = resolve_lora_targets(dit, ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"], names=names)
    assert original == own
    assert len(own) == 20
    assert resolve_lora_targets(dit, ["self_attn.q"], names=names) == ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q"]


@pytest.mark.parametrize("target", LORA_FORMATS)
def test_lora_names_round_trip_and_load(target):
    dit, names = with_lora(), Wan.layer_names("dit")
    state = lora_state_dict(dit)
    there = lora_from_memory(state, target=target, names=names)
    modules = [key.partition(".lora_")[0] for key in state]
    back = lora_to_memory(there, names=names, modules=modules)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    other = with_lora(seed=1)
    load_lora(other, there, names=names)
    assert all(torch.equal(tensor, state[key]) for key, tensor in lora_state_dict(other).items())


def test_first_key_of_each_format():
    state = lora_state_dict(with_lora(["q"]))
    first = {
        target: next(iter(lora_from_memory(state, target=target, names=Wan.layer_names("dit")))) for target in LORA_FORMATS
    }
    assert first == {
        "diffsynth": "blocks.0.self_attn.q.lora_A.default.weight",
        "diffusers": "transformer.blocks.0.attn1.to_q.lora_A.weight",
        "comfyui": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "kohya": "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    }


@pytest.mark.parametrize("target", ["diffusers", "comfyui", "kohya"])
def test_diffusers_loads_the_export(target, text_to_video):
    from diffusers import WanPipeline

    trained, names = with_lora(), Wan.layer_names("dit")
    state = lora_from_memory(lora_state_dict(trained), target=target, names=names)
    plain = Wan.build_tiny(0, components=["dit"])
    batch = text_to_video.encode(PROMPTS, pixels())
    before = plain.predict(batch, batch.latents, TIMES)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    WanPipeline(transformer=plain.components["dit"], **parts).load_lora_weights(state)
    after = plain.predict(batch, batch.latents, TIMES)
    plain.components["dit"] = trained
    expected = plain.predict(batch, batch.latents, TIMES)
    assert (after - before).abs().max() > 1e-2
    assert (after - expected).abs().max() < 1e-5


def test_full_weights_round_trip(tmp_path, text_to_video):
    save_file(
        {
            f"pipe.dit.{key}": tensor.clone()
            for key, tensor in Wan.checkpoint_tensors("dit", text_to_video.components["dit"].state_dict()).items()
        },
        tmp_path / "full.safetensors",
    )
    other = Wan.build_tiny(7, components=["dit"])
    load_exported(other, ["dit"], [tmp_path / "full.safetensors"])
    for key, tensor in text_to_video.components["dit"].state_dict().items():
        assert torch.equal(other.components["dit"].state_dict()[key], tensor)


def test_a_tokenizer_that_is_missing(tmp_path):
    with pytest.raises(ModelError, match="tokenizer_path"):
        Wan.load_tokenizer("tokenizer_path", tmp_path)


def test_an_image_of_another_size_is_squeezed(image_to_video):
    clip = pixels()
    big = torch.full((1, 64, 48, 3), 200, dtype=torch.uint8).numpy()
    batch = image_to_video.encode(PROMPTS, clip, extra={"input_image": ((big,), (big,))})
    same = torch.full((1, 32, 32, 3), 200, dtype=torch.uint8)
    expected = image_to_video.encode(PROMPTS, clip, extra={"input_image": ((same,), (same,))})
    assert torch.equal(batch.conditions["image_latents"], expected.conditions["image_latents"])
    with pytest.raises(ModelError, match="one picture a sample, got 2 files"):
        image_to_video.encode(PROMPTS, clip, extra={"input_image": ((big, big), (big,))})
