"""Training with DeepSpeed's ZeRO: optimizer state (1), gradients (2) and parameters (3) shared out over the workers.

DeepSpeed sees no more than it has to: the trained parameters, and at stage 3 the components that hold them. Frozen components
are called inside the same forward pass and know nothing of it. What is DeepSpeed's elsewhere is decided here or in the job:
which backward completes a step, the learning rate, and the resume state, which is read from and written to the flat float32
partitions under the names that DDP uses, so that a run may change between them.

DeepSpeed averages gradients over the workers, so that the share of a loss is scaled up by their number, as under DDP.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffsynth_ray.config.schema import Job, TrainingSection
from diffsynth_ray.config.zero import read_zero_config
from diffsynth_ray.errors import ModelError
from diffsynth_ray.memory.checkpointing import PartitionedBlockCall
from diffsynth_ray.memory.placement import WeightSource, find_spots, pinned_memory, read_ahead, release_pinned_memory
from diffsynth_ray.models.family import ModelFamily
from diffsynth_ray.schedule import partitioned_components
from diffsynth_ray.train.optim import NUMBERS, OF_GROUP, GroupNumbers, as_entry, build_optimizer, eval_weights, group_entries
from diffsynth_ray.train.residency import recomputes_at_first
from diffsynth_ray.train.strategy import trained_parameters
from diffsynth_ray.train.strategy.base import GradientWatch, StateReader, StateSlice
from diffsynth_ray.train.strategy.communication import CommunicationTimer, TimedCollectives

_ADAM = {"torch.optim.AdamW": True, "torch.optim.Adam": False}
"""Optimizers that DeepSpeed has a CPU kernel for -> whether weight decay is decoupled."""
_ADAM_ARGUMENTS = {"betas", "eps"}
_ONLY_SPEED = {"fused", "foreach"}
"""Arguments of torch's optimizers that change nothing but their speed."""
_BUCKET_ELEMENTS = 500_000_000
_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's own bound of parameters that are whole on a worker at a time."""
_SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class _Part:
    """This rank's part of a parameter: where it lies in a flat float32 partition and in the flattened whole."""

    flat: Tensor
    offset: int
    """Of the part in `flat`."""
    start: int
    """Of the part in the flattened parameter."""
    count: int


