from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.flow_matching import (
    draw_noise_and_timestep,
    draw_validation_noise,
    flow_matching_table,
    make_targets,
    per_sample_loss,
    timestep_id_range,
)

RECORDS = Path(__file__).parents[2] / "assets" / "records"


@pytest.mark.parametrize(
    ("name", "recorded", "file"),
    [
        ("qwen_image", "Qwen-Image", "scheduler_tables"),
        ("wan", "Wan", "scheduler_tables"),
        ("flux", "FLUX.1", "scheduler_tables"),
        ("z_image", "Z-Image", "scheduler_tables"),
        ("flux2", "FLUX.2", "scheduler_table_flux2"),
    ],
)
def test_tables_are_the_recorded_ones(name, recorded, file):
    record = load_file(RECORDS / f"{file}.safetensors")
    table = flow_matching_table(name)
    for part in ("sigmas", "timesteps", "weights"):
        mine, theirs = getattr(table, part), record[f"{recorded}.{part}"]
        assert mine.dtype == torch.float32
        scale = 1000 if part == "timesteps" else 1
        assert (mine - theirs).abs().max() / scale <= 1e-6, part


def test_table_names_are_checked():
    with pytest.raises(ModelError, match="qwen_image"):
        flow_matching_table("qwen")


def test_boundaries_are_fractions_of_the_id_range():
    assert timestep_id_range(0.0, 1.0) == (0, 1000)
    assert timestep_id_range(0.0, 0.358) == (0, 358)
    assert timestep_id_range(0.417, 1.0) == (417, 1000)
    for bounds in [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.9, 0.1)]:
        with pytest.raises(ModelError, match="boundar"):
            timestep_id_range(*bounds)


def test_draws_depend_on_seed_step_and_index_only():
    shape, ids = (16, 8, 12), (0, 1000)
    noise, timestep_id = draw_noise_and_timestep(1, 2, 3, shape=shape, id_range=ids)
    torch.manual_seed(99)
    again, again_id = draw_noise_and_timestep(1, 2, 3, shape=shape, id_range=ids)
    assert torch.equal(noise, again)
    assert timestep_id == again_id
    assert noise.dtype == torch.float32
    assert draw_noise_and_timestep(1, 2, 3, shape=(4,), id_range=ids)[1] == timestep_id
    for other in [(0, 2, 3), (1, 3, 2), (1, 23, 0), (12, 3, 0)]:
        assert not torch.equal(draw_noise_and_timestep(*other, shape=shape, id_range=ids)[0], noise)


def test_draws_are_uniform_over_the_range():
    drawn = [draw_noise_and_timestep(0, step, 0, shape=(1,), id_range=(10, 20))[1] for step in range(400)]
    assert set(drawn) == set(range(10, 20))
    noise = torch.cat([draw_noise_and_timestep(0, step, 1, shape=(64,), id_range=(0, 1))[0] for step in range(100)])
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


@pytest.mark.parametrize("shape", [(2, 16, 4, 6), (2, 16, 3, 4, 6)])
def test_targets(shape):
    table = flow_matching_table("wan")
    latents, noise = torch.randn(shape), torch.randn(shape)
    ids = torch.tensor([0, 700])
    targets = make_targets(latents, noise, ids, table)
    sigma = table.sigmas[700]
    assert torch.allclose(targets.noisy_latents[0], noise[0])
    assert torch.allclose(targets.noisy_latents[1], (1 - sigma) * latents[1] + sigma * noise[1])
    assert torch.equal(targets.target, noise - latents)
    assert torch.equal(targets.timesteps, table.timesteps[ids])
    assert torch.equal(targets.loss_weight, table.weights[ids])


def test_bf16_latents_keep_their_exact_timestep():
    table = flow_matching_table("qwen_image")
    ids = torch.arange(1000)
    latents = torch.zeros(1000, 1, 1, 1, dtype=torch.bfloat16)
    targets = make_targets(latents, torch.ones(1000, 1, 1, 1), ids, table)
    assert targets.noisy_latents.dtype == torch.bfloat16
    assert targets.timesteps.dtype == targets.loss_weight.dtype == targets.target.dtype == torch.float32
    assert len(targets.timesteps.unique()) == 1000


def test_loss_is_per_sample_and_weighted():
    pred, target = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    loss = per_sample_loss(pred, target, torch.tensor([0.0, 1.0, 2.0]))
    assert loss.shape == (3,)
    assert loss[0] == 0
    assert torch.allclose(loss[2], 2 * torch.nn.functional.mse_loss(pred[2], target[2]))


def test_validation_noise_follows_from_its_names_alone() -> None:
    first = draw_validation_noise(0, 1, 2, shape=(4, 8))
    torch.randn(3)
    assert torch.equal(first, draw_validation_noise(0, 1, 2, shape=(4, 8)))
    for names in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(first, draw_validation_noise(*names, shape=(4, 8)))
