"""Wan VACE against diffusers' one class: two modules from one file, control clips, masks and a reference picture."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from random_lora import with_random_lora
from safetensors.torch import load_file, save_file
from torch import nn

from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import ModelError
from diffsynth_ray.memory.fp8 import convert_to_fp8
from diffsynth_ray.models import wan_configs as configs
from diffsynth_ray.models.family import REFERENCE, BatchShape, EncodedBatch
from diffsynth_ray.models.inspection import inspect_model
from diffsynth_ray.models.lora import load_lora, lora_state_dict
from diffsynth_ray.models.names import LORA_FORMATS, lora_from_memory
from diffsynth_ray.models.sampling import SampleRequest
from diffsynth_ray.models.wan import VACE_CONTROL, Wan
from diffsynth_ray.models.weights import load_components
from diffsynth_ray.train.graph import SampleBatch, TrainGraph
from diffsynth_ray.train.initial import load_exported

torch.set_num_threads(1)
PROMPTS = ["a big rabbit", "a small dog in the house"]
TIMES = torch.tensor([900.0, 30.0])
COLUMNS = ["vace_video", "vace_reference_image"]


def clips(seed, num_frames=5):
    shape = (2, num_frames, 32, 32, 3)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def mask():
    """A rectangle in the first sample's frames 2 to 5, all of the second's first frame: black and white."""
    white = torch.zeros(2, 5, 32, 32, 3, dtype=torch.uint8)
    white[0, 1:, 3:22, 13:] = 255
    white[1, 0] = 255
    return white


def column(values):
    return tuple((one,) for one in values)


GIVEN = {"vace_video": column(clips(1)), "vace_reference_image": column(clips(2, 1)), "vace_video_mask": column(mask())}
CASES = {
    "video and reference": COLUMNS,
    "video": ["vace_video"],
    "reference": ["vace_reference_image"],
    "all": ["vace_video", "vace_video_mask", "vace_reference_image"],
}


def extra(names):
    return {name: GIVEN[name] for name in names}


@pytest.fixture(scope="module")
def family():
    return Wan.build_tiny(0, extra_inputs=COLUMNS)


def joined(family):
    """diffusers' class with the weights of both modules, which have its names."""
    from diffusers import WanVACETransformer3DModel

    one = WanVACETransformer3DModel(**configs.TINY_VACE_DIT, vace_layers=[0, 2])
    one.load_state_dict({**family.component("dit").state_dict(), **family.component("vace").state_dict()})
    return one.eval()


def pipeline(family, transformer=None):
    from diffusers import UniPCMultistepScheduler, WanVACEPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    pipe = WanVACEPipeline(
        tokenizer=None, text_encoder=None, vae=family.component("vae"), scheduler=scheduler,
        transformer=transformer or joined(family),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def floats(pixels):
    return pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def control_of_the_pipeline(family, names):
    pipe, found = pipeline(family), []
    for number in range(2):
        video = floats(clips(1)[number : number + 1]) if "vace_video" in names else torch.zeros(1, 3, 5, 32, 32)
        white = mask()[number : number + 1].permute(0, 4, 1, 2, 3) / 255
        white = white if "vace_video_mask" in names else torch.ones_like(video)
        pictures = [[floats(clips(2, 1))[number, :, 0]] if "vace_reference_image" in names else []]
        latents = pipe.prepare_video_latents(video, white, pictures, device="cpu")
        found.append(torch.cat([latents, pipe.prepare_masks(white, pictures)], dim=1))
    return torch.cat(found)


def padded_text(batch):
    text = batch.conditions["prompt_embeds"]
    return nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_control_and_the_prediction_are_diffusers(family, case):
    encoded = family.encode(PROMPTS, clips(0), extra=extra(CASES[case]))
    control = control_of_the_pipeline(family, CASES[case])
    assert control.shape[1] == 96
    assert (encoded.conditions[VACE_CONTROL] - control).abs().max() < 1e-5
    batch = encoded.with_reference()
    assert REFERENCE not in batch.conditions
    assert batch.latents.shape[2] == control.shape[2] == (3 if "vace_reference_image" in CASES[case] else 2)
    assert torch.equal(batch.latents[:, :, -2:], encoded.latents)
    if "vace_reference_image" in CASES[case]:
        assert (batch.latents[:, :, :1] - control[:, :16, :1]).abs().max() < 1e-5
    found = family.predict(batch, batch.latents, TIMES)
    expected = joined(family)(
        batch.latents, timestep=TIMES, encoder_hidden_states=padded_text(batch), control_hidden_states=control
    ).sample
    assert (found - expected).abs().max() < 1e-5
    # The control matters, and leaves nothing behind in the DiT.
    other = EncodedBatch(batch.latents, batch.conditions | {VACE_CONTROL: control.flip(0)})
    assert (family.predict(other, batch.latents, TIMES) - expected).abs().max() > 1e-3
    assert (family.predict(batch, batch.latents, TIMES) - expected).abs().max() < 1e-5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in family.component("dit").modules())


