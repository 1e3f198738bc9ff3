"""Weights from their source to where they live: the device, or the node's host memory.

Modules arrive with their parameters on the meta device. Each one is read once, turned into FP8 where asked (on the device,
which is faster), and put in its place before the next ones are read: host memory never holds more than the model and what is
in flight. Of the workers of a node that share host memory only the first one reads what is shared.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from diffsynth_ray.memory.fp8 import Fp8Linear, quantize
from diffsynth_ray.memory.host import HostSegment, NodeGroup
from diffsynth_ray.memory.offload import ALIGNMENT, Unit, build_unit

READ_THREADS = 4
READ_AHEAD = 8
"""Tensors that are read but not yet placed."""
LARGEST_PINNED_BYTES = 128 << 20
"""Larger tensors are few, and go to the device from ordinary memory: pinned memory is taken in powers of two."""
PROGRESS_S = 5.0
_NOTABLE_BYTES = 1 << 30
"""Of which nobody wonders what takes time."""
LARGEST_LOOSE_BYTES = 256 << 20
"""Largest unit outside of the repeated blocks, where no threshold is given."""
_SCALE = "weight_scale"

Say = Callable[[str], object]


class WeightSource(Protocol):
    """Where a component's weights come from. Reads from several threads at once."""

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """The parameter of this name, as the module was built (without adapters), in the dtype it computes in.

        It may lie in `into`, memory on the CPU of its shape and dtype.
        """
        ...


@dataclass(frozen=True)
class Spot:
    """A parameter or buffer on the meta device, and every module that holds it (tied weights have several)."""

    name: str
    """Within the component."""
    holders: tuple[tuple[nn.Module, str], ...]
    meta: Tensor

    @property
    def source_name(self) -> str:
        """The name before adapters were put in."""
        return self.name.replace(".base_layer.", ".")

    @property
    def current(self) -> Tensor:
        """What the module holds there now."""
        module, leaf = self.holders[0]
        found: Tensor = getattr(module, leaf)
        return found

    def put(self, value: Tensor) -> Tensor:
        """Give every holder this tensor instead, as a parameter where it was one; returns it."""
        if isinstance(self.meta, nn.Parameter):
            value = nn.Parameter(value, requires_grad=self.meta.requires_grad)
        for module, leaf in self.holders:
            setattr(module, leaf, value)
        return value


