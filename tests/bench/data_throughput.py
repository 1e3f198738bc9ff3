"""The data plane measured: throughput beside a torch DataLoader, start anywhere, memory, many ranks, backpressure.

    python tests/bench/data_throughput.py [--parts jpeg,video,start,memory,ranks,backpressure] > tests/bench/results/data_throughput.json

Every ratio is taken in one run on one machine; the two sides of a comparison take turns. Besides rows a second of the clock, rows
a CPU second of all processes (Ray's own included) are told: on a machine that does other things they say more.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import psutil
import ray
import torch
from PIL import Image

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.data.samples import SampleIndex, SampleRule, build_sample_index
from diffsynth_ray.data.stream import build_stream

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT / "jobs" / "data" / "photos"
VIDEO = ROOT / "tests" / "assets" / "videos" / "bigbuckbunny.mp4"
NUM_PROCESSES = 2
ROUNDS = int(os.environ.get("ROUNDS", "3"))


def build_index(folder: Path, *, column: str = "image", rule: SampleRule | None = None, **dataset: object) -> SampleIndex:
    """The index of a folder's metadata.csv; `dataset` are keys of [dataset]."""
    keys = {"repeat": 1, "num_frames": 17, "frame_rate": None} | dataset
    later = {name: keys.pop(name) for name in ("num_frames", "frame_rate")}
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in keys.items())
    job = folder / "job.toml"
    job.write_text(
        f'[dataset]\nbase_path = "{folder}"\nmetadata_path = "{folder}/metadata.csv"\n{lines}'
        f'[model]\nfamily = "qwen_image"\ntiny = true\n[lora]\nbase_model = "dit"\n[output]\npath = "{folder}/out"\n'
    )
    resolved = resolve(load_job(str(job)), Resources(cpus=2, gpus=0))
    section = resolved.job.dataset.model_copy(update=later)
    resolved = resolved.model_copy(update={"job": resolved.job.model_copy(update={"dataset": section})})
    return build_sample_index(resolved, lambda line: None, rule=rule)


def write_photos(folder: Path, *, count: int, side: int) -> None:
    """JPEGs of side x side cut from the shipped photographs."""
    folder.mkdir()
    sources = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]
    names = []
    for number in range(count):
        image = sources[number % len(sources)].resize((side + 16 * (number % 5), side + 16 * (number % 7)))
        names.append(f"{number}.jpg")
        image.save(folder / names[-1], quality=92)
    (folder / "metadata.csv").write_text("image,prompt\n" + "".join(f"{name},a photo\n" for name in names))


class TorchRows(torch.utils.data.Dataset):
    """The same micro batches for a torch DataLoader."""

    def __init__(self, index: SampleIndex, num_steps: int) -> None:
        self.micros = [micro for _, _, _, micro in index.micro_batches(start_step=0, num_steps=num_steps, rank=0, world_size=1)]
        self.index = index

    def __len__(self) -> int:
        return len(self.micros)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self.index.decode(self.micros[number], step=number).pixels)


def cpu_seconds() -> float:
    """CPU time of this process and all below it: torch's workers, or Ray's daemons and workers."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def speeds(batches: Iterator[object], *, skipped: int, counted: int) -> tuple[float, float]:
    """Rows a second and rows a CPU second, after `skipped` rows have come (processes start, pipelines fill)."""
    for _ in range(skipped):
        next(batches)
    started, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(counted):
        next(batches)
    return counted / (time.perf_counter() - started), counted / (cpu_seconds() - cpu)


def compare_throughput(index: SampleIndex, *, skipped: int, counted: int) -> dict[str, object]:
    """Rows/s of our stream and of a DataLoader with as many processes, in turns."""
    num_steps = skipped + counted + 40  # a few stay unread, so that no end is measured
    reference = ray.put(index)
    ours, theirs = [], []
    for number in range(ROUNDS):
        loader = torch.utils.data.DataLoader(
            TorchRows(index, num_steps), batch_size=None, num_workers=NUM_PROCESSES, prefetch_factor=8
        )
        batches = iter(loader)
        theirs.append(speeds(batches, skipped=skipped, counted=counted))
        del batches, loader
        stream = build_stream(
            reference, start_step=0, num_steps=num_steps, rank=0, world_size=1, decode_cpus=1.0, decode_tasks=NUM_PROCESSES
        )
        ours.append(speeds(stream, skipped=skipped, counted=counted))
        del stream
        say(f"round {number + 1}: rows/s, rows/CPU s: torch {theirs[-1]}, ours {ours[-1]}")
    ratios = [our / their for our, their in zip(ours, theirs, strict=True) for our, their in zip(our, their, strict=True)]
    return {
        "rows_per_s": {"ours": [round(wall, 1) for wall, _ in ours], "torch": [round(wall, 1) for wall, _ in theirs]},
        "rows_per_cpu_s": {"ours": [round(cpu, 1) for _, cpu in ours], "torch": [round(cpu, 1) for _, cpu in theirs]},
        "ratio_by_clock": round(statistics.median(ratios[::2]), 3),
        "ratio_by_cpu": round(statistics.median(ratios[1::2]), 3),
    }


def measure_jpeg(work: Path) -> dict[str, object]:
    found = {}
    for side, skipped, counted in ((1024, 48, 120), (512, 64, 300)):
        folder = work / f"jpeg{side}"
        write_photos(folder, count=35, side=side)
        index = build_index(folder, height=side, width=side, repeat=100)
        found[f"{side}x{side}"] = compare_throughput(index, skipped=skipped, counted=counted)
    return found


def measure_video(work: Path) -> dict[str, object]:
    folder = work / "video"
    folder.mkdir()
    (folder / "metadata.csv").write_text(f"video,prompt\n{VIDEO},a rabbit\n")
    index = build_index(folder, column="video", rule=SampleRule(clip_step=4), height=480, width=832, repeat=1000)
    return {"17 frames 832x480 of 1280x720": compare_throughput(index, skipped=4, counted=10)}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


PARTS: dict[str, Callable[[Path], dict[str, object]]] = {"jpeg": measure_jpeg, "video": measure_video}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parts = parser.parse_args().parts.split(",")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(address="local", num_cpus=NUM_PROCESSES + 1, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             object_store_memory=1 << 30)  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        results = {part: PARTS[part](Path(work)) for part in parts}
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
