"""Whole runs with the memory keys, on two real workers of one node that share their host weights."""

from pathlib import Path

import pytest
from training_runs import Run

from diffsynth_ray.errors import ExitCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.usefixtures("local_ray")]
TWO = "distributed.num_workers=2"
OFFLOAD = "offload.cpu_offload=true"


@pytest.fixture(scope="module")
def reference(tmp_path_factory, local_ray):
    """Two workers, everything on the device."""
    photos = Path(__file__).resolve().parents[2] / "jobs" / "data" / "photos"
    run = Run(tmp_path_factory.mktemp("reference"), photos)
    assert run.start(TWO) == ExitCode.DONE, run.said
    return run


@pytest.mark.parametrize(
    "overrides", [[OFFLOAD], [OFFLOAD, "gradient.checkpointing_offload=true"], [OFFLOAD, "offload.optimize_on_cpu=true"]]
)
def test_two_workers_with_one_host_copy_train_the_same(reference, tmp_path, photos, overrides):
    run = Run(tmp_path, photos)
    assert run.start(TWO, *overrides) == ExitCode.DONE, run.said
    assert run.losses() == pytest.approx(reference.losses(), abs=1e-5)
    for name, tensor in reference.weights().items():
        assert (run.weights()[name] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-6, name
    assert any("layer offload: " in line for line in run.said)


def test_offload_goes_on_where_another_way_has_stopped(tmp_path, photos, reference):
    run = Run(tmp_path, photos)
    first = [TWO, OFFLOAD, "offload.optimize_on_cpu=true"]
    assert run.start(*first, "training.max_steps=4") == ExitCode.DONE, run.said
    assert run.start("offload.cpu_offload=true", "training.max_steps=10") == ExitCode.DONE, run.said
    assert run.losses() == pytest.approx(reference.losses(), abs=1e-4)