@pytest.mark.parametrize("case", ["video and reference", "video"])
def test_the_loss_counts_the_reference_too(family, case):
    names = CASES[case]
    graph = TrainGraph(family, trained=["vace"], extra_inputs=names)
    samples = SampleBatch(clips(0).numpy(), tuple(PROMPTS), (0, 1), extra(names))
    shape = graph.latents_shape(samples)
    batch = graph.encode(samples)
    assert shape == graph.latents_shape(batch) == tuple(batch.latents.shape[1:])
    from_cache = family.encode(PROMPTS, clips(0), extra=extra(names))
    assert graph.latents_shape(from_cache) == shape
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([100, 700])
    losses = graph(samples, noise, ids).detach()
    assert graph(from_cache, noise, ids).detach() == pytest.approx(losses, rel=1e-6)
    assert torch.equal(graph.from_tensors(graph.to_tensors(from_cache, noise, ids)).detach(), losses)

    even = torch.linspace(1, 0, 1001)[:-1]
    sigmas = 5 * even / (1 + 4 * even)
    bell = torch.exp(-2 * ((sigmas * 1000 - 500) / 1000) ** 2)
    weights = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    clean = family.encode_image(clips(0))
    if "vace_reference_image" in names:
        clean = torch.cat([family.encode_image(clips(2, 1)), clean], dim=2)
    sigma = sigmas[ids].view(2, 1, 1, 1, 1)
    with torch.no_grad():
        pred = joined(family)(
            (1 - sigma) * clean + sigma * noise, timestep=sigmas[ids] * 1000, encoder_hidden_states=padded_text(batch),
            control_hidden_states=control_of_the_pipeline(family, names),
        ).sample  # fmt: skip
    expected = ((pred - (noise - clean)) ** 2).mean(dim=(1, 2, 3, 4)) * weights[ids]
    assert losses == pytest.approx(expected, rel=1e-5)


def original(family, prefix=""):
    parts = [Wan.checkpoint_tensors(name, family.component(name).state_dict()) for name in ("dit", "vace")]
    return {prefix + key: tensor.clone() for part in parts for key, tensor in part.items()}


def write_original(family, folder):
    """Shards of which one has VACE's tensors alone."""
    state = original(family)
    shards = [[key for key in state if key.startswith("vace_")], [key for key in state if not key.startswith("vace_")]]
    paths = [folder / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for path, keys in zip(paths, shards, strict=True):
        save_file({key: state[key] for key in keys}, path)
    return [str(path) for path in paths]


def write_comfyui(family, folder):
    save_file(original(family, "model.diffusion_model."), folder / "vace.safetensors")
    return str(folder / "vace.safetensors")


def write_diffusers(family, folder):
    joined(family).save_pretrained(folder)
    return str(folder / "diffusion_pytorch_model.safetensors")


def write_diffusers_without_config(family, folder):
    path = write_diffusers(family, folder)
    (folder / "config.json").unlink()
    return path


@pytest.mark.parametrize("layout", [write_original, write_comfyui, write_diffusers, write_diffusers_without_config])
def test_one_file_is_two_components_in_every_layout(family, layout, tmp_path):
    name, files = load_components([layout(family, tmp_path)], family="wan")
    assert (name, set(files)) == ("wan", {"dit", "vace"})
    loaded = Wan.load(files, dtype=torch.float32)
    for component in ("dit", "vace"):
        own, read = (one.component(component).state_dict() for one in (family, loaded))
        assert own.keys() == read.keys()
        assert all(torch.equal(own[key], read[key]) for key in own)
    assert loaded.component("vace").layers_of(4) == [0, 2]
    assert set(Wan.load(files, components=["dit"], dtype=torch.float32).components) == {"dit"}


def test_a_plan_names_both(family, tmp_path):
    job = Job.model_validate(
        {"name": "job", "model": {"family": "wan", "paths": [write_original(family, tmp_path)]}, "lora": {"base_model": "vace"}}
    )
    entries, problems = inspect_model(job)
    assert entries[0].line().startswith("dit and vace: diffusion_pytorch_model-00001-of-00002.safetensors and 1 more")
    assert problems == []


def test_the_first_release_s_names_are_what_diffusers_converts(family):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted = convert_wan_transformer_to_diffusers(original(family))
    own = joined(family).state_dict()
    assert converted.keys() == own.keys()
    assert all(torch.equal(converted[key], own[key]) for key in own)


def test_a_trained_vace_is_a_file_of_its_own_too(family, tmp_path):
    state = Wan.checkpoint_tensors("vace", family.component("vace").state_dict())
    assert {key.split(".")[0] for key in state} == {"vace_blocks", "vace_patch_embedding"}
    save_file({f"pipe.vace.{key}": tensor.clone() for key, tensor in state.items()}, tmp_path / "full.safetensors")
    other = Wan.build_tiny(7, extra_inputs=COLUMNS, components=["vace"])
    load_exported(other, ["vace"], [tmp_path / "full.safetensors"])
    read = other.component("vace").state_dict()
    assert all(torch.equal(tensor, read[key]) for key, tensor in family.component("vace").state_dict().items())
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "trained.safetensors")
    assert set(load_components([tmp_path / "trained.safetensors"], family="wan")[1]) == {"vace"}
    whole = write_comfyui(family, tmp_path)
    with pytest.raises(ModelError, match="component vace is given twice"):
        load_components([whole, tmp_path / "trained.safetensors"], family="wan")


