"""One rank of the cases of test_deepspeed.py: `python zero_rank.py WORLD_SIZE FOLDER CASE... --rank N`. Not a test module.

All cases run in one group of gloo processes, because imports take longer than they do. Rank 0 writes what it saw to
FOLDER/results-WORLD_SIZE.json.
"""

import argparse
import json
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.family import BatchShape, ComponentFiles, EncodedBatch, get_family
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.models.qwen_image_configs import TINY
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.export import export_weights
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.shards import ShardedState, write_shard
from diffsynth_ray.train.storage import Storage
from diffsynth_ray.train.trainer import MicroInput, Trainer, select_trained

torch.set_num_threads(1)
STEPS = 3
LORA = {"lora": {"base_model": "dit", "rank": 4}}
FULL = {"lora": {"base_model": None}, "training": {"trainable_models": ["dit"]}}
BF16 = {"training": {"precision": "bf16"}}
COMPILED = {"training": {"compile": True}}
SGD = {"training": {"optimizer": "torch.optim.SGD", "optimizer_args": {"momentum": 0.9}}}
SCHEDULE_FREE = {"training": {"optimizer": "schedule_free.AdamW"}}


def zero(stage, **keys):
    return {"distributed": {"strategy": "deepspeed", "zero_stage": stage, **keys}}


ON_HOST = {"offload_optimizer_device": "cpu"}
SMALL_BUCKETS = Path(__file__).parents[2] / "support" / "small_buckets.json"
"""Of which the tiny model's gradients fill several, so that one travels while the next fills."""
CASES = {
    1: {
        "lora 2": (LORA, zero(2)),
        "full 3": (FULL, zero(3)),
    },
    2: {
        "lora 1": (LORA, zero(1)),
        "lora 2": (LORA, zero(2)),
        "lora 3": (LORA, zero(3)),
        "full 1 host": (FULL, zero(1, **ON_HOST)),
        "full 2": (FULL, zero(2)),
        "full 2 overlapped": (FULL, zero(2, deepspeed_config=str(SMALL_BUCKETS))),
        "full 2 host": (FULL, zero(2, **ON_HOST)),
        "full 3": (FULL, zero(3)),
        "full 3 kept": (FULL, {"gradient": {"checkpointing": False}}, zero(3)),
        "lora 3 compiled": (LORA, COMPILED, zero(3)),
        "full 3 compiled": (FULL, COMPILED, zero(3)),
        "full 3 kept compiled": (FULL, COMPILED, {"gradient": {"checkpointing": False}}, zero(3)),
        "full 3 host": (FULL, zero(3, **ON_HOST, offload_param_device="cpu")),
        "sgd 2": (LORA, SGD, zero(2)),
        "schedule-free 1": (FULL, SCHEDULE_FREE, zero(1)),
        "schedule-free 2": (LORA, SCHEDULE_FREE, zero(2)),
        "schedule-free 2 host": (FULL, SCHEDULE_FREE, zero(2, **ON_HOST)),
        "bf16 1": (LORA, BF16, zero(1)),
        "bf16 2": (LORA, BF16, zero(2)),
        "bf16 3": (LORA, BF16, zero(3)),
        "bf16 2 host": (LORA, BF16, zero(2, **ON_HOST)),
    },
}


def build_job(*parts):
    """Clipping that bites, a schedule, weight decay large enough to be seen where it must not act."""
    job = {
        "name": "test",
        "training": {
            "precision": "fp32",
            "learning_rate": 1e-3,
            "weight_decay": 0.5,
            "max_grad_norm": 0.05,
            "lr_scheduler": "linear",
            "warmup_steps": 1,
        },
    }
    for part in parts:
        for section, values in part.items():
            job[section] = job.get(section, {}) | values
    return Job.model_validate(job)


def build_trainer(job, family=None, *, probes=True):
    if family is None:
        dtype = torch.bfloat16 if job.training.precision == "bf16" else torch.float32
        family = QwenImage.build_tiny(0, components=["dit"], dtype=dtype, device="meta")
    family.device = torch.device("cpu")
    select_trained(family, job)
    residency = settle(family, job, say=print)
    trainer = Trainer(job, family, build_schedule(job, num_samples=24, global_batch_size=3), residency=residency)
    trainer.start(micro(0) if probes else None, say=print)
    return trainer


def micro(index, *, is_dummy=False, width=64):
    generator = torch.Generator().manual_seed(index)
    latents = torch.randn(1, 16, 4, 6, generator=generator)
    embeds = torch.randn(1, 5, width, generator=generator)
    return MicroInput(EncodedBatch(latents, {"prompt_embeds": embeds}), (index,), is_dummy)


