"""A whole run on one GPU against the same run on the CPU: the same samples, noise and timesteps."""

import csv

import pytest
from safetensors.torch import load_file

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import local_resources, resolve
from diffsynth_ray.errors import ExitCode
from diffsynth_ray.launch.driver import run_locally

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


def train(output, *overrides):
    # A LoRA at a moderate learning rate: what is compared is the arithmetic, not how chaotic a training can get.
    small = ["dataset.batch_size=1", "dataset.global_batch_size=2", "training.learning_rate=1e-3", "validation.prompts=[]"]
    lora = ["training.trainable_models=[]", "lora.base_model=dit", "lora.rank=8"]
    ends = ["training.max_steps=8", "output.save_steps=8", "logging.tensorboard=false"]
    settings = [f"output.path={output}", *small, *lora, *ends, *overrides]
    job = load_job("jobs/quickstart.toml", settings)
    said = []
    assert run_locally(resolve(job, local_resources()), say=said.append) == ExitCode.DONE, said
    with (output / "loss.csv").open() as file:
        losses = [float(row["value"]) for row in csv.DictReader(file) if row["key"] == "loss"]
    return losses, load_file(output / "step-8.safetensors"), said


def test_gpu_in_bf16_and_fp32_against_cpu(tmp_path):
    on_cpu, _, _ = train(tmp_path / "cpu", "distributed.resources_per_worker={CPU = 0.5}", "distributed.num_workers=1")
    on_gpu, _, said = train(tmp_path / "gpu")
    assert any("on cuda" in line for line in said), said
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    in_bf16, weights, _ = train(tmp_path / "bf16", "training.precision=bf16")
    assert in_bf16 == pytest.approx(on_cpu, rel=5e-2)
    assert in_bf16 != on_gpu
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.bfloat16"}
