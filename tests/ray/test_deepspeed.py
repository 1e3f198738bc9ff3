"""A run under DeepSpeed with two workers on real Ray processes, the whole way: data, steps, export, checkpoint, continuing."""

import json

import pytest
from training_runs import Run

from diffsynth_ray.errors import ExitCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.usefixtures("local_ray")]

THREES = ["dataset.global_batch_size=3", "output.save_steps=3"]
"""Three samples a step for two workers: one of four micro steps is a dummy."""
ZERO = [*THREES, "distributed.strategy=deepspeed", "distributed.num_workers=2"]


def test_a_run_under_zero_2_goes_on_under_zero_3_as_one_under_ddp(tmp_path, photos):
    plain, shared = Run(tmp_path, photos, "plain"), Run(tmp_path, photos, "shared")
    assert plain.start(*THREES, "training.max_steps=6") == ExitCode.DONE, plain.said
    zero_2 = [*ZERO, "training.max_steps=3", "distributed.offload_optimizer_device=cpu"]
    assert shared.start(*zero_2) == ExitCode.DONE, shared.said
    more = {"zero_optimization": {"stage": "auto", "stage3_param_persistence_threshold": 100}}
    (tmp_path / "ds.json").write_text(json.dumps(more))
    zero_3 = [*ZERO, "distributed.zero_stage=3", f"distributed.deepspeed_config={tmp_path}/ds.json"]
    assert shared.start(*zero_3, "training.max_steps=6") == ExitCode.DONE, shared.said
    assert any("continuing after step 3 of 6" in line for line in shared.said), shared.said
    assert shared.losses() == pytest.approx(plain.losses(), abs=1e-5)
    for step in (3, 6):
        expected, found = plain.weights(step), shared.weights(step)
        assert expected.keys() == found.keys()
        assert max(float((expected[key] - found[key]).abs().max()) for key in expected) < 1e-5
