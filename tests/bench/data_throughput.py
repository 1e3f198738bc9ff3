"""The data plane measured: throughput beside a torch DataLoader, start anywhere, memory, many ranks, backpressure.

    python tests/bench/data_throughput.py [--parts jpeg1024,jpeg512,video,start,memory,ranks,backpressure] [--into RESULTS.json]

Every ratio is taken in one run on one machine; the two sides of a comparison take turns. Besides rows a second of the clock,
rows a CPU second of all processes (Ray's own included) are told: on a machine that does other things they say more.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

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
NUM_RANKS = int(os.environ.get("RANKS", "64"))
CPUS_PER_RANK = float(os.environ.get("CPUS_PER_RANK", "0.25"))
LIMIT_S = float(os.environ.get("LIMIT_S", "480"))
LEAST_GIB = 3.0
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


def measure_jpeg(work: Path, *, side: int, skipped: int, counted: int) -> dict[str, object]:
    """JPEGs a little larger than side x side, to side x side."""
    folder = work / f"jpeg{side}"
    write_photos(folder, count=35, side=side)
    return compare_throughput(build_index(folder, height=side, width=side, repeat=100), skipped=skipped, counted=counted)


def measure_video(work: Path) -> dict[str, object]:
    """Clips of 17 frames at 832x480, of an mp4 of 1280x720."""
    folder = work / "video"
    folder.mkdir()
    (folder / "metadata.csv").write_text(f"video,prompt\n{VIDEO},a rabbit\n")
    index = build_index(folder, column="video", rule=SampleRule(clip_step=4), height=480, width=832, repeat=1000)
    return compare_throughput(index, skipped=4, counted=10)


def measure_start(work: Path) -> dict[str, object]:
    """Seconds to the first batch from position 0 and from the middle of 1e12 rows, in turns; Ray's workers are warm."""
    folder = work / "start"
    write_photos(folder, count=100, side=64)
    index = build_index(folder, height=64, width=64, repeat=10**10)
    reference = ray.put(index)

    def first_batch_s(start_step: int) -> float:
        started = time.perf_counter()
        stream = build_stream(
            reference, start_step=start_step, num_steps=start_step + 10, rank=0, world_size=1, decode_cpus=1.0, decode_tasks=1
        )
        assert next(stream).step == start_step
        return time.perf_counter() - started

    assert index.order.num_samples == 10**12
    first_batch_s(0)
    positions = {"0": 0, "5e11": 5 * 10**11}
    found: dict[str, list[float]] = {name: [] for name in positions}
    for _ in range(2 * ROUNDS):
        for name, start_step in positions.items():
            found[name].append(round(first_batch_s(start_step), 3))
    ratio = statistics.median(found["5e11"]) / statistics.median(found["0"])
    return {"first_batch_s": found, "ratio": round(ratio, 3)}


def measure_memory(work: Path) -> dict[str, object]:
    """Memory of the process that builds the order of 100,000 rows and takes steps anywhere, at two repeats."""
    program = (
        "import re, sys, numpy as np\n"
        "from diffsynth_ray.data.batches import SampleOrder, build_buckets\n"
        "sizes = np.stack([16 * (1 + np.arange(100_000) % 40), np.full(100_000, 64), np.ones(100_000)], axis=1).astype(int)\n"
        "order = SampleOrder(build_buckets(sizes), repeat=int(sys.argv[1]), batch_size=2, global_batch_size=64, seed=0)\n"
        "for n in range(100): order.step(n * order.steps_per_epoch // 100)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"  # not ru_maxrss: exec hands it on
    )
    found = {}
    for repeat in (1, 10**6):
        done = subprocess.run([sys.executable, "-c", program, str(repeat)], capture_output=True, text=True, check=True)
        found[f"repeat {repeat}"] = int(done.stdout) // 1024
    return {"peak_mib": found}


def measure_backpressure(work: Path) -> dict[str, object]:
    """Object store in use while a slow consumer takes 10,000 samples: highest value of each fifth of the way."""
    folder = work / "backpressure"
    write_photos(folder, count=20, side=128)
    index = build_index(folder, height=128, width=128, repeat=1000)
    stream = build_stream(
        ray.put(index), start_step=0, num_steps=10_000, rank=0, world_size=1, decode_cpus=1.0, decode_tasks=NUM_PROCESSES
    )
    highest = [0.0] * 5
    for number in range(10_000):
        next(stream)
        time.sleep(0.005)
        if number % 50 == 0:
            fifth = number // 2000
            highest[fifth] = max(highest[fifth], store_mib())
    return {"samples": 10_000, "sample_mib": 128 * 128 * 3 / 2**20, "highest_mib_by_fifth": [round(mib, 1) for mib in highest]}


