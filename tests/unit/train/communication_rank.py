"""One rank of test_communication.py: `python communication_rank.py RANK FOLDER LATE_S CASE...`. Not a test module.

Rank 1 comes late to every step: when rank 0 has been in one wait for LATE_S seconds, or longer where the steps take long. Each
rank writes to FOLDER/rank-RANK.json, by case and step, the seconds that its strategy has measured ("waited"), when it began
the step and when each of its waits, by the clock that both share.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_trainer import build_job, micro
from waiting import wait_until

from diffsynth_ray.memory.host import NodePlace
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.group import Group, NodeWorkers
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.strategy import communication
from diffsynth_ray.train.trainer import Trainer, load_family, select_trained

WORLD_SIZE = 2
WARM_UP = 2
"""Steps to which both come in time. In the first one DeepSpeed waits where it does not later."""
STEPS = 3
BF16 = {"precision": "bf16"}
FULL = {"base_model": None, "rank": 32}
ON_HOST = {"cpu_offload": True, "optimize_on_cpu": True}


SMALL_BUCKETS = str(Path(__file__).parents[2] / "support" / "small_buckets.json")


def zero(stage, **keys):
    return {"strategy": "deepspeed", "zero_stage": stage, **keys}


CASES = {
    "ddp": {},
    "ddp, recomputed": {"gradient": {"checkpointing": True}},
    "ddp, bf16": {"training": BF16},
    "ddp, unused": {"training": {"find_unused_parameters": True}},
    "zero 1": {"distributed": zero(1)},
    "zero 2": {"distributed": zero(2)},
    "zero 2, bf16": {"distributed": zero(2), "training": BF16},
    "zero 2, beside": {"distributed": zero(2, deepspeed_config=SMALL_BUCKETS)},
    "zero 3": {"distributed": zero(3)},
    "zero 3, beside": {"distributed": zero(3)},
    "host": {"lora": FULL, "offload": ON_HOST, "training": {"trainable_models": ["dit"], "max_grad_norm": 0.0}},
    "host, clipped": {"lora": FULL, "offload": ON_HOST, "training": {"trainable_models": ["dit"]}},
}


def build_trainer(job, rank):
    family = load_family(job, device=torch.device("cpu"))
    select_trained(family, job)
    group = NodeWorkers(Group(WORLD_SIZE), NodePlace(0, rank, WORLD_SIZE))
    residency = settle(family, job, group=group, say=print)
    trainer = Trainer(job, family, build_schedule(job, num_samples=40, global_batch_size=4), residency=residency)
    trainer.start(micro([0]))
    return trainer


def run_case(case, rank, late_s, folder):
    trainer = build_trainer(build_job(**CASES[case]), rank)
    strategy = trainer.strategy
    collectives = communication._COLLECTIVES
    if case.endswith("beside"):  # as on a GPU, where they run in streams that are not measured
        strategy._waits_beside, communication._COLLECTIVES = True, ()
    hands = [[micro([0]), micro([1])], [micro([2]), micro([3])]]
    steps, begun = [], []
    timer = strategy.communication._timer
    stretch, timer.stretch = timer.stretch, lambda: note_wait(begun, shown_at) or stretch()
    for step in range(WARM_UP + STEPS):
        shown_at = folder / f"{case}-{step}-{rank}.waits"
        dist.barrier()
        strategy.communication.take_s()
        begun = []
        if step >= WARM_UP and rank == 1:
            wait_until(partial(waits_since, folder / f"{case}-{step}-0.waits", late_s))
        began = time.monotonic()
        trainer.train_step(hands[rank], num_samples=4)
        steps.append({"began": began, "waited": strategy.communication.take_s(), "waits": begun})
        if step == WARM_UP - 1:  # on a busy machine a step has many small waits, for both
            late_s = max(late_s, 4 * (time.monotonic() - began))
    communication._COLLECTIVES = collectives
    if hasattr(strategy, "engine"):
        strategy.engine.destroy()
    return steps[WARM_UP:]


def note_wait(begun, path):
    """A wait begins: for the figures, and for the other rank to see."""
    begun.append(time.monotonic())
    with path.open("a") as file:
        file.write(f"{begun[-1]}\n")


def waits_since(path, seconds):
    """Whether the newest of the waits began that long ago: it goes on."""
    begun = path.read_text().splitlines() if path.exists() else []
    return bool(begun) and time.monotonic() - float(begun[-1]) > seconds


def main():
    rank, folder, late_s = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    store = dist.FileStore(str(folder / "store"), WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    found = {case: run_case(case, rank, late_s, folder) for case in sys.argv[4:]}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    # Without it gloo's threads are still there when the interpreter ends, which sometimes aborts the process.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