def hand(rank, world_size):
    """Three samples; with two workers the second one's second micro step is a dummy."""
    if world_size == 1:
        return [micro(0), micro(1), micro(2)]
    return [[micro(0), micro(1)], [micro(2), micro(1, is_dummy=True)]][rank]


def train(trainer, steps=STEPS):
    losses, norms = [], []
    for _ in range(steps):
        result = trainer.train_step(hand(trainer.strategy.rank, trainer.strategy.world_size), num_samples=3)
        losses.append(trainer.strategy.sum_over_workers(result.loss_sum.clone()).item() / 3)
        norms.append(float(result.grad_norm))
    return losses, norms


def evaluate(trainer):
    """The loss of a sample of its own on each rank, without gradients."""
    batch = micro(10 + trainer.strategy.rank).batch
    return trainer.evaluate(batch, micro(20).batch.latents, torch.tensor([500])).item()


def close(trainer):
    if hasattr(trainer.strategy, "engine"):
        trainer.strategy.engine.destroy()


def compare(expected, found):
    """Largest differences of losses, norms and weights; names of weights that differ in nothing from their start."""
    return {
        "loss": max(abs(a - b) for a, b in zip(expected["losses"], found["losses"], strict=True)),
        "norm": max(abs(a - b) for a, b in zip(expected["norms"], found["norms"], strict=True)),
        "evaluated": max(abs(a - b) for a, b in zip(expected["evaluated"], found["evaluated"], strict=True)),
        "weights": max(float((expected["masters"][key] - found["masters"][key]).abs().max()) for key in expected["masters"]),
        "same names": list(expected["masters"]) == list(found["masters"]),
        "drift": found["drift"],
        "moved": sum(not torch.equal(found["start"][key], found["masters"][key]) for key in found["masters"]),
        "moved as ddp": all(
            torch.equal(found["start"][key], found["masters"][key])
            == torch.equal(expected["start"][key], expected["masters"][key])
            for key in found["masters"]
        ),
    }


def copied(masters):
    return {name: tensor.float().cpu().clone() for name, tensor in masters.items()}


def run_case(job, *, probes=True):
    trainer = build_trainer(job, probes=probes)
    start = copied(trainer.strategy.full_masters())
    losses, norms, evaluated = [], [], [evaluate(trainer)]
    for _ in range(STEPS):
        loss, norm = train(trainer, steps=1)
        losses, norms = losses + loss, norms + norm
        with trainer.strategy.eval_weights():
            evaluated.append(evaluate(trainer))
    with trainer.strategy.eval_weights():
        masters = copied(trainer.strategy.full_masters())
        found = {"losses": losses, "norms": norms, "start": start, "masters": masters, "evaluated": evaluated}
        found["drift"] = drift(trainer, masters)
    close(trainer)
    return found


def drift(trainer, masters):
    """Largest difference between the model's parameters and their masters, rounded as they are."""
    largest = 0.0
    for name, param in trainer.trained.items():
        whole = trainer.strategy._deepspeed.zero.GatheredParameters if hasattr(param, "ds_id") else nullcontext
        with whole([param]):
            if masters:  # on rank 0 only under ZeRO
                largest = max(largest, float((param.detach() - masters[name].to(param.dtype)).abs().max()))
    return largest


def run_beside_ddp(parts, references):
    *base, _ = parts
    name = json.dumps(base)
    if name not in references:
        references[name] = run_case(build_job(*base))
    found = run_case(build_job(*parts))
    return compare(references[name], found) if dist.get_rank() == 0 else {}


def run_chain(rank, world_size, folder):
    """One run that changes its strategy at every checkpoint, beside one that stays with DDP."""
    straight = build_trainer(build_job(FULL))
    expected, _ = train(straight, steps=8)
    expected_masters = copied(straight.strategy.full_masters())
    storage = Storage.at(folder / "state")
    losses, step, names = [], 0, []
    for number, strategy in enumerate([{}, zero(2), zero(3), zero(1, **ON_HOST), {}]):
        trainer = build_trainer(build_job(FULL, strategy))
        if number:
            state = ShardedState(storage, [f"step-{step}/{each}" for each in range(world_size)])
            trainer.strategy.load_state(state)
            trainer.step = step
        found, _ = train(trainer, steps=2 if number < 3 else 1)
        losses += found
        step = trainer.step
        slices = trainer.strategy.state_slices()
        write_shard(storage, f"step-{step}/{rank}", slices)
        dist.barrier()
        names.append(sorted(ShardedState(storage, [f"step-{step}/{each}" for each in range(world_size)]).names()))
        masters = copied(trainer.strategy.full_masters())
        close(trainer)
    if rank != 0:
        return {}
    return {
        "loss": max(abs(a - b) for a, b in zip(expected, losses, strict=True)),
        "weights": max(float((expected_masters[key] - masters[key]).abs().max()) for key in masters),
        "one set of names": all(each == names[0] for each in names),
        "keys": sorted({name.partition("/")[0] for name in names[0]}),
    }