def find_spots(component: nn.Module) -> list[Spot]:
    """All parameters and buffers of a component that are on the meta device."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    first: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in component.named_modules():
        for leaf, tensor in [*module.named_parameters("", recurse=False), *module.named_buffers("", recurse=False)]:
            if tensor.is_meta:
                holders.setdefault(id(tensor), []).append((module, leaf))
                first.setdefault(id(tensor), (f"{prefix}.{leaf}" if prefix else leaf, tensor))
    return [Spot(name, tuple(holders[key]), tensor) for key, (name, tensor) in first.items()]


def split_units(
    component: nn.Module, blocks: Sequence[nn.Module], *, max_bytes: int | None, with_trained: bool = False
) -> dict[str, nn.Module]:
    """The modules, by name, that are loaded at once: the blocks, and whatever is around them.

    `with_trained`: trained parameters are in host memory too; else a module without frozen ones is no unit.

    A block larger than `max_bytes` is split into its children. Parameters that a split module holds itself stay on the device.
    """
    blocks_inside = set(blocks)
    units: dict[str, nn.Module] = {}

    def walk(name: str, module: nn.Module, *, in_block: bool) -> None:
        num_bytes = _unit_bytes(module, with_trained=with_trained)
        if not num_bytes:
            return
        in_block = in_block or module in blocks_inside
        limit = max_bytes or (num_bytes if in_block else LARGEST_LOOSE_BYTES)
        holds_blocks = not in_block and any(inner in blocks_inside for inner in module.modules())
        is_called = bool(name) and not holds_blocks and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        # A part of a block is frozen in full, adapters stay outside: gradients are then summed in the whole block's order.
        is_whole = module in blocks_inside or not any(param.requires_grad for param in module.parameters())
        if is_called and num_bytes <= limit and is_whole:
            units[name] = module
            return
        if is_called and not any(True for _ in module.children()):
            # Adapters (new, so not on the meta device) are read by the layer that they adapt, and not called.
            if all(param.is_meta for param in module.parameters()):
                units[name] = module
            return
        for child_name, child in module.named_children():
            walk(f"{name}.{child_name}" if name else child_name, child, in_block=in_block)

    walk("", component, in_block=False)
    return units


def _unit_bytes(module: nn.Module, *, with_trained: bool) -> int:
    return sum(param.numel() * param.element_size() for param in module.parameters() if with_trained or not param.requires_grad)


def place(
    components: Mapping[str, nn.Module],
    sources: Mapping[str, WeightSource],
    *,
    device: torch.device,
    units: Mapping[str, Mapping[str, nn.Module]] | None = None,
    with_trained: bool = False,
    group: NodeGroup | None = None,
    say: Say,
) -> dict[nn.Module, Unit]:
    """Fill every parameter on the meta device from its component's source.

    The frozen parameters of the modules in `units` (by component) go to host memory, `with_trained` the trained ones as well,
    and everything else to the device. Returns the units by module; LayerOffload brings them to the device.
    """
    spots = {name: find_spots(component) for name, component in components.items()}
    built: dict[nn.Module, Unit] = {}
    given: list[tuple[nn.Parameter, Tensor]] = []
    for component_name, named in (units or {}).items():
        by_tensor = {id(spot.meta): spot for spot in spots[component_name]}
        for unit_name, module in named.items():
            aside = _set_aside(module, device) if with_trained else []
            given += aside
            mine = [param for param, _ in aside]
            unit = _claim_unit(
                f"{component_name}.{unit_name}", module, by_tensor, device, given=mine, with_trained=with_trained
            )
            if unit.slots:
                built[module] = unit
    counters = ALIGNMENT * (-(-8 * len(built) // ALIGNMENT))
    num_bytes = counters + sum(unit.num_bytes for unit in built.values())
    if device.type == "cuda" and num_bytes > _NOTABLE_BYTES:
        say(f"pinning {num_bytes / 2**30:.1f} GiB of host memory")
    segment = HostSegment(num_bytes, device=device, group=group)
    homes = _give_homes(segment, list(built.values()), start=counters)
    if segment.is_first:
        for param, value in given:
            homes[id(param)].copy_(value)
    for name, found in spots.items():
        for spot in found:
            if spot.current.is_meta:
                spot.put(torch.empty_like(spot.meta, device=device))
        _fill(name, found, sources[name], homes, device=device, fills_shared=segment.is_first, say=say)
    release_pinned_memory(device)
    if group is not None:
        group.barrier()  # nobody reads what is not yet written
    return built


def _set_aside(module: nn.Module, device: torch.device) -> list[tuple[nn.Parameter, Tensor]]:
    """Take the values of the module's trained parameters that have some (new adapters), for host memory."""
    given = []
    for param in module.parameters():
        if param.requires_grad and not param.is_meta:
            given.append((param, param.data))
            param.data = _absent(param, device)
    return given


def _claim_unit(
    name: str,
    module: nn.Module,
    by_tensor: dict[int, Spot],
    device: torch.device,
    *,
    given: Sequence[nn.Parameter],
    with_trained: bool,
) -> Unit:
    """Lay out the module's parameters as one unit; each belongs to the first unit that holds it."""
    claimed: list[tuple[str, Tensor]] = []
    set_aside = {id(param) for param in given}
    for inner, param in module.named_parameters():
        if id(param) in set_aside:
            claimed.append((inner, param))
            continue
        spot = by_tensor.pop(id(param), None) if with_trained or not param.requires_grad else None
        if spot is not None:
            claimed.append((inner, spot.put(_absent(param, device))))
    return build_unit(name, claimed)  # type: ignore[arg-type]  # put() gives parameters back as parameters


def _absent(param: nn.Parameter, device: torch.device) -> Tensor:
    """NaN of the parameter's shape on the device, in the memory of one element."""
    value = torch.zeros(1, device=device)
    if param.is_floating_point():
        value.fill_(torch.nan)
    return value.to(param.dtype).expand(param.shape)


