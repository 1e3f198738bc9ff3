"""Optimizer with float32 masters, the course of the learning rate, gradient clipping.

Under bf16 the trained parameters compute in bf16 and the optimizer updates float32 copies of them (masters): an update of
1e-4 relative to the weight is lost in bf16's 8 bits otherwise. Gradients of several micro steps are summed in float32.
Under fp32, and with master_weights = false, the masters are the parameters themselves.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffsynth_ray.config.schema import Job, TrainingSection
from diffsynth_ray.errors import JobFileError, Problem
from diffsynth_ray.train.strategy.base import StateReader


def lr_factor(name: str, *, step: int, warmup_steps: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) as a fraction of its peak.

    The shapes are those of transformers' schedules: a linear warm-up, then the named course down to 0 at `num_steps`.
    A pure function of the step, so that a resumed run needs no scheduler state.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if name == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    if name == "linear":
        return 1.0 - done
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if name == "cosine_with_restarts":
        return 0.5 * (1.0 + math.cos(math.pi * (4 * done % 1.0))) if done < 1.0 else 0.0
    assert name == "polynomial", name  # the schema allows no other
    return 1e-3 + (1.0 - 1e-3) * (1.0 - done)


def load_optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of a dotted name; raises JobFileError where there is none."""
    module_name, _, class_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise JobFileError(
            "job",
            [Problem("training.optimizer", f"got {name!r}; cannot be imported here: {error}; as in torch.optim.AdamW")],
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise JobFileError("job", [Problem("training.optimizer", f"{name!r} is not a subclass of torch.optim.Optimizer")])
    return found


_HAVE_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
"""Their updates are one kernel for many parameters on the GPU, where asked for."""


_OF_ARGUMENTS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError)
"""What optimizers make of arguments that they do not take, as one beta in place of two. Some make a RuntimeError of two that
exclude each other; on a GPU that can be something else, as a full memory."""
COLLECTED_BYTES = 1 << 30
"""Gradients that are added to their masters' at once."""


def build_optimizer(
    params: Sequence[Tensor], training: TrainingSection, optimizer_class: Callable[..., torch.optim.Optimizer] | None = None
) -> torch.optim.Optimizer:
    """The job's optimizer over `params` (in another class where one is given); raises JobFileError for wrong arguments."""
    if optimizer_class is None:
        optimizer_class = load_optimizer_class(training.optimizer)
    arguments: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if optimizer_class in _HAVE_FUSED and all(param.is_cuda for param in params):
        arguments["fused"] = True
    arguments |= training.optimizer_args
    try:
        optimizer = optimizer_class(params, **arguments)
    except _OF_ARGUMENTS as error:
        raise _not_accepted(training, error) from error
    if is_schedule_free(optimizer):
        cast(Any, optimizer).train()
    return optimizer


def _not_accepted(training: TrainingSection, error: Exception) -> JobFileError:
    message = f"{training.optimizer} does not take {training.optimizer_args}: {error}"
    return JobFileError("job", [Problem("training.optimizer_args", message)])


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether gradients are computed at other weights than those to evaluate and export: it has `train` and `eval` to go from
    the ones to the others, as in the package schedulefree."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


@contextmanager
@torch.no_grad()
def eval_weights(
    optimizers: Sequence[torch.optim.Optimizer], masters: Sequence[Tensor], write_back: Callable[[], object]
) -> Iterator[None]:
    """Inside, the masters of schedule-free optimizers are the weights to evaluate, outside exactly what they were.

    `write_back` takes masters over into the model. With other optimizers nothing happens.
    """
    apart: list[Any] = [optimizer for optimizer in optimizers if is_schedule_free(optimizer)]
    if not apart:
        yield
        return
    # The way there and back would round, and whoever validates more often would train on other numbers.
    kept = [master.detach().clone() for master in masters]
    for optimizer in apart:
        optimizer.eval()
    write_back()
    try:
        yield
    finally:
        for optimizer in apart:
            optimizer.train()
        torch._foreach_copy_([*masters], kept)
        write_back()


def check_optimizer(job: Job) -> None:
    """Raise JobFileError where the optimizer cannot be had with the job's arguments and strategy; needs no model."""
    try:
        optimizer = build_optimizer([nn.Parameter(torch.zeros(2, 2))], job.training)
    except RuntimeError as error:
        raise _not_accepted(job.training, error) from error
    if job.distributed.strategy == "deepspeed" and job.distributed.zero_stage == 3 and is_schedule_free(optimizer):
        message = (
            f"{job.training.optimizer} is schedule-free: its steps, and its way to the weights that are exported, are those of "
            'all weights, which zero_stage = 3 updates part by part; use zero_stage = 2 or strategy = "ddp"'
        )
        raise JobFileError(f"job {job.name}", [Problem("distributed.zero_stage", message)])


