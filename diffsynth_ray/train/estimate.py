"""Peak memory and step time of a worker before anything runs: what `model_cost` has counted, added up for a job and a device.

Nothing here is measured. Memory is what torch allocates; a CUDA context and the allocator's gaps come on top
(`RESERVED_BYTES`). Time is a roofline over the kernels, without the host's launching them and without the network.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from diffsynth_ray.config.schema import Job
from diffsynth_ray.memory.activations import FETCH_AHEAD
from diffsynth_ray.memory.devices import Device
from diffsynth_ray.memory.graph_cost import GraphCost
from diffsynth_ray.memory.offload import RING_UNITS
from diffsynth_ray.memory.placement import READ_AHEAD
from diffsynth_ray.memory.selective import MARGIN
from diffsynth_ray.schedule import partitioned_components
from diffsynth_ray.train.model_cost import BlockKind, ModelCost, Weights
from diffsynth_ray.train.optim import COLLECTED_BYTES, state_bytes
from diffsynth_ray.train.residency import selects_blocks

GIB = 2**30
RESERVED_BYTES = int(1.2 * GIB)
"""Of the device, beside what torch allocates: the CUDA context with its libraries, and gaps between allocations."""
_PROCESS_BYTES = 3 * GIB
"""Host memory of a worker's process with torch and CUDA."""
_BUCKET_ELEMENTS = 500_000_000
_DISTURBED = 0.15
"""Share of the shorter one of computation and copies that is lost where they run beside each other."""
_HOST_BYTES_PER_S = 130e9
"""What our optimizer on the host reads and writes: 4.1e9 parameters in 0.8 to 0.9 s of a step (memory_table.json)."""
_LIBRARY_HOST_BYTES_PER_S, _LIBRARY_NODE_BYTES_PER_S = 31e9, 47e9
"""The same by DeepSpeed's, of one worker and of all on a node: 3.7 s of a step by one, 2.45 s by two (scaling.json). Gradients
travel three times there, and masters from memory that is not pinned."""
_UPDATE_BYTES = 52
"""A trained parameter's share of one update: summing its gradient up (6), norm and clipping (12), AdamW on float32 (28), and
writing the rounded weight back (6)."""


@dataclass(frozen=True)
class Estimate:
    """Of one worker."""

    device: str
    device_bytes: int
    """0 = not known."""
    memory: dict[str, int]
    """Bytes on the device at the peak by category."""
    moment: str
    """Of the step, in which the peak is."""
    host: dict[str, int]
    """Bytes of host memory of one node by category."""
    times: dict[str, float]
    """Seconds of one step by what takes them; those beside each other overlap."""
    step_s: float
    moved_bytes: int
    """Copied to the device in one step."""
    notes: tuple[str, ...] = ()
    advice: tuple[tuple[int, str], ...] = ()
    """(bytes, setting) that would lower the peak."""

    @property
    def peak_bytes(self) -> int:
        """What torch allocates at most."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool | None:
        """Whether the peak and what is beside it fit the device; None where that is not known."""
        return self.peak_bytes + RESERVED_BYTES <= self.device_bytes if self.device_bytes else None

    @property
    def limit(self) -> str:
        """What takes most of a step."""
        return max(self.times, key=lambda name: self.times[name])

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        more = {"peak_bytes": self.peak_bytes, "fits": self.fits, "limit": self.limit, "reserved_bytes": RESERVED_BYTES}
        return asdict(self) | more

    def lines(self) -> list[str]:
        """For people."""
        verdict = {None: "", True: ": it fits", False: ": it does NOT fit"}[self.fits]
        size = f" of {self.device_bytes / GIB:.1f} GiB" if self.device_bytes else ""
        lines = [f"memory    a worker on {self.device}, at the peak ({self.moment}), estimated"]
        lines += [f"          {bytes_ / GIB:7.2f} GiB  {name}" for name, bytes_ in self.memory.items() if bytes_ >= 0.005 * GIB]
        lines.append(
            f"          {self.peak_bytes / GIB:7.2f} GiB  in all, and {RESERVED_BYTES / GIB:.1f} beside{size}{verdict}"
        )
        if self.fits is False:
            lines += [f"          {saved / GIB:7.2f} GiB  less with {setting}" for saved, setting in self.advice]
        lines.append("time      of a step, by roofline")
        lines += [f"          {seconds:7.3f} s    {name}" for name, seconds in self.times.items() if seconds >= 5e-4]
        lines.append(f"          {self.step_s:7.3f} s    in all, limited by {self.limit}")
        lines.append("host      memory of a node")
        lines += [f"          {bytes_ / GIB:7.2f} GiB  {name}" for name, bytes_ in self.host.items() if bytes_ >= 0.005 * GIB]
        lines.append(f"          {sum(self.host.values()) / GIB:7.2f} GiB  in all")
        return lines + [f"note      {note}" for note in self.notes]


@dataclass(frozen=True)
class Spread:
    """How many workers a job has, and what each does in a step."""

    num_workers: int = 1
    """Of all nodes."""
    workers_on_node: int = 1
    micro_steps: int = 1
    """Of one worker in a step."""
    object_store_bytes: int = 2 * GIB
    """Of a node."""


@dataclass(frozen=True)
class _Bytes:
    """What is on the device all the time, by category, and gradients by moment."""

    static: dict[str, int]
    summed: int
    """Gradients that stay between micro steps."""
    arriving: int
    """Gradients at the end of a backward, in the parameters' number format."""
    updating: int
    """Gradients while the weights are updated."""


