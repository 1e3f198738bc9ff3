"""One block of a model at its real size, traced without memory and without a device: what it keeps, computes and moves.

Fake tensors have shapes and number formats and no values. A compiled block is split into forward and backward by the same
rule as in torch.compile (a minimal cut between what is kept and what is made again), an uncompiled one as autograd does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffsynth_ray.memory.graph_cost import GraphCost, graph_cost, storages


@dataclass(frozen=True)
class BlockCost:
    """Of one call of a block."""

    kept_bytes: int
    """Kept for backward where it is not recomputed, without its inputs and parameters."""
    kept_inputs: frozenset[int]
    """Positions of the tensors among the arguments that are kept as well."""
    forward: GraphCost
    backward: GraphCost


def fake_weights(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers by fake tensors on the CPU, in place."""
    made: dict[int, nn.Parameter] = {}
    for inner in module.modules():
        for name, param in list(inner.named_parameters("", recurse=False)):
            if id(param) not in made:
                with mode:
                    made[id(param)] = nn.Parameter(torch.empty(param.shape, dtype=param.dtype), param.requires_grad)
            setattr(inner, name, made[id(param)])
        for name, buffer in list(inner.named_buffers("", recurse=False)):
            if buffer.is_meta:
                with mode:
                    setattr(inner, name, torch.empty(buffer.shape, dtype=buffer.dtype))


class Growth:
    """Of a batch that has `more` samples than three: every number and tensor, from those of two samples and of three.

    Lengths, strides and storages grow evenly with the samples, and what shares a storage still does.
    """

    def __init__(self, more: int, mode: FakeTensorMode) -> None:
        self._more, self._mode = more, mode
        self._storages: dict[int, Tensor] = {}

    def of(self, two: int, three: int) -> int:
        """A number."""
        return three + self._more * (three - two)

    def tensor(self, two: Tensor, three: Tensor) -> Tensor:
        """A fake tensor; one that does not depend on the batch stays itself."""
        before, storage = two.untyped_storage(), three.untyped_storage()
        if before._cdata == storage._cdata:
            return three
        with self._mode:
            whole = self._storages.get(storage._cdata)
            if whole is None:
                whole = torch.empty(self.of(before.nbytes(), storage.nbytes()), dtype=torch.uint8)
                self._storages[storage._cdata] = whole
            size, stride = map(self.of, two.shape, three.shape), map(self.of, two.stride(), three.stride())
            offset = self.of(int(two.storage_offset()), int(three.storage_offset()))
            grown = whole.view(three.dtype).as_strided(tuple(size), tuple(stride), offset)
        return grown.requires_grad_(three.requires_grad)


def tensors_of(arguments: object) -> list[Tensor]:
    """All tensors in nested arguments."""
    return [leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor)]


def kept_by_autograd(call: Callable[[], object]) -> dict[int, int]:
    """What a real or fake call saves for backward: storage -> bytes, its inputs and parameters among them."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    sizes = storages(saved.values())
    del result
    return sizes


def block_cost(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, mode: FakeTensorMode, is_compiled: bool
) -> BlockCost:
    """Trace a block with fake weights, called with these fake arguments."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    names = [name for name, _ in block.named_parameters()]
    params: list[Tensor] = [param for _, param in block.named_parameters()]

    def run(params: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        given = iter(tensors)
        filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inner_args, inner_kwargs = tree_unflatten(filled, spec)
        return tensors_of(functional_call(block, dict(zip(names, params, strict=True)), inner_args, inner_kwargs))

    graphs: dict[str, fx.Graph] = {}

    def remember(name: str, module: fx.GraphModule, _: Any) -> Any:
        graphs[name] = module.graph
        return make_boxed_func(module.forward)

    partition = partial(min_cut_rematerialization_partition, compiler="inductor") if is_compiled else default_partition
    with mode:
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        traced = aot_function(
            run,
            fw_compiler=cast(Any, partial(remember, "forward")),
            bw_compiler=cast(Any, partial(remember, "backward")),
            partition_fn=partition,
            decompositions=cast(Any, select_decomp_table()) if is_compiled else {},
        )
        results = traced(params, inputs)
        # The backward graph is made when it is first run.
        outs = [result for result in results if result.requires_grad]
        wanted = [tensor for tensor in (*params, *inputs) if tensor.requires_grad]
        if outs and wanted:
            torch.autograd.grad(outs, wanted, [torch.empty_like(out) for out in outs], allow_unused=True)
    cost = _read(graphs, results, num_params=len(params), num_inputs=len(inputs), is_compiled=is_compiled)
    return cost if is_compiled else _as_autograd(cost, lambda: run(params, inputs), params, inputs, mode)


def _read(
    graphs: dict[str, fx.Graph], results: list[Tensor], *, num_params: int, num_inputs: int, is_compiled: bool
) -> BlockCost:
    forward = graphs["forward"]
    placeholders = [node.meta["val"] for node in forward.nodes if node.op == "placeholder"]
    params = frozenset(storages(placeholders[:num_params]))
    inputs = [next(iter(storages([value])), 0) for value in placeholders[num_params : num_params + num_inputs]]
    saved_nodes = forward.find_nodes(op="output")[0].args[0][len(results) :]
    saved = storages(node.meta.get("val") for node in saved_nodes if isinstance(node, fx.Node))
    kept = sum(size for storage, size in saved.items() if storage not in params and storage not in inputs)
    cost = partial(graph_cost, is_fused=is_compiled)
    backward = graphs.get("backward")
    return BlockCost(
        kept_bytes=kept,
        kept_inputs=frozenset(number for number, storage in enumerate(inputs) if storage in saved),
        forward=cost(forward, kept=params),
        backward=GraphCost() if backward is None else cost(backward, kept=params),
    )


def _as_autograd(
    cost: BlockCost, call: Callable[[], object], params: Sequence[Tensor], inputs: Sequence[Tensor], mode: FakeTensorMode
) -> BlockCost:
    """The cost of an uncompiled block: what autograd keeps, and attention once only.

    The split of the traced graph may make attention again in its backward, which autograd never does.
    """
    with mode:
        saved = kept_by_autograd(call)
    places = [next(iter(storages([tensor]))) for tensor in inputs]
    known = {*storages(params), *places}
    kept = sum(size for storage, size in saved.items() if storage not in known)
    attention = cost.forward.attention_flops * 5 // 2 if cost.backward.attention_flops else 0
    peak = max(cost.backward.peak_bytes, kept)
    return BlockCost(
        kept_bytes=kept,
        kept_inputs=frozenset(number for number, place in enumerate(places) if place in saved),
        forward=cost.forward,
        backward=replace(cost.backward, attention_flops=attention, peak_bytes=peak),
    )
