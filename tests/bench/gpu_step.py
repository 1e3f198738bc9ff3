"""One training step of Qwen-Image's DiT at its real size on one GPU, through the project's own Trainer.

Weights are random (shapes, number formats and work per step are the real ones); latents and prompt embeddings are given, as in
stage two of split training. Prints one JSON line; run it beside another trainer's step in one call and quote the ratio.

usage: python tests/bench/gpu_step.py [--full] [--no-checkpointing] [--layers N] [--size PIXELS] [--batch N] [--steps N]
"""

import argparse
import json
import time

import torch

from diffsynth_ray.config.schema import Job
from diffsynth_ray.models.family import EncodedBatch
from diffsynth_ray.models.qwen_image import QwenImage, build_component
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.trainer import MicroInput, Trainer, select_trained

TEXT_TOKENS = 256


def build_job(options: argparse.Namespace) -> Job:
    return Job.model_validate(
        {
            "name": "bench",
            "training": {"trainable_models": ["dit"] if options.full else [], "optimizer_args": {"fused": True}},
            "lora": {} if options.full else {"base_model": "dit", "rank": 32},
            "gradient": {"checkpointing": not options.no_checkpointing},
        }
    )


def build_family(num_layers: int) -> QwenImage:
    dit = build_component("dit", {"num_layers": num_layers})  # the classes' defaults are the real size
    for module in dit.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            real = torch.empty(param.shape, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
            setattr(module, name, torch.nn.Parameter(real, requires_grad=False))
    return QwenImage({"dit": dit}, dtype=torch.bfloat16, device="cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()

    torch.manual_seed(0)
    job = build_job(options)
    family = build_family(options.layers)
    select_trained(family, job)
    trainer = Trainer(job, family, build_schedule(job, num_samples=1000, global_batch_size=options.batch))
    latents = torch.randn(options.batch, *family.latents_shape(options.size, options.size), device="cuda")
    embeds = torch.randn(options.batch, TEXT_TOKENS, 3584, device="cuda", dtype=torch.bfloat16)
    micro = MicroInput(EncodedBatch(latents, {"prompt_embeds": embeds}), tuple(range(options.batch)))
    trainer.start(micro)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(options.steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = trainer.train_step([micro], num_samples=options.batch)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    settled = sorted(times[2:])
    record = {
        "what": "diffsynth_ray Trainer",
        **vars(options),
        "trained_parameters": sum(param.numel() for param in trainer.trained.values()),
        "s_per_step": round(settled[len(settled) // 2], 3),
        "min_s": round(settled[0], 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": round(result.loss_sum.item() / options.batch, 4),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
