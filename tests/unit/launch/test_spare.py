"""Whether the cluster has room for samples beside the training."""

from types import SimpleNamespace

import pytest

from diffsynth_ray.data import nodes
from diffsynth_ray.launch.spare import SpareRoom

RESOLVED = SimpleNamespace(resources_per_worker={"CPU": 1.0, "GPU": 1.0}, num_workers=1, decode_cpus=1.0)


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with what is free on each; the second may say that it goes."""
    free = {"a": {"CPU": 4.0}, "b": {"CPU": 4.0, "GPU": 1.0}}
    draining = {}
    monkeypatch.setattr(nodes.ray, "nodes", lambda: [{"NodeID": name, "Alive": True, "Resources": {}} for name in free])
    monkeypatch.setattr(nodes, "_draining_nodes", lambda: draining)
    monkeypatch.setattr(nodes, "_free_by_node", lambda: free)
    return SimpleNamespace(free=free, draining=draining)


def test_there_is_room_where_a_workers_resources_are_free(cluster):
    assert SpareRoom(RESOLVED, None).has_room()
    cluster.free["b"]["GPU"] = 0.0
    assert not SpareRoom(RESOLVED, None).has_room()


def test_what_is_free_on_a_node_that_will_be_taken_away_is_no_room(cluster):
    cluster.draining["b"] = 1_795_523_230_169
    assert not SpareRoom(RESOLVED, None).has_room()
