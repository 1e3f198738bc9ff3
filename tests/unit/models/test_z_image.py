import pytest
import torch
from random_lora import with_random_lora
from safetensors.torch import load_file, save_file

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import z_image_configs as configs
from diffsynth_ray.models.family import detect_component
from diffsynth_ray.models.image_vae import as_convolution
from diffsynth_ray.models.lora import load_lora, lora_state_dict
from diffsynth_ray.models.names import LORA_FORMATS, lora_from_memory, lora_to_memory
from diffsynth_ray.models.weights import load_components
from diffsynth_ray.models.z_image import ZImage
from diffsynth_ray.train.graph import SampleBatch, TrainGraph

torch.set_num_threads(1)
PROMPTS = ["a cat", "a small dog in the house"]
TIMES = torch.tensor([900.0, 30.0])
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pixels(batch=2):
    return torch.randint(0, 256, (batch, 1, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def family():
    return ZImage.build_tiny(0)


@pytest.fixture(scope="module")
def batch(family):
    return family.encode(PROMPTS, pixels())


def predict(family, batch, times=TIMES):
    with torch.no_grad():
        return family.predict(batch, batch.latents, times)


def write_released(family, folder, *, with_configs=True):
    """As Tongyi-MAI/Z-Image has them: diffusers' layout, Qwen3 as a causal language model without its tied head."""
    names = {"dit": "transformer", "vae": "vae", "text_encoder": "text_encoder"}
    entries = []
    for component, module in family.components.items():
        module.save_pretrained(folder / names[component])
        path = next((folder / names[component]).glob("*.safetensors"))
        if component == "text_encoder":
            save_file({f"model.{key.removeprefix('model.')}": t for key, t in load_file(path).items()}, path)
        if not with_configs:
            (folder / names[component] / "config.json").unlink()
        entries.append(str(path))
    return entries


@pytest.mark.parametrize("with_configs", [True, False])
def test_released_files_load(with_configs, tmp_path, family, batch):
    name, files = load_components(write_released(family, tmp_path, with_configs=with_configs), family="z_image")
    assert (name, set(files)) == ("z_image", set(ZImage.component_names))
    loaded = ZImage.load(files, dtype=torch.float32, tokenizer_paths=ZImage.tiny_tokenizers)
    for component, module in family.components.items():
        state = loaded.components[component].state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())
    again = loaded.encode(PROMPTS, pixels())
    assert torch.equal(again.latents, batch.latents)
    assert all(torch.equal(again.conditions[key], batch.conditions[key]) for key in batch.conditions)
    assert torch.equal(predict(loaded, batch), predict(family, batch))


def test_flux_s_ae_loads_as_the_vae(family, tmp_path):
    state = {f"x.{key}": tensor for key, tensor in family.components["vae"].state_dict().items()}
    from diffsynth_ray.models.flux import Flux

    original = Flux.checkpoint_tensors("vae", {key.removeprefix("x."): tensor for key, tensor in state.items()})
    assert all(as_convolution(key, tensor) is tensor for key, tensor in original.items())
    for key, tensor in original.items():
        for name, own in ZImage.memory_tensors("vae", key, tensor).items():
            assert torch.equal(own, state[f"x.{name}"])


def test_the_text_is_encoded_as_the_pipeline_does(family, batch):
    from diffusers import ZImagePipeline

    tokenizer = family.tokenizers["tokenizer_path"]
    tokenizer.chat_template = CHAT
    parts = dict.fromkeys(("scheduler", "vae", "transformer"))
    pipe = ZImagePipeline(text_encoder=family.components["text_encoder"], tokenizer=tokenizer, **parts)
    expected = pipe._encode_prompt(list(PROMPTS), device=torch.device("cpu"))
    for one, own in zip(batch.samples(), expected, strict=True):
        assert (one.conditions["prompt_embeds"][0] - own).abs().max() < 1e-5


def reference_prediction(dit, batch, noisy, times):
    """diffusers' transformer, called as its pipeline calls it."""
    captions = [one.conditions["prompt_embeds"][0] for one in batch.samples()]
    output = dit(list(noisy.unsqueeze(2).unbind(0)), (1000 - times) / 1000, captions, return_dict=False)[0]
    return -torch.stack(output).squeeze(2)


def test_the_dit_and_vae_are_diffusers(family, batch):
    pred = predict(family, batch)
    assert (pred - reference_prediction(family.components["dit"], batch, batch.latents, TIMES)).abs().max() < 1e-5
    assert pred.std() > 0.05
    for index, one in enumerate(batch.samples()):
        assert (predict(family, one, TIMES[index : index + 1])[0] - pred[index]).abs().max() < 1e-5
    mode = family.components["vae"].encode(pixels()[:, 0].permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
    assert (batch.latents - (mode - 0.1159) * 0.3611).abs().max() < 1e-5


def test_the_loss_is_the_reference(family, batch):
    graph = TrainGraph(family, trained=["dit"])
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([100, 700])
    losses = graph(SampleBatch(pixels().numpy(), tuple(PROMPTS), (0, 1)), noise, ids)
    even = torch.linspace(1, 0, 1001)[:-1]
    sigmas = 3 * even / (1 + 2 * even)
    bell = torch.exp(-2 * ((sigmas * 1000 - 500) / 1000) ** 2)
    weights = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    sigma = sigmas[ids].view(2, 1, 1, 1)
    noisy = (1 - sigma) * batch.latents + sigma * noise
    pred = reference_prediction(family.components["dit"], batch, noisy, sigmas[ids] * 1000)
    expected = ((pred - (noise - batch.latents)) ** 2).mean(dim=(1, 2, 3)) * weights[ids]
    assert losses.detach() == pytest.approx(expected.detach(), rel=1e-5)


def test_detection_and_refusals(family):
    for component, module in family.components.items():
        state = ZImage.checkpoint_tensors(component, module.state_dict())
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        assert detect_component(shapes, family="z_image") == ("z_image", component)
    shapes = {key: tuple(t.shape) for key, t in family.components["dit"].state_dict().items()}
    assert all(ZImage.infer_config("dit", shapes)[key] == value for key, value in configs.TINY["dit"].items())
    with pytest.raises(ModelError, match="Omni"):
        ZImage.infer_config("dit", shapes | {"siglip_embedder.1.weight": (64, 8)})
    with pytest.raises(ModelError, match="takes none"):
        ZImage.build_tiny(0, extra_inputs=["edit_image"])
    with pytest.raises(ModelError, match="tokenizer_path"):
        ZImage.load_tokenizer("tokenizer_path", None)


def with_lora(seed=0):
    return with_random_lora(ZImage, seed=seed)


@pytest.mark.parametrize("target", LORA_FORMATS)
def test_lora_names_round_trip_and_load(target):
    state, names = lora_state_dict(with_lora()), ZImage.layer_names("dit")
    blocks = ("noise_refiner.0", "context_refiner.0", "layers.0", "layers.1")
    layers = [*(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))]
    layers += [f"feed_forward.{name}" for name in ("w1", "w2", "w3")]
    assert {key.partition(".lora_")[0] for key in state} == {f"{block}.{layer}" for block in blocks for layer in layers}
    there = lora_from_memory(state, target=target, names=names)
    back = lora_to_memory(there, names=names, modules=[key.partition(".lora_")[0] for key in state])
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    other = with_lora(seed=1)
    load_lora(other, there, names=names)
    assert all(torch.equal(tensor, state[key]) for key, tensor in lora_state_dict(other).items())


def test_diffusers_loads_the_export(batch):
    from diffusers import ZImagePipeline

    trained = with_lora()
    plain = ZImage.build_tiny(0, components=["dit"])
    before = predict(plain, batch)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    state = lora_from_memory(lora_state_dict(trained), target="diffusers")
    ZImagePipeline(transformer=plain.components["dit"], **parts).load_lora_weights(state)
    after = predict(plain, batch)
    assert (after - before).abs().max() > 1e-2
    assert (after - predict(ZImage({"dit": trained}, dtype=torch.float32, device="cpu"), batch)).abs().max() < 1e-5
