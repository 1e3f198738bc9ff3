"""How long training waits for a checkpoint: written in the loop against written beside it; and what is written.

    python tests/bench/checkpoint_stall.py [--million 50] [--checkpoints 4] [--folder DIR]

One worker with AdamW over `million` million float32 parameters in matrices of 1024x1024; a step is one update of them. Both
ways write the same files with the same code; the synchronous one waits for each of them in the loop.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from diffsynth_ray.config.schema import TrainingSection
from diffsynth_ray.train.checkpoint import find_checkpoints
from diffsynth_ray.train.optim import MasterOptimizer
from diffsynth_ray.train.saver import CheckpointSaver, WriterIdentity
from diffsynth_ray.train.shards import balanced_slices
from diffsynth_ray.train.storage import Storage


def build_optimizer(num_matrices):
    parameters = {f"layer.{n}.weight": torch.nn.Parameter(torch.randn(1024, 1024) / 32) for n in range(num_matrices)}
    return MasterOptimizer(parameters, TrainingSection(precision="fp32"))


def train_step(optimizer):
    for parameter in optimizer.params:
        parameter.grad = parameter.detach() * 1e-3
    optimizer.step(1e-4)


def measure(optimizer, folder, *, is_asynchronous, checkpoints, steps_between):
    storage = Storage.at(folder)
    saver = CheckpointSaver(
        storage,
        WriterIdentity(rank=0, world_size=1, token="t", writer="w"),
        keep=2,
        may_commit=lambda: True,
        gather=lambda value: [value],
        say=lambda line: None,
    )
    stalls, steps, steps_beside, began = [], [], [], time.monotonic()
    for number in range(1, checkpoints * steps_between + 1):
        started = time.monotonic()
        train_step(optimizer)
        is_beside = saver.in_flight
        (steps_beside if is_beside else steps).append(time.monotonic() - started)
        if number % steps_between == 0:
            started = time.monotonic()
            saver.start(number, balanced_slices(optimizer.state_tensors(), rank=0, world_size=1))
            if not is_asynchronous:
                saver.finish()
            stalls.append(time.monotonic() - started)
    saver.finish()
    [newest, *_] = find_checkpoints(storage)
    return {
        "stall_s": [round(stall, 4) for stall in stalls],
        # The first one allocates the host buffers that the later ones use again.
        "stall_s_median_after_the_first": round(statistics.median(stalls[1:] or stalls), 4),
        "step_s_median": round(statistics.median(steps), 4),
        "step_s_median_while_writing": round(statistics.median(steps_beside), 4) if steps_beside else None,
        "whole_s": round(time.monotonic() - began, 2),
        "bytes": sum(shard.num_bytes for shard in newest.shards),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million", type=int, default=50)
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--steps-between", type=int, default=12)
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    optimizer = build_optimizer(max(1, options.million * 10**6 // 2**20))
    train_step(optimizer)
    results = {}
    for name, is_asynchronous in (("synchronous", False), ("asynchronous", True)):
        folder = Path(tempfile.mkdtemp(prefix="stall-", dir=options.folder))
        results[name] = measure(
            optimizer, folder, is_asynchronous=is_asynchronous, checkpoints=options.checkpoints,
            steps_between=options.steps_between,
        )  # fmt: skip
        shutil.rmtree(folder)
    numel = sum(parameter.numel() for parameter in optimizer.params)
    minimum = 3 * 4 * numel + 4 * len(optimizer.params)  # master and two moments of each weight, one count a parameter
    stall = "stall_s_median_after_the_first"
    print(json.dumps({
        "trained_parameters": numel,
        "results": results,
        "stall_asynchronous_to_synchronous": round(results["asynchronous"][stall] / results["synchronous"][stall], 4),
        "bytes_minimum": minimum,
        "bytes_to_minimum": round(results["asynchronous"]["bytes"] / minimum, 6),
        "hardware": f"{os.cpu_count()} x {platform.processor() or platform.machine()}, local disk",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "command": " ".join(["python tests/bench/checkpoint_stall.py", *sys.argv[1:]]),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
