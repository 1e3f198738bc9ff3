"""FLUX.1 Kontext against diffusers: pictures to edit as the transformer and the pipeline get them."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.edit_pictures import EDIT_SHAPES, EDIT_TOKENS
from diffsynth_ray.models.family import BatchShape, EncodedBatch
from diffsynth_ray.models.flux import Flux
from diffsynth_ray.models.sampling import SampleRequest
from diffsynth_ray.train.graph import SampleBatch, TrainGraph

torch.set_num_threads(1)
PROMPTS = ["make it red", "a cat in a hat"]
TIMES = torch.tensor([900.0, 30.0])


def picture(seed, height=32, width=48):
    return np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


def pixels():
    return torch.from_numpy(np.stack([picture(8), picture(9)]))


ONE = {"kontext_images": ((picture(0),), (picture(1),))}
SEVERAL = {"kontext_images": ((picture(0),), (picture(1), picture(2, 64, 16)))}


@pytest.fixture(scope="module")
def family():
    return Flux.build_tiny(0, extra_inputs=["kontext_images"])


def by_diffusers(family, batch, number):
    """One sample by diffusers' transformer, called as FluxKontextPipeline calls it."""
    from diffusers import FluxKontextPipeline

    sample, noisy = batch.samples()[number], batch.latents[number : number + 1]
    _, c, h, w = noisy.shape
    ids = [FluxKontextPipeline._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", torch.float32)]
    tokens = [FluxKontextPipeline._pack_latents(noisy, 1, c, h, w), sample.conditions[EDIT_TOKENS]]
    for _, rows, columns in sample.conditions[EDIT_SHAPES][0].tolist():
        given = FluxKontextPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
        given[..., 0] = 1
        ids.append(given)
    output = family.component("dit")(
        hidden_states=torch.cat(tokens, dim=1),
        timestep=TIMES[number : number + 1] / 1000,
        guidance=torch.ones(1),
        pooled_projections=sample.conditions["pooled_prompt_embeds"],
        encoder_hidden_states=sample.conditions["prompt_embeds"],
        txt_ids=torch.zeros(512, 3),
        img_ids=torch.cat(ids),
    ).sample[:, : tokens[0].shape[1]]
    return FluxKontextPipeline._unpack_latents(output, h * 8, w * 8, 8)


@torch.no_grad()
@pytest.mark.parametrize("extra", [ONE, SEVERAL], ids=["one", "several"])
def test_the_dit_is_diffusers(family, extra):
    batch = family.encode(PROMPTS, pixels(), extra=extra)
    found = family.predict(batch, batch.latents, TIMES)
    expected = torch.cat([by_diffusers(family, batch, number) for number in range(2)])
    assert found.shape == batch.latents.shape
    assert (found - expected).abs().max() < 1e-5
    # The pictures matter, and are those of the vae at their own sizes.
    other = family.encode(PROMPTS, pixels(), extra={"kontext_images": ((picture(5),), (picture(6),))})
    assert (family.predict(other, other.latents, TIMES) - expected).abs().max() > 1e-3
    latents = family.encode_image(torch.from_numpy(extra["kontext_images"][1][-1])[None])
    shape = batch.samples()[1].conditions[EDIT_SHAPES][0, -1].tolist()
    assert shape == [1, latents.shape[2] // 2, latents.shape[3] // 2]


def test_the_loss_counts_the_picture_that_is_made_alone(family):
    batch = family.encode(PROMPTS, pixels(), extra=ONE)
    graph = TrainGraph(family, trained=["dit"], extra_inputs=["kontext_images"])
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([100, 700])
    losses = graph(SampleBatch(pixels().numpy(), tuple(PROMPTS), (0, 1), ONE), noise, ids).detach()
    encoded = graph(EncodedBatch(batch.latents, batch.conditions), noise, ids).detach()
    assert losses == pytest.approx(encoded, rel=1e-6)
    even = torch.linspace(1, 0.003 / 1.002, 1000)
    sigmas = 3 * even / (1 + 2 * even)
    bell = torch.exp(-2 * ((sigmas * 1000 - 500) / 1000) ** 2)
    weights = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    sigma = sigmas[ids].view(2, 1, 1, 1)
    noisy = (1 - sigma) * batch.latents + sigma * noise
    with torch.no_grad():
        pred = family.predict(EncodedBatch(batch.latents, batch.conditions), noisy, sigmas[ids] * 1000)
    expected = ((pred - (noise - batch.latents)) ** 2).mean(dim=(1, 2, 3)) * weights[ids]
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_blank_batch_is_like_a_real_one(family):
    blank = family.blank_batch(BatchShape(2, 32, 48), extra_inputs=["kontext_images"])
    real = family.encode(PROMPTS, pixels(), extra=ONE)
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in one.conditions.items()} for one in (blank, real)]
    assert shapes[0] == shapes[1]
    assert blank.conditions[EDIT_SHAPES].tolist() == real.conditions[EDIT_SHAPES].tolist()


def test_the_sample_is_the_pipelines(family):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

    from diffsynth_ray.models import flux_configs as configs

    request = SampleRequest("make it red", 32, 48, 1, 2, 2.5, 0, (Image.fromarray(picture(3, 64, 96)[0]),))
    made = family.sample(request)[0]
    text = family.encode_text([request.prompt])
    pipeline = FluxKontextPipeline(
        FlowMatchEulerDiscreteScheduler(**configs.SCHEDULER), family.component("vae"), None, None, None, None,
        family.component("dit"),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        image=request.inputs[0].resize((48, 32)), height=32, width=48, num_inference_steps=2, guidance_scale=2.5,
        generator=request.generator(), output_type="np", max_area=32 * 48, _auto_resize=False, **text,
    ).images[0]  # fmt: skip
    assert np.abs(made.astype(float) - expected * 255).max() <= 1
    plain = family.sample(SampleRequest("make it red", 32, 48, 1, 2, 2.5, 0))[0]
    assert (plain != made).any()


def test_what_is_wrong_with_extra_inputs_is_said(family):
    with pytest.raises(ModelError, match="flux takes kontext_images, got edit_image"):
        Flux.build_tiny(0, extra_inputs=["edit_image"])
    with pytest.raises(ModelError, match="flux takes kontext_images, got edit_image"):
        family.encode(PROMPTS, pixels(), extra={"edit_image": ONE["kontext_images"]})
    with pytest.raises(ModelError, match=r"kontext_images takes pictures, got 'a.png'; is it in dataset.data_file_keys"):
        family.encode(PROMPTS, pixels(), extra={"kontext_images": ("a.png", "b.png")})
