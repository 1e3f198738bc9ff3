"""Qwen-Image LoRA at its real size as on a card of 24 GB in a machine of 64 GB: how much it takes, and that it trains.

The GPU is capped at 23 GiB (an allocation above that fails), host memory is measured: the largest resident size of this
process, pinned memory included. Random weights; 1024x1024, rank 32, batch 1. Prints one JSON line.

  combined   text encoder (16.6 GB) and VAE included: every step encodes a picture and a prompt
  cached     latents and prompt embeddings are given

usage: python tests/bench/small_card.py combined|cached [--fp8] [--steps N] [--gib 23]
"""

import argparse
import json
import resource
import time

import numpy as np
import torch
from real_size import build, encoded_batch

from diffsynth_ray.config.schema import Job
from diffsynth_ray.models.family import BatchShape
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.graph import SampleBatch
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import MicroInput, Trainer, select_trained

SIZE, PROMPT = 1024, "a photograph of a cat on a windowsill in the evening sun, looking at birds " * 8


def build_job(options: argparse.Namespace) -> Job:
    return Job.model_validate(
        {
            "name": "bench",
            "model": {"fp8_models": ["dit"] if options.fp8 else []},
            "lora": {"base_model": "dit", "rank": 32},
            "gradient": {"checkpointing": True, "checkpointing_offload": options.checkpointing_offload},
            "offload": {"cpu_offload": not options.resident, "vram_budget_gib": options.vram_budget_gib},
        }
    )


def host_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["combined", "cached"])
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--checkpointing-offload", action="store_true")
    parser.add_argument("--vram-budget-gib", type=float)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--gib", type=float, default=23)
    options = parser.parse_args()
    torch.manual_seed(0)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(options.gib * 2**30 / total)
    began = time.perf_counter()
    job = build_job(options)
    family = build("qwen-image", ["dit", "text_encoder", "vae"] if options.mode == "combined" else ["dit"], device="cuda")
    select_trained(family, job)
    residency = settle(family, job, say=lambda line: print(line, flush=True))
    trainer = Trainer(job, family, build_schedule(job, num_samples=1000, global_batch_size=1), residency=residency)
    if options.mode == "combined":
        pixels = np.random.default_rng(0).integers(0, 256, (1, 1, SIZE, SIZE, 3), dtype=np.uint8)
        micro = MicroInput(SampleBatch(pixels, (PROMPT,), (0,)), (0,))
    else:
        micro = MicroInput(encoded_batch(family, BatchShape(1, SIZE, SIZE)), (0,))
    trainer.start(micro)
    times, losses = [], []
    for _ in range(options.steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        losses.append(trainer.train_step([micro], num_samples=1).loss_sum.item())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    record = {
        "what": "Qwen-Image LoRA r32 1024x1024, GPU capped",
        **vars(options),
        "s_per_step": round(sorted(times[1:])[len(times[1:]) // 2], 3),
        "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "host_gib": round(host_gib(), 1),
        "losses": [round(loss, 4) for loss in losses],
        "took_s": round(time.perf_counter() - began, 1),
        "device": torch.cuda.get_device_name(),
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
