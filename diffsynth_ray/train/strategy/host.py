"""Training with masters and optimizer state in host memory, for whatever does not fit the device.

Gradients leave the device block by block while backward goes on, and are dropped there. A thread updates the block's masters
and writes its weights back to the host memory that the device reads them from; with several micro steps another adds the
gradients up in float32 before. An update starts as soon as the block's gradients are there (with clipping: when the norm of all
is known) and is waited for where the block is next loaded, so that it runs beside the rest of the backward pass and the next
forward pass.

The workers of a node share the host weights. Each updates every n-th block of its node, with gradients summed over all workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffsynth_ray.config.schema import Job
from diffsynth_ray.memory.host import NodePlace
from diffsynth_ray.memory.offload import LayerOffload, Unit
from diffsynth_ray.train.optim import (
    NUMBERS,
    OF_GROUP,
    GroupNumbers,
    as_entry,
    build_optimizer,
    eval_weights,
    group_entries,
    load_optimizer_class,
)
from diffsynth_ray.train.shards import balanced_slices
from diffsynth_ray.train.strategy.base import GradientWatch, StateReader, StateSlice
from diffsynth_ray.train.strategy.communication import CommunicationTimer
from diffsynth_ray.train.strategy.host_adam import MasterUpdate, compiled_steps, in_huge_pages, takes, update_masters

_POLL_S = 0.0005
_FUSED_ON_CPU = (torch.optim.AdamW, torch.optim.Adam)
_PLAIN_DEVICES = ("cpu",)
"""On a machine without a GPU the numbers stay those of a plain run, whose update is not fused."""


@dataclass(eq=False)
class _Group:
    """Parameters that are updated together: those of one offloaded block, or all that are in none."""

    names: list[str]
    params: list[nn.Parameter]
    homes: list[Tensor | None]
    """Where a parameter's values are in host memory; None = it is on the device."""
    unit: Unit | None
    is_mine: bool
    """This worker updates it."""
    masters: list[nn.Parameter] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    in_one_pass: bool = False
    """`update_masters` updates it."""
    expected: int = 0
    """Parameters that get a gradient."""
    arrived: dict[int, Tensor] = field(default_factory=dict)
    """Gradients on the device, by position."""
    staged: list[int] = field(default_factory=list)
    """Positions whose whole gradient lies in the staging memory: the step has one micro step."""
    taken: Future[None] | None = None
    updated: Future[None] | None = None


