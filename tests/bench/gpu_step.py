"""One training step of a DiT at its real size (Qwen-Image's unless told) on one GPU, through the project's own Trainer.

Weights are random (shapes, number formats and work per step are the real ones); latents and prompt embeddings are given, as in
stage two of split training. Prints one JSON line; run it beside another trainer's step in one call and quote the ratio.

usage: python tests/bench/gpu_step.py --help
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch._inductor.config
from real_size import MODELS, build, encoded_batch

from diffsynth_ray.config.schema import Job
from diffsynth_ray.models.family import BatchShape
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train import selection
from diffsynth_ray.train.residency import Residency, settle
from diffsynth_ray.train.trainer import MicroInput, Trainer, select_trained

UNTIMED = 3
"""Steps before those that are measured."""


def build_job(options: argparse.Namespace) -> Job:
    auto = {"true": True, "false": False, "auto": "auto"}
    return Job.model_validate(
        {
            "name": "bench",
            "model": {"fp8_models": ["dit"] if options.fp8 else []},
            "training": {
                "trainable_models": ["dit"] if options.full else [],
                "optimizer_args": {} if options.optimize_on_cpu else {"fused": True},
                "compile": auto[options.compile],
                "max_grad_norm": 0.0 if options.no_clipping else 1.0,
            },
            "lora": {} if options.full else {"base_model": "dit", "rank": options.rank},
            "gradient": {
                "checkpointing": auto[options.checkpointing],
                "checkpointing_offload": options.checkpointing_offload,
            },
            "offload": {
                "cpu_offload": options.offload,
                "optimize_on_cpu": options.optimize_on_cpu,
                "vram_budget_gib": options.vram_budget_gib,
                "param_size_threshold": options.param_size_threshold,
            },
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--optimize-on-cpu", action="store_true")
    parser.add_argument("--no-clipping", action="store_true")
    parser.add_argument("--vram-budget-gib", type=float)
    parser.add_argument("--param-size-threshold", type=float)
    parser.add_argument("--checkpointing", default="true", choices=["true", "false", "auto"])
    parser.add_argument("--checkpointing-offload", action="store_true")
    parser.add_argument("--compile", default="auto", choices=["true", "false", "auto"])
    parser.add_argument("--model", default="qwen-image", choices=list(MODELS))
    parser.add_argument("--layers", type=int, help="fewer blocks than the model has")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--width", type=int, help="where it is not SIZE")
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, default=256, help="of families whose text has no fixed length")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cpp-wrapper", action="store_true", help="inductor's host code in C++")
    parser.add_argument("--no-replay", action="store_true", help="kernels are launched one by one, not as a CUDA graph")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step that take longest")
    options = parser.parse_args()

    if options.cpp_wrapper:
        torch._inductor.config.cpp_wrapper = True
    torch.manual_seed(0)
    job = build_job(options)
    family = build(options.model, device="cuda", num_layers=options.layers)
    select_trained(family, job)
    residency = settle(family, job, say=lambda line: print(line, flush=True))
    if options.no_replay:
        residency = replace(residency, is_replayable=False)
    schedule = build_schedule(job, num_samples=1000, global_batch_size=options.batch)
    trainer = Trainer(job, family, schedule, residency=residency)
    shape = BatchShape(options.batch, options.size, options.width or options.size, options.frames, options.text_tokens)
    batch = encoded_batch(family, shape)
    micro = MicroInput(batch, tuple(range(options.batch)))
    started = time.perf_counter()
    if residency.selectable:
        selection.watch(trainer)
    trainer.start(micro, say=lambda line: print(line, flush=True))
    if residency.selectable:
        selection.keep_what_fits(
            trainer, selection.read_memory(), gather=lambda value: [value], say=lambda line: print(line, flush=True)
        )
    torch.cuda.synchronize()
    start_s = time.perf_counter() - started
    loading_peak_gib = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(UNTIMED):  # the last of them is captured as a CUDA graph
        trainer.train_step([micro], num_samples=options.batch)
    for _ in range(options.steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = trainer.train_step([micro], num_samples=options.batch)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        losses.append(round(result.loss_sum.item() / options.batch, 5))
    peak_gib = torch.cuda.max_memory_allocated() / 2**30
    if options.profile:
        print_profile(lambda: trainer.train_step([micro], num_samples=options.batch))
    settled = sorted(times)
    replay = getattr(trainer.strategy, "replay", None)
    record = {
        "what": "diffsynth_ray Trainer",
        **vars(options),
        "trained_parameters": sum(param.numel() for param in trainer.trained.values()),
        "s_per_step": round(settled[len(settled) // 2], 3),
        "min_s": round(settled[0], 3),
        "first_s": round(start_s, 1),
        "peak_gib": round(peak_gib, 2),
        "loading_peak_gib": round(loading_peak_gib, 2),
        "moved_gib_per_step": round(moved_gib(residency) / (options.steps + UNTIMED + 1), 2),
        **link_figures(residency),
        "graphs": replay.num_graphs if replay is not None else 0,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "used_gib": round((torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]) / 2**30, 2),
        "losses": losses,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    print(json.dumps(record), flush=True)


def moved_gib(residency: Residency) -> float:
    """Weights brought to the device since the start."""
    return residency.offload.moved_bytes / 2**30 if residency.offload else 0.0


def link_figures(residency: Residency) -> dict[str, float]:
    """With layer offload: GiB/s from its pinned memory to the device; no step is faster than its bytes."""
    if residency.offload is None:
        return {}
    units = [unit for unit in residency.offload.units if unit.host is not None]
    buffer = torch.empty(max(unit.num_bytes for unit in units), dtype=torch.uint8, device=residency.offload.device)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for unit in units:
        assert unit.host is not None
        buffer[: unit.num_bytes].copy_(unit.host, non_blocking=True)
    torch.cuda.synchronize()
    return {"link_gib_per_s": round(sum(unit.num_bytes for unit in units) / 2**30 / (time.perf_counter() - began), 1)}


def print_profile(step: Callable[[], object]) -> None:
    """Where one step's time goes on the GPU (kernels) and on the host (launching them)."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    averages = profile.key_averages()
    kernels = [event for event in averages if event.device_type == torch.autograd.DeviceType.CUDA]
    total_s = sum(event.self_device_time_total for event in kernels) / 1e6
    print(f"kernels: {sum(event.count for event in kernels)} launches, {total_s:.3f} s")
    for sort_by in ("self_cuda_time_total", "self_cpu_time_total"):
        print(averages.table(sort_by=sort_by, row_limit=40, max_name_column_width=90))


if __name__ == "__main__":
    main()
