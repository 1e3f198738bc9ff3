"""ZeRO-2 and ZeRO-3 on one GPU against DDP: the same model, samples, noise and timesteps."""

import pytest
import torch
import torch.distributed as dist

from diffsynth_ray.config.schema import Job
from diffsynth_ray.models.family import EncodedBatch
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import MicroInput, Trainer, select_trained

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def no_group_left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def micro(index):
    generator = torch.Generator().manual_seed(index)
    latents = torch.randn(1, 16, 8, 8, generator=generator).cuda()
    embeds = torch.randn(1, 16, 64, generator=generator).cuda()
    return MicroInput(EncodedBatch(latents, {"prompt_embeds": embeds}), (index,))


def train(precision, full, **distributed):
    job = Job.model_validate(
        {
            "name": "test",
            "training": {"precision": precision, "learning_rate": 1e-3, "trainable_models": ["dit"] if full else []},
            "lora": {} if full else {"base_model": "dit", "rank": 8},
            "distributed": distributed,
        }
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    family = QwenImage.build_tiny(0, components=["dit"], dtype=dtype, device="meta")
    family.device = torch.device("cuda")
    select_trained(family, job)
    said = []
    residency = settle(family, job, say=said.append)
    trainer = Trainer(job, family, build_schedule(job, num_samples=20, global_batch_size=2), residency=residency)
    trainer.start(micro(0), say=said.append)
    losses = [trainer.train_step([micro(0), micro(1)], num_samples=2).loss_sum.item() / 2 for _ in range(6)]
    masters = {name: tensor.float().cpu().clone() for name, tensor in trainer.strategy.full_masters().items()}
    if distributed:
        trainer.strategy.engine.destroy()
    return losses, masters, said


def norm_of(tensors):
    return sum(float(tensor.norm() ** 2) for tensor in tensors) ** 0.5


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 2, "offload_optimizer_device": "cpu"},
        {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"},
    ],
)
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp32", 1e-4)])
def test_one_gpu_trains_as_under_ddp(precision, tolerance, keys, full):
    expected, expected_masters, _ = train(precision, full)
    losses, masters, said = train(precision, full, strategy="deepspeed", **keys)
    assert losses == pytest.approx(expected, rel=tolerance)
    assert masters.keys() == expected_masters.keys()
    difference = norm_of(masters[name] - tensor for name, tensor in expected_masters.items())
    assert difference <= tolerance * norm_of(expected_masters.values())
    if "offload_optimizer_device" in keys:
        assert any("CPU optimizer is ready" in line for line in said), said
