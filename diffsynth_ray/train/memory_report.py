"""What an out-of-memory error tells: what was being computed, what the memory held, and which keys would free how much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import RunError
from diffsynth_ray.train.trainer import Trainer

_GIB = 2**30
_RECOMPUTED_SHARE = 0.75
"""Share of the activations that recomputation frees: the blocks' inputs stay, about a quarter of what a block keeps."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on the device at the peak, by category."""

    total: int
    """Of the device."""
    peak: int
    frozen: int
    """Weights that are not trained."""
    trained: int
    masters: int
    optimizer: int
    gradients: int

    @property
    def activations(self) -> int:
        """Whatever else the peak held: activations and buffers of the computation."""
        known = self.frozen + self.trained + self.masters + self.optimizer + self.gradients
        return max(self.peak - known, 0)


def measure(trainer: Trainer, device: torch.device) -> MemoryUse:
    """The device's memory as the failed step left it."""
    optimizer = trainer.optimizer
    frozen = (param for param in trainer.graph.parameters() if not param.requires_grad)
    use = MemoryUse(
        total=torch.cuda.get_device_properties(device).total_memory,
        peak=torch.cuda.max_memory_allocated(device),
        frozen=_num_bytes(frozen, device),
        trained=_num_bytes(trainer.trained.values(), device),
        masters=0,
        optimizer=0,
        gradients=0,
    )
    if trainer.job.offload.optimize_on_cpu:
        return use  # gradients leave block by block, the rest never was here
    if optimizer is None:
        return _with_shares(use, trainer)
    states = (value for state in optimizer.optimizer.state.values() for value in state.values())
    return replace(
        use,
        masters=_num_bytes(optimizer.masters, device) if optimizer.keeps_masters else 0,
        optimizer=_num_bytes((value for value in states if isinstance(value, Tensor)), device),
        # Every trained parameter gets one by the end of the backward, whether this one came so far or not.
        gradients=_num_bytes(optimizer.masters, device),
    )


def _with_shares(use: MemoryUse, trainer: Trainer) -> MemoryUse:
    """What a worker has of DeepSpeed's float32 masters, Adam's two moments and gradients, reckoned from the stage."""
    distributed = trainer.job.distributed
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    whole = 4 * sum(getattr(param, "ds_numel", param.numel()) for param in trainer.trained.values())
    share = 0 if distributed.offload_optimizer_device == "cpu" else whole // world_size
    return replace(use, masters=share, optimizer=2 * share, gradients=share if distributed.zero_stage > 1 else whole)


def _num_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    found = (getattr(tensor, "ds_tensor", tensor) for tensor in tensors)  # a partitioned parameter is empty, its part is not
    # An offloaded weight that is away is one element repeated, a loaded one a part of its unit's memory.
    return sum(
        min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        for tensor in found
        if tensor.device.type == device.type
    )


def out_of_memory(job: Job, use: MemoryUse, *, rank: int, world_size: int, computed: str, cause: str) -> RunError:
    """The error of a full device. It is not retried: the same step would need the same memory again."""
    categories = {
        "frozen weights": use.frozen,
        "trained weights": use.trained,
        "float32 masters": use.masters,
        "optimizer state": use.optimizer,
        "gradients": use.gradients,
        "activations and the like": use.activations,
    }
    shown = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in categories.items() if size >= 0.005 * _GIB)
    lines = [f"  {saved / _GIB:.2f} GiB: {key}" for saved, key in savings(job, use, world_size) if saved > 0]
    return RunError(
        f"rank {rank}: the device's memory ({use.total / _GIB:.1f} GiB) was not enough for {computed}; at the peak "
        f"{use.peak / _GIB:.2f} GiB were taken: {shown or 'too little to tell'} GiB. {cause}",
        hint="what frees memory, estimated, a worker:\n" + "\n".join(lines) if lines else "use a device with more memory",
    )


def savings(job: Job, use: MemoryUse, world_size: int) -> list[tuple[int, str]]:
    """(bytes, key and what it costs) of the settings that would free memory, the largest first."""
    state = use.masters + use.optimizer
    found: list[tuple[float, str, str]] = []
    if job.gradient.checkpointing is not True:
        found.append((use.activations * _RECOMPUTED_SHARE, "gradient.checkpointing", "= true (a third more time)"))
    if job.dataset.batch_size > 1:
        half = -(-job.dataset.batch_size // 2)
        saved = use.activations * (1 - half / job.dataset.batch_size)
        found.append((saved, "dataset.batch_size", f"= {half}, with global_batch_size as it is (a new run)"))
    if job.dataset.height is None:
        change = f"= {job.dataset.max_pixels // 2} (smaller pictures, a new run)"
        found.append((use.activations / 2, "dataset.max_pixels", change))
    # Layer offload and DeepSpeed exclude each other, and so do moving averages and DeepSpeed.
    has_averages = job.training.ema_decay is not None
    if job.distributed.strategy == "ddp" and world_size > 1 and not job.offload.cpu_offload and not has_averages:
        saved = (state + use.gradients) * (1 - 1 / world_size)
        found.append((saved, "distributed.strategy", '= "deepspeed" (shares masters, optimizer and gradients)'))
    if job.distributed.strategy == "deepspeed" and job.distributed.offload_optimizer_device == "none":
        found.append((state, "distributed.offload_optimizer_device", '= "cpu" (slower steps)'))
    if job.distributed.strategy == "ddp" and not job.offload.cpu_offload:
        found.append((use.frozen * 0.9, "offload.cpu_offload", "= true (slower steps)"))
    if not job.model.fp8_models:
        found.append((use.frozen / 2, "model.fp8_models", "= the frozen components"))
    if job.training.trainable_models:
        change = "instead of training.trainable_models: a LoRA (a new run)"
        found.append((state + use.gradients, "lora.base_model", change))
    return sorted(((int(saved), f"{key} {change}") for saved, key, change in found), reverse=True)
