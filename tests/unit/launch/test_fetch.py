"""What is checked of a job on a node, before a worker loads anything."""

from pathlib import Path

import pytest

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.errors import JobFileError
from diffsynth_ray.launch.fetch import _check_model


def test_arguments_that_the_optimizer_does_not_take_are_told_before_a_worker_starts(tmp_path):
    job = load_job("quickstart", [f"output.path={tmp_path}", "training.optimizer_args={bettas = [0.9, 0.95]}"])
    with pytest.raises(JobFileError, match=r"training\.optimizer_args: .*unexpected keyword argument 'bettas'"):
        _check_model(resolve(job, Resources(cpus=2, gpus=0)), board=None)


def test_files_without_the_trained_component_are_told_before_a_worker_starts(tmp_path):
    vae = Path(__file__).parents[2] / "assets" / "qwen_image_tiny" / "vae" / "diffusion_pytorch_model.safetensors"
    keys = ["model.tiny=false", "model.options={}", f'model.paths=["{vae}"]', f"output.path={tmp_path}"]
    job = load_job("quickstart", keys)
    with pytest.raises(JobFileError, match=r"training\.trainable_models: dit is in none of the model's files, which hold vae"):
        _check_model(resolve(job, Resources(cpus=2, gpus=0)), board=None)
