"""How the processes of a run get their environment: from a Ray of ours, or by the runtime_env of the job."""

import json
import os

import pytest
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from diffsynth_ray.launch.environment import WORKER_ENV, inherited, leave_out_runtime_env, local_environment

LOCAL = local_environment("http://127.0.0.1:20001")


def job_environment(runtime_env, **others):
    return {RAY_JOB_CONFIG_JSON_ENV_VAR: json.dumps({"runtime_env": runtime_env, "metadata": {"run": "r"}})} | others


def test_the_local_ray_hands_down_what_a_cluster_gets_by_runtime_env():
    assert LOCAL.items() >= WORKER_ENV.items()
    assert LOCAL["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:20001"


def test_jobs_of_the_local_ray_need_no_runtime_env_but_keep_their_metadata():
    environment = job_environment({"working_dir": "gcs://a.zip", "env_vars": {}}) | LOCAL
    assert leave_out_runtime_env(environment)
    assert json.loads(environment[RAY_JOB_CONFIG_JSON_ENV_VAR]) == {"runtime_env": {}, "metadata": {"run": "r"}}


@pytest.mark.parametrize(
    "environment",
    [
        job_environment({"working_dir": "gcs://a.zip"}),
        job_environment({"working_dir": "gcs://a.zip", "py_modules": ["gcs://b.zip"]}) | LOCAL,
        LOCAL,
    ],
    ids=["a cluster", "our code travels with the job", "no job"],
)
def test_other_jobs_keep_theirs(environment):
    before = dict(environment)
    assert not leave_out_runtime_env(environment)
    assert environment == before


def test_the_environment_is_as_before_afterwards(monkeypatch):
    monkeypatch.setenv("DSRAY_TEST_ONE", "before")
    monkeypatch.delenv("DSRAY_TEST_TWO", raising=False)
    with inherited({"DSRAY_TEST_ONE": "1", "DSRAY_TEST_TWO": "2"}):
        assert (os.environ["DSRAY_TEST_ONE"], os.environ["DSRAY_TEST_TWO"]) == ("1", "2")
    assert os.environ["DSRAY_TEST_ONE"] == "before"
    assert "DSRAY_TEST_TWO" not in os.environ