class HostStrategy:
    """Masters, optimizer and update on the host; computation and gradients on the device."""

    def __init__(
        self,
        job: Job,
        graph: nn.Module,
        trained: Mapping[str, nn.Parameter],
        offload: LayerOffload,
        *,
        place: NodePlace,
        probe: tuple[Any, ...] | None,
    ) -> None:
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._job, self._graph, self._offload, self._place = job, graph, offload, place
        self._device = offload.device
        self.communication = CommunicationTimer(self._device, world_size=self.world_size)
        self._single = True
        """The step has one micro step so far: its gradients are the whole ones."""
        self._norms: dict[str, Tensor] = {}
        """Of this step's gradients on the device, by parameter."""
        self._steps = 0
        is_cuda = self._device.type == "cuda"
        self._out = torch.cuda.Stream(self._device) if is_cuda else None
        self._staging: dict[_Group, list[Tensor]] = {}
        self._taking = ThreadPoolExecutor(1, thread_name_prefix="gradients")
        self._updating = ThreadPoolExecutor(1, thread_name_prefix="update")
        self._trained = dict(trained)
        watch = GradientWatch(self._trained)
        if probe is not None:
            graph(*probe).sum().backward()
        for param in trained.values():
            param.grad = None
        unused = set(watch.stop()) if probe is not None else set()
        self._groups = self._build_groups(unused)
        for group in self._groups:
            for position, param in enumerate(group.params):
                param.register_post_accumulate_grad_hook(partial(self._take_gradient, group, position))

    def _build_groups(self, unused: set[str]) -> list[_Group]:
        of_param = {id(slot.param): (unit, slot) for unit in self._offload.units for slot in unit.slots}
        by_unit: dict[Unit | None, list[tuple[str, nn.Parameter]]] = {}
        for name, param in self._trained.items():
            unit = of_param[id(param)][0] if id(param) in of_param else None
            by_unit.setdefault(unit, []).append((name, param))
        groups = []
        for number, (unit, members) in enumerate(by_unit.items()):
            homes: list[Tensor | None] = []
            for _, param in members:
                slot = of_param[id(param)][1] if unit is not None else None
                assert unit is None or unit.host is not None
                homes.append(None if slot is None or unit is None or unit.host is None else slot.view(unit.host))
            group = _Group(
                names=[name for name, _ in members],
                params=[param for _, param in members],
                homes=homes,
                unit=unit,
                is_mine=unit is None or number % self._place.local_world_size == self._place.local_rank,
                expected=sum(name not in unused for name, _ in members),
            )
            if group.is_mine:
                self._give_masters(group)
            groups.append(group)
        return groups

    def _give_masters(self, group: _Group) -> None:
        for param, home in zip(group.params, group.homes, strict=True):
            values = param.detach() if home is None else home
            group.masters.append(nn.Parameter(in_huge_pages(values.float())))
        training = self._job.training
        optimizer_class = load_optimizer_class(training.optimizer)
        fused = optimizer_class in _FUSED_ON_CPU and self._device.type not in _PLAIN_DEVICES
        build: Callable[..., torch.optim.Optimizer] = optimizer_class
        group.optimizer = build_optimizer(group.masters, training, partial(build, fused=True) if fused else build)
        # What lies on the device is little, and is brought back from the masters.
        group.in_one_pass = fused and group.unit is not None and takes(group.optimizer) and compiled_steps() is not None

    def micro_step(self, *inputs: Any, weight: float, num_samples: int, last: bool) -> Tensor:
        """See Strategy."""
        self._single = self._single and last
        losses: Tensor = self._graph(*inputs)
        (losses.sum() * weight / num_samples).backward()
        for group in self._groups:  # those with a parameter that unexpectedly got no gradient
            self._send(group)
        if not last:
            self._single = False
        return losses.detach()

    def release_memory(self) -> None:
        """See Strategy. Nothing."""

    def evaluate(self, *inputs: Any) -> Tensor:
        """See Strategy. A block that is being updated is waited for where it is loaded."""
        losses: Tensor = self._graph(*inputs)
        return losses

    def _take_gradient(self, group: _Group, position: int, param: nn.Parameter) -> None:
        if param.grad is None:
            return  # a recomputed block has an answer for each of its parameters
        group.arrived[position], param.grad = param.grad, None
        if len(group.arrived) == group.expected:
            self._send(group)

    @torch.no_grad()
    def _send(self, group: _Group) -> None:
        """Move a group's gradients to the host, summed over the workers."""
        if not group.arrived:
            return
        arrived, group.arrived = group.arrived, {}
        if self.world_size > 1:
            with self.communication.waiting():
                for gradient in arrived.values():
                    dist.all_reduce(gradient)
        for position, gradient in arrived.items():
            self._norms[group.names[position]] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        if not group.is_mine:
            return
        staging = self._staging.setdefault(group, [])
        if group.taken is not None:
            group.taken.result()  # the staging memory is free again
        whole = self._single and arrived.keys().isdisjoint(group.staged)
        if not whole:  # a parameter has a second gradient
            self._add(group, group.staged)
            group.staged.clear()
        if not staging:
            pinned = self._out is not None
            staging += [torch.empty(p.shape, dtype=p.dtype, pin_memory=pinned) for p in group.params]
        event = None
        if self._out is not None:
            self._out.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._out):
                for position, gradient in arrived.items():
                    staging[position].copy_(gradient, non_blocking=True)
                    gradient.record_stream(self._out)
            event = torch.cuda.Event()
            event.record(self._out)
        else:
            for position, gradient in arrived.items():
                staging[position].copy_(gradient)
        group.taken = self._taking.submit(self._take, group, list(arrived), event, whole)

    def _take(self, group: _Group, positions: list[int], event: torch.cuda.Event | None, whole: bool) -> None:
        if event is not None:
            event.synchronize()
        if whole:
            group.staged += positions
        else:
            self._add(group, positions)

    @torch.no_grad()
    def _add(self, group: _Group, positions: Sequence[int]) -> None:
        for position in positions:
            master, gradient = group.masters[position], self._staging[group][position]
            if master.grad is None:
                master.grad = gradient.to(torch.float32, copy=True)
            else:
                master.grad += gradient

    def step(self, lr: float) -> Tensor:
        """See Strategy. Returns while updates still run, unless gradients are clipped or summed over micro steps."""
        clip = self._job.training.max_grad_norm
        norm = self._device_norm() if self._single else self._host_norm()
        scale = (clip / (norm + 1e-6)).clamp(max=1.0).item() if clip > 0 else 1.0
        self._norms.clear()
        self._steps += 1
        self._single = True
        # As their gradients come, the last blocks first; when all are there, as the next forward pass wants them.
        for group in self._groups if clip > 0 else reversed(self._groups):
            if group.is_mine:
                group.updated = self._updating.submit(self._update, group, lr, scale)
            if group.unit is not None:
                group.unit.pending = _Pending(self, group, self._steps)
                self._offload.evict(group.unit)
        for group in self._groups:
            if group.unit is None and group.updated is not None:
                self._bring_back(group)
        return norm

    def _device_norm(self) -> Tensor:
        found = [self._norms[name] for name in self._trained if name in self._norms]
        return torch.linalg.vector_norm(torch.stack(found))

    def _host_norm(self) -> Tensor:
        """The norm of gradients summed over micro steps, each by the worker that has it."""
        norms = {name: torch.zeros(2) for name in self._trained}  # of the gradient, and whether there is one
        for group in self._groups:
            if group.taken is not None:
                group.taken.result()
            if not self._counts(group):
                continue
            for name, master in zip(group.names, group.masters, strict=True):
                if master.grad is not None:
                    norms[name] = torch.stack([torch.linalg.vector_norm(master.grad), torch.ones(())])
        found = self.sum_over_workers(torch.stack(list(norms.values())).to(self._device))
        # Parameters without gradient are left out, those whose gradient is zero are not, as elsewhere: a sum of more or fewer
        # terms rounds differently.
        return torch.linalg.vector_norm(found[:, 0][found[:, 1] > 0])

    def _counts(self, group: _Group) -> bool:
        """Whether this worker speaks for the group: every group has exactly one such worker."""
        return group.is_mine and self._place.node == 0 and (group.unit is not None or self._place.local_rank == 0)

    @torch.no_grad()
    def _update(self, group: _Group, lr: float, scale: float) -> None:
        if group.taken is not None:
            group.taken.result()
        assert group.optimizer is not None
        for param_group in group.optimizer.param_groups:
            param_group["lr"] = lr
        steps = compiled_steps() if group.in_one_pass else None
        if steps is not None:
            update_masters(steps, group.optimizer, self._updates(group), scale=scale)
        else:
            self._add(group, group.staged)
            gradients = [master.grad for master in group.masters if master.grad is not None]
            if scale != 1.0 and gradients:
                torch._foreach_mul_(gradients, scale)
            group.optimizer.step()
            self._write_home(group)
        group.staged.clear()
        group.optimizer.zero_grad(set_to_none=True)
        if group.unit is not None and group.unit.version is not None:
            group.unit.version += 1

    def _updates(self, group: _Group) -> Iterator[MasterUpdate]:
        for position, (master, home) in enumerate(zip(group.masters, group.homes, strict=True)):
            gradient = self._staging[group][position] if position in group.staged else master.grad
            if gradient is not None and home is not None:
                yield MasterUpdate(master, gradient, home)

    def _write_home(self, group: _Group) -> None:
        for master, home in zip(group.masters, group.homes, strict=True):
            if home is not None:
                home.copy_(master)

    @torch.no_grad()
    def _bring_back(self, group: _Group) -> None:
        assert group.updated is not None
        group.updated.result()
        for param, master in zip(group.params, group.masters, strict=True):
            param.copy_(master)

    def sum_over_workers(self, value: Tensor) -> Tensor:
        """See Strategy."""
        if self.world_size > 1:
            with self.communication.waiting():
                dist.all_reduce(value)
        return value

    def _finish(self) -> None:
        """Wait until every update is in host memory."""
        for group in self._groups:
            if group.unit is not None and group.unit.pending is not None:
                group.unit.pending.wait()

    def eval_weights(self) -> AbstractContextManager[None]:
        """See Strategy."""
        self._finish()
        mine = [group for group in self._groups if group.is_mine]
        optimizers = [group.optimizer for group in mine if group.optimizer is not None]
        return eval_weights(optimizers, [master for group in mine for master in group.masters], self._show_masters)

    def full_masters(self) -> dict[str, Tensor]:
        """See Strategy. Blocks that another worker updates as the weights in host memory, rounded as an export rounds them."""
        self._finish()
        masters = {}
        for group in self._groups:
            values = group.masters if group.is_mine else group.homes
            for name, value in zip(group.names, values, strict=True):
                assert value is not None  # what has no home is everybody's
                masters[name] = value.detach()
        return masters

    def full_averages(self) -> dict[str, Tensor]:
        """See Strategy. Refused with this strategy (config.validation)."""
        return {}

    def averaged(self) -> AbstractContextManager[None]:
        """See Strategy."""
        return nullcontext()

    def state_slices(self) -> dict[str, StateSlice]:
        """See Strategy. The workers of the first node have everything between them."""
        self._finish()
        slices: dict[str, StateSlice] = {}
        for group in self._groups:
            if not self._counts(group):
                continue
            assert group.optimizer is not None
            tensors: dict[str, Tensor] = {}
            for name, master in zip(group.names, group.masters, strict=True):
                tensors[f"master/{name}"] = master.detach()
                for key, value in group.optimizer.state.get(master, {}).items():
                    tensors |= as_entry(key, name, value)
            tensors |= group_entries(group.optimizer, group.names[0])
            slices |= balanced_slices(tensors, rank=0, world_size=1)
        return slices

    @torch.no_grad()
    def load_state(self, state: StateReader) -> None:
        """See Strategy."""
        self._finish()
        places = {name: (group, position) for group in self._groups for position, name in enumerate(group.names)}
        numbers = GroupNumbers(state)
        for group in self._groups:
            if group.optimizer is not None:
                group.optimizer.state.clear()
                numbers.restore(group.optimizer, group.names[0])
        for full_name, shape in state.names().items():
            key, _, name = full_name.partition("/")
            key, _, number = key.partition("#")
            if full_name.startswith(OF_GROUP) or name not in places or not places[name][0].is_mine:
                continue
            group, position = places[name]
            master, values = group.masters[position], state.read(full_name).reshape(shape)
            assert group.optimizer is not None
            if key == "master":
                master.copy_(values)
            else:
                own = NUMBERS[number](values.item()) if number else in_huge_pages(values)
                group.optimizer.state[master][key] = own
        self._show_masters()

    @torch.no_grad()
    def _show_masters(self) -> None:
        """Round the masters into the weights in host memory, and into those that stay on the device."""
        if self.world_size > 1:
            dist.barrier()  # nobody computes with the ones before any more
        for group in self._groups:
            if group.unit is not None:
                self._offload.evict(group.unit)
            if group.is_mine:
                self._write_home(group)
                if group.unit is None:
                    for param, master in zip(group.params, group.masters, strict=True):
                        param.copy_(master)
        if self.world_size > 1:
            dist.barrier()  # nobody loads a block that another worker has not yet written


@dataclass(frozen=True)
class _Pending:
    """An update of a unit that may still run, here or in another worker of the node."""

    strategy: HostStrategy
    group: _Group
    version: int

    def done(self) -> bool:
        """Whether host memory holds the new weights."""
        if self.group.updated is not None and self.group.updated.done():
            self.group.updated.result()  # an error of the thread is raised here
            return True
        version = self.group.unit.version if self.group.unit is not None else None
        return not self.group.is_mine and version is not None and int(version) >= self.version

    def wait(self) -> None:
        """Wait until it is done."""
        if self.group.updated is not None:
            self.group.updated.result()
        while not self.done():
            time.sleep(_POLL_S)
