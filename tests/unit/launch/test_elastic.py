"""Which nodes an elastic run counts on, with the policy that Ray Train's controller asks."""

import pytest
from ray.train import ScalingConfig
from ray.train.v2.api import data_parallel_trainer

from diffsynth_ray.data import nodes
from diffsynth_ray.data.nodes import staying_nodes
from diffsynth_ray.launch.elastic import ElasticTrainer, StayingNodesPolicy

TWO_CPUS = {"CPU": 2.0, "memory": 1e9}


@pytest.fixture
def policy(monkeypatch):
    live = {"a": True, "b": True, "c": False}
    found = [{"NodeID": name, "Alive": alive, "Resources": TWO_CPUS} for name, alive in live.items()]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: found)
    monkeypatch.setattr(nodes, "_draining_nodes", lambda: {"b": 1_795_523_230_169})
    return StayingNodesPolicy(ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 1.2}))


@pytest.mark.parametrize(("reserved", "expected"), [("a", 1), ("ab", 1), ("abc", 1), ("bc", 0)])
def test_neither_dead_nor_leaving_nodes_count(policy, reserved, expected):
    assert policy._count_possible_workers(dict.fromkeys(reserved, TWO_CPUS)) == expected


def test_what_the_staying_nodes_have_is_what_can_be_had(policy):
    assert staying_nodes() == {"a": TWO_CPUS}


@pytest.mark.parametrize("num_workers", [2, (1, 2)])
def test_only_elastic_runs_get_it(monkeypatch, num_workers):
    given = {}
    base = data_parallel_trainer.DataParallelTrainer
    monkeypatch.setattr(base, "_initialize_and_run_controller", lambda self, **passed: given.update(passed))
    trainer = ElasticTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=num_workers))
    trainer._initialize_and_run_controller(scaling_policy="Ray's")
    assert isinstance(given["scaling_policy"], StayingNodesPolicy) == isinstance(num_workers, tuple)