def estimate(job: Job, cost: ModelCost, device: Device | None, *, spread: Spread) -> Estimate:
    """Add up; `device` None = the memory only."""
    memory, moment = _device_memory(job, cost, spread)
    times, step_s, moved = _times(job, cost, device, spread)
    notes = list(cost.notes)
    if device is not None and selects_blocks(job):
        extra = sum(kind.count * (_kept_of(kind, recompute=False) - kind.input_bytes) for kind in cost.blocks)
        free = int((1 - MARGIN) * (device.memory_bytes - RESERVED_BYTES)) - sum(memory.values())
        share = min(max(free / extra, 0.0), 1.0) if extra else 0.0
        memory["activations kept"] = memory.get("activations kept", 0) + int(share * extra)
        step_s -= share * times["recomputation"]
        times["recomputation"] *= 1 - share
        notes.append(f'gradient.checkpointing = "auto" will keep the activations of about {share:.0%} of the blocks')
    if device is not None and not device.is_measured:
        notes.append(f"the speeds of {device.name} are its data sheet's, scaled as an H100 reaches its own")
    if job.distributed.strategy == "deepspeed":
        notes.append("DeepSpeed's own buffers are reckoned from its settings; one run was compared, under ZeRO-3 (1 % apart)")
    if spread.num_workers > 1:
        notes.append("the network between workers is not in the time")
    if plain := {kind.component for kind in cost.blocks if not kind.is_compiled}:
        notes.append(f"blocks of {' and '.join(sorted(plain))} are not compiled")
    return Estimate(
        device=device.name if device else "any device",
        device_bytes=device.memory_bytes if device else 0,
        memory=memory,
        moment=moment,
        host=_host_memory(job, cost, spread),
        times=times,
        step_s=step_s,
        moved_bytes=moved,
        notes=tuple(notes),
    )


def recomputes(job: Job) -> bool:
    """Whether the blocks' activations are made again in backward; for "auto" as if all were."""
    return job.gradient.checkpointing is not False


@dataclass(frozen=True)
class BackwardMoment:
    """The backward pass when it comes to a kind of blocks."""

    name: str
    kept: int
    """Bytes of what blocks and what is around them still keep, and of gradients that wait for a block."""
    working: int
    """Most that one of the kind's blocks takes while it computes."""
    trained_after: int
    """Bytes of the trained weights of later blocks: they have their gradients."""


def activation_bytes(job: Job, cost: ModelCost) -> int:
    """Most that activations take at once."""
    return max((moment.kept + moment.working for moment in backward_moments(job, cost)), default=cost.around_kept_bytes)


