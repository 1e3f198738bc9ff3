"""A one-node Ray for the tests that run stages in this process."""

import pytest
import ray

from diffsynth_ray.launch.driver import WITHOUT_DASHBOARD_ENV


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory):
    """Two CPUs, as on the smallest machine that the quickstart runs on; stopped at the end."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=512 << 20,
        runtime_env={"env_vars": WITHOUT_DASHBOARD_ENV},
    )
    yield
    ray.shutdown()
