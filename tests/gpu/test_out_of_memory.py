"""A run whose samples do not fit the GPU: found before the first step, not retried, and told with what would help."""

import pytest
import torch

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import local_resources, resolve
from diffsynth_ray.errors import ExitCode
from diffsynth_ray.launch.driver import run_locally

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


def test_a_full_gpu_ends_the_run_at_once_with_the_keys_that_help(tmp_path):
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - 2 * 2**30, dtype=torch.uint8, device="cuda")  # another program's
    sizes = ["dataset.height=1024", "dataset.width=1024", "dataset.batch_size=8", "dataset.global_batch_size=8"]
    settings = [f"output.path={tmp_path / 'run'}", *sizes, "validation.prompts=[]", "distributed.num_workers=1"]
    job = load_job("jobs/quickstart.toml", [*settings, "training.precision=fp32", "gradient.checkpointing=false"])
    said = []
    assert run_locally(resolve(job, local_resources()), say=said.append) == ExitCode.RUN_FAILED, said
    del held
    text = "\n".join(said)
    samples, by_category = ["8 x 1024x1024", "metadata rows"], ["activations and the like"]
    cures = ["gradient.checkpointing = true", "dataset.batch_size = 4"]
    missing = [part for part in ["was not enough for", *samples, *by_category, *cures] if part not in text]
    assert not missing, text
    assert "step 1/" not in text  # before the first step
    assert not any("attempt 2" in line for line in said), said  # and not tried again
    assert (tmp_path / "run" / "error.json").exists()