ESTIMATING = {"training": {"optimizer": "estimating_optimizer.Estimating"}}
RESUMED = {"1": zero(1), "2": zero(2), "3": zero(3), "2 host": zero(2, **ON_HOST)}


def run_resume(rank, world_size, folder):
    """Largest differences of a run whose optimizer steers itself by numbers, interrupted once, from an uninterrupted one."""
    found, estimates = {}, {}
    for name, strategy in RESUMED.items():
        straight, first, second = (build_trainer(build_job(FULL, ESTIMATING, strategy)) for _ in range(3))
        expected, _ = train(straight, steps=5)
        losses, _ = train(first, steps=3)
        storage = Storage.at(folder / name)
        write_shard(storage, str(rank), first.strategy.state_slices())
        dist.barrier()
        second.strategy.load_state(ShardedState(storage, [str(each) for each in range(world_size)]))
        second.step = 3
        losses += train(second, steps=2)[0]
        masters = [copied(trainer.strategy.full_masters()) for trainer in (straight, second)]
        found[name] = max(abs(a - b) for a, b in zip(expected, losses, strict=True))
        if rank == 0:
            found[name] = max(found[name], *(float((masters[0][key] - masters[1][key]).abs().max()) for key in masters[0]))
        estimates[name] = [None] * world_size
        dist.all_gather_object(estimates[name], straight.strategy._torch_optimizer.param_groups[0]["distance"])
        for trainer in (straight, first, second):
            close(trainer)
    return {"difference": found, "estimates": estimates, "refused": refusal()}


def refusal():
    """What is said of an optimizer whose state has neither one value a weight nor one in all."""
    trainer = build_trainer(build_job(FULL, {"training": {"optimizer": "estimating_optimizer.Sliced"}}, zero(2)))
    train(trainer, steps=1)
    try:
        trainer.strategy.state_slices()
    except ModelError as error:
        return error.message
    finally:
        close(trainer)
    return None


def run_export(rank, folder):
    """A consolidated export at stage 3 beside DDP's."""
    paths = {}
    for name, strategy in (("ddp", {}), ("zero", zero(3))):
        job = build_job(LORA, {"lora": {"alpha": 8.0}}, strategy)
        trainer = build_trainer(job)
        train(trainer, steps=1)
        masters = trainer.strategy.full_masters()
        if rank == 0:
            [path] = export_weights(trainer.family, job, masters=masters, output_dir=folder / name, stem="step-1")
            paths[name] = str(path)
        close(trainer)
    return paths


def run_families():
    """Losses and norms of two steps at stage 3, compiled, beside DDP's, which is not: blocks of one or several kinds, called by
    name or by place, with samples of several sizes."""
    found = {}
    for name in ("flux", "flux2", "qwen_image", "wan", "z_image"):
        for kind, keys in (("lora", LORA), ("full", FULL)):
            expected = family_steps(get_family(name), build_job(keys))
            steps = family_steps(get_family(name), build_job(keys, COMPILED, zero(3)))
            found[f"{name} {kind}"] = max(abs(a - b) / abs(a) for a, b in zip(expected, steps, strict=True))
    return found


def family_steps(family_type, job):
    family = family_type.build_tiny(0, components=["dit"], dtype=torch.float32, device="meta")
    family.device = torch.device("cpu")
    select_trained(family, job)
    residency = settle(family, job, sizes_vary=True, say=print)
    trainer = Trainer(job, family, build_schedule(job, num_samples=24, global_batch_size=2), residency=residency)

    def micro_of(index):
        generator = torch.Generator().manual_seed(index)
        width, tokens = 64 + 16 * (index % 3), 12 + 5 * (index % 2)
        blank = family.blank_batch(BatchShape(1, 64, width, 5 if family.clip_step else 1, text_tokens=tokens))
        conditions = {
            name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            for name, value in blank.conditions.items()
        }
        return MicroInput(EncodedBatch(torch.randn(blank.latents.shape, generator=generator), conditions), (index % 2,))

    rank = dist.get_rank()
    trainer.start(micro_of(rank), say=print)
    figures = []
    for step in range(2):
        result = trainer.train_step([micro_of(2 * step + rank)], num_samples=2)
        figures += [trainer.strategy.sum_over_workers(result.loss_sum.clone()).item(), float(result.grad_norm)]
    close(trainer)
    return figures


