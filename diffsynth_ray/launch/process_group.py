"""torch's process group of the training workers, as a backend of Ray Train that only the workers import torch for.

Ray's TorchConfig does the same, but whatever process holds one imports torch: the stage, Ray Train's controller, and (by the
version's type) the actor behind the dashboard's Train page, 2.5 s of a CPU each, before the first worker is asked for.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

_SHUTDOWN_S = 30.0
"""How long the end of a group of workers waits for each to leave; one that hangs is ended without."""


@dataclass
class ProcessGroup(BackendConfig):
    """A process group over all workers of a run."""

    backend: str
    """torch's name of it: nccl, gloo."""
    timeout_s: int
    """Seconds after which a collective operation has failed."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What the controller calls when workers start and end."""
        return _ProcessGroupBackend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """What the train function runs in."""
        return _on_own_gpu

    def to_dict(self) -> dict[str, Any]:
        """What the dashboard's Train page shows."""
        # Not `framework`: Ray Train would send torch.__version__ around, and whoever reads that imports torch.
        return {**asdict(self), "torch": version("torch")}


class _ProcessGroupBackend(Backend):
    """Lives in Ray Train's controller."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        """Connect the workers; raises what a worker raised."""
        address, port = worker_group.execute_single(0, _free_address)
        world_size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, address=address, port=port, world_rank=rank, world_size=world_size, config=backend_config
                )
                for rank in range(world_size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        """Let the workers leave each other, so that none fails because another is gone."""
        left = worker_group.execute_async(_leave)
        ray.wait(left, num_returns=len(left), timeout=_SHUTDOWN_S)


def _free_address() -> tuple[str, int]:
    """Address of this worker's node, and a port that is free there."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind(("", 0))
        return address, probe.getsockname()[1]


def _join(*, address: str, port: int, world_rank: int, world_size: int, config: ProcessGroup) -> None:
    """On a worker: wait for the others. Sets the variables that torchrun sets, which libraries read."""
    import torch.distributed as dist
    from ray.train.torch import get_device

    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(world_rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
        "ACCELERATE_TORCH_DEVICE": str(get_device()),
    }
    # A collective operation of NCCL that times out ends its process, rather than leave the GPU waiting.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(
        config.backend,
        init_method="env://",
        rank=world_rank,
        world_size=world_size,
        timeout=timedelta(seconds=config.timeout_s),
    )


def _leave() -> None:
    """On a worker: free what the group holds."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _on_own_gpu() -> Iterator[None]:
    """The train function has a thread of its own, and each thread of CUDA a current device."""
    import torch
    from ray.train.torch import get_device

    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    yield
