"""One training step of Qwen-Image's DiT on the GPUs of this machine, by the project's Trainer: DDP, ZeRO, layer offload.

Weights are random (shapes, number formats and work per step are the real ones); latents and prompt embeddings are given, as in
stage two of split training. Each method runs in processes of its own; a method that runs out of memory says so and the next
follows. Prints one JSON line a method.

usage: python tests/bench/zero.py --gpus 2 [--full] [--layers N] [--size PIXELS] [--steps N] [--eager] [--profile]
       [--methods ddp zero2 ...]
Methods: ddp, zero1, zero2, zero3, zero2-host (the optimizer in host memory), zero3-host (and the parameters), offload (layer
offload; the frozen weights once in host memory, whatever the number of workers).
"""

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpu_step import print_profile
from real_size import build, encoded_batch

from diffsynth_ray.config.schema import Job
from diffsynth_ray.memory.host import NodePlace
from diffsynth_ray.models.family import BatchShape
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.group import Group, NodeWorkers
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import MicroInput, Trainer, select_trained

TEXT_TOKENS = 256
METHODS = ("ddp", "zero1", "zero2", "zero3", "zero2-host", "zero3-host", "offload")
UNTIMED = 4
"""Steps before those that count: the third of one shape is captured as a CUDA graph."""


def build_job(options: argparse.Namespace, method: str) -> Job:
    distributed: dict[str, Any] = {}
    if method.startswith("zero"):
        stage = int(method[4])
        distributed = {"strategy": "deepspeed", "zero_stage": stage}
        if method.endswith("-host"):
            distributed["offload_optimizer_device"] = "cpu"
            distributed["offload_param_device"] = "cpu" if stage == 3 else "none"
    return Job.model_validate(
        {
            "name": "bench",
            "training": {
                "trainable_models": ["dit"] if options.full else [],
                "optimizer_args": {"fused": True},
                "compile": False if options.eager else "auto",
            },
            "lora": {} if options.full else {"base_model": "dit", "rank": 32},
            "distributed": distributed,
            "offload": {"cpu_offload": method == "offload"},
        }
    )


def run_rank(rank: int, options: argparse.Namespace, method: str, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", options.gpus)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=options.gpus)
    torch.manual_seed(0)
    record: dict[str, Any] = {"method": method}
    try:
        record |= measure(options, build_job(options, method), device)
    except torch.OutOfMemoryError as error:
        record["error"] = str(error).splitlines()[0]
    if rank == 0 or "error" in record:
        Path(folder, f"record-{rank}.json").write_text(json.dumps(record))
    if "error" in record:
        os._exit(0)  # the other ranks wait in a collective operation


def measure(options: argparse.Namespace, job: Job, device: torch.device) -> dict[str, Any]:
    rank, started = dist.get_rank(), time.perf_counter()
    family = build("qwen-image", device=device, num_layers=options.layers)
    select_trained(family, job)

    def say(line: str) -> None:
        if rank == 0:
            print(f"# {line}", flush=True)

    group = Group(dist.get_world_size())
    workers = NodeWorkers(group, NodePlace(0, rank, dist.get_world_size()))
    residency = settle(family, job, group=workers, say=say)
    schedule = build_schedule(job, num_samples=1000, global_batch_size=options.gpus)
    trainer = Trainer(job, family, schedule, residency=residency)
    num_trained = sum(param.numel() for param in trainer.trained.values())
    generator = torch.Generator(device).manual_seed(rank)
    batch = encoded_batch(family, BatchShape(1, options.size, options.size), generator=generator)
    micro = MicroInput(batch, (rank,))
    trainer.start(micro, say=say)
    start_s = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    times = []
    assert trainer.strategy is not None
    for _ in range(options.steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = trainer.train_step([micro], num_samples=options.gpus)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    loss = trainer.strategy.sum_over_workers(result.loss_sum).item() / options.gpus
    peak = torch.cuda.max_memory_allocated()
    if options.profile:
        one_more = partial(trainer.train_step, [micro], num_samples=options.gpus)
        if rank == 0:
            print_profile(one_more)
        else:
            one_more()
    settled = sorted(times[UNTIMED:])
    # What processes share counts once.
    shared = sum(group.gather(psutil.Process().memory_full_info().pss))
    return {
        **{key: value for key, value in vars(options).items() if key != "methods"},
        "trained_parameters": num_trained,
        "start_s": round(start_s, 1),
        "s_per_step": round(settled[len(settled) // 2], 3),
        "min_s": round(settled[0], 3),
        "peak_gib_per_gpu": round(peak / 2**30, 2),
        "host_gib_of_all_processes": round(shared / 2**30, 2),
        "loss": round(loss, 4),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--eager", action="store_true", help="blocks are not compiled")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step of rank 0 that take longest")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["ddp", "zero2", "zero3"])
    options = parser.parse_args()
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            context = mp.spawn(run_rank, (options, method, folder), nprocs=options.gpus, join=False)
            try:
                while not context.join(timeout=5):
                    if any("error" in path.read_text() for path in Path(folder).glob("record-*.json")):
                        break
            finally:
                for process in context.processes:
                    process.kill()
                    process.join()
            for path in sorted(Path(folder).glob("record-*.json"))[:1]:
                print(path.read_text(), flush=True)


if __name__ == "__main__":
    main()
