"""The optimizer's step on the host in one pass (train/strategy/host_adam.py) beside torch's fused step with its casts.

Both do what a step has to: a bf16 gradient, float32 master and moments, the new weight rounded to bf16. Seconds are the
clock's; CPU seconds, of all threads, are what a machine that others use too still tells. Prints one JSON line.

usage: python tests/bench/host_adam.py [--millions N] [--rounds N]
"""

import argparse
import json
import os
import time
from collections.abc import Callable

import torch

from diffsynth_ray.train.strategy.host_adam import MasterUpdate, compiled_steps, in_huge_pages, update_masters


def measure(step: Callable[[], object], *, count: int, rounds: int) -> dict[str, float]:
    """The best of some rounds after one to warm up, in nanoseconds a parameter."""
    step()
    clock, cpu = [], []
    for _ in range(rounds):
        began, began_cpu = time.perf_counter(), time.process_time()
        step()
        clock.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    return {"ns": round(min(clock) / count * 1e9, 3), "cpu_ns": round(min(cpu) / count * 1e9, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    count = options.millions * 1_000_000
    gradient = (torch.randn(count) * 1e-3).bfloat16()
    home = torch.zeros(count, dtype=torch.bfloat16)
    began = time.perf_counter()
    steps = compiled_steps()
    compile_s = time.perf_counter() - began
    if steps is None:
        raise SystemExit("no C compiler here: nothing to compare")

    def build(*, is_huge: bool) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        values = torch.randn(count) * 0.02
        master = torch.nn.Parameter(in_huge_pages(values) if is_huge else values)
        return master, torch.optim.AdamW([master], lr=1e-4, fused=True)

    def by_torch(master: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            master.grad = gradient.to(torch.float32, copy=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            home.copy_(master)

    master, optimizer = build(is_huge=True)
    ours = measure(
        lambda: update_masters(steps, optimizer, [MasterUpdate(master, gradient, home)], scale=0.5),
        count=count,
        rounds=options.rounds,
    )
    master, optimizer = build(is_huge=False)
    theirs = measure(lambda: by_torch(master, optimizer), count=count, rounds=options.rounds)
    record = {
        "what": "AdamW on the host, per parameter",
        "millions": options.millions,
        "one pass, huge pages": ours,
        "torch fused, with its casts": theirs,
        "ratio": {key: round(ours[key] / theirs[key], 3) for key in ours},
        "compile_s": round(compile_s, 2),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
