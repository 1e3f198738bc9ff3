"""The methods of low VRAM at Qwen-Image's real size on one GPU, ours beside DiffSynth-Studio's own, each in its own process.

Prints one JSON line a run and writes all to --output. The reference is a script of DiffSynth-Studio's training path that
takes a mode, --layers and --steps, and prints a JSON line with s_per_step and peak_GiB; without --reference only ours runs.

usage: python tests/bench/memory_table.py --output results.json [--reference reference.py] [--only NAME ...]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEP = Path(__file__).with_name("gpu_step.py")
FULL = ["--full", "--layers", "12"]
# Most wanted first: a machine that is lent for minutes may go before the end.
RUNS: list[tuple[str, list[str], list[str]]] = [
    ("lora resident", [], ["peer-lora"]),
    ("lora offload", ["--offload", "--checkpointing-offload"], ["peer-lora-offload"]),
    ("lora fp8 offload", ["--fp8", "--offload"], []),
    ("full 12 blocks, offload, optimizer on the host", [*FULL, "--offload", "--optimize-on-cpu", "--no-clipping"],
     ["peer-full-offload-cpuopt", "--layers", "12"]),
    ("lora fp8", ["--fp8"], ["peer-lora-fp8"]),
    ("lora offload, budget 22 GiB", ["--offload", "--vram-budget-gib", "22"], []),
    ("full 12 blocks resident", FULL, ["peer-full", "--layers", "12"]),
    ("lora resident, wrapper in C++", ["--cpp-wrapper"], []),
    ("lora without checkpointing", ["--checkpointing", "false"], []),
    ("lora 512x512, batch 4, without checkpointing", ["--size", "512", "--batch", "4", "--checkpointing", "false"], []),
]  # fmt: skip


def run(command: list[str], *, timeout_s: float) -> dict[str, Any]:
    """The last JSON line that the command prints, or what went wrong."""
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout_s:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found | {"process_s": round(time.monotonic() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--timeout-s", type=float, default=120)
    options = parser.parse_args()
    results: dict[str, Any] = {"command": " ".join(sys.argv), "runs": {}}
    for name, ours, reference in RUNS:
        if options.only and name not in options.only:
            continue
        steps = ["--steps", str(options.steps)]
        entry = {"ours": run([sys.executable, str(STEP), *ours, *steps], timeout_s=options.timeout_s)}
        if reference and options.reference is not None:
            command = [sys.executable, str(options.reference), *reference, *steps]
            entry["reference"] = run(command, timeout_s=options.timeout_s)
            times = [entry[side].get("s_per_step") for side in ("ours", "reference")]
            if None not in times:
                entry["ratio"] = round(times[0] / times[1], 3)
        results["runs"][name] = entry
        print(json.dumps({name: entry}), flush=True)
        # Whole at every moment: the machine may be taken away.
        beside = options.output.with_suffix(".part")
        beside.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(beside, options.output)


if __name__ == "__main__":
    main()