class PeakMemory:
    """Peak of this process's anonymous memory over what it had at the start, in bytes; mapped files are not counted."""

    def __enter__(self):
        self.start, self.peak, self.running = anonymous_bytes(), 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.peak = max(self.peak, anonymous_bytes() - self.start)
            time.sleep(0.01)

    def __exit__(self, *args):
        self.running = False
        self.thread.join()


def anonymous_bytes():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


BIG = TINY["dit"] | {"num_layers": 12, "num_attention_heads": 16, "joint_attention_dim": 512}


class WholeParameters:
    """Largest share of a model's parameters that was whole on this rank at a time, in a forward and in a backward pass."""

    def __init__(self, trainer):
        self.params = [param for param in trainer.graph.parameters() if hasattr(param, "ds_status")]
        self.share = {"forward": 0.0, "backward": 0.0}
        coordinator = trainer.strategy._zero.parameter_offload.get_param_coordinator()
        self.fetch = coordinator.fetch_sub_module
        coordinator.fetch_sub_module = self.fetch_and_look

    def fetch_and_look(self, module, forward):
        self.fetch(module, forward=forward)
        whole = sum(param.ds_numel for param in self.params if param.ds_status.name != "NOT_AVAILABLE")
        name = "forward" if forward else "backward"
        self.share[name] = max(self.share[name], whole / sum(param.ds_numel for param in self.params))


def few_live(rank, folder):
    """By default DeepSpeed keeps a billion parameters at hand, which is more than these models have."""
    file = folder / f"few-{rank}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage3_max_live_parameters": 10**7, "stage3_max_reuse_distance": 0}}))
    return str(file)


def run_unprobed(rank, folder):
    """In the first pass, whose order is not known yet, stage 3 lets go of small parameters too."""
    at_once = {"training": {"warmup_steps": 0}}  # the first step's weight decay would be seen where it must not act
    stage_3 = zero(3, deepspeed_config=few_live(rank, folder))
    expected, found = (run_case(build_job(FULL, at_once, *more), probes=False) for more in ([], [stage_3]))
    return compare(expected, found) if rank == 0 else {}


def run_memory(rank, folder):
    """Loading and two steps of a LoRA at stage 3 with a model of some hundred MB."""
    path = folder / "big.safetensors"
    module = QwenImage.build_component("dit", BIG)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if rank == 0:
        save_file({name: torch.full(shape, 0.01) for name, shape in shapes.items()}, path)
    dist.barrier()
    job = build_job(LORA, zero(3, deepspeed_config=few_live(rank, folder)))
    close(build_trainer(build_job(LORA, zero(3))))  # imports are not what is measured
    with PeakMemory() as loading:
        files = ComponentFiles(BIG, (path,), shapes)
        family = QwenImage.load({"dit": files}, dtype=torch.float32, device="meta")
        trainer = build_trainer(job, family, probes=False)
    whole = WholeParameters(trainer)
    for _ in range(2):  # the order of the first one tells the second what comes next
        trainer.train_step([micro(rank, width=512)], num_samples=2)
    close(trainer)
    peaks = [None, None]
    dist.all_gather_object(peaks, {"loading": loading.peak} | whole.share)
    return {"model": path.stat().st_size, "peaks": peaks}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("world_size", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--rank", type=int, required=True)
    options = parser.parse_args()
    rank, world_size, folder = options.rank, options.world_size, options.folder
    if world_size > 1:
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    special = {
        "memory": lambda: run_memory(rank, folder),
        "unprobed": lambda: run_unprobed(rank, folder),
        "chain": lambda: run_chain(rank, world_size, folder),
        "export": lambda: run_export(rank, folder),
        "families": run_families,
        "resume": lambda: run_resume(rank, world_size, folder),
    }
    results, references = {}, {}
    for case in CASES[world_size] if options.cases == ["all"] else options.cases:
        started = time.process_time()
        results[case] = special[case]() if case in special else run_beside_ddp(CASES[world_size][case], references)
        print(f"{case}: {time.process_time() - started:.1f} s CPU", flush=True)
    if rank == 0:
        (folder / f"results-{world_size}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        # Without it gloo's threads are still there when the interpreter ends, which sometimes aborts the process.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
