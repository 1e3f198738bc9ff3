"""Which of Ray Train's actors are started ahead. That Ray still has these functions is part of what is tested."""

import pytest
from ray.data._internal import cluster_autoscaler
from ray.train.v2._internal.state import state_actor

from diffsynth_ray.launch.early import start_early
from diffsynth_ray.launch.environment import ONE_NODE_ENV, WITHOUT_DASHBOARD_ENV, WORKER_ENV, inherited


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (WORKER_ENV, ["coordinator", "state"]),
        (ONE_NODE_ENV, ["coordinator", "state"]),
        (WITHOUT_DASHBOARD_ENV, ["coordinator"]),
    ],
)
def test_only_actors_that_the_run_will_wait_for_are_started(monkeypatch, environment, expected):
    started = []
    monkeypatch.setattr(cluster_autoscaler, "get_or_create_autoscaling_coordinator", lambda: started.append("coordinator"))
    monkeypatch.setattr(state_actor, "get_or_create_state_actor", lambda: started.append("state"))
    with inherited(environment):
        start_early()
    assert started == expected


def test_another_ray_that_has_no_such_actors_is_no_error(monkeypatch):
    monkeypatch.delattr(cluster_autoscaler, "get_or_create_autoscaling_coordinator")
    monkeypatch.delattr(state_actor, "get_or_create_state_actor")
    with inherited(WORKER_ENV):
        start_early()
