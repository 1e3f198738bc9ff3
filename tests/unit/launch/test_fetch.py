"""What is checked of a job on a node, before a worker loads anything."""

import pytest

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.errors import JobFileError
from diffsynth_ray.launch.fetch import _check_model


def test_arguments_that_the_optimizer_does_not_take_are_told_before_a_worker_starts(tmp_path):
    job = load_job("quickstart", [f"output.path={tmp_path}", "training.optimizer_args={bettas = [0.9, 0.95]}"])
    with pytest.raises(JobFileError, match=r"training\.optimizer_args: .*unexpected keyword argument 'bettas'"):
        _check_model(resolve(job, Resources(cpus=2, gpus=0)), board=None)
