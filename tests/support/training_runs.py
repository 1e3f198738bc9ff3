"""Whole runs of a small job, for tests that watch, stop, kill and continue them."""

import csv
import re
import threading
import time

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

    def start(self, *overrides):
        resolved = resolve(load_job(str(self.job_path), list(overrides)), Resources(cpus=2, gpus=0))
        return run_job(resolved, submission_id="test", say=self.said.append)

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

    def weights(self):
        return load_file(self.output / "step-10.safetensors")

    def wait_for(self, text, seconds=120, *, count=1):
        """Until a line with `text` was said `count` times."""
        wait_until(lambda: sum(text in line for line in list(self.said)) >= count, seconds, lambda: self.said)


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
