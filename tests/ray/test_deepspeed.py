"""A run under DeepSpeed with two workers on real Ray processes, the whole way: data, steps, export, checkpoint, continuing."""

import csv
import json

import pytest
from safetensors.torch import load_file

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.errors import ExitCode
from diffsynth_ray.launch.driver import run_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.usefixtures("local_ray")]

JOB = """
[dataset]
base_path = "{photos}"
metadata_path = "{photos}/metadata.csv"
repeat = 8
max_pixels = 4096
global_batch_size = 3
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
save_steps = 3
[logging]
tensorboard = false
"""
ZERO = ["distributed.strategy=deepspeed", "distributed.num_workers=2"]


def start(folder, photos, *overrides):
    job = folder / "job.toml"
    job.write_text(JOB.format(photos=photos, output=folder / "run"))
    said = []
    resolved = resolve(load_job(str(job), list(overrides)), Resources(cpus=2, gpus=0))
    code = run_job(resolved, submission_id="test", say=said.append)
    assert code == ExitCode.DONE, said
    return said


def losses(folder):
    with (folder / "run" / "loss.csv").open() as file:
        return {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["key"] == "loss"}


def test_a_run_under_zero_2_goes_on_under_zero_3_as_one_under_ddp(tmp_path, photos):
    plain, shared = tmp_path / "plain", tmp_path / "shared"
    for folder in (plain, shared):
        folder.mkdir()
    start(plain, photos, "training.max_steps=6")
    # Three samples a step for two workers: one of four micro steps is a dummy.
    start(shared, photos, *ZERO, "training.max_steps=3", "distributed.offload_optimizer_device=cpu")
    more = {"zero_optimization": {"stage": "auto", "stage3_param_persistence_threshold": 100}}
    (shared / "ds.json").write_text(json.dumps(more))
    zero_3 = [*ZERO, "distributed.zero_stage=3", f"distributed.deepspeed_config={shared}/ds.json"]
    said = start(shared, photos, *zero_3, "training.max_steps=6")
    assert any("continuing after step 3 of 6" in line for line in said), said
    assert losses(shared) == pytest.approx(losses(plain), abs=1e-5)
    for step in (3, 6):
        expected, found = (load_file(folder / "run" / f"step-{step}.safetensors") for folder in (plain, shared))
        assert expected.keys() == found.keys()
        assert max(float((expected[key] - found[key]).abs().max()) for key in expected) < 1e-5
