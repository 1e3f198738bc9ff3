"""Split training of Qwen-Image at its real size on one GPU: what stage one costs, what stage two saves, when it pays.

Weights are random (shapes, number formats and work are the real ones), built on the device: nothing is downloaded. The code
is the project's own: SampleEncoder, Cache, read_batches, CachedInput, Trainer. Prints one JSON object:

  encode       texts and images a second, alone and in batches, as a share of the compute limit (counted operations against a
               measured matrix product); seconds and bytes a sample
  cache        writing and reading: samples and MB a second in training order, and the share that SHA-256 takes
  stage two    s a step and peak memory with the transformer alone, from the cache
  combined     the same with text encoder and VAE on the device, encoding in every step
  break_even   passes over the data after which stage one has paid for itself

With --read-only nothing is computed with: entries of the real sizes are written and read, which needs no GPU. Beside it the
same tensors are read from one .pth a sample, in the same order, as DiffSynth-Studio's split training keeps them.

usage: python tests/bench/split.py [--tiny | --read-only] [--size PIXELS] [--samples N] [--tokens N] [--steps N] [--layers N]
       [--cache DIR]
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# As the driver sets it for its workers: threads that wait actively take the processors of the readers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from real_size import build
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffsynth_ray.config.schema import DatasetSection, Job
from diffsynth_ray.data.batches import SampleOrder, build_buckets
from diffsynth_ray.data.cache import Cache, TensorBytes, entry_key, entry_sha256, pack_entry
from diffsynth_ray.data.cached import locate_rows, read_batches
from diffsynth_ray.data.manifest import Manifest, ManifestRow
from diffsynth_ray.data.metadata import PROMPT_COLUMN, Metadata
from diffsynth_ray.data.samples import SampleIndex
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.cached_input import CachedInput
from diffsynth_ray.train.graph import SampleBatch
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.split import SampleEncoder
from diffsynth_ray.train.trainer import MicroInput, Trainer, select_trained


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the tiny size, also without a GPU: to try this program out")
    parser.add_argument("--read-only", action="store_true", help="the cache alone, with random entries of the real sizes")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--cache", type=Path, help="where the cache is written; default: a temporary folder")
    return parser.parse_args()


def build_family(options: argparse.Namespace, components: list[str], device: str) -> QwenImage:
    """The family with its weights still to be read by `settle`."""
    if options.tiny:
        family = QwenImage.build_tiny(0, components=components, dtype=torch.bfloat16, device="meta")
        family.device = torch.device(device)
        return family
    return build("qwen-image", components, device=device, num_layers=options.layers)


def synchronize() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call, repeats: int = 3) -> float:
    """Median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        started = synchronize()
        call()
        times.append(synchronize() - started)
    return sorted(times)[len(times) // 2]


def operations(call) -> int:
    # As plain products: the counter knows no attention with fewer keys than queries.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def matrix_rate(device: str, size: int) -> float:
    """FLOP/s of a bf16 matrix product."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / seconds(lambda: a @ a, repeats=10)


def prompts_of(family: QwenImage, count: int, tokens: int) -> list[str]:
    """Different prompts of about so many tokens of this family's tokenizer."""
    words = [f"{number} a photograph of {number % 7} cats" for number in range(count)]
    tokenizer = family.tokenizers["tokenizer_path"]
    per_word = len(tokenizer(" cat").input_ids)
    return [word + " cat" * max((tokens - len(tokenizer(word).input_ids)) // per_word, 0) for word in words]


def bench_encode(options: argparse.Namespace, device: str, cache: Cache, limit: float) -> tuple[dict, Manifest]:
    size, count = options.size, options.samples
    family = build_family(options, ["text_encoder", "vae"], device)
    encoder = SampleEncoder(family, settle(family, bench_job(), say=lambda line: None))
    prompts = prompts_of(family, count, options.tokens)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, size, size, 3), dtype=np.uint8)
    figures: dict = {"weights_gib": weights_gib(family)}
    reset_peak()
    with torch.no_grad():
        text_work = operations(lambda: family.encode_text(prompts[:1]))
        image_work = operations(lambda: family.encode_image(torch.from_numpy(pixels[:1])))
    text_s = seconds(lambda: encoder.encode_texts(prompts[:8])) / 8
    image_s = {batch: seconds(lambda: encoder.encode_images(pixels[:batch])) / batch for batch in (1, 2, 4, 8)}
    best = min(image_s.values())
    figures |= {
        "texts_per_s": 1 / text_s,
        "text_share_of_limit": text_work / text_s / limit,
        "images_per_s_by_batch": {str(batch): 1 / spent for batch, spent in image_s.items()},
        "image_share_of_limit": image_work / best / limit,
        "tflop_per_text": text_work / 1e12,
        "tflop_per_image": image_work / 1e12,
        "s_per_sample": text_s + best,
        "peak_gib": peak_gib(),
    }
    texts = [entry for first in range(0, count, 8) for entry in encoder.encode_texts(prompts[first : first + 8])]
    images = [entry for first in range(0, count, 4) for entry in encoder.encode_images(pixels[first : first + 4])]
    rows, sizes = [], []
    started = time.perf_counter()
    for first in range(0, count, 32):
        part = range(first, min(first + 32, count))
        cache.write("text", {entry_key(text=n): texts[n] for n in part}, encoder="bench")
        cache.write("image", {entry_key(image=n): images[n] for n in part}, encoder="bench")
    write_s = time.perf_counter() - started
    for n in range(count):
        rows.append(ManifestRow(prompts[n], entry_key(text=n), entry_key(image=n), size, size, 1))
        sizes.append(len(pack_entry(texts[n])[1]) + len(pack_entry(images[n])[1]))
    figures |= {"bytes_per_sample": sum(sizes) // count, "write_mb_per_s": sum(sizes) / write_s / 1e6}
    return figures, Manifest(tuple(rows))


def write_random(options: argparse.Namespace, cache: Cache) -> tuple[dict, Manifest]:
    """Entries as Qwen-Image's: latents bf16 [16, h/8, w/8], a token 3584 bf16."""
    side, random = options.size // 8, np.random.default_rng(0)
    sizes = {"image": 16 * side * side * 2, "text": options.tokens * 3584 * 2}
    shapes = {"image": (16, side, side), "text": (options.tokens, 3584)}
    names = {"image": "latents", "text": "prompt_embeds"}
    write_s = 0.0
    for first in range(0, options.samples, 32):
        part = range(first, min(first + 32, options.samples))
        for kind, shape in shapes.items():
            tensors = {n: TensorBytes("BF16", shape, random.bytes(sizes[kind])) for n in part}
            began = time.perf_counter()
            cache.write(kind, {entry_key(**{kind: n}): {names[kind]: tensors[n]} for n in part}, encoder="bench")
            write_s += time.perf_counter() - began
    rows = tuple(
        ManifestRow(f"{n}", entry_key(text=n), entry_key(image=n), options.size, options.size, 1)
        for n in range(options.samples)
    )
    total = sum(sizes.values()) * options.samples
    return {"bytes_per_sample": sum(sizes.values()), "write_mb_per_s": total / write_s / 1e6}, Manifest(rows)


def print_reading(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(str(options.cache or folder))
        written, manifest = write_random(options, cache)
        record = {
            "what": "the cache of split training with entries of Qwen-Image's sizes, read in training order",
            "options": {name: value for name, value in vars(options).items() if name in ("size", "samples", "tokens")},
            "hardware": f"{platform.machine()}, {os.cpu_count()} CPUs, local disk; load {os.getloadavg()[0]:.1f} at the start",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "commit": git_commit(),
            "command": "python tests/bench/split.py " + " ".join(sys.argv[1:]),
            "write": written,
        }
        index = build_index(manifest)
        paths = write_pth(cache, manifest, Path(folder))
        turns = [(bench_read(index, cache, manifest, "cpu"), read_pth(index, paths)) for _ in range(5)]
        record["read"], record["read_pth_of_one_sample_each"] = sorted(turns, key=lambda turn: turn[0]["ms_per_sample"])[2]
        ratios = sorted(ours["samples_per_s"] / theirs["samples_per_s"] for ours, theirs in turns)
        record["samples_per_s_over_pth"] = {"median": ratios[2], "of_turns": ratios}
    print(json.dumps(rounded(record), indent=1), flush=True)


def write_pth(cache: Cache, manifest: Manifest, folder: Path) -> list[Path]:
    """A file for each row, with the tensors that the cache has for it."""
    index = build_index(manifest, repeat=1)
    rows = locate_rows(cache, manifest, kinds=("text", "image"))
    given = CachedInput(index, rows, device=torch.device("cpu"))
    paths = [folder / f"{row}.pth" for row in range(len(manifest.rows))]
    for batch in read_batches(index, rows, start_step=0, num_steps=len(paths), rank=0, world_size=1):
        encoded = given.from_cache(batch).batch
        torch.save({"latents": encoded.latents, **encoded.conditions}, paths[batch.rows[0]])
    return paths


def read_pth(index: SampleIndex, paths: list[Path]) -> dict:
    """The samples of `bench_read` in the same order, each a file of its own, loaded by torch in this thread."""
    count = 200
    micros = index.micro_batches(start_step=0, num_steps=count, rank=0, world_size=1)
    started, cpu = time.perf_counter(), time.process_time()
    for _, _, _, micro in micros:
        torch.load(paths[micro.rows[0]], weights_only=True)
    read_s, cpu_s = (time.perf_counter() - started) / count, (time.process_time() - cpu) / count
    return {
        "samples_per_s": 1 / read_s,
        "ms_per_sample": read_s * 1e3,
        "cpu_ms_per_sample": cpu_s * 1e3,
        "note": "from the page cache; one thread, no check",
    }


def git_commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip()


def build_index(manifest: Manifest, *, repeat: int = 1000) -> SampleIndex:
    metadata = Metadata([{PROMPT_COLUMN: row.prompt} for row in manifest.rows], (PROMPT_COLUMN,), (), "", "")
    buckets = build_buckets([(row.height, row.width, row.num_frames) for row in manifest.rows])
    order = SampleOrder(buckets, repeat=repeat, batch_size=1, global_batch_size=1, seed=0)
    return SampleIndex(metadata=metadata, order=order, dataset=DatasetSection())


def bench_read(index: SampleIndex, cache: Cache, manifest: Manifest, device: str) -> dict:
    rows = locate_rows(cache, manifest, kinds=("text", "image"))
    given = CachedInput(index, rows, device=torch.device(device))
    num_bytes = sum(rows.index.table["num_bytes"].to_pylist()) / len(manifest.rows)
    count = 200
    batches = read_batches(index, rows, start_step=0, num_steps=count, rank=0, world_size=1)
    started, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        given.from_cache(batch)
    read_s, cpu_s = (synchronize() - started) / count, (time.process_time() - cpu) / count
    location = rows.index.location(0)
    data = cache.store.read_at(location.shard, location.offset, location.num_bytes)
    hash_s = seconds(lambda: entry_sha256(location.key, location.layout, data), repeats=20) * num_bytes / len(data)
    return {
        "samples_per_s": 1 / read_s,
        "mb_per_s": num_bytes / read_s / 1e6,
        "ms_per_sample": read_s * 1e3,
        "cpu_ms_per_sample": cpu_s * 1e3,
        "sha256_ms_per_sample_in_one_thread": hash_s * 1e3,
        "note": "from the page cache where it fits; four threads, pinned copies to the device included",
    }


def bench_training(options: argparse.Namespace, device: str, components: list[str], inputs) -> dict:
    """Steps of a LoRA of rank 32, compiled where that works; `inputs(family)` yields micro inputs."""
    gc.collect()
    reset_peak()
    family, job = build_family(options, components, device), bench_job()
    select_trained(family, job)
    residency = settle(family, job, say=lambda line: None)
    loaded_gib = weights_gib(family)
    trainer = Trainer(job, family, build_schedule(job, num_samples=1000, global_batch_size=1), residency=residency)
    found = iter(inputs(family))
    trainer.start(next(found))
    times, waits = [], []
    for _ in range(options.steps):
        started = synchronize()
        micro = next(found)
        waits.append(time.perf_counter() - started)
        trainer.train_step([micro], num_samples=1)
        times.append(synchronize() - started)
    settled = sorted(times[2:])
    return {
        "components": components,
        "weights_gib": loaded_gib,
        "peak_gib": peak_gib(),
        "s_per_step": settled[len(settled) // 2],
        "min_s": settled[0],
        "data_wait_s": sorted(waits)[len(waits) // 2],
    }


def bench_job() -> Job:
    return Job.model_validate({"name": "bench", "lora": {"base_model": "dit", "rank": 32}})


def gib(num_bytes: float) -> float:
    return num_bytes / 2**30


def weights_gib(family: QwenImage) -> float:
    params = (param for module in family.components.values() for param in module.parameters())
    return gib(sum(param.numel() * param.element_size() for param in params))


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return gib(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0.0


def rounded(value):
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    options = parse()
    if options.read_only:
        print_reading(options)
        return
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    limit = matrix_rate(device, 512 if device == "cpu" else 8192)
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(str(options.cache or folder))
        encode, manifest = bench_encode(options, device, cache, limit)
        gc.collect()
        index = build_index(manifest)
        read = bench_read(index, cache, manifest, device)
        rows = locate_rows(cache, manifest, kinds=("text", "image"))

        def cached(family: QwenImage):
            given = CachedInput(index, rows, device=torch.device(device))
            for batch in read_batches(index, rows, start_step=0, num_steps=1000, rank=0, world_size=1):
                yield given.from_cache(batch)

        def decoded(family: QwenImage):
            pixels = np.random.default_rng(0).integers(0, 256, (1, 1, options.size, options.size, 3), dtype=np.uint8)
            for row in range(1000):
                yield MicroInput(SampleBatch(pixels, (manifest.rows[row % len(manifest.rows)].prompt,), (row,)), (0,))

        stage_two = bench_training(options, device, ["dit"], cached)
        combined = bench_training(options, device, ["dit", "text_encoder", "vae"], decoded)
    saved = combined["s_per_step"] - stage_two["s_per_step"]
    record = {
        "what": "split training of Qwen-Image, LoRA r32, batch 1",
        "options": {name: value for name, value in vars(options).items() if name != "cache"},
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "matrix_product_tflops": limit / 1e12,
        "encode": encode,
        "read": read,
        "read_samples_per_trained_sample": read["samples_per_s"] * stage_two["s_per_step"],
        "stage_two": stage_two,
        "combined": combined,
        "stage_two_to_combined": {
            "s_per_step": stage_two["s_per_step"] / combined["s_per_step"],
            "peak_gib": stage_two["peak_gib"] / combined["peak_gib"] if combined["peak_gib"] else None,
        },
        "break_even_passes": encode["s_per_sample"] / saved if saved > 0 else None,
        "took_s": time.perf_counter() - began,
    }
    print(json.dumps(rounded(record), indent=1), flush=True)


if __name__ == "__main__":
    main()
