"""Kills at random moments over one run, which must end with the very weights of an undisturbed one.

    python tests/bench/soak.py reference --folder DIR
    python tests/bench/soak.py kill --folder DIR --seconds 330      (again and again: it goes on where it was)
    python tests/bench/soak.py finish --folder DIR > tests/bench/results/soak.json

A portion starts an attempt of the same run, kills a random worker after a random time, again and again, and asks for a stop
before its time is over; `finish` trains to the end and compares losses and weights bit by bit.
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import ray

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from training_runs import PARTS, Run, current_commit, describe_measurement, distance

from diffsynth_ray.errors import ExitCode
from diffsynth_ray.launch.environment import WITHOUT_DASHBOARD_ENV

NUM_STEPS = 400
SETTINGS = (
    "dataset.max_pixels=1024", "dataset.global_batch_size=2", "distributed.num_workers=2", "output.checkpoint_steps=3",
    f"training.max_steps={NUM_STEPS}", f"output.save_steps={NUM_STEPS}", "distributed.max_failures=1000",
)  # fmt: skip
PHOTOS = Path(__file__).parents[2] / "jobs/data/photos"


def kill_at_random(run, *, seconds, seed, kills):
    """SIGKILL a random rank at a random moment of its life, until the time is over; then ask for a stop."""
    draw = random.Random(seed)
    end = time.monotonic() + seconds
    seen = 0
    while time.monotonic() < end:
        groups = [line for line in list(run.said) if "training worker(s): rank" in line]
        if len(groups) == seen:
            time.sleep(0.02)
            continue
        seen = len(groups)
        group_started = time.monotonic()
        # Most die while training, some while they load or restore.
        wait_for_training = draw.random() < 0.8
        num_steps = len(steps_of(run))
        while wait_for_training and len(steps_of(run)) == num_steps and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 2.0))
        if time.monotonic() >= end:
            break
        rank = draw.randrange(2)
        moment = moment_of(run)
        try:
            run.kill(rank)
        except (ProcessLookupError, KeyError):
            continue
        steps = steps_of(run)
        kills.append({
            "rank": rank, "step": steps[-1] if steps else 0, "age_s": round(time.monotonic() - group_started, 2),
            "moment": moment,
        })  # fmt: skip
    run.dir.request_stop(reason="the soak's portion is over")


def moment_of(run):
    """What the newest group of workers is doing, from what it said and what lies in the checkpoints' folder."""
    said = list(run.said)
    start = max(number for number, line in enumerate(said) if "training worker(s): rank" in line)
    lines = said[start:]
    if any(line.startswith("step ") for line in lines):
        folders = run.dir.checkpoints_dir.glob("step-*")
        is_saving = any(not (folder / "manifest.json").exists() for folder in folders)
        return "training, a checkpoint half written" if is_saving else "training"
    return "loaded, before its first step" if any(line.startswith("model loaded") for line in lines) else "loading"


def steps_of(run):
    return [int(line.split()[1].split("/")[0]) for line in list(run.said) if line.startswith("step ")]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["reference", "kill", "finish"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=330)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=256 << 20, runtime_env={"env_vars": WITHOUT_DASHBOARD_ENV},
    )  # fmt: skip
    reference, run = Run(options.folder, PHOTOS, "whole"), Run(options.folder, PHOTOS, "killed")
    kills_path = options.folder / "kills.json"
    known = json.loads(kills_path.read_text()) if kills_path.exists() else {"kills": [], "recoveries": []}
    kills = known["kills"]
    if options.part == "reference":
        assert reference.start(*SETTINGS) == ExitCode.DONE, reference.said
        return
    if options.part == "kill":
        killer = threading.Thread(
            target=kill_at_random, args=(run,), kwargs={"seconds": options.seconds, "seed": len(kills), "kills": kills}
        )
        killer.start()
        code = run.start(*SETTINGS)
        killer.join()
        known["recoveries"] += run.recoveries()
        kills_path.write_text(json.dumps(known))
        print(f"{len(kills)} kills, at step {steps_of(run)[-1:]} of {NUM_STEPS}, {ExitCode(code).name}", file=sys.stderr)
        return
    assert run.start(*SETTINGS) == ExitCode.DONE, run.said
    name = f"step-{NUM_STEPS}.safetensors"
    from safetensors.torch import load_file

    assert run.losses() == reference.losses()
    assert distance(load_file(reference.output / name), load_file(run.output / name)) == 0
    lost = run.lost()
    print(json.dumps({
        "kills": len(kills),
        "kills_by_moment": Counter(kill["moment"] for kill in kills),
        "kills_by_rank": Counter(f"rank {kill['rank']}" for kill in kills),
        "steps_at_kills": " ".join(str(kill["step"]) for kill in kills),
        "losses_noted": len(lost),
        "attempts": max(entry["attempt"] for entry in run.dir.attempts()),
        "num_steps": NUM_STEPS,
        "weights_and_losses": "bit-identical to the undisturbed run",
        "steps_redone": sum(each.get("steps_redone", 0) for each in known["recoveries"]),
        "median_s": {
            key: statistics.median(each[key] for each in known["recoveries"] if key in each) for key in PARTS
        },
        **describe_measurement(),
        "commit": current_commit(),
        "command": "python tests/bench/soak.py reference, kill (repeated), finish",
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
