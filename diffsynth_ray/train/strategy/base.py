"""What the trainer asks of a distribution strategy."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from diffsynth_ray.errors import ModelError
from diffsynth_ray.train.strategy.communication import CommunicationTimer


@dataclass(frozen=True)
class StateSlice:
    """A contiguous part of one tensor of the resume state."""

    values: Tensor
    """1-d part of the flattened tensor, on any device; the training may go on to change it."""
    start: int
    """Offset of the part in the flattened whole, in elements."""
    shape: tuple[int, ...]
    """Of the whole tensor; () for a number."""


class StateReader(Protocol):
    """The resume state of a checkpoint, whoever wrote it: "master/NAME" and the optimizer's "KEY/NAME" ("exp_avg/NAME",
    "exp_avg_sq/NAME", "step/NAME") by full parameter name."""

    def names(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened tensor, as a new 1-d tensor on the CPU; nothing else is read."""
        ...


class GradientWatch:
    """Sees which of the named parameters get a gradient in the backward passes from here to `stop`."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self._names = list(params)
        self._reached: set[str] = set()
        self._hooks = [param.register_hook(partial(self._note, name)) for name, param in params.items()]

    def _note(self, name: str, gradient: Tensor | None) -> None:
        if gradient is not None:  # a recomputed block has an answer for each of its parameters
            self._reached.add(name)

    def stop(self) -> list[str]:
        """Names of the parameters without gradient; raises ModelError where that is all of them."""
        for hook in self._hooks:
            hook.remove()
        if not self._reached:
            raise ModelError("no trained parameter has a gradient: the trained components take no part in the loss")
        return [name for name in self._names if name not in self._reached]


class Strategy(Protocol):
    """How forward, backward and the update are spread over the workers."""

    communication: CommunicationTimer
    """How long the steps have waited for other workers."""

    def micro_step(self, *inputs: Any, weight: float, num_samples: int, last: bool) -> Tensor:
        """Forward and backward of one micro batch; returns its losses [b], detached.

        The gradients are those of weight * the sum of the losses / num_samples, the batch's share of the step's mean loss: the
        shares of all workers sum up to it. `last`: this batch completes the step's gradients.
        """
        ...

    def evaluate(self, *inputs: Any) -> Tensor:
        """Losses [b] of one micro batch, called without gradients between two steps, equally often on all ranks."""
        ...

    def release_memory(self) -> None:
        """Give back what is only kept to be faster; called before other work on the device."""
        ...

    def step(self, lr: float) -> Tensor:
        """Update the weights; returns the gradient norm before clipping (0-d, not synchronised)."""
        ...

    def sum_over_workers(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all workers, on every worker."""
        ...

    def eval_weights(self) -> AbstractContextManager[None]:
        """Masters and parameters are inside what is validated and exported, outside what is trained and kept to go on.

        Called on all ranks. They differ for schedule-free optimizers only.
        """
        ...

    def full_masters(self) -> dict[str, Tensor]:
        """Float32 masters by full parameter name. Called on all ranks; whole on rank 0, whatever on the others."""
        ...

    def full_averages(self) -> dict[str, Tensor]:
        """Float32 moving averages by full parameter name, as `full_masters`; empty where the job has none."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """The parameters hold their moving averages inside, for `evaluate`."""
        ...

    def state_slices(self) -> dict[str, StateSlice]:
        """This rank's part of the resume state; the parts of all ranks hold every element exactly once."""
        ...

    def load_state(self, state: StateReader) -> None:
        """Take from the resume state what this rank needs; the caller has checked that the trained parameters agree."""
        ...