def backward_moments(job: Job, cost: ModelCost) -> list[BackwardMoment]:
    """By kind of blocks, in the order of the forward pass."""
    found: list[BackwardMoment] = []
    kept = cost.around_kept_bytes
    waiting = 0
    trained_after = sum(kind.weights.trained_bytes * kind.count for kind in cost.blocks)
    for number, kind in enumerate(cost.blocks, start=1):
        one = _kept_of(kind, recompute=recomputes(job))
        kept += kind.shared_bytes
        kept += one * (min(kind.count, FETCH_AHEAD + 1) if job.gradient.checkpointing_offload else kind.count)
        waiting += kind.handed_bytes * kind.count
        trained_after -= kind.weights.trained_bytes * kind.count
        # The block that runs has its own activations among those that its backward holds.
        own = 0 if recomputes(job) else one
        working = max(kind.cost.backward.peak_bytes - own, kind.cost.forward.peak_bytes - own, 0)
        # What is handed on goes to the last blocks: their gradients are there when those are done.
        is_last = number == len(cost.blocks)
        name = "the beginning of the backward" if is_last else f"the backward of {kind.component}'s blocks"
        found.append(BackwardMoment(name, kept + (0 if is_last else waiting), working, trained_after))
    return found


def _kept_of(kind: BlockKind, *, recompute: bool) -> int:
    if recompute:
        return kind.input_bytes
    return kind.cost.kept_bytes + (kind.input_bytes if kind.keeps_input else 0)


def _device_memory(job: Job, cost: ModelCost, spread: Spread) -> tuple[dict[str, int], str]:
    """The categories at the moment of the peak, and that moment."""
    held = _held(job, cost, spread)
    first = next((kind.input_bytes for kind in cost.blocks if kind.has_backward), 0)
    gathered = _gathered(job, cost, spread)
    encode = max((other.encode_bytes for other in cost.others.values()), default=0)
    steps = backward_moments(job, cost)
    end = BackwardMoment(
        name="the end of the backward",
        kept=cost.around_kept_bytes + first,
        working=max((step.working for step in steps), default=0),
        trained_after=held.arriving,
    )
    moments = [("encoding", {"gradients": held.summed, "encoding": encode}), ("the update", {"gradients": held.updating})]
    moments += [
        (
            step.name,
            {
                "gradients": held.summed + min(held.arriving, step.trained_after),
                "activations kept": step.kept,
                "the block that computes": step.working,
                "gathered parameters": gathered,
            },
        )
        for step in (*steps, end)
    ]
    moment, taken = max(moments, key=lambda each: sum(each[1].values()))
    return {name: size for name, size in {**held.static, **taken}.items() if size}, moment


def _held(job: Job, cost: ModelCost, spread: Spread) -> _Bytes:
    """Weights, masters, optimizer state and gradients, by strategy."""
    encoders = sum(other.weights.frozen_bytes for other in cost.others.values())
    shared = _partitioned(job, cost)
    trained, elements = cost.weights.trained_bytes, cost.weights.num_trained
    state = int(elements * state_bytes(job.training))
    has_masters = job.training.precision == "bf16" and job.training.master_weights
    wide = 4 * elements
    static = {"frozen weights": cost.weights.frozen_bytes + encoders, "trained weights": trained}
    if job.offload.cpu_offload:
        static = _offloaded(job, cost)
    if job.offload.optimize_on_cpu:
        return _Bytes(static, 0, 0, 0)  # a block's gradients are among what its backward leaves, and go at once
    if job.distributed.strategy == "deepspeed":
        whole = static["frozen weights"] - shared.frozen_bytes
        return _zero(job, static, trained, elements, spread, whole=whole)
    static |= {"float32 masters": wide if has_masters else 0, "optimizer state": state}
    static["moving averages"] = wide if job.training.ema_decay is not None else 0
    if spread.num_workers > 1:
        static["gradient buckets of DDP"] = trained
    narrow = 0 if spread.num_workers > 1 else trained
    if not has_masters:
        return _Bytes(static, trained if spread.micro_steps > 1 else 0, narrow if spread.micro_steps == 1 else 0, narrow)
    copied = min(narrow, COLLECTED_BYTES)
    return _Bytes(static, wide if spread.micro_steps > 1 else 0, narrow, wide + copied)


