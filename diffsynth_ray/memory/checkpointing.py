"""How a block is called: recomputed in backward, its inputs kept in host memory, compiled, its weights loaded first.

`BlockCall` takes the place of a module's `forward`. With recomputation a block is one node of the autograd graph: forward
runs without a graph and keeps the inputs, backward runs it again with one. The weights are needed exactly inside these two
calls, which is what makes offloading exact. A random generator is not restored: frozen and trained components run in eval
mode, without dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from diffsynth_ray.memory.activations import ActivationStore
from diffsynth_ray.memory.compilation import let_sizes_vary
from diffsynth_ray.memory.offload import LayerOffload, Unit
from diffsynth_ray.memory.selective import RecomputationMeter


class BlockCall:
    """A module's forward, with what is around it."""

    def __init__(
        self,
        module: nn.Module,
        *,
        recompute: bool,
        compile: bool = False,
        sizes_vary: bool = False,
        unit: Unit | None = None,
        offload: LayerOffload | None = None,
        activations: ActivationStore | None = None,
    ) -> None:
        """`sizes_vary`: what is compiled holds for inputs of other sizes too."""
        self.module = module
        self.recompute = recompute
        self.unit, self.offload, self.activations = unit, offload, activations
        inner: Callable[..., Any] = module.forward
        self.is_compiled = compile
        self.sizes_vary = compile and sizes_vary
        self.inner = torch.compile(inner) if compile else inner
        self.trained = [param for param in module.parameters() if param.requires_grad]
        self.out_form: _WithoutTensors | None = None
        self.meter: RecomputationMeter | None = None
        """Measures recomputations while it is set."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result; same values and gradients as the module's own forward."""
        tensors, arguments = _take_out((args, kwargs))
        records = torch.is_grad_enabled() and (self.trained or any(tensor.requires_grad for tensor in tensors))
        if not (self.recompute and records):
            with self.weights():
                return self._call(args, kwargs, tensors)
        results = _Recomputed.apply(self, arguments, len(tensors), *tensors, *self.trained)
        assert self.out_form is not None  # set by forward
        return self.out_form.filled(results)

    def weights(self) -> AbstractContextManager[None]:
        """The module's offloaded weights are on the device inside."""
        if self.unit is None or self.offload is None:
            return nullcontext()
        return self.offload.use(self.unit)

    def run(self, arguments: _WithoutTensors, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The results' tensors, one behind the other."""
        args, kwargs = arguments.filled(tensors)
        results, self.out_form = _take_out(self._call(args, kwargs, tensors))
        return results

    def _call(self, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        if self.sizes_vary:
            let_sizes_vary(tensors)
        return self.inner(*args, **kwargs)

    def run_again(self, arguments: _WithoutTensors, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`run` in a backward pass, measured where it is wanted."""
        if self.meter is None:
            return self.run(arguments, tensors)
        with self.meter.stretch(lambda: sum(result.numel() * result.element_size() for result in results)):
            results = self.run(arguments, tensors)
        return results


class PartitionedBlockCall(BlockCall):
    """A module's forward where its parameters are whole only while it runs (ZeRO-3): they are gathered before the call."""

    def __init__(self, module: nn.Module, *, recompute: bool, compile: bool = False, sizes_vary: bool = False) -> None:
        super().__init__(module, recompute=recompute, compile=compile, sizes_vary=sizes_vary)
        self._after_backward: Callable[[], object] | None = None

    def set_up(self, after_backward: Callable[[], object]) -> None:
        """The parameters are shared out; `after_backward` is called when the gradients of inputs and parameters are there."""
        self.trained = [param for param in self.module.parameters() if param.requires_grad]  # others than before
        self._after_backward = after_backward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result; same values and gradients as the module's own forward."""
        if torch.is_grad_enabled() and self._after_backward is not None:
            leaves, spec = tree_flatten((args, kwargs))
            places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
            if places:
                tensors = _Passed.apply(self._after_backward, *(leaves[place] for place in places))
                for place, tensor in zip(places, tensors, strict=True):
                    leaves[place] = tensor
                args, kwargs = tree_unflatten(leaves, spec)
        return super().__call__(*args, **kwargs)


class _Passed(torch.autograd.Function):
    """Tensors as they are; something is called when a backward pass has come through them."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], object], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.call()
        return (None, *grads)


class _WithoutTensors:
    """A call's arguments or results without their tensors."""

    def __init__(self, fixed: list[Any], places: list[int], spec: TreeSpec) -> None:
        self.fixed, self.places, self.spec = fixed, places, spec

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self.fixed)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.spec)


def _take_out(tree: Any) -> tuple[list[Tensor], _WithoutTensors]:
    """The tensors of arguments or results, in order, and what is left of them (None where a block gives none)."""
    leaves, spec = tree_flatten(tree)
    places = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return [leaves[place] for place in places], _WithoutTensors(fixed, places, spec)


class _Recomputed(torch.autograd.Function):
    """Inputs: the call's tensors, then the module's trained parameters (so that their gradients take the usual way)."""

    @staticmethod
    def forward(ctx: Any, call: BlockCall, arguments: _WithoutTensors, num_tensors: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        # A result that nothing uses has no gradient, and neither have the parameters that only it depends on.
        ctx.set_materialize_grads(False)
        tensors = inputs[:num_tensors]
        ctx.call, ctx.arguments, ctx.num_tensors = call, arguments, num_tensors
        if call.activations is None:
            ctx.save_for_backward(*tensors)
        else:
            ctx.saved = call.activations.save(tensors)
        with call.weights():
            # Whether an input has a gradient is no matter here, and would be a reason to compile the block once more.
            return tuple(call.run(arguments, [tensor.detach() for tensor in tensors]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call: BlockCall = ctx.call
        saved = ctx.saved_tensors if call.activations is None else call.activations.restore(ctx.saved)
        needed = ctx.needs_input_grad[3:]
        tensors = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(saved, needed, strict=False)]
        wanted = [tensor for tensor in tensors if tensor.requires_grad] + call.trained
        with call.weights():
            with torch.enable_grad():
                results = call.run_again(ctx.arguments, tensors)
            pairs = [
                (result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None and result.requires_grad
            ]
            found = iter(
                torch.autograd.grad([result for result, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True)
                if pairs
                else [None] * len(wanted)
            )
        return (None, None, None, *(next(found) if tensor.requires_grad else None for tensor in tensors), *found)