class _Seen(nn.Module):
    """The module that DeepSpeed wraps: it holds what is to be seen, and runs the whole graph."""

    def __init__(self, seen: nn.Module, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.seen = seen
        self._run = run  # a bound method, so that the graph is not a child

    def forward(self, *inputs: Any) -> Tensor:
        return self._run(*inputs)


class DeepSpeedStrategy:
    """A DeepSpeed engine over the trained parameters."""

    def __init__(
        self,
        job: Job,
        family: ModelFamily,
        graph: nn.Module,
        *,
        probe: tuple[Any, ...] | None,
        say: Callable[[str], object],
    ) -> None:
        self.stage = job.distributed.zero_stage
        self._device = family.device
        self._deepspeed = load_deepspeed(family.device)
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.communication = CommunicationTimer(family.device, world_size=self.world_size)
        components = partitioned_components(job)
        blocks = [block for name in components for block in family.repeated_blocks(name)]
        config = _engine_config(job, graph, blocks, family.device)
        overlaps = self.stage == 3 or config["zero_optimization"].get("overlap_comm", False)
        self._waits_beside = family.device.type == "cuda" and overlaps
        """Its collectives run in streams beside the computation."""
        for block in blocks:
            _make_leaf(block)
        self._partition_components(family, components, config, say=say)
        self._trained = trained_parameters(graph)
        self._shapes = {name: tuple(getattr(param, "ds_shape", param.shape)) for name, param in self._trained.items()}
        params = list(self._trained.values())
        optimizer = _offloaded_optimizer(job, params, family.device, say=say) or build_optimizer(params, job.training)
        seen = nn.ModuleDict({name: family.component(name) for name in components}) or nn.ParameterList(params)
        with redirect_stdout(io.StringIO()):  # it prints beside its logger
            self.engine, *_ = self._deepspeed.initialize(
                model=_Seen(seen, graph.__call__), optimizer=optimizer, config=config, dist_init_required=False
            )
        if self.stage == 3:
            self._gather_by_block(blocks)
        self._parts = {name: self._find_part(param) for name, param in self._trained.items()}
        self._idle: list[str] = []
        """Parameters that get no gradient. Torch's optimizers leave such a parameter alone; in a flat partition its gradient
        is 0, and weight decay would shrink it."""
        looks = job.training.find_unused_parameters is not False
        self._watch = GradientWatch(self._trained) if looks or probe is not None else None
        # A recomputed block answers for all of its parameters, also with "none", which DeepSpeed's own hooks do not expect.
        for param in params:
            param.register_hook(partial(_fill, param))
        if probe is not None:
            # Gradients of 0, which those of the first step are added to.
            self.micro_step(*probe, weight=0.0, num_samples=1, last=False)
            self._stop_watch()

    def _stop_watch(self) -> None:
        if self._watch is not None:
            self._idle = self._watch.stop()
            self._watch = None

    def _partition_components(
        self, family: ModelFamily, components: list[str], config: dict[str, Any], *, say: Callable[[str], object]
    ) -> None:
        """Read components block by block, each shared out before the next: no rank ever holds one whole.

        Rank 0 reads; DeepSpeed hands its values out when it partitions.
        """
        for component in components:
            module = family.component(component)
            source = cast(WeightSource, cast(Any, module).weight_source)
            spots = {id(spot.meta): spot for spot in find_spots(module)}
            # The blocks first; what is left of the component comes last.
            units = [*family.repeated_blocks(component), module]
            last_said = time.monotonic()
            for number, unit in enumerate(units, start=1):
                wanted = [spots[id(param)] for param in unit.parameters() if id(param) in spots]
                if self.rank == 0:
                    for spot, value in read_ahead(wanted, source, partial(pinned_memory, device=family.device)):
                        spot.put(value.to(family.device, non_blocking=True))
                else:
                    for spot in wanted:
                        spot.put(torch.empty_like(spot.meta, device=family.device))
                self._deepspeed.zero.Init(module=unit, config_dict_or_path=copy.deepcopy(config))
                if time.monotonic() - last_said > _SAY_EVERY_S:
                    say(f"sharing out {component}: {number} of {len(units)} parts")
                    last_said = time.monotonic()
        release_pinned_memory(family.device)

    def _gather_by_block(self, blocks: Sequence[nn.Module]) -> None:
        """Blocks are gathered whole and let go after their backward; their gradients are shared out parameter by parameter.

        A leaf of DeepSpeed's own is let go by a hook that sees positional arguments only, and so are its gradients.
        """
        zero = self._zero
        for block in blocks:
            cast(PartitionedBlockCall, block.forward).set_up(
                partial(zero.parameter_offload.post_sub_module_backward_function, block)
            )
            for param in block.parameters():
                delattr(param, "ds_z3_leaf_module")
        for hook in (*zero._leaf_module_hooks, *zero._grad_acc_hooks):
            hook.remove()
        zero._leaf_module_hooks.clear()
        zero._grad_acc_hooks.clear()
        zero.create_reduce_and_remove_grad_hooks()

    def micro_step(self, *inputs: Any, weight: float, num_samples: int, last: bool) -> Tensor:
        """See Strategy."""
        self.engine.set_gradient_accumulation_boundary(last)
        with self._timed():
            losses: Tensor = self.engine(*inputs)
            self.engine.backward(losses.sum() * weight / num_samples * self.world_size, scale_wrt_gas=False)
        return losses.detach()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Inside, DeepSpeed's waits for other workers are measured."""
        if self.world_size == 1:
            yield
            return
        comm = self._deepspeed.comm.comm
        timed: list[tuple[Any, str, Any]] = [(comm, "cdb", TimedCollectives(comm.cdb, self.communication))]
        if self._waits_beside:
            for owner, name in self._waits_for_streams():
                timed.append((owner, name, self.communication.timed(getattr(owner, name))))
        before = [getattr(owner, name) for owner, name, _ in timed]
        for owner, name, replacement in timed:
            setattr(owner, name, replacement)
        try:
            yield
        finally:
            for (owner, name, _), original in zip(timed, before, strict=True):
                setattr(owner, name, original)

    def _waits_for_streams(self) -> list[tuple[Any, str]]:
        """Methods of DeepSpeed in which the computation waits for collectives that run in streams beside it."""
        end_of_backward = (self._zero, "independent_gradient_partition_epilogue")
        if self.stage == 3:
            return [(self._zero.parameter_offload.get_param_coordinator(), "fetch_sub_module"), end_of_backward]
        return [(self._zero, "average_tensor"), end_of_backward]  # a full bucket waits for the one before it

    def release_memory(self) -> None:
        """See Strategy. Nothing."""

    def evaluate(self, *inputs: Any) -> Tensor:
        """See Strategy. Through the engine, which at stage 3 gathers the parameters."""
        return self.engine(*inputs)

    def step(self, lr: float) -> Tensor:
        """See Strategy."""
        self._stop_watch()
        for group in self._zero.param_groups:
            group["lr"] = lr
        with self._idle_ones_stay(), self._timed():
            self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self._device)

    @contextmanager
    def _idle_ones_stay(self) -> Iterator[None]:
        """Parameters that get no gradient are after the optimizer's step what they were before it."""
        kept = [tensor.clone() for tensor in self._idle_tensors()]
        # At stage 3 the step puts small ones together on every rank, from the shares that it has updated.
        small = [param for param in self._idle_params() if getattr(param, "ds_persist", False)]
        wholes = [param.detach().clone() if _is_whole(param) else None for param in small]
        yield
        for tensor, values in zip(self._idle_tensors(), kept, strict=True):
            tensor.copy_(values)
        for param, whole in zip(small, wholes, strict=True):
            if whole is not None:
                param.detach().copy_(whole)
            elif _is_whole(param):
                param.partition()  # lets go what was put together; the next pass gathers it from the shares

    def _idle_params(self) -> list[Any]:
        return [self._trained[name] for name in self._idle]

    def _idle_tensors(self) -> list[Tensor]:
        """Where this rank has parameters that get no gradient: its part of their masters, and its share of the model's."""
        masters = [self._view(name) for name in self._idle if self._parts[name] is not None]
        return masters + [getattr(param, "ds_tensor", param).detach() for param in self._idle_params()]

    def sum_over_workers(self, value: Tensor) -> Tensor:
        """See Strategy."""
        if self.world_size > 1:
            with self.communication.waiting():
                dist.all_reduce(value)
        return value

    def eval_weights(self) -> AbstractContextManager[None]:
        """See Strategy. At stage 3, where an optimizer is not shown its weights, refused (`check_optimizer`)."""
        masters = [self._view(name) for name in self._idle if self._parts[name] is not None]
        kept = [master.clone() for master in masters]

        def write_back() -> None:
            for master, values in zip(masters, kept, strict=True):  # weight decay has moved their average
                master.copy_(values)
            self._write_back()

        return eval_weights([self._torch_optimizer], self._flats, write_back)

    def full_masters(self) -> dict[str, Tensor]:
        """See Strategy. Gathered parameter by parameter; on the CPU, and on rank 0 only."""
        from deepspeed.utils import safe_get_full_fp32_param

        masters = {}
        for name, param in self._trained.items():
            full = safe_get_full_fp32_param(param)
            if self.rank == 0:
                masters[name] = full.detach().cpu()
        return masters

    def full_averages(self) -> dict[str, Tensor]:
        """See Strategy. Refused with this strategy (config.validation)."""
        return {}

    def averaged(self) -> AbstractContextManager[None]:
        """See Strategy."""
        return nullcontext()

    def state_slices(self) -> dict[str, StateSlice]:
        """See Strategy."""
        slices = {}
        per_element, numbers = self._state_keys()
        for name, part in self._parts.items():
            if part is None:
                continue
            shape = self._shapes[name]
            slices[f"master/{name}"] = StateSlice(self._view(name), part.start, shape)
            if name in self._idle:
                continue  # as under DDP, where it has no state
            for key in per_element:
                slices[f"{key}/{name}"] = StateSlice(self._view(name, key), part.start, shape)
            if part.start == 0:
                for key in numbers:
                    slices |= _whole(self._number(part, key, name))
        return slices | _whole(group_entries(self._torch_optimizer, self._owner))

    @property
    def _owner(self) -> str:
        """Each worker's optimizer sees its part of the weights, so that what it finds out is its own."""
        return f"rank-{self.rank}-of-{self.world_size}"

    def _number(self, part: _Part, key: str, name: str) -> dict[str, Tensor]:
        """A number of a partition's state as an entry of the resume state, in the kind that the optimizer keeps it in."""
        value = self._torch_optimizer.state[part.flat][key]
        if isinstance(value, Tensor) and value.numel() != 1:
            chosen = type(self._torch_optimizer).__name__
            raise ModelError(
                f"training.optimizer: {chosen} keeps {key!r} as {tuple(value.shape)} for {part.flat.numel()} weights; "
                "checkpoints under DeepSpeed hold one value a weight, or one in all; use ddp"
            )
        if isinstance(value, Tensor) or self._counts_as_torch:
            value = torch.as_tensor(value, dtype=torch.float32)
        return as_entry(key, name, value)

    @property
    def _counts_as_torch(self) -> bool:
        """The optimizer stands for torch's Adam, whose count of steps is a tensor, and keeps a Python number itself."""
        return isinstance(self._torch_optimizer, self._deepspeed.ops.adam.DeepSpeedCPUAdam)

    @torch.no_grad()
    def load_state(self, state: StateReader) -> None:
        """See Strategy. A partition has one step count: the largest that a parameter has."""
        shapes = state.names()
        if self.stage == 3:
            self._zero.parameter_offload.partition_all_parameters()
        keys = self._seed_optimizer_state(state)
        for name, part in self._parts.items():
            for key in ("master", *keys):
                if part is not None and f"{key}/{name}" in shapes:
                    values = state.read(f"{key}/{name}", part.start, part.start + part.count)
                    self._view(name, None if key == "master" else key).copy_(values)
        GroupNumbers(state).restore(self._torch_optimizer, self._owner)
        self._write_back()

    def _seed_optimizer_state(self, state: StateReader) -> list[str]:
        """Give every partition optimizer state of zeros and the checkpoint's numbers; returns the keys to be filled in."""
        numbers: dict[str, float] = {}
        kinds: dict[str, str] = {}
        per_element: dict[str, None] = {}
        for full_name, shape in state.names().items():
            key, _, name = full_name.partition("/")
            if key == "master" or full_name.startswith(OF_GROUP) or name not in self._shapes:
                continue
            if shape == () != self._shapes[name]:
                key, _, kinds[key] = key.partition("#")
                number = state.read(full_name).item()
                numbers[key] = max(number, numbers.get(key, number))
            else:
                per_element[key] = None
        group = self._torch_optimizer.param_groups[0]
        on_device = group.get("fused") or group.get("capturable")
        for flat in self._flats:
            self._torch_optimizer.state.pop(flat, None)
            if not per_element and not numbers:
                continue
            own: dict[str, Any] = {key: torch.zeros_like(flat, requires_grad=False) for key in per_element}
            for key, number in numbers.items():
                if self._counts_as_torch:
                    own[key] = int(number)
                elif kinds[key]:
                    own[key] = NUMBERS[kinds[key]](number)
                else:
                    own[key] = torch.tensor(number, dtype=torch.float32, device=flat.device if on_device else "cpu")
            self._torch_optimizer.state[flat] = own
        return list(per_element)

    def _state_keys(self) -> tuple[list[str], list[str]]:
        """Keys of the optimizer's state: those with a value an element, and those with one number."""
        flat = self._flats[0]
        state = self._torch_optimizer.state.get(flat, {})
        per_element = [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape]
        return per_element, [key for key in state if key not in per_element and state[key] is not None]

    def _write_back(self) -> None:
        """Round the masters into the parameters, on all ranks."""
        zero = self._zero
        if self.stage != 3:
            zero.update_lp_params()
            return
        for group in range(len(zero.fp16_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    # What follows knows how DeepSpeed lays its partitions out. Its public accessors (deepspeed.utils.safe_get_local_*) are for
    # stage 3 only and copy offloaded state to the device, which is what offloading is to avoid.

    @property
    def _zero(self) -> Any:
        return self.engine.optimizer

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    @property
    def _flats(self) -> list[Tensor]:
        """This rank's float32 partitions."""
        layouts = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return next(getattr(self._zero, name) for name in layouts if hasattr(self._zero, name))

    def _find_part(self, param: Any) -> _Part | None:
        if self.stage == 3:
            group, offset, size = self._zero.grad_position[self._zero.get_param_id(param)]
            start = size * self.rank  # equal parts, the last ones padded or empty
            count = min(size, param.ds_numel - start)
            return _Part(self._flats[group], offset, start, count) if count > 0 else None
        mapping = param._hp_mapping
        if mapping is None:
            return None
        whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        return _Part(self._flats[mapping.param_group_index], flat.start, whole.start, flat.numel)

    def _view(self, name: str, key: str | None = None) -> Tensor:
        """This rank's part of a master, or of the optimizer state of a key, in place."""
        part = self._parts[name]
        assert part is not None, name
        values = part.flat if key is None else self._torch_optimizer.state[part.flat][key]
        return values.detach().narrow(0, part.offset, part.count)


class _Untouched:
    """In the place of the function that DeepSpeed puts around a module's positional inputs."""

    @staticmethod
    def apply(tensor: Tensor) -> Tensor:
        return tensor


def _make_leaf(block: nn.Module) -> None:
    """Mark a block that DeepSpeed's hooks are to gather as a whole, before they are set up."""
    cast(Any, block)._z3_leaf = True
    cast(Any, block).post_bwd_fn = _Untouched


def _whole(numbers: dict[str, Tensor]) -> dict[str, StateSlice]:
    return {name: StateSlice(number.reshape(1), 0, ()) for name, number in numbers.items()}


def _is_whole(param: Any) -> bool:
    """Whether a parameter of stage 3 is put together on this rank just now."""
    return bool(param.ds_status.name == "AVAILABLE")


def _fill(param: nn.Parameter, gradient: Tensor | None) -> None:
    """Zeros where the backward has no gradient for a parameter; run before it is accumulated."""
    if gradient is None and param.grad is None:
        param.grad = torch.zeros_like(param)


def load_deepspeed(device: torch.device) -> ModuleType:
    """The library, quiet and bound to the device that this process trains on, with a process group around."""
    # It looks for an accelerator by itself otherwise, and for its number in the environment of its own launcher.
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Otherwise it compiles collectives over shared memory, for minutes, before it trains on a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _engine_config(job: Job, graph: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> dict[str, Any]:
    """The job's configuration with sizes that follow from the model and the device, where a file does not say them.

    `blocks`: those that are gathered as a whole, still with all of their parameters.
    """
    config = read_zero_config(job)
    zero = config["zero_optimization"]
    # Buffers of the default size take 2 GiB in float32, also where a LoRA has a hundredth of that.
    trained = sum(param.numel() for param in trained_parameters(graph).values())
    bucket = min(_BUCKET_ELEMENTS, trained + trained % 2)
    zero.setdefault("reduce_bucket_size", bucket)
    zero.setdefault("allgather_bucket_size", bucket)
    if zero["stage"] == 2 and zero["offload_optimizer"]["device"] == "none" and dist.get_world_size() > 1:
        # Gradients of a full bucket travel while the next one fills; with a single bucket there is nothing to travel beside.
        zero.setdefault("overlap_comm", trained > zero["reduce_bucket_size"])
    if recomputes_at_first(job, device):
        # Its own product for Linear keeps no weight from forward to backward, which recomputed blocks do not do either.
        zero.setdefault("memory_efficient_linear", False)
    if blocks:
        largest = max(sum(param.numel() for param in block.parameters()) for block in blocks)
        # The next block arrives while this one computes.
        zero.setdefault("stage3_prefetch_bucket_size", largest)
        zero.setdefault("stage3_max_live_parameters", max(_LIVE_ELEMENTS, 3 * largest))
    if device.type == "cuda":
        for section in ("offload_optimizer", "offload_param"):
            if zero[section]["device"] != "none":
                zero[section].setdefault("pin_memory", True)
    return config


def _offloaded_optimizer(
    job: Job, params: list[nn.Parameter], device: torch.device, *, say: Callable[[str], object]
) -> torch.optim.Optimizer | None:
    """DeepSpeed's Adam for the host, several times faster there than torch's; None where it is not to be had or not needed."""
    training = job.training
    arguments = {key: value for key, value in training.optimizer_args.items() if key not in _ONLY_SPEED}
    if job.distributed.offload_optimizer_device == "none":
        return None
    if training.optimizer not in _ADAM or set(arguments) - _ADAM_ARGUMENTS:
        say(f"the optimizer runs on the host as {training.optimizer}; DeepSpeed's faster kernel is for Adam and AdamW")
        return None
    if device.type == "cpu":
        say(f"training on the CPU: the optimizer stays {training.optimizer}")
        return None
    return cpu_adam(training, params, say=say)


def cpu_adam(
    training: TrainingSection, params: list[nn.Parameter], *, say: Callable[[str], object]
) -> torch.optim.Optimizer | None:
    """DeepSpeedCPUAdam with the job's arguments; None, and a note, where it cannot be compiled."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    arguments = {key: value for key, value in training.optimizer_args.items() if key in _ADAM_ARGUMENTS}
    started = time.monotonic()
    say("loading DeepSpeed's CPU optimizer; its first use on a machine compiles it, which takes about a minute")
    try:
        built = build_optimizer(
            params,
            training.model_copy(update={"optimizer_args": arguments}),
            partial(DeepSpeedCPUAdam, adamw_mode=_ADAM[training.optimizer]),
        )
    except RuntimeError as error:
        say(f"DeepSpeed's CPU optimizer cannot be compiled here ({error.__cause__ or error}); {training.optimizer} is used")
        return None
    say(f"DeepSpeed's CPU optimizer is ready after {time.monotonic() - started:.0f} s")
    return built
