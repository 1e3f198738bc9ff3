"""How training of Qwen-Image's DiT at its real size scales with the GPUs of one host, through `dsray run`.

Writes random weights and a cache of random encodings of the real sizes (41 GB of disk), then trains with each method on 1, 2, 4
... GPUs, the work of a GPU the same. Prints a JSON line a run and writes all of them to --output:

  samples_per_s   of all GPUs
  efficiency      against the fewest GPUs that ran the method, per GPU
  lost_share      share of a step beyond what one GPU takes for the same work: communication and waiting for each other
  gpu_gib         most memory that rank 0's GPU gave out
  host_gib        most memory of the run's processes, what they share counted once

usage: python tests/bench/scaling.py --folder FOLDER --output results.json [--gpus 1 2] [--only NAME ...] [--tiny]
"""

import argparse
import csv
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from diffsynth_ray.data.cache import Cache, entry_key
from diffsynth_ray.data.manifest import Manifest, ManifestRow, write_manifest
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.models.qwen_image_configs import TINY
from diffsynth_ray.train.split import tensor_bytes

SHARD_BYTES = 4 << 30
TOKENS, SAMPLES = 256, 64
LORA = ["lora.base_model=dit"]
ZERO = ['training.trainable_models=["dit"]', "distributed.strategy=deepspeed"]
METHODS: dict[str, list[str]] = {
    "lora, ddp": LORA,
    "lora, layer offload, one host copy": [*LORA, "offload.cpu_offload=true"],
    "full, zero 2": [*ZERO, "distributed.zero_stage=2"],
    "full, zero 3": [*ZERO, "distributed.zero_stage=3"],
    "full, zero 3, optimizer on the host": [*ZERO, "distributed.zero_stage=3", "distributed.offload_optimizer_device=cpu"],
}
JOB = """
name = "scaling"
[dataset]
repeat = 1000
[model]
family = "qwen_image"
paths = [{paths}]
[split]
enabled = true
cache_path = "{cache}"
[training]
precision = "{precision}"
max_steps = {steps}
max_grad_norm = 0
[output]
path = "{output}"
save_steps = 100000
checkpoint_minutes = 100000
[logging]
tensorboard = false
"""


def write_weights(folder: Path, *, tiny: bool) -> list[Path]:
    """Random weights of std 0.02 in shards, written once; config.json beside them."""
    done = folder / "config.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = TINY["dit"] if tiny else {}
        module = QwenImage.build_component("dit", config)
        shards: list[dict[str, torch.Size]] = [{}]
        size = 0
        for name, tensor in module.state_dict().items():
            if size > SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][name] = tensor.shape
            size += 2 * tensor.numel()
        for number, shard in enumerate(shards, start=1):
            tensors = {name: random_weight(shape) for name, shape in shard.items()}
            save_file(tensors, folder / f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors")
        done.write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel", **dict(module.config)}))
    return sorted(folder.glob("*.safetensors"))


def random_weight(shape: torch.Size) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02).cpu()


def write_cache(path: Path, *, pixels: int, width: int, dtype: torch.dtype) -> None:
    """Latents and prompt embeddings of SAMPLES rows as Qwen-Image's, written once."""
    if path.exists():
        return
    cache, random, side = Cache(str(path)), torch.Generator().manual_seed(0), pixels // 8
    shapes = {"image": ("latents", (16, side, side)), "text": ("prompt_embeds", (TOKENS, width))}
    for kind, (name, shape) in shapes.items():
        tensors = torch.randn(SAMPLES, *shape, generator=random).to(dtype)
        entries = {entry_key(**{kind: n}): {name: tensor_bytes(tensors[n])} for n in range(SAMPLES)}
        cache.write(kind, entries, encoder="bench")
    rows = tuple(ManifestRow(f"{n}", entry_key(text=n), entry_key(image=n), pixels, pixels, 1) for n in range(SAMPLES))
    known = {"text": "bench", "image": "bench"}
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    write_manifest(cache, Manifest(rows, family="qwen_image", dtype=precision, encoders=known, created=time.time()))


class HostMemory:
    """Most memory that a process and its descendants take, in bytes, what they share counted once; looked at each second."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak, self.has_ended = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while not self.has_ended.wait(1.0):
            try:
                processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
                self.peak = max(self.peak, sum(process.memory_full_info().pss for process in processes))
            except psutil.Error:
                continue


def run(job: Path, output: Path, overrides: list[str], *, timeout_s: float) -> dict[str, Any]:
    """Figures of one run, or what went wrong."""
    sets = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "diffsynth_ray.cli.app", "run", str(job), "--new", *sets]
    log = output.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        memory = HostMemory(process.pid)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            code = -1
        memory.has_ended.set()
    if code != 0:
        return {"error": f"exit code {code}", "log": log.read_text()[-1500:]}
    with (output / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = {key: [float(row["value"]) for row in rows if row["key"] == key] for key in {row["key"] for row in rows}}
    return {
        # A window of steps that no longer knows the first ones, which compile.
        "step_s": values["step_s"][-1],
        "samples_per_s": values["samples_per_s"][-1],
        "gpu_gib": values.get("gpu_memory_gib", [0.0])[-1],
        "host_gib": memory.peak / 2**30,
        "last_loss": values["loss"][-1],
    }


def compare(found: dict[int, dict[str, Any]]) -> None:
    """Add efficiency and what is lost, against the fewest GPUs."""
    good = {gpus: figures for gpus, figures in found.items() if "error" not in figures}
    if not good:
        return
    least = min(good)
    for gpus, figures in good.items():
        figures["efficiency"] = figures["samples_per_s"] / gpus / (good[least]["samples_per_s"] / least)
        figures["lost_share"] = 1 - good[least]["step_s"] / figures["step_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--timeout-s", type=float, default=900)
    parser.add_argument("--tiny", action="store_true", help="the tiny size on CPUs: to try this program out")
    options = parser.parse_args()
    folder = options.folder.absolute()
    width = TINY["dit"]["joint_attention_dim"] if options.tiny else 3584
    paths = write_weights(folder / "transformer", tiny=options.tiny)
    pixels, dtype = (64, torch.float32) if options.tiny else (1024, torch.bfloat16)
    write_cache(folder / "cache", pixels=pixels, width=width, dtype=dtype)
    shards = ", ".join(json.dumps(str(path)) for path in paths)
    job = folder / "job.toml"
    output = folder / "run"
    precision = "fp32" if options.tiny else "bf16"
    job.write_text(
        JOB.format(paths=f"[{shards}]", cache=folder / "cache", output=output, steps=options.steps, precision=precision)
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record: dict[str, Any] = {
        "device": device, "torch": torch.__version__, "command": " ".join(sys.argv), "pixels": pixels, "methods": {},
    }  # fmt: skip
    for name, overrides in METHODS.items():
        if options.only and name not in options.only:
            continue
        found = record["methods"][name] = {}
        for gpus in options.gpus:
            both = [*overrides, f"distributed.num_workers={gpus}", f"dataset.global_batch_size={gpus}"]
            found[gpus] = run(job, output, both, timeout_s=options.timeout_s)
            compare(found)
            print(json.dumps({"method": name, "gpus": gpus, **found[gpus]}), flush=True)
            options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
