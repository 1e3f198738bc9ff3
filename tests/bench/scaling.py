"""How training of Qwen-Image at its real size scales with the GPUs of one host, through `dsray run`.

Writes random weights and a cache of random encodings of the real sizes (41 GB of disk, 58 with the encoders), then trains with
each method on 1, 2, 4 ... GPUs, the work of a GPU the same. Full training of 20.4 B parameters needs more than four GPUs:
--full-layers trains a transformer of so many blocks instead. The last method encodes pictures on each GPU and then trains from
the cache that it has filled. Prints a JSON line a run and writes all of them to --output:

  samples_per_s        of all GPUs
  efficiency           against the fewest GPUs that ran the method, per GPU
  lost_share           share of a step beyond what one GPU takes for the same work
  communication_share  share of a step that rank 0 has waited for the others
  gpu_gib              most memory that rank 0's GPU gave out
  host_gib             most memory of the run's processes, what they share counted once
  encoded_per_s        (split) samples a second of stage one, once all encoders run
  start_s              from the command to the end of the first step

Beside --output lie the runs' logs, each line with its second.

usage: python tests/bench/scaling.py --folder FOLDER --output results.json [--gpus 1 2] [--only NAME ...] [--full-layers N]
       [--samples N] [--steps N] [--set KEY=VALUE ...] [--tiny]
"""

import argparse
import contextlib
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth_ray.data.cache import Cache, entry_key
from diffsynth_ray.data.manifest import Manifest, ManifestRow, write_manifest
from diffsynth_ray.models.full_size import RELEASED
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.models.qwen_image_configs import TINY
from diffsynth_ray.train.split import tensor_bytes

TOKENS, SAMPLES = 256, 64
DSRAY = [sys.executable, "-m", "diffsynth_ray.cli.app"]
MEASURED = 10
"""Last steps of a run whose waits are averaged; its step time is that of the last 19."""
LORA = ["lora.base_model=dit"]
ZERO = ['training.trainable_models=["dit"]', "distributed.strategy=deepspeed"]
SPLIT = "lora, split: encode, then train"
METHODS: dict[str, list[str]] = {
    "lora, ddp": LORA,
    "lora, layer offload, one host copy": [*LORA, "offload.cpu_offload=true", "gradient.checkpointing_offload=true"],
    "full, zero 2": [*ZERO, "distributed.zero_stage=2"],
    "full, zero 3": [*ZERO, "distributed.zero_stage=3"],
    "full, zero 3, optimizer on the host": [*ZERO, "distributed.zero_stage=3", "distributed.offload_optimizer_device=cpu"],
    SPLIT: LORA,
}
JOB = """
name = "scaling"
[dataset]
repeat = 1000
{data}
[model]
family = "qwen_image"
paths = {paths}
{tokenizer}
[split]
enabled = true
cache_path = "{cache}"
[training]
precision = "{precision}"
max_steps = 1000
max_grad_norm = 0
[output]
path = "{output}"
save_steps = 100000
checkpoint_minutes = 100000
[logging]
tensorboard = false
"""


def write_weights(folder: Path, component: str, config: dict[str, Any]) -> list[Path]:
    """Random weights of std 0.02 in shards, written once; what is around a transformer's blocks comes first, then they."""
    done = folder / "written"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        module = QwenImage.build_component(component, config)
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        shards: dict[str, dict[str, torch.Size]] = {}
        for name, shape in shapes.items():
            shards.setdefault(shard_of(name), {})[name] = shape
        for number, shard in enumerate(shards[key] for key in sorted(shards)):
            save_file({name: random_weight(shape) for name, shape in shard.items()}, folder / f"{number:03}.safetensors")
        if component != "dit":  # which is known by its tensors, whatever its number of blocks
            names = dict.fromkeys(("_class_name", "model_type"), QwenImage.config_names[component])
            (folder / "config.json").write_text(json.dumps({**config, **names}))
        done.touch()
    return sorted(folder.glob("*.safetensors"))


def shard_of(name: str) -> str:
    """Each block of a transformer, or layer of an encoder, has a file of its own."""
    found = re.search(r"(transformer_blocks|layers)\.(\d+)\.", name)
    return f"{int(found[2]):03}" if found else ""


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


