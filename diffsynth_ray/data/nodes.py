"""The nodes of a cluster that can be counted on. Imports nothing but Ray: the queue's process lives as long as the cluster."""

from __future__ import annotations

from collections.abc import Iterable

import ray


def staying_nodes() -> dict[str, dict[str, float]]:
    """Node id -> its resources, of the nodes that are neither dead nor about to be taken away.

    A node that is drained may live for long after it said that it goes, and Ray starts nothing on it any more: what it has is
    part of the cluster's resources, but not to be had.
    """
    draining = _draining_nodes()
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining}


def staying_resources() -> dict[str, float]:
    """What these nodes have in all, by resource."""
    return _sum(staying_nodes().values())


def free_resources() -> dict[str, float]:
    """What is free on these nodes just now, by resource."""
    staying = staying_nodes()
    return _sum(free for node, free in _free_by_node().items() if node in staying)


def _sum(nodes: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for resources in nodes:
        for name, amount in resources.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _free_by_node() -> dict[str, dict[str, float]]:
    """Node id -> what is free there. As ray.available_resources() reads it, which gives the sum only."""
    from ray._private.state import state

    return state.available_resources_per_node()


def _draining_nodes() -> dict[str, int]:
    """Node id -> its deadline. As Ray Train's own watcher of pre-emptions reads it."""
    from ray._private.state import state

    return state.get_draining_nodes()
