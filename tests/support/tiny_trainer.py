"""A trainer of the tiny Qwen-Image in this process, and samples for it."""

import faulthandler
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from diffsynth_ray.config.schema import Job
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.graph import SampleBatch
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import MicroInput, Trainer, load_family, select_trained

torch.set_num_threads(1)
PROMPTS = ("a cat", "a rocket on its launch pad", "coffee", "")


def build_job(**sections):
    base = {
        "name": "test",
        "model": {"family": "qwen_image", "tiny": True},
        "training": {"precision": "fp32", "learning_rate": 1e-3},
        "lora": {"base_model": "dit", "rank": 4},
    }
    for section, values in sections.items():
        base[section] = base.get(section, {}) | values if isinstance(values, dict) else values
    return Job.model_validate(base)


def build_trainer(job, *, num_samples=40, probe=True):
    family = load_family(job, device=torch.device("cpu"))
    select_trained(family, job)
    residency = settle(family, job, say=print)
    trainer = Trainer(job, family, build_schedule(job, num_samples=num_samples, global_batch_size=4), residency=residency)
    trainer.start(micro([0]) if probe else None)
    return trainer


def micro(indices, *, is_dummy=False):
    """Samples whose pixels follow from their index."""
    pixels = np.stack([np.random.default_rng(index).integers(0, 256, (1, 32, 48, 3), dtype=np.uint8) for index in indices])
    prompts = tuple(PROMPTS[index] for index in indices)
    return MicroInput(SampleBatch(pixels, prompts, tuple(indices)), tuple(indices), is_dummy)


def weights(trainer):
    return {name: master.clone() for name, master in trainer.strategy.full_masters().items()}


def train(trainer, micro_inputs, steps=3):
    losses = []
    for _ in range(steps):
        result = trainer.train_step(micro_inputs, num_samples=sum(len(m.indices) for m in micro_inputs if not m.is_dummy))
        losses.append(result.loss_sum.item())
    return losses


def train_as_rank(rank, folder, job, hand):
    """One step as one of two workers, from a hand of micro inputs; the weights are then in the folder as RANK.pt."""
    faulthandler.dump_traceback_later(80, exit=True)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    trainer = build_trainer(job)
    trainer.train_step(hand, num_samples=4)
    torch.save(weights(trainer), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