def write_pictures(folder: Path, *, pixels: int, count: int) -> None:
    """A data set of soft random pictures with prompts of about TOKENS words, written once."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    random, rows = np.random.default_rng(0), ["image,prompt"]
    for n in range(count):
        colors = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        colors.resize((pixels, pixels), Image.Resampling.BICUBIC).save(folder / f"{n}.jpg", quality=92)
        rows.append(f"{n}.jpg,picture {n}" + " soft colors" * (TOKENS // 2))
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")


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


class Run:
    """`dsray run`, followed until a step is done, then ended: an export and a checkpoint of a whole model are not measured."""

    def __init__(self, job: Path, output: Path, overrides: list[str], *, log: Path) -> None:
        sets = [part for override in overrides for part in ("--set", override)]
        self.output, self.lines, self.started = output, list[str](), time.monotonic()
        shutil.rmtree(output, ignore_errors=True)
        command = [*DSRAY, "run", str(job), "--new", *sets]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.memory = HostMemory(self.process.pid)
        self.reader = threading.Thread(target=self.read, args=(log,), daemon=True)
        self.reader.start()

    def read(self, log: Path) -> None:
        """The run's lines with the seconds since its start, here and in a file."""
        assert self.process.stdout is not None
        with log.open("w") as file:
            for line in self.process.stdout:
                self.lines.append(f"{time.monotonic() - self.started:6.1f} {line.rstrip()}")
                print(self.lines[-1], file=file, flush=True)

    def values(self) -> dict[str, list[float]]:
        """What loss.csv holds so far, by key."""
        path = self.output / "loss.csv"
        if not path.exists():
            return {}
        found: dict[str, list[float]] = {}
        for row in csv.DictReader(io.StringIO(path.read_text().rpartition("\n")[0])):
            found.setdefault(row["key"], []).append(float(row["value"]))
        return found

    def figures(self, steps: int, *, timeout_s: float) -> dict[str, Any]:
        """Those after so many steps, or what went wrong."""
        while self.process.poll() is None and len(self.values().get("loss", [])) < steps:
            if time.monotonic() - self.started > timeout_s:
                break
            time.sleep(0.5)
        values = self.values()
        self.memory.has_ended.set()
        self.end()
        if len(values.get("loss", [])) < steps:
            return {"error": f"{len(values.get('loss', []))} of {steps} steps", "log": self.lines[-12:]}
        encoded = self.output / "encode.json"
        return {
            # A window of steps that no longer knows the first ones, which compile.
            "step_s": values["step_s"][-1],
            "samples_per_s": values["samples_per_s"][-1],
            "communication_share": mean(values.get("communication_s", [0.0])[-MEASURED:]) / values["step_s"][-1],
            "gpu_gib": values.get("gpu_memory_gib", [0.0])[-1],
            "host_gib": self.memory.peak / 2**30,
            "last_loss": values["loss"][-1],
            "start_s": next((float(line.split()[0]) for line in self.lines if " step 1/" in line), None),
            # A text and a picture count one each.
            **({"encoded_per_s": json.loads(encoded.read_text())["per_s"] / 2} if encoded.exists() else {}),
        }

    def end(self) -> None:
        """Its processes are gone afterwards, and their GPUs free. Nothing is asked: a checkpoint of all that is not wanted."""
        try:
            processes = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess:
            processes = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=60)  # freeing much pinned memory takes a while
        self.process.wait(60)
        self.reader.join(10)


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
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, 2, 4, 8], help="none: only write the files")
    parser.add_argument("--only", nargs="*", choices=METHODS)
    parser.add_argument("--full-layers", type=int, default=60)
    parser.add_argument("--samples", type=int, default=192, help="pictures to encode for each GPU")
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--timeout-s", type=float, default=900, help="of one run")
    parser.add_argument("--set", action="append", default=[], help="a key of every job, as of `dsray run`")
    parser.add_argument("--tiny", action="store_true", help="the tiny size on CPUs: to try this program out")
    options = parser.parse_args()
    folder = options.folder.absolute()
    configs = TINY if options.tiny else RELEASED["Qwen/Qwen-Image"][1]
    pixels, dtype = (64, torch.float32) if options.tiny else (1024, torch.bfloat16)
    names = [name for name in METHODS if not options.only or name in options.only]
    dit = write_weights(folder / "transformer", "dit", configs["dit"])
    encoders = {}
    if SPLIT in names:
        encoders = {name: write_weights(folder / name, name, configs[name]) for name in ("text_encoder", "vae")}
    width = configs["text_encoder"]["text_config"]["hidden_size"]
    write_cache(folder / "cache", pixels=pixels, width=width, dtype=dtype)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record: dict[str, Any] = {
        "device": device, "torch": torch.__version__, "command": " ".join(sys.argv), "pixels": pixels,
        "full_layers": options.full_layers, "methods": {},
    }  # fmt: skip
    job, output = folder / "job.toml", folder / "run"
    for name in names:
        found = record["methods"][name] = {}
        for gpus in options.gpus:
            overrides = [*METHODS[name], *options.set, f"distributed.num_workers={gpus}", f"dataset.global_batch_size={gpus}"]
            paths, data, cache = [dit], "", folder / "cache"
            if name.startswith("full"):
                paths = [dit[: options.full_layers + 1]]
            if name == SPLIT:
                base = folder / f"pictures-{gpus}"
                paths, cache = [dit, *encoders.values()], folder / f"cache-{gpus}"
                write_pictures(base, pixels=pixels, count=options.samples * gpus)
                data = f'base_path = "{base}"\nmetadata_path = "{base}/metadata.csv"\nheight = {pixels}\nwidth = {pixels}'
                shutil.rmtree(cache, ignore_errors=True)
                overrides += [f"split.num_workers={gpus}"]
            job.write_text(
                JOB.format(
                    paths=json.dumps([[str(path) for path in shards] for shards in paths]),
                    tokenizer=f'tokenizer_path = "{QwenImage.tiny_tokenizers["tokenizer_path"]}"' if name == SPLIT else "",
                    data=data, cache=cache, output=output,
                    precision="fp32" if options.tiny else "bf16",
                )
            )  # fmt: skip
            log = options.output.with_name(f"{options.output.stem}-{re.sub(r'[^a-z0-9]+', '-', name)}-{gpus}.log")
            started = Run(job, output, overrides, log=log)
            found[gpus] = started.figures(options.steps, timeout_s=options.timeout_s)
            compare(found)
            print(json.dumps({"method": name, "gpus": gpus, **found[gpus]}), flush=True)
            options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
