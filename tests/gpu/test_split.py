"""Split training on GPUs, both stages, against combined training: the same samples, noise and timesteps."""

import csv
import re

import pytest
import torch

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import local_resources, resolve
from diffsynth_ray.errors import ExitCode
from diffsynth_ray.launch.driver import run_locally

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


def train(tmp_path, name, *overrides):
    gpus = torch.cuda.device_count()
    ends = ["training.max_steps=6", "output.save_steps=6", "logging.tensorboard=false"]
    workers = [f"distributed.num_workers={gpus}", f"dataset.global_batch_size={2 * gpus}"]
    job = load_job("jobs/quickstart_split.toml", [f"output.path={tmp_path / name}", *ends, *workers, *overrides])
    said = []
    assert run_locally(resolve(job, local_resources()), say=said.append) == ExitCode.DONE, said
    with (tmp_path / name / "loss.csv").open() as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["key"] == "loss"], said


def test_two_stages_on_gpus_are_one(tmp_path):
    split, said = train(tmp_path, "split", f"split.cache_path={tmp_path / 'cache'}")
    assert any(re.search(r"^encode .* on cuda", line) for line in said), said
    assert any(re.search(r"^encoded 5 texts and 5 images", line) for line in said), said
    combined, _ = train(tmp_path, "combined", "split.enabled=false")
    # An encoder may choose other kernels with more samples in a batch.
    assert split == pytest.approx(combined, rel=1e-3)
