"""Steps as CUDA graphs against steps launched kernel by kernel: the same model, samples, noise and timesteps."""

import gc
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from diffsynth_ray.config.schema import Job
from diffsynth_ray.memory.step_replay import MOST_GRAPHS, USUAL_RUNS, StepReplay
from diffsynth_ray.models.family import EncodedBatch
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import MicroInput, Trainer, select_trained

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


def micro(index, side, tokens, count=1):
    generator = torch.Generator().manual_seed(index)
    latents = torch.randn(count, 16, side, side, generator=generator).cuda()
    embeds = torch.randn(count, tokens, 64, generator=generator).cuda()
    return MicroInput(EncodedBatch(latents, {"prompt_embeds": embeds}), tuple(range(index, index + count)))


def train(micros, *, replays, checkpointing=True):
    job = Job.model_validate(
        {
            "name": "test",
            "training": {"learning_rate": 1e-3, "optimizer_args": {"fused": True}},
            "lora": {"base_model": "dit", "rank": 8},
            "gradient": {"checkpointing": checkpointing},
        }
    )
    torch.manual_seed(0)
    family = QwenImage.build_tiny(0, components=["dit"], dtype=torch.bfloat16, device="meta")
    family.device = torch.device("cuda")
    select_trained(family, job)
    said = []
    residency = settle(family, job, say=said.append)
    assert residency.is_replayable
    if not replays:
        residency = replace(residency, is_replayable=False)
    trainer = Trainer(job, family, build_schedule(job, num_samples=100, global_batch_size=2), residency=residency)
    trainer.start(micros[0][0], say=said.append)
    losses, norms = [], []
    for step in micros:
        result = trainer.train_step(step, num_samples=sum(len(one.indices) for one in step))
        losses.append(result.loss_sum.item())
        norms.append(result.grad_norm.item())
    masters = torch.cat([tensor.flatten() for tensor in trainer.strategy.full_masters().values()])
    return losses, norms, masters, trainer.strategy, said


@pytest.mark.parametrize("checkpointing", [True, False])
def test_replayed_steps_are_the_launched_ones(checkpointing):
    # Two shapes in turn, two micro steps of different shapes in a step, and a dummy.
    micros = [[micro(n, 8 if n % 2 else 16, 16)] for n in range(10)]
    micros += [[micro(n, 8, 16), replace(micro(n, 16, 16), is_dummy=n % 2 == 0)] for n in range(4)]
    launched = train(micros, replays=False, checkpointing=checkpointing)
    replayed = train(micros, replays=True, checkpointing=checkpointing)
    assert launched[3].replay is None
    assert replayed[3].replay.is_on, replayed[4]
    assert replayed[3].replay.num_graphs == 2
    assert replayed[0] == pytest.approx(launched[0], rel=2e-3)
    assert replayed[1] == pytest.approx(launched[1], rel=2e-2)
    moved = (replayed[2] - launched[2]).norm() / launched[2].norm()
    assert moved < 1e-3, moved


def test_graphs_that_are_released_are_captured_anew():
    losses, _, _, strategy, _ = train([[micro(0, 8, 16)]] * 5, replays=True)
    assert strategy.replay.num_graphs == 1
    strategy.release_memory()
    assert strategy.replay.num_graphs == 0
    assert all(a != b for a, b in pairwise(losses))


def linear(width=64):
    torch.manual_seed(0)
    return nn.Linear(width, width, bias=False, device="cuda")


def test_shapes_that_come_often_are_captured():
    layer, said = linear(), []
    replay = StepReplay(lambda given: layer(given["x"]).square().mean(dim=1), [layer.weight], say=said.append)

    def run(count):
        x = torch.randn(count, 64, device="cuda")
        losses = replay.run({"x": x}, 0.5)
        expected = layer(x).square().mean(dim=1)
        [gradient] = torch.autograd.grad(expected.sum() * 0.5, [layer.weight])
        torch.testing.assert_close(losses, expected.detach())
        torch.testing.assert_close(layer.weight.grad, gradient)

    for turn in range(USUAL_RUNS + 2):
        run(1)
        assert replay.num_graphs == (turn >= USUAL_RUNS)
    for _ in range(USUAL_RUNS + 2):
        for count in range(2, 3 * MOST_GRAPHS):
            run(count)
    assert replay.num_graphs == 1  # the others come too rarely
    for _ in range(40):
        run(2)
    assert replay.num_graphs == 2
    assert not said


def test_what_cannot_be_captured_is_computed_as_usual():
    layer, said = linear(), []

    def losses(given):
        found = layer(given["x"]).square().mean(dim=1)
        return found * (2 if found[0].item() > -1 else 1)  # looks at a value

    replay = StepReplay(losses, [layer.weight], say=said.append)
    x = torch.randn(3, 64, device="cuda")
    found = [replay.run({"x": x}, 1.0) for _ in range(6)]
    [line] = said
    assert "CUDA graphs are off: a step of this model cannot be captured" in line
    assert not replay.is_on
    assert replay.num_graphs == 0
    for each in found:
        torch.testing.assert_close(each, 2 * layer(x).square().mean(dim=1).detach())
    # The device is as it was: random numbers, a copy, memory that comes back, another graph.
    torch.randn(2, device="cuda")
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved()
    torch.empty(64 << 20, device="cuda")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == used
    other = StepReplay(lambda given: layer(given["x"]).square().mean(dim=1), [layer.weight], say=said.append)
    for _ in range(USUAL_RUNS + 1):
        other.run({"x": x}, 1.0)
    assert other.num_graphs == 1


def test_graphs_of_any_size_are_captured_anew():
    layer, said = linear(2048), []
    replay = StepReplay(lambda given: layer(given["x"]).square().mean(dim=1), [layer.weight], say=said.append)
    x = torch.randn(100_000, 2048, device="cuda")
    for _ in range(3):
        for _ in range(USUAL_RUNS + 1):
            losses = replay.run({"x": x}, 1.0)
        assert replay.num_graphs == 1
        torch.testing.assert_close(losses, layer(x).square().mean(dim=1).detach())
        replay.release()
    assert not said


def test_graphs_give_way_to_what_needs_their_memory():
    layer, said = linear(), []
    gc.collect()
    torch.cuda.empty_cache()
    before, total = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 3 * 2**30) / total)
    try:
        # One gigabyte and a half of activations each: both do not fit side by side.
        replay = StepReplay(lambda given: (given["x"] @ layer.weight).square().mean(dim=1), [layer.weight], say=said.append)
        for rows in [1_500_000, 1_700_000] * 3:
            for _ in range(USUAL_RUNS + 2):
                x = torch.ones(rows, 64, device="cuda")
                losses = replay.run({"x": x}, 1.0)
                assert losses.isfinite().all()
                del x, losses
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert replay.is_on
    assert replay.num_graphs == 1
    replay.release()
    assert torch.cuda.memory_reserved() - before < 256 << 20  # nothing holds on to the graphs' memory