def _zero(job: Job, static: dict[str, int], trained: int, elements: int, spread: Spread, *, whole: int) -> _Bytes:
    """DeepSpeed: float32 masters, two moments and gradients in equal parts; see `train.memory_report`.

    `whole`: bytes of the frozen weights that every worker has whole at stage 3 too.
    """
    distributed, workers = job.distributed, spread.num_workers
    share = -(-4 * elements // workers)
    on_device = 0 if distributed.offload_optimizer_device == "cpu" else share
    bucket = 2 * min(_BUCKET_ELEMENTS, elements)
    if distributed.zero_stage == 3:
        shared = static | {"frozen weights": static["frozen weights"] - whole}
        static = {
            name: 0 if distributed.offload_param_device == "cpu" else -(-size // workers) for name, size in shared.items()
        }
        static["frozen weights"] += whole
    state = int(on_device / 4 * state_bytes(job.training))
    static = static | {"float32 masters": on_device, "optimizer state": state, "DeepSpeed's buckets": 2 * bucket}
    gradients = (share if distributed.zero_stage > 1 else 4 * elements) if on_device else min(trained, bucket)
    return _Bytes(static, gradients, 0, gradients)


def _gathered(job: Job, cost: ModelCost, spread: Spread) -> int:
    """Parameters that ZeRO-3 has whole while they compute: a block and the next."""
    if spread.num_workers == 1:
        return 0
    shared = [kind.weights for kind in cost.blocks if kind.component in partitioned_components(job)]
    return 2 * max((each.frozen_bytes + each.trained_bytes for each in shared), default=0)


def _partitioned(job: Job, cost: ModelCost) -> Weights:
    """Of the components that ZeRO-3 shares out: those that hold trained weights. A frozen one beside them is not."""
    return sum(map(cost.weights_of, partitioned_components(job)), Weights())


def _units(job: Job, cost: ModelCost) -> tuple[int, int, int]:
    """(bytes of all units of layer offload, the largest, what stays on the device for good)."""
    with_trained = job.offload.optimize_on_cpu
    units = [kind.weights.frozen_bytes + (kind.weights.trained_bytes if with_trained else 0) for kind in cost.blocks]
    total = sum(size * kind.count for size, kind in zip(units, cost.blocks, strict=True))
    largest = max(units, default=0)
    parts = [*cost.around.values(), *cost.others.values()]
    loose = 0
    for part in parts:
        whole = part.weights.frozen_bytes + (part.weights.trained_bytes if with_trained else 0)
        total += whole - part.loose_bytes
        loose += part.loose_bytes
        largest = max(largest, part.largest_unit_bytes)
    return total, largest, loose


def _ring(job: Job, cost: ModelCost) -> int:
    """Device memory of offloaded weights."""
    total, largest, _ = _units(job, cost)
    budget = job.offload.vram_budget_gib
    return min(total, RING_UNITS * largest if budget is None else max(int(budget * GIB), 2 * largest))


def _offloaded(job: Job, cost: ModelCost) -> dict[str, int]:
    trained = 0 if job.offload.optimize_on_cpu else cost.weights.trained_bytes
    return {
        "frozen weights outside of units": _units(job, cost)[2],
        "trained weights": trained,
        "offloaded weights, loaded at a time": _ring(job, cost),
    }


def _host_memory(job: Job, cost: ModelCost, spread: Spread) -> dict[str, int]:
    """Bytes of one node."""
    workers = spread.workers_on_node
    found = {"processes of the workers": _PROCESS_BYTES * workers, "Ray's object store": spread.object_store_bytes}
    elements = cost.weights.num_trained
    if job.offload.cpu_offload:
        found["pinned weights, once a node"] = _units(job, cost)[0]
    state = int(elements * state_bytes(job.training))
    if job.offload.optimize_on_cpu:
        found["masters and optimizer state"] = 4 * elements + state
        found["gradients on the host"] = 4 * elements + cost.weights.trained_bytes
    if job.distributed.strategy == "deepspeed":
        if job.distributed.offload_optimizer_device == "cpu":
            # Stage 3 sums gradients up in one place and updates from another.
            floats = 3 if job.distributed.zero_stage == 3 else 2
            found["masters, optimizer state and gradients"] = (4 * floats * elements + state) * workers // spread.num_workers
        if job.distributed.offload_param_device == "cpu":
            weights = _partitioned(job, cost)
            found["pinned parameters"] = (weights.frozen_bytes + weights.trained_bytes) * workers // spread.num_workers
    if job.gradient.checkpointing_offload:
        found["pinned activations"] = workers * sum(kind.count * kind.input_bytes for kind in cost.blocks)
    largest = max((kind.weights.frozen_bytes + kind.weights.trained_bytes for kind in cost.blocks), default=0)
    found["while loading: tensors on their way"] = READ_AHEAD * largest // 4 * workers
    return found


def _host_update_s(job: Job, elements: int, spread: Spread) -> float:
    """Seconds in which the host reads and writes what an update of all trained parameters needs, 28 bytes each."""
    if job.offload.optimize_on_cpu:  # the workers of a node share its update out
        return 28 * elements / spread.workers_on_node / _HOST_BYTES_PER_S
    rate = min(_LIBRARY_HOST_BYTES_PER_S, _LIBRARY_NODE_BYTES_PER_S / spread.workers_on_node)
    return 28 * elements / spread.num_workers / rate


def kernels_s(graph: GraphCost, device: Device, *, backward: bool) -> float:
    """Seconds of a graph's kernels: products by the slower of arithmetic and memory, the rest by memory."""
    products = sum(
        max(flops / device.product_flops, size / device.traffic_bytes) + device.kernel_s for flops, size in graph.products
    )
    attention = graph.attention_flops / device.attention_flops[backward]
    return products + attention + graph.traffic_bytes / device.traffic_bytes


def _times(job: Job, cost: ModelCost, device: Device | None, spread: Spread) -> tuple[dict[str, float], float, int]:
    """(seconds by what takes them, of the step, bytes moved to the device)."""
    if device is None:
        return {"not known without a device": 0.0}, 0.0, 0
    forward = sum(kind.count * kernels_s(kind.cost.forward, device, backward=False) for kind in cost.blocks)
    backward = sum(kind.count * kernels_s(kind.cost.backward, device, backward=True) for kind in cost.blocks)
    again = sum(
        kind.count * kernels_s(kind.cost.forward, device, backward=False)
        for kind in cost.blocks
        if kind.has_backward and recomputes(job)
    )
    micro = spread.micro_steps
    times = {"forward": micro * forward, "backward": micro * backward, "recomputation": micro * again}
    compute_s = sum(times.values())
    elements = cost.weights.num_trained
    moved = 0
    if job.offload.cpu_offload:
        total, _, _ = _units(job, cost)
        moved = micro * 2 * max(total - _ring(job, cost), 0)
        times["copies of offloaded weights"] = moved / device.link_bytes
    if job.gradient.checkpointing_offload:
        bytes_ = sum(kind.count * kind.input_bytes for kind in cost.blocks)
        times["copies of activations"] = micro * bytes_ / device.link_bytes
    copies_s = sum(seconds for name, seconds in times.items() if name.startswith("copies"))
    step_s = max(compute_s, copies_s) + _DISTURBED * min(compute_s, copies_s)
    if job.updates_on_host:
        # An update with clipping waits for the whole backward, the next forward for the update of its first block.
        times["the optimizer on the host"] = _host_update_s(job, elements, spread)
        step_s = step_s + times["the optimizer on the host"]
    else:
        share = spread.num_workers if job.distributed.strategy == "deepspeed" else 1
        times["the update"] = _UPDATE_BYTES * elements / share / device.traffic_bytes
        step_s += times["the update"]
    return times, step_s, moved