def _give_homes(segment: HostSegment, units: Sequence[Unit], *, start: int) -> dict[int, Tensor]:
    """Every unit's place behind the counters; the host tensors by the id of their parameter."""
    homes: dict[int, Tensor] = {}
    offset = start
    for number, unit in enumerate(units):
        unit.version = segment.data[8 * number : 8 * number + 8].view(torch.int64)
        unit.host = segment.data[offset : offset + unit.num_bytes]
        offset += unit.num_bytes
        homes.update({id(slot.param): slot.view(unit.host) for slot in unit.slots})
    return homes


def _fill(
    component: str,
    spots: Sequence[Spot],
    source: WeightSource,
    homes: Mapping[int, Tensor],
    *,
    device: torch.device,
    fills_shared: bool,
    say: Say,
) -> None:
    """Read the spots' values and copy each to its home, or to the device where it has none."""
    wanted = [spot for spot in spots if spot.holders[0][1] != _SCALE and (fills_shared or id(spot.current) not in homes)]
    started = told = time.monotonic()
    num_bytes = 0

    def memory_for(spot: Spot) -> Tensor | None:
        home = homes.get(id(spot.current), spot.current.data)
        return home if home.device.type == "cpu" and not _is_narrowed(spot) else pinned_memory(spot, device)

    for spot, value in read_ahead(wanted, source, memory_for):
        module, leaf = spot.holders[0]
        num_bytes += value.numel() * value.element_size()
        values = {leaf: value}
        if _is_narrowed(spot):
            values[leaf], values[_SCALE] = quantize(value.to(device, non_blocking=True))
        for name, converted in values.items():
            target = getattr(module, name)
            home = homes.get(id(target), target.data)
            if home.data_ptr() != converted.data_ptr():
                home.copy_(converted, non_blocking=home.is_cuda)
        if time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            say(f"loading {component}: {_amount(num_bytes, told - started)}")
    if num_bytes > _NOTABLE_BYTES:
        say(f"loaded {component}: {_amount(num_bytes, time.monotonic() - started)}")


def _amount(num_bytes: int, seconds: float) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB in {seconds:.1f} s, {gib / seconds:.2f} GiB/s"


def _is_narrowed(spot: Spot) -> bool:
    """Whether the value is turned into FP8 on its way."""
    module, leaf = spot.holders[0]
    return isinstance(module, Fp8Linear) and leaf == "weight"


def pinned_memory(spot: Spot, device: torch.device) -> Tensor | None:
    """Memory that a device copies a spot's value from without waiting; None where that is no GPU, or the value is large."""
    module, _ = spot.holders[0]
    dtype = module.weight_scale.dtype if isinstance(module, Fp8Linear) and _is_narrowed(spot) else spot.meta.dtype
    if device.type != "cuda" or spot.meta.numel() * dtype.itemsize > LARGEST_PINNED_BYTES:
        return None
    return torch.empty(spot.meta.shape, dtype=dtype, pin_memory=True)


def release_pinned_memory(device: torch.device) -> None:
    """Give back what loading has pinned: torch keeps it, in every worker, until the process ends."""
    if device.type == "cuda" and hasattr(torch._C, "_host_emptyCache"):
        torch.cuda.synchronize(device)
        torch._C._host_emptyCache()


def read_ahead(
    spots: Sequence[Spot], source: WeightSource, memory_for: Callable[[Spot], Tensor | None]
) -> Iterator[tuple[Spot, Tensor]]:
    """The spots' values in order, the next few already on their way to the memory that there is for them."""
    with ThreadPoolExecutor(max_workers=READ_THREADS, thread_name_prefix="weights") as pool:
        waiting: deque[tuple[Spot, Future[Tensor]]] = deque()
        for spot in spots:
            waiting.append((spot, pool.submit(source.read, spot.source_name, memory_for(spot))))
            if len(waiting) == READ_AHEAD:
                first, value = waiting.popleft()
                yield first, value.result()
        while waiting:
            first, value = waiting.popleft()
            yield first, value.result()
