"""Whole runs of a small job, for tests that watch, stop, kill and continue them."""

import csv
import json
import os
import platform
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import ray
import torch
from safetensors.torch import load_file
from waiting import wait_until

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.launch.driver import run_job
from diffsynth_ray.run_dir import RunDir

JOB = """
[dataset]
base_path = "{photos}"
metadata_path = "{photos}/metadata.csv"
repeat = 8
max_pixels = 4096
global_batch_size = 4
[model]
family = "qwen_image"
tiny = true
[lora]
base_model = "dit"
rank = 4
[training]
learning_rate = 1e-3
precision = "fp32"
[output]
path = "{output}"
save_steps = 4
[logging]
tensorboard = false
"""


class Run:
    """One job in its own folder, and what it said."""

    def __init__(self, tmp_path, photos, name="run"):
        self.output = tmp_path / name
        self.job_path = tmp_path / f"{name}.toml"
        self.job_path.write_text(JOB.format(photos=photos, output=self.output))
        self.dir = RunDir(self.output)
        self.said = []
        self.heard = []
        """When each line was said."""
        self.killed = []
        """When `kill` has killed."""

    def start(self, *overrides):
        resolved = resolve(load_job(str(self.job_path), list(overrides)), Resources(cpus=2, gpus=0))
        return run_job(resolved, submission_id="test", say=self._hear)

    def _hear(self, line):
        self.heard.append(time.monotonic())
        self.said.append(line)

    def kill(self, rank):
        """SIGKILL a rank of the newest group; `recoveries` counts from here."""
        pid = self.pids()[rank]
        self.killed.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)

    def recoveries(self):
        """For every loss of workers: see `recovery`. Counted from the signal where `kill` sent it."""
        pairs = list(zip(self.heard, self.said, strict=True))
        starts = [number for number, line in enumerate(self.said) if line.startswith("lost rank")]
        killed = self.killed if len(self.killed) == len(starts) else [self.heard[number] for number in starts]
        ends = [*starts, len(pairs)][1:]
        return [recovery(pairs[:end], start=start, killed=at) for start, end, at in zip(starts, ends, killed, strict=True)]

    def begin(self, *overrides):
        """Start in a thread; `end` waits and gives the exit code."""
        self._codes = []
        self._thread = threading.Thread(target=lambda: self._codes.append(self.start(*overrides)), daemon=True)
        self._thread.start()

    def end(self, seconds=200):
        self._thread.join(seconds)
        assert not self._thread.is_alive(), self.said
        return self._codes[0]

    def pids(self):
        """Process of every rank of the newest group of workers."""
        line = [line for line in list(self.said) if "training worker(s): rank" in line][-1]
        return {int(rank): int(pid) for rank, pid in re.findall(r"rank (\d+) \(pid (\d+)", line)}

    def lost(self):
        """What attempts.jsonl says about lost workers."""
        return [entry for entry in self.dir.attempts() if entry["event"] == "workers lost"]

    def losses(self):
        with self.dir.loss_path.open() as file:
            return {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["key"] == "loss"}

    def weights(self, step=10):
        return load_file(self.output / f"step-{step}.safetensors")

    def wait_for(self, text, seconds=120, *, count=1):
        """Until a line with `text` was said `count` times."""
        wait_until(lambda: sum(text in line for line in list(self.said)) >= count, seconds, lambda: self.said)

    def wait_for_step(self, step, seconds=120):
        """Until rank 0 has written that the step is done: the next few take less time than its line takes to be heard."""

        def is_done():
            progress = self.dir.progress()
            return progress is not None and progress.step >= step

        wait_until(is_done, seconds, lambda: self.said, every_s=0.002)


PARTS = {
    "detected_s": "lost rank", "workers_started_s": r"\d+ training worker\(s\)", "model_loaded_s": "model loaded",
    "restored_s": "continuing after step", "training_s": r"step \d+/",
}  # fmt: skip
"""Seconds from the kill to the first such line, each after the one before."""


def recovery(told, *, start, killed):
    """What one loss cost: `told` are (when, line), line `start` tells the loss; a key is left out where its line never came.

    `steps_redone` had been done before the loss and were done again after it.
    """
    found, position, group = {}, start, start
    for key, pattern in PARTS.items():
        at = next((number for number in range(position, len(told)) if re.match(pattern, told[number][1])), None)
        if at is not None:
            found[key], position = round(told[at][0] - killed, 1), at
            group = at if key == "workers_started_s" else group
    parts = (told[:group], told[group:])
    steps = [[int(step) for _, line in part for step in re.findall(r"^step (\d+)/", line)] for part in parts]
    if all(steps):
        found["steps_redone"] = max(max(steps[0]) - steps[1][0] + 1, 0)
    return found


def note_recovery(what, recoveries):
    """Add to the figures of the file that the environment names (tests/bench/results/recovery.json is one)."""
    path = os.environ.get("DSRAY_RECOVERY_JSON")
    if path is None:
        return
    known = json.loads(Path(path).read_text()) if Path(path).exists() else describe_measurement() | {"recoveries": {}}
    now = {"commit": current_commit(), "load": round(os.getloadavg()[0], 1)}
    known["recoveries"].setdefault(what, []).extend(each | now for each in recoveries)
    Path(path).write_text(json.dumps(known, indent=2) + "\n")


def current_commit():
    """Of the checkout, or "" where there is none."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip()


def describe_measurement():
    """What a file of figures says about where they are from."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "hardware": f"{os.cpu_count()} CPUs ({model[1] if model else platform.machine()}), "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "versions": {"python": platform.python_version(), "ray": ray.__version__, "torch": torch.__version__},
        "command": "DSRAY_RECOVERY_JSON=tests/bench/results/recovery.json pytest -m 'slow or not slow' "
        "tests/ray/test_recovery.py tests/ray/test_nodes.py tests/ray/test_continue.py",
        "unit": "seconds from the kill: until it was told, until new workers were there, had loaded the model, had restored "
        "the checkpoint, had done a step; load: of the machine, in processes",
    }


def distance(first, second):
    """Norm of the difference of two exports, relative to the first's."""
    difference = sum(float((first[key] - second[key]).norm() ** 2) for key in first) ** 0.5
    return difference / sum(float(tensor.norm() ** 2) for tensor in first.values()) ** 0.5
