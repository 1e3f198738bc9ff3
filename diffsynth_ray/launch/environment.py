"""Environment variables of a run's processes, and the two ways in which they get them.

A Ray that we start ourselves gets them when it starts, and all its processes inherit them. On a cluster of others they are
the runtime_env of our job: Ray then starts every worker through a process of its own, which sets them. It imports ray for
that, 0.75 s of a CPU for each of the dozen processes of a run, so that a Ray of ours goes without.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

WORKER_ENV = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Start-ups that time out do not count as failures: the sooner one is given up, the sooner one that fits is tried.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    # Threads of a computation on the CPU that wait for each other would spin on the very CPUs that Ray, the decoding and other
    # workers need: a step of a tiny model takes 0.13 to 0.26 s instead of 1.5 to 7 s on two busy CPUs, with the same loss.
    "OMP_WAIT_POLICY": "passive",
}
"""Environment of the driver and its workers: how Ray and its processes behave, never a setting of the job."""
ELASTIC_ENV = {
    # Ray Train's view of a node that has just died is some seconds old: it first waits in vain for as many workers as before.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
}
"""What is different where fewer workers will do."""
ONE_NODE_ENV = WORKER_ENV | {
    # Nobody takes away a cluster's only node and lets it live; the process that looks for it costs every start seconds.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""The same on a Ray of one node."""
WITHOUT_DASHBOARD_ENV = ONE_NODE_ENV | {
    # Nobody shows what it would track.
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    # Ray Train asks the dashboard whether its controller lives. Where there is none it looks for its address for 40 s, and a
    # run that ends waits for that; a port that refuses answers at once.
    "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9",
}
"""The same where that Ray has no dashboard."""

_INHERITED = "DSRAY_ENVIRONMENT_IS_INHERITED"
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray Jobs leaves the driver the runtime_env of its job."""


def local_environment(dashboard_url: str) -> dict[str, str]:
    """What the processes of the local Ray inherit."""
    # Ray Train's actors ask the dashboard that their environment names, else that of the Ray that last started on this
    # machine, which may be another one or gone: then a run that ends waits for an answer.
    return ONE_NODE_ENV | {"RAY_API_SERVER_ADDRESS": dashboard_url, _INHERITED: "1"}


@contextmanager
def inherited(environment: Mapping[str, str]) -> Iterator[None]:
    """Inside, a Ray that is started from this process hands this environment down to all its workers."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def leave_out_runtime_env(environment: MutableMapping[str, str]) -> bool:
    """Have the workers of this process's Ray job start without a runtime_env, where they need none; whether that is so.

    The job's own brings this process its job.json, which no worker reads. It is needed where it also brings our code.
    """
    if environment.get(_INHERITED) != "1" or _JOB_CONFIG not in environment:
        return False
    config = json.loads(environment[_JOB_CONFIG])
    if "py_modules" in config["runtime_env"]:
        return False
    environment[_JOB_CONFIG] = json.dumps(config | {"runtime_env": {}})
    return True
