"""One rank of test_communication.py: `python communication_rank.py RANK FOLDER LATE_S CASE...`. Not a test module.

Rank 1 comes LATE_S seconds late to every step. Each rank writes to FOLDER/rank-RANK.json, by case and step, the seconds that
its strategy has measured ("waited"), when it began the step and when each of its waits, by the clock that both share.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_trainer import build_job, micro

from diffsynth_ray.memory.host import NodePlace
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.group import Group, NodeWorkers
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.strategy import communication
from diffsynth_ray.train.trainer import Trainer, load_family, select_trained

WORLD_SIZE = 2
STEPS = 3
BF16 = {"precision": "bf16"}
FULL = {"base_model": None, "rank": 32}
ON_HOST = {"cpu_offload": True, "optimize_on_cpu": True}


def zero(stage):
    return {"strategy": "deepspeed", "zero_stage": stage}


CASES = {
    "ddp": {},
    "ddp, recomputed": {"gradient": {"checkpointing": True}},
    "ddp, bf16": {"training": BF16},
    "ddp, unused": {"training": {"find_unused_parameters": True}},
    "zero 1": {"distributed": zero(1)},
    "zero 2": {"distributed": zero(2)},
    "zero 2, bf16": {"distributed": zero(2), "training": BF16},
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


def run_case(case, rank, late_s):
    trainer = build_trainer(build_job(**CASES[case]), rank)
    strategy = trainer.strategy
    collectives = communication._COLLECTIVES
    if case.endswith("beside"):  # as on a GPU, where they run in streams that are not measured
        strategy._waits_beside, communication._COLLECTIVES = True, ()
    hands = [[micro([0]), micro([1])], [micro([2]), micro([3])]]
    steps, begun = [], []
    timer = strategy.communication._timer
    stretch, timer.stretch = timer.stretch, lambda: begun.append(time.monotonic()) or stretch()
    for _ in range(STEPS):
        dist.barrier()
        strategy.communication.take_s()
        begun = []
        time.sleep(late_s * rank)
        step = {"began": time.monotonic()}
        trainer.train_step(hands[rank], num_samples=4)
        steps.append(step | {"waited": strategy.communication.take_s(), "waits": begun})
    communication._COLLECTIVES = collectives
    if hasattr(strategy, "engine"):
        strategy.engine.destroy()
    return steps


def main():
    rank, folder, late_s = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    store = dist.FileStore(str(folder / "store"), WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    found = {case: run_case(case, rank, late_s) for case in sys.argv[4:]}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    # Without it gloo's threads are still there when the interpreter ends, which sometimes aborts the process.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