_STATE_BYTES: dict[str, float] = {}
"""Bytes of an optimizer's state an element, by its class and arguments."""


def state_bytes(training: TrainingSection) -> float:
    """Bytes of the optimizer's state an element, found by one step on a small matrix.

    Two moments, as AdamW has, where the optimizer is not to be had here.
    """
    key = f"{training.optimizer} {training.optimizer_args}"
    if key not in _STATE_BYTES:
        param = nn.Parameter(torch.zeros(256, 256))
        param.grad = torch.ones_like(param)
        try:
            optimizer = build_optimizer([param], training)
            optimizer.step()
        except (RuntimeError, TypeError, JobFileError):
            return 8.0
        state = (value for values in optimizer.state.values() for value in values.values())
        size = sum(value.numel() * value.element_size() for value in state if isinstance(value, Tensor) and value.ndim)
        _STATE_BYTES[key] = size / param.numel()
    return _STATE_BYTES[key]


class MasterOptimizer:
    """A torch optimizer over the masters of named parameters."""

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], training: TrainingSection) -> None:
        self.names = list(named_parameters)
        self.params = list(named_parameters.values())
        keep_masters = training.master_weights and any(p.dtype != torch.float32 for p in self.params)
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in self.params] if keep_masters else self.params
        self.keeps_masters = keep_masters
        self.max_grad_norm = training.max_grad_norm
        self.optimizer = build_optimizer(self.masters, training)
        self.ema_decay = training.ema_decay
        self.averages: list[Tensor] = []
        """Float32 moving averages of the masters, where the job wants them; they begin with the first weights."""
        if self.ema_decay is not None:
            self.averages = [master.detach().clone().float() for master in self.masters]

    def collect_gradients(self) -> None:
        """Add the parameters' gradients to their masters' in float32 and drop them."""
        if not self.keeps_masters:
            return
        # Few kernels for all parameters: a LoRA has thousands, and launching one for each takes longer than its work. But not
        # one for all: the gradients of a whole model would be there in both number formats at once.
        part: list[tuple[nn.Parameter, nn.Parameter]] = []
        num_bytes = 0
        for pair in zip(self.params, self.masters, strict=True):
            if (gradient := pair[0].grad) is None:
                continue
            part.append(pair)
            num_bytes += gradient.numel() * gradient.element_size()
            if num_bytes >= COLLECTED_BYTES:
                _collect(part)
                part, num_bytes = [], 0
        _collect(part)

    def step(self, lr: float) -> Tensor:
        """Clip, update, write the masters back; returns the gradient norm before clipping (a 0-d tensor, not synchronised)."""
        self.collect_gradients()
        grads = [master.grad for master in self.masters if master.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.masters, self.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.write_back()
        self._average()
        return norm

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema_decay is not None:
            torch._foreach_lerp_(self.averages, [master.detach().float() for master in self.masters], 1 - self.ema_decay)

    def named_averages(self) -> dict[str, Tensor]:
        """Moving averages of the trained weights by name; empty where the job has none."""
        return dict(zip(self.names, self.averages, strict=True)) if self.averages else {}

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """The parameters hold their moving averages inside, and exactly what they held afterwards."""
        kept = [param.detach().clone() for param in self.params]
        torch._foreach_copy_([*self.params], self.averages)
        try:
            yield
        finally:
            torch._foreach_copy_([*self.params], kept)

    def eval_weights(self) -> AbstractContextManager[None]:
        """See `eval_weights`."""
        return eval_weights([self.optimizer], self.masters, self.write_back)

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the parameters."""
        if self.keeps_masters:
            torch._foreach_copy_([*self.params], [*self.masters])

    def named_masters(self) -> dict[str, Tensor]:
        """Float32 (or only) copies of the trained weights by name."""
        return {name: master.detach() for name, master in zip(self.names, self.masters, strict=True)}

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters ("master/NAME"), moving averages ("ema/NAME") and the optimizer's state ("KEY/NAME") by parameter name.

        Python numbers of the state travel as 0-d tensors, "KEY#int/NAME" or "KEY#float/NAME"; those of the parameter group see
        `group_entries`.
        """
        tensors = {f"master/{name}": master for name, master in self.named_masters().items()}
        tensors |= {f"ema/{name}": average for name, average in self.named_averages().items()}
        for name, master in zip(self.names, self.masters, strict=True):
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors |= as_entry(key, name, value)
        return tensors | group_entries(self.optimizer)

    @torch.no_grad()
    def load_state(self, state: StateReader) -> None:
        """Restore what `state_tensors` gave; the caller has checked that the names agree."""
        by_name = dict(zip(self.names, self.masters, strict=True))
        averages = self.named_averages()
        for master in self.masters:
            self.optimizer.state[master] = {}
        GroupNumbers(state).restore(self.optimizer)
        for full_name, shape in state.names().items():
            if full_name.startswith(OF_GROUP):
                continue
            key, _, name = full_name.partition("/")
            key, _, number = key.partition("#")
            tensor = state.read(full_name).reshape(shape)
            if key == "master":
                by_name[name].copy_(tensor)
            elif key == "ema":
                if averages:
                    averages[name].copy_(tensor)
            elif number:
                self.optimizer.state[by_name[name]][key] = NUMBERS[number](tensor.item())
            else:  # AdamW keeps its step count on the CPU
                device = by_name[name].device if tensor.ndim else tensor.device
                self.optimizer.state[by_name[name]][key] = tensor.to(device)
        for master in self.masters:
            if not self.optimizer.state[master]:
                del self.optimizer.state[master]  # a parameter that never had a gradient has no state
        self.write_back()


def _collect(pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Add the gradients of parameters to those of their masters, and drop them."""
    sums: list[Tensor] = []
    added: list[Tensor] = []
    new: list[Tensor] = []
    first: list[Tensor] = []
    for param, master in pairs:
        assert param.grad is not None
        if master.grad is None:
            master.grad = torch.empty_like(master)
            new.append(master.grad)
            first.append(param.grad)
        else:
            sums.append(master.grad)
            added.append(param.grad)
        param.grad = None
    if new:
        torch._foreach_copy_(new, first)
    if sums:
        torch._foreach_add_(sums, added)


NUMBERS: dict[str, Callable[[float], float]] = {"int": int, "float": float}
"""How a number is read whose entry in the resume state is "KEY#int/NAME" or "KEY#float/NAME"."""


def as_entry(key: str, name: str, value: object) -> dict[str, Tensor]:
    """A value of an optimizer's state as an entry of the resume state; what is no tensor and no number has no entry."""
    if isinstance(value, Tensor):
        return {f"{key}/{name}": value.detach()}
    if type(value) is int:
        return {f"{key}#int/{name}": torch.tensor(value, dtype=torch.int64)}
    if type(value) is float:
        return {f"{key}#float/{name}": torch.tensor(value, dtype=torch.float64)}
    return {}


OF_GROUP = "group."
"""Begins the names of entries of the resume state that are no parameter's."""
_CHANGE_NO_NUMBERS = ("torch", "deepspeed")
"""Packages whose optimizers leave the numbers of their parameter groups as the job gave them."""


def group_entries(optimizer: torch.optim.Optimizer, owner: str = "") -> dict[str, Tensor]:
    """The numbers of an optimizer's parameter group ("group.KEY#float/OWNER"), where it may change them: Prodigy's `d`.

    `owner`: whose optimizer it is, where a run has several beside each other, each with numbers of its own.
    """
    if type(optimizer).__module__.partition(".")[0] in _CHANGE_NO_NUMBERS:
        return {}
    entries: dict[str, Tensor] = {}
    for key, value in optimizer.param_groups[0].items():
        if type(value) in (int, float) and key != "lr":  # the learning rate is a function of the step
            entries |= as_entry(f"{OF_GROUP}{key}", owner, value)
    return entries


class GroupNumbers:
    """What `group_entries` has kept in a checkpoint."""

    def __init__(self, state: StateReader) -> None:
        self._by_owner: dict[str, dict[str, float]] = {}
        for full_name in state.names():
            if full_name.startswith(OF_GROUP):
                key, _, owner = full_name.removeprefix(OF_GROUP).partition("/")
                key, _, number = key.partition("#")
                self._by_owner.setdefault(owner, {})[key] = NUMBERS[number](state.read(full_name).item())

    def restore(self, optimizer: torch.optim.Optimizer, owner: str = "") -> None:
        """Give an optimizer its owner's numbers; where the run had other optimizers, the largest that one of them had."""
        found = self._by_owner.get(owner)
        if found is None:
            found = {}
            for numbers in self._by_owner.values():
                for key, value in numbers.items():
                    found[key] = max(value, found.get(key, value))
        optimizer.param_groups[0].update(found)
