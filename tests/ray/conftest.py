"""A one-node Ray for the tests that run stages in this process."""

import os
from pathlib import Path

import pytest
import ray

from diffsynth_ray.launch.environment import WITHOUT_DASHBOARD_ENV, inherited

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory):
    """Two CPUs, as on the smallest machine that the quickstart runs on; stopped at the end."""
    # A job may name an optimizer of the tests.
    search = {"PYTHONPATH": os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))}
    with inherited(WITHOUT_DASHBOARD_ENV | search):  # by Ray's processes; the tests that follow go without
        for attempt in range(3):
            try:
                ray.init(
                    address="local",
                    num_cpus=2,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=512 << 20,
                )
                break
            except Exception as error:  # a bare one, where a busy machine needs more than the 30 s that Ray gives its node
                if "timed out during startup" not in str(error) or attempt == 2:
                    raise
                ray.shutdown()
    yield
    ray.shutdown()
