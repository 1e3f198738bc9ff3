"""Whole runs of a small job, for tests that watch, stop, kill and continue them."""

import csv
import json
import os
import re
import threading
import time
from pathlib import Path

from safetensors.torch import load_file

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

    def start(self, *overrides):
        resolved = resolve(load_job(str(self.job_path), list(overrides)), Resources(cpus=2, gpus=0))
        return run_job(resolved, submission_id="test", say=self._hear)

    def _hear(self, line):
        self.heard.append(time.monotonic())
        self.said.append(line)

    def recoveries(self):
        """For every loss of workers: seconds until a step was done again, and how many steps were done twice."""
        found = []
        for number, line in enumerate(self.said):
            if not line.startswith("lost rank"):
                continue
            before = [int(step) for each in self.said[:number] for step in re.findall(r"^step (\d+)/", each)]
            after = [(at, re.match(r"step (\d+)/", each)) for at, each in enumerate(self.said) if at > number]
            at, match = next((pair for pair in after if pair[1]), (None, None))
            if match is not None:
                again = max(before, default=0) - int(match[1]) + 1
                found.append({"seconds": round(self.heard[at] - self.heard[number], 1), "steps_redone": max(again, 0)})
        return found

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


def note_recovery(what, recoveries):
    """Add to the figures of the file that the environment names (tests/bench/results/recovery.json is one)."""
    path = os.environ.get("DSRAY_RECOVERY_JSON")
    if path is None:
        return
    known = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    known.setdefault(what, []).extend(recoveries)
    Path(path).write_text(json.dumps(known, indent=2) + "\n")


def wait_until(condition, seconds=120, explain=lambda: ""):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, explain()
        time.sleep(0.02)
    return found


def distance(first, second):
    """Norm of the difference of two exports, relative to the first's."""
    difference = sum(float((first[key] - second[key]).norm() ** 2) for key in first) ** 0.5
    return difference / sum(float(tensor.norm() ** 2) for tensor in first.values()) ** 0.5