# The digests by which DiffSynth-Studio recognises the files; see test_full_size.py.
RELEASED = {
    "1.3B": ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 15, "a61453409b67cd3246cf0c3bebad47ba"),
    "14B": ({"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, 8, "7a513e1f257a861512b1afd387a8ecd9"),
}


@pytest.mark.parametrize("size", ["1.3B", pytest.param("14B", marks=pytest.mark.slow)])
def test_the_released_files_have_the_keys_that_are_expected(size):
    dit, count, expected = RELEASED[size]
    heads = {"num_attention_heads": dit["num_attention_heads"], "attention_head_dim": 128, "ffn_dim": dit["ffn_dim"]}
    with torch.device("meta"):
        modules = {
            "dit": Wan.build_component("dit", dit),
            "vace": Wan.build_component("vace", heads | {"num_vace_blocks": count}),
        }
    shapes = {}
    for component, module in modules.items():
        state = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
        own = {key: tuple(tensor.shape) for key, tensor in Wan.checkpoint_tensors(component, state).items()}
        shapes |= own
        with torch.device("meta"):
            again = Wan.build_component(component, Wan.infer_config(component, own))
        assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {
            name: tensor.shape for name, tensor in state.items()
        }
    parts = sorted([f"{key}:{'_'.join(map(str, shape))}" for key, shape in shapes.items()] + list(shapes))
    assert hashlib.md5(",".join(parts).encode()).hexdigest() == expected
    layers = list(range(0, 30, 2)) if size == "1.3B" else list(range(0, 40, 5))
    assert modules["vace"].layers_of(dit["num_layers"]) == layers


def with_lora(seed=0):
    return with_random_lora(Wan, "vace", extra_inputs=COLUMNS, seed=seed)


def test_lora_names_are_diffsynth_s():
    state = lora_from_memory(lora_state_dict(with_lora()), target="diffsynth", names=Wan.layer_names("vace"))
    layers = [f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
    assert set(state) == {
        f"vace_blocks.{block}.{layer}.lora_{part}.default.weight" for block in range(2) for layer in layers for part in "AB"
    }


@torch.no_grad()
@pytest.mark.parametrize("target", LORA_FORMATS)
def test_exports_load_again_and_into_diffusers(family, target, tmp_path):
    trained, names = with_lora(), Wan.layer_names("vace")
    save_file(lora_from_memory(lora_state_dict(trained), target=target, names=names), tmp_path / "lora.safetensors")
    fresh = with_lora(seed=1)
    load_lora(fresh, tmp_path / "lora.safetensors", names=names)
    own, read = lora_state_dict(trained), lora_state_dict(fresh)
    assert all(torch.equal(own[key], read[key]) for key in own)
    if target != "diffusers":
        return  # diffusers' converters of Wan's other names know the DiT's blocks alone
    batch = family.encode(PROMPTS, clips(0), extra=extra(COLUMNS)).with_reference()
    transformer = joined(family)
    pipeline(family, transformer).load_lora_weights(load_file(tmp_path / "lora.safetensors"))
    arguments = {"timestep": TIMES, "encoder_hidden_states": padded_text(batch)}
    found = transformer(batch.latents, control_hidden_states=batch.conditions[VACE_CONTROL], **arguments).sample
    plain = family.predict(batch, batch.latents, TIMES)
    with_it = Wan(family.components | {"vace": trained}, dtype=torch.float32, device="cpu", tokenizer_paths=Wan.tiny_tokenizers)
    assert (found - with_it.predict(batch, batch.latents, TIMES)).abs().max() < 1e-5
    assert (found - plain).abs().max() > 1e-3


def test_the_sample_is_the_pipeline_s(family):
    picture = Image.fromarray(clips(2, 1)[0, 0].numpy())
    request = SampleRequest("a rabbit", 32, 32, 5, 2, 3.0, 0, (picture,))
    embeds = [nn.functional.pad(e, (0, 0, 0, 512 - e.shape[1])) for e in
              (family.encode_text([text])["prompt_embeds"] for text in ("a rabbit", ""))]  # fmt: skip
    expected = pipeline(family)(
        prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], height=32, width=32, num_frames=5, num_inference_steps=2,
        guidance_scale=3.0, generator=request.generator(), reference_images=[picture], output_type="np",
    ).frames[0]  # fmt: skip
    assert np.abs(family.sample(request).astype(float) - expected * 255).max() <= 1


@pytest.mark.parametrize("eight_bit", [False, True])
def test_samples_are_made_wherever_the_weights_are_and_of_eight_bit_ones(eight_bit, monkeypatch):
    from diffusers import ModelMixin

    family = Wan.build_tiny(0, extra_inputs=COLUMNS, dtype=torch.bfloat16)
    if eight_bit:
        convert_to_fp8([*family.repeated_blocks("dit"), *family.repeated_blocks("vace")])
    made = []
    for seed in (2, 3):
        picture = Image.fromarray(clips(seed, 1)[0, 0].numpy())
        made.append(family.sample(SampleRequest("a rabbit", 32, 32, 5, 2, 1.0, 0, (picture,))))
    assert made[0].shape == (5, 32, 32, 3)
    assert (made[0] != made[1]).any()
    monkeypatch.setattr(ModelMixin, "device", property(lambda self: torch.device("meta")))
    assert (family.sample(SampleRequest("a rabbit", 32, 32, 5, 2, 1.0, 0, (picture,))) == made[1]).all()


@pytest.mark.parametrize("case", CASES)
def test_a_blank_batch_is_like_a_real_one(family, case):
    blank = family.blank_batch(BatchShape(2, 32, 32, 5), extra_inputs=CASES[case])
    real = family.encode(PROMPTS, clips(0), extra=extra(CASES[case]))
    shapes = [{name: tensor.shape for name, tensor in one.conditions.items() if "prompt" not in name} for one in (blank, real)]
    assert shapes[0] == shapes[1]
    assert blank.latents.shape == real.latents.shape


def test_what_does_not_fit_is_said(family):
    with pytest.raises(ModelError, match=r"VACE takes no input_image; give it the clip's frames as vace_video"):
        family.encode(PROMPTS, clips(0), extra=extra(COLUMNS) | {"input_image": column(clips(2, 1))})
    with pytest.raises(ModelError, match=r"vace_video must be like .* 5 frames of 32x32, got 1 frames of 32x32"):
        family.encode(PROMPTS, clips(0), extra={"vace_video": column(clips(2, 1))})
    with pytest.raises(ModelError, match=r"vace_video takes one clip a sample, got 'a.mp4'; see dataset.data_file_keys"):
        family.encode(PROMPTS, clips(0), extra={"vace_video": ("a.mp4", "b.mp4")})
    batch = family.encode(PROMPTS, clips(0))
    with pytest.raises(ModelError, match="is VACE, and got none of vace_video, vace_video_mask, vace_reference_image"):
        family.predict(batch, batch.latents, TIMES)
    plain = Wan.build_tiny(0)
    control = plain.encode(PROMPTS, clips(0), extra=extra(COLUMNS)).with_reference()
    with pytest.raises(ModelError, match="component 'vace' is needed but not loaded"):
        plain.predict(control, control.latents, TIMES)
    with pytest.raises(ModelError, match="wan vace: 352 input channels; this version trains"):
        Wan.infer_config("vace", {"vace_patch_embedding.weight": (64, 352, 1, 2, 2)})
    with pytest.raises(ModelError, match="its 2 blocks do not go evenly into the dit's 3"):
        family.component("vace").layers_of(3)
