"""What a traced computation costs: matrix products, attention, memory traffic of the rest, and the bytes alive at its peak.

Nodes are aten operators on tensors whose shapes are known (`meta["val"]`). In a compiled graph neighbouring pointwise operators
and reductions are one kernel: only what enters or leaves such a group touches memory.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

_ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
_VIEWS = {
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "slice", "select"),
    *("split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "view_as_real", "view_as_complex", "unfold"),
}


@dataclass(frozen=True)
class GraphCost:
    """Of one run of a graph."""

    products: tuple[tuple[int, int], ...] = ()
    """(FLOPs, bytes read and written) of every matrix product and convolution."""
    attention_flops: int = 0
    traffic_bytes: int = 0
    """Read and written by everything else."""
    peak_bytes: int = 0
    """Alive at once, without parameters: inputs until their last use, intermediate results and outputs."""


@dataclass
class _Walk:
    """The graph's nodes by what they are for a device."""

    is_fused: bool
    kind: dict[fx.Node, str]
    """See `_kind`."""
    group: dict[fx.Node, int] = field(default_factory=dict)
    """Number of the kernel of each pointwise node."""


def nbytes(value: object) -> int:
    """Bytes of a tensor, or of all in a sequence."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(nbytes(each) for each in value)
    return 0


def storages(values: Iterable[object]) -> dict[int, int]:
    """Storage -> its bytes, of all tensors."""
    return {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in values if isinstance(tensor, Tensor)
    }


def graph_cost(graph: fx.Graph, *, is_fused: bool, kept: frozenset[int] = frozenset()) -> GraphCost:
    """Cost of a graph. `kept`: storages that stay alive whatever the graph does (parameters); they are not counted."""
    walk = _Walk(is_fused, {node: _kind(node) for node in graph.nodes})
    _join_groups(graph, walk)
    products, attention = [], 0
    for node, kind in walk.kind.items():
        if kind == "product":
            products.append((_product_flops(node), nbytes(_value(node)) + sum(nbytes(_value(i)) for i in node.all_input_nodes)))
        elif kind == "attention":
            attention += _attention_flops(node)
    return GraphCost(tuple(products), attention, _traffic(walk), _peak(graph, walk, kept))


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _values(node: fx.Node) -> Iterable[Any]:
    """Of a node with one result or several."""
    value = _value(node)
    return value if isinstance(value, (tuple, list)) else [value]


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", "")


def _kind(node: fx.Node) -> str:
    """input, output, product, attention, view, or pointwise (also reductions and copies)."""
    if node.op in ("placeholder", "get_attr"):
        return "input"
    if node.op == "output":
        return "output"
    if node.target is operator.getitem:
        return "view"
    name = _name(node)
    if name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"):
        return "product"
    if name.startswith(_ATTENTION):
        return "attention"
    return "view" if name in _VIEWS else "pointwise"


def _product_flops(node: fx.Node) -> int:
    name, shapes = _name(node), [_value(each).shape for each in node.all_input_nodes if isinstance(_value(each), Tensor)]
    if name in ("mm", "bmm"):
        return 2 * shapes[0].numel() * shapes[1][-1]
    if name in ("addmm", "baddbmm"):
        rows, inner = node.args[1], node.args[2]
        assert isinstance(rows, fx.Node)
        assert isinstance(inner, fx.Node)
        return 2 * _value(rows).numel() * _value(inner).shape[-1]
    out = _value(node)
    if name == "convolution":
        return 2 * out.numel() * shapes[1][1:].numel()
    return 4 * shapes[0].numel() * shapes[2][1:].numel()


def _attention_flops(node: fx.Node) -> int:
    """Two products forward, five backward (flash attention makes the scores again)."""
    backward = "backward" in _name(node)
    arguments = [_value(each) for each in node.all_input_nodes if isinstance(_value(each), Tensor)]
    query, key = arguments[1:3] if backward else arguments[:2]
    return (10 if backward else 4) * query.numel() * key.shape[-2]


def _join_groups(graph: fx.Graph, walk: _Walk) -> None:
    """Number the kernels of pointwise nodes: connected ones are one where they are fused."""
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in graph.nodes:
        if walk.kind[node] != "pointwise":
            continue
        parent[node] = node
        if walk.is_fused:
            for source in _sources(node, walk):
                if source in parent:
                    parent[root(source)] = root(node)
    numbers: dict[fx.Node, int] = {}
    for node in parent:
        walk.group[node] = numbers.setdefault(root(node), len(numbers))


def _sources(node: fx.Node, walk: _Walk) -> list[fx.Node]:
    """Where a node's inputs come from, through views."""
    found: list[fx.Node] = []
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if walk.kind[source] == "view" and source.all_input_nodes:
            waiting += source.all_input_nodes
        elif source not in found:
            found.append(source)
    return found


def _leaves_group(node: fx.Node, walk: _Walk) -> bool:
    """Whether something outside of a pointwise node's kernel uses its result."""
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if walk.kind[user] == "view":
            waiting += list(user.users)
        elif walk.group.get(user) != walk.group[node]:
            return True
    return False


def _traffic(walk: _Walk) -> int:
    read: set[tuple[int, fx.Node]] = set()
    total = 0
    for node, group in walk.group.items():
        if _leaves_group(node, walk):
            total += nbytes(_value(node))
        for source in node.all_input_nodes:  # a view's bytes: of a tensor that is cut up only the part is read
            origin = _sources(node, walk) if walk.kind[source] == "view" else [source]
            if all(walk.group.get(each) != group for each in origin) and (group, source) not in read:
                read.add((group, source))
                total += nbytes(_value(source))
    return total


def _peak(graph: fx.Graph, walk: _Walk, kept: frozenset[int]) -> int:
    """Bytes of what exists in memory at once; results inside of a kernel never do."""
    last_use: dict[int, int] = {}
    sizes: list[dict[int, int]] = []
    for position, node in enumerate(graph.nodes):
        exists = walk.kind[node] != "pointwise" or _leaves_group(node, walk)
        found = storages(_values(node)) if exists and node.op != "output" else {}
        sizes.append({storage: size for storage, size in found.items() if storage not in kept})
        for each in (node, *node.all_input_nodes):
            last_use.update(dict.fromkeys(storages(_values(each)), position))
    alive: dict[int, int] = {}
    peak = 0
    for position, node in enumerate(graph.nodes):
        if walk.kind[node] == "input":
            alive.update(sizes[position])
    for position, found in enumerate(sizes):
        alive.update(found)
        peak = max(peak, sum(alive.values()))
        for storage in [each for each in alive if last_use.get(each, -1) <= position]:
            del alive[storage]
    return peak
