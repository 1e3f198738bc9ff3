"""Checkpoints beside the training: the loop waits for a copy to host memory only; a thread writes, hashes and commits.

Every worker writes its own shard. The threads of all workers meet in a process group of their own (gather), so that rank 0
commits when all shards are there, wherever the training loops are by then. At most one checkpoint is under way, of all workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsynth_ray.errors import RunError, SupersededError
from diffsynth_ray.train.checkpoint import TrainedOn, commit_checkpoint, shard_name
from diffsynth_ray.train.shards import Shard, write_shard
from diffsynth_ray.train.storage import Storage
from diffsynth_ray.train.strategy.base import StateSlice


@dataclass(frozen=True)
class WriterIdentity:
    """Who writes, and by which right."""

    rank: int
    world_size: int
    token: str
    """Of the attempt."""
    writer: str
    """Of this group of workers."""
    trained_on: TrainedOn | None = None


class CheckpointSaver:
    """One worker's side. All methods are called on all ranks after the same step."""

    def __init__(
        self,
        storage: Storage,
        identity: WriterIdentity,
        *,
        keep: int,
        may_commit: Callable[[], bool],
        gather: Callable[[Any], list[Any]],
        say: Callable[[str], object],
    ) -> None:
        """`gather` gives the values of all ranks, in a group that nobody else uses; `say` is silent on ranks but 0."""
        self._storage, self._identity, self._keep = storage, identity, keep
        self._may_commit, self._gather, self._say = may_commit, gather, say
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._host: dict[str, Tensor] = {}
        self.stall_s = 0.0
        """Seconds that the training loop waited for the newest checkpoint."""
        self.took_s = 0.0
        """Seconds of the newest committed checkpoint, from copy to commit; on rank 0."""

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint is still being written. Ranks may differ."""
        return self._writing is not None and not self._writing.done()

    def start(self, step: int, slices: Mapping[str, StateSlice], *, on_commit: Callable[[], object] = lambda: None) -> None:
        """Copy the state of optimizer step `step` and write it in the background; first waits for the one before.

        `on_commit` is called on rank 0, in the thread, when this checkpoint is committed.
        """
        started = time.monotonic()
        self._await(must_succeed=False)
        copies = self._copy_to_host(slices)
        self.stall_s = time.monotonic() - started
        self._writing = self._pool.submit(self._write, step, copies, started, on_commit)

    def check(self) -> None:
        """Raise what ended the newest checkpoint for good, without waiting. A full disk does not: the next may find room."""
        if self._writing is not None and self._writing.done():
            self._await(must_succeed=False)

    def finish(self) -> None:
        """Wait for the checkpoint under way; raises RunError where it failed."""
        self._await(must_succeed=True)

    def _await(self, *, must_succeed: bool) -> None:
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except CheckpointNotWrittenError as error:
            if must_succeed:
                raise
            self._say(f"warning: {error.message}; training goes on, and the next checkpoint tries again")

    def _copy_to_host(self, slices: Mapping[str, StateSlice]) -> dict[str, StateSlice]:
        copies = {}
        for name, part in slices.items():
            kept = self._host.get(name)
            if kept is None or kept.shape != part.values.shape or kept.dtype != part.values.dtype:
                kept = torch.empty(part.values.shape, dtype=part.values.dtype, pin_memory=part.values.device.type == "cuda")
                self._host[name] = kept
            kept.copy_(part.values, non_blocking=True)
            copies[name] = StateSlice(kept, part.start, part.shape)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(self, step: int, slices: Mapping[str, StateSlice], started: float, on_commit: Callable[[], object]) -> None:
        me = self._identity
        result: Shard | str
        try:
            name = shard_name(step, rank=me.rank, world_size=me.world_size, writer=me.writer)
            result = write_shard(self._storage, name, slices)
        except OSError as error:
            result = f"rank {me.rank}: {error.strerror or error}"
        results = self._gather(result)
        failures = [each for each in results if isinstance(each, str)]
        if failures:
            if isinstance(result, Shard):
                self._storage.delete(result.name)
            where = self._storage.path(f"step-{step}")
            raise CheckpointNotWrittenError(f"checkpoint {where} could not be written: {'; '.join(failures)}")
        try:
            if me.rank == 0:
                self._commit(step, results, started)
                on_commit()
        finally:
            # Whatever is there of other steps is deleted then: nobody may be writing the next checkpoint yet.
            self._gather(None)

    def _commit(self, step: int, shards: list[Shard], started: float) -> None:
        try:
            committed = commit_checkpoint(
                self._storage,
                step=step,
                shards=shards,
                token=self._identity.token,
                may_commit=self._may_commit,
                keep=self._keep,
                trained_on=self._identity.trained_on,
            )
        except OSError as error:
            where = self._storage.path(f"step-{step}")
            raise CheckpointNotWrittenError(f"checkpoint {where} could not be committed: {error}") from error
        if not committed:
            raise SupersededError
        num_bytes = sum(shard.num_bytes for shard in shards)
        self.took_s = time.monotonic() - started
        self._say(
            f"checkpoint after step {step}: {num_bytes / 2**20:.1f} MiB in {self.took_s:.1f} s, "
            f"training waited {self.stall_s:.2f} s"
        )


class CheckpointNotWrittenError(RunError):
    """A checkpoint could not be written; the ones before are whole."""
