"""How long blocks take to compile for samples of several sizes, and what a step takes then, on one GPU.

Qwen-Image's DiT with fewer blocks (compiled once whatever their number), LoRA, random weights, in a process with an empty
compiler cache. With --one-size the compiler is left to itself: it compiles for the first size and again when a size differs.
Prints a JSON line for the start and for each size: seconds of its first step, of a later one, and variants compiled.

usage: python tests/bench/compile_time.py [--one-size] [--layers N] [--checkpointing false] [--size HEIGHT WIDTH BATCH TOKENS]
"""

import argparse
import json
import os
import tempfile
import time

import torch
from real_size import build, encoded_batch

from diffsynth_ray.config.schema import Job
from diffsynth_ray.memory.compilation import CompileTime
from diffsynth_ray.models.family import BatchShape
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import MicroInput, Trainer, select_trained

SIZES = [[1024, 1024, 1, 256], [1024, 1024, 1, 180], [768, 1344, 1, 180], [512, 512, 4, 200]]
STEPS = 8
"""Of each size; the third one is captured as a CUDA graph, and the last four are timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one-size", action="store_true")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--checkpointing", default="true", choices=["true", "false"])
    parser.add_argument("--size", type=int, nargs=4, action="append")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        measure(options)


def measure(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    gradient = {"checkpointing": options.checkpointing == "true"}
    training = {"optimizer_args": {"fused": True}}
    job = Job.model_validate(
        {"name": "bench", "lora": {"base_model": "dit", "rank": 32}, "gradient": gradient, "training": training}
    )
    family = build("qwen-image", device="cuda", num_layers=options.layers)
    select_trained(family, job)
    residency = settle(family, job, sizes_vary=not options.one_size, say=print)
    trainer = Trainer(job, family, build_schedule(job, num_samples=1000, global_batch_size=1), residency=residency)
    sizes = options.size or SIZES
    inputs = {}
    for height, width, num, tokens in sizes:
        batch = encoded_batch(family, BatchShape(num, height, width, 1, tokens))
        inputs[height, width, num, tokens] = MicroInput(batch, tuple(range(num)))

    def variants() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def report(what: str, **figures: float) -> None:
        print(json.dumps({"one_size": options.one_size, "what": what, **figures}), flush=True)

    with CompileTime(print) as compiling:
        began = time.perf_counter()
        trainer.start(next(iter(inputs.values())), say=print)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        report("start", s=round(seconds, 1), compiling_s=round(compiling.take_s(), 1), variants=variants())
        for (height, width, num, tokens), micro in inputs.items():
            times, before = [], variants()
            for _ in range(STEPS):
                torch.cuda.synchronize()
                began = time.perf_counter()
                trainer.train_step([micro], num_samples=num)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            later = sorted(times[-4:])
            report(
                f"{num} x {width}x{height}, {tokens} tokens", first_step_s=round(times[0], 2),
                compiling_s=round(compiling.take_s(), 1), variants=variants() - before,
                step_ms=round(1e3 * later[len(later) // 2], 1), min_ms=round(1e3 * later[0], 1),
            )  # fmt: skip
    replay = getattr(trainer.strategy, "replay", None)
    graphs = replay.num_graphs if replay is not None else 0
    report("end", graphs=graphs, peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2))
    print(torch.cuda.get_device_name(), torch.__version__)


if __name__ == "__main__":
    main()
