import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import edit_pictures
from diffsynth_ray.models import qwen_image_edit as edit
from diffsynth_ray.models.edit_pictures import EDIT_SHAPES, EDIT_TOKENS
from diffsynth_ray.models.family import EncodedBatch
from diffsynth_ray.models.packing import pack_latents
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.train.graph import SampleBatch, TrainGraph

torch.set_num_threads(1)
PROMPTS = ("a small dog in the house", "a red square")
TIMES = torch.tensor([900.0, 30.0])
VAE_AREA, SEEN_AREA = 64 * 64, 56 * 56


def picture(seed, height=64, width=96):
    return np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


ONE = {"edit_image": ((picture(0),), (picture(1),))}
SEVERAL = {"edit_image": ((picture(0),), (picture(1), picture(2, 96, 32)))}


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(edit_pictures, "AREA", VAE_AREA)
    monkeypatch.setattr(edit, "_SEEN_AREA", SEEN_AREA)


@pytest.fixture(scope="module")
def family():
    return QwenImage.build_tiny(0, extra_inputs=["edit_image"])


def pixels():
    return torch.randint(0, 256, (2, 1, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def plain_dit(family, **config):
    """diffusers' own transformer with the family's weights."""
    from diffusers import QwenImageTransformer2DModel

    dit = family.components["dit"]
    plain = QwenImageTransformer2DModel.from_config({**dit.config, **config})
    plain.load_state_dict(dit.state_dict())
    return plain.eval()


def as_seen(array, area):
    return edit.scaled(Image.fromarray(array[0]), area)


def test_pictures_are_scaled_as_diffusers_does_it():
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    for width, height in ((640, 480), (333, 1000), (2000, 31), (64, 64)):
        for area in (1024 * 1024, 384 * 384):
            scaled = edit.scaled(Image.new("RGB", (width, height)), area)
            assert scaled.size == calculate_dimensions(area, width / height)


@pytest.mark.parametrize(("numbered", "arrays"), [(False, [0]), (True, [0]), (True, [0, 1])])
def test_the_prompt_is_read_with_the_pictures(family, numbered, arrays):
    """The templates are those of diffusers' two pipelines; positions are three-dimensional, as the encoder was trained."""
    from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer"))
    pipe = (QwenImageEditPlusPipeline if numbered else QwenImageEditPipeline)(**parts)
    arrays = [picture(seed) for seed in arrays]
    family.options = {"edit_prompt": "numbered"} if numbered else {}
    embeds = family._read_prompt(PROMPTS[0], edit.for_the_vae([Image.fromarray(one[0]) for one in arrays]))["prompt_embeds"]
    family.options = {}

    seen = [edit.scaled(as_seen(one, VAE_AREA), SEEN_AREA) if numbered else as_seen(one, VAE_AREA) for one in arrays]
    vision = family.tokenizers["processor_path"](images=seen, return_tensors="pt")
    intro = "".join(f"Picture {i + 1}: <|vision_start|>#{i}<|vision_end|>" for i in range(len(seen))) if numbered else ""
    text = pipe.prompt_template_encode.format(intro + PROMPTS[0]).replace("<|image_pad|>", "#0")
    for number, (_, rows, columns) in enumerate(vision.image_grid_thw.tolist()):
        text = text.replace(f"#{number}", "<|image_pad|>" * (rows * columns // 4))
    ids = family.tokenizers["tokenizer_path"](text, return_tensors="pt").input_ids
    states = family.components["text_encoder"](
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=vision.pixel_values,
        image_grid_thw=vision.image_grid_thw,
        mm_token_type_ids=(ids == 552).int(),
        output_hidden_states=True,
    ).hidden_states[-1]
    assert (embeds - states[:, pipe.prompt_template_encode_start_idx :]).abs().max() < 1e-5
    other = family._read_prompt(PROMPTS[0], edit.for_the_vae([Image.fromarray(picture(9)[0])] * len(arrays)))["prompt_embeds"]
    assert (embeds.mean() - other.mean()).abs() > 1e-6


def test_latents_become_tokens_behind_each_other(family):
    batch = family.encode(PROMPTS, pixels(), extra=SEVERAL)
    second = batch.samples()[1].conditions
    assert second[EDIT_SHAPES].tolist() == [[[1, 4, 4], [1, 6, 2]]]
    vae = family.components["vae"]
    tokens = []
    for array in SEVERAL["edit_image"][1]:
        floats = torch.from_numpy(np.array(as_seen(array, VAE_AREA))).permute(2, 0, 1)[None, :, None] / 127.5 - 1
        mode = vae.encode(floats).latent_dist.mode()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        tokens.append(pack_latents(((mode - mean) / std)[:, :, 0]))
    assert (second[EDIT_TOKENS] - torch.cat(tokens, dim=1)).abs().max() < 1e-5


def reference_prediction(dit, sample, noisy, time):
    """diffusers' transformer, called as its edit pipelines call it, for one sample."""
    tokens = torch.cat([pack_latents(noisy), sample.conditions[EDIT_TOKENS]], dim=1)
    shapes = [[(1, noisy.shape[2] // 2, noisy.shape[3] // 2), *map(tuple, sample.conditions[EDIT_SHAPES][0].tolist())]]
    output = dit(
        hidden_states=tokens,
        encoder_hidden_states=sample.conditions["prompt_embeds"],
        timestep=time / 1000,
        img_shapes=shapes,
        return_dict=False,
    )[0]
    return output[:, : noisy.shape[2] * noisy.shape[3] // 4]


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("extra", [ONE, SEVERAL])
def test_the_dit_is_diffusers(family, extra, zero_cond_t):
    own = QwenImage.build_tiny(0, options={"zero_cond_t": zero_cond_t})
    batch = own.encode(PROMPTS, pixels(), extra=extra)
    pred = own.predict(batch, batch.latents, TIMES)
    dit = plain_dit(own, zero_cond_t=zero_cond_t)
    for index, sample in enumerate(batch.samples()):
        expected = reference_prediction(dit, sample, sample.latents, TIMES[index : index + 1])
        assert (pack_latents(pred[index : index + 1]) - expected).abs().max() < 1e-5
    plain = family.predict(EncodedBatch(batch.latents, family.encode_text(PROMPTS)), batch.latents, TIMES)
    assert (plain - pred).abs().max() > 1e-2


def test_the_loss_is_the_reference(family):
    graph = TrainGraph(family, trained=["dit"], extra_inputs=["edit_image"])
    samples = SampleBatch(pixels().numpy(), PROMPTS, (0, 1), SEVERAL)
    batch = graph.encode(samples)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([100, 700])
    losses = graph(samples, noise, ids)
    sigmas, weights = graph.table.sigmas, graph.table.weights
    dit = plain_dit(family)
    for index, sample in enumerate(batch.samples()):
        sigma, own = sigmas[ids[index]], noise[index : index + 1]
        noisy = (1 - sigma) * sample.latents + sigma * own
        pred = reference_prediction(dit, sample, noisy, sigma[None] * 1000)
        expected = (pred - pack_latents(own - sample.latents)).square().mean() * weights[ids[index]]
        assert losses[index].item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ModelError, match="no column edit_image"):
        graph(SampleBatch(samples.pixels, PROMPTS, (0, 1)), noise, ids)


def test_what_cannot_be_used_is_named(family, tmp_path):
    with pytest.raises(ModelError, match="takes pictures"):
        family.encode(PROMPTS, pixels(), extra={"edit_image": ("a.png", "b.png")})
    with pytest.raises(ModelError, match="takes edit_image, got input_image"):
        family.encode(PROMPTS, pixels(), extra={"input_image": ONE["edit_image"]})
    with pytest.raises(ModelError, match="preprocessor_config"):
        QwenImage.load_tokenizer("processor_path", tmp_path)
    with pytest.raises(ModelError, match="edit_prompt is one of auto, numbered"):
        QwenImage.build_tiny(0, options={"edit_prompt": "x"}).encode(PROMPTS, pixels(), extra=ONE)