def store_mib() -> float:
    """Memory of the object store's file: pages once written stay, so that it tells the most it ever held."""
    raylet = next(child for child in psutil.Process().children(recursive=True) if child.name() == "raylet")
    files = [path for path in Path(f"/proc/{raylet.pid}/fd").iterdir() if "/dev/shm" in os.readlink(path)]
    blocks = {found.st_ino: found.st_blocks for found in map(os.stat, files)}
    return sum(blocks.values()) * 512 / 2**20


def measure_ranks(work: Path) -> dict[str, object]:
    """Many ranks (RANKS) on this machine: one executor a rank, and one executor for the 8 ranks of a node.

    The images are tiny, so that what is measured is what an executor costs. A rank's part of a step is one sample; with one
    executor a node, its stream brings the samples of 8 ranks. The consumers of both wait for the slowest before each step, as
    training does. What has not done its first step after LIMIT_S seconds, or takes the machine's last memory, is given up, and
    told as such.
    """
    folder = work / "ranks"
    write_photos(folder, count=50, side=64)
    index = build_index(folder, height=64, width=64, repeat=1000, global_batch_size=NUM_RANKS)
    found = {}
    for name, num_executors in (("one a node", NUM_RANKS // 8), ("one a rank", NUM_RANKS)):
        found[name] = run_executors(ray.put(index), num_executors, num_batches=NUM_RANKS // num_executors)
        say(f"{name}: {found[name]}")
    first, second = found["one a rank"], found["one a node"]
    ratios = {key: round(first[key] / second[key], 2) for key in first.keys() & second.keys() - {"given_up"}}
    return found | {"ranks": NUM_RANKS, "cpus_per_rank": CPUS_PER_RANK, "rank_over_node": ratios}


def run_executors(index: ray.ObjectRef, num_executors: int, *, num_batches: int) -> dict[str, float | str]:
    """Start so many streams, each for `num_batches` micro batches a step; seconds to the first step and a step."""
    num_steps, skipped = 40, 10
    before, cpu = num_workers(), cpu_seconds()
    barrier = threading.Barrier(num_executors)
    ends: list[float] = []
    failures: list[BaseException] = []
    have_sample: set[int] = set()
    started = time.perf_counter()

    def consume(rank: int) -> None:
        try:
            stream = build_stream(
                index, start_step=0, num_steps=1000, rank=rank, world_size=num_executors, decode_cpus=0.1, decode_tasks=1
            )
            for _ in range(num_steps):
                for _ in range(num_batches):
                    next(stream)
                    have_sample.add(rank)
                if barrier.wait(timeout=LIMIT_S + 60) == 0:
                    ends.append(time.perf_counter() - started)
        except BaseException as error:  # noqa: BLE001  a thread
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=consume, args=(rank,), daemon=True) for rank in range(num_executors)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        spent, left_gib = time.perf_counter() - started, psutil.virtual_memory().available / 2**30
        if not ends and not failures and (spent > LIMIT_S or left_gib < LEAST_GIB):
            cause = f"no step after {spent:.0f} s" if spent > LIMIT_S else f"{left_gib:.1f} GiB of memory left"
            return {
                "given_up": f"{cause}; {len(have_sample)} of {num_executors} executors had brought a sample",
                "ray_workers": num_workers() - before,
                "cpu_s": round(cpu_seconds() - cpu, 1),
            }
    if failures:
        raise failures[0]
    return {
        "first_step_s": round(ends[0], 2),
        "step_s": round((ends[-1] - ends[skipped]) / (num_steps - 1 - skipped), 4),
        "ray_workers": num_workers() - before,
        "cpu_s": round(cpu_seconds() - cpu, 1),
    }


def num_workers() -> int:
    """Processes of Ray's workers."""
    return sum("ray::" in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


PARTS: dict[str, Callable[[Path], dict[str, object]]] = {
    "jpeg1024": partial(measure_jpeg, side=1024, skipped=40, counted=150),
    "jpeg512": partial(measure_jpeg, side=512, skipped=100, counted=500),
    "video": measure_video,
    "start": measure_start,
    "memory": measure_memory,
    "ranks": measure_ranks,
    "backpressure": measure_backpressure,
}


def surroundings() -> dict[str, object]:
    """What the figures were taken on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start",
        "versions": {"python": platform.python_version(), "ray": ray.__version__, "torch": torch.__version__},
        "commit": commit.stdout.strip(),
        "command": "python tests/bench/data_throughput.py " + " ".join(sys.argv[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--into", type=Path, help="a results file: the parts measured now replace those in it")
    options = parser.parse_args()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # The many ranks need their small shares all at once; the comparisons limit themselves.
    num_cpus = int(NUM_RANKS * CPUS_PER_RANK) if options.parts == "ranks" else NUM_PROCESSES + 1
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             object_store_memory=1 << 30)  # fmt: skip
    results = json.loads(options.into.read_text()) if options.into and options.into.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        for part in options.parts.split(","):
            about = surroundings()
            results[part] = PARTS[part](Path(work)) | {"about": about}
            say(f"{part}: {json.dumps(results[part])}")
            if options.into:
                options.into.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
