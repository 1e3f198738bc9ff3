"""The Ray Train loop: one process a worker. Loads, restores, streams, steps, logs, checkpoints and exports."""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.util.metrics import Gauge

from diffsynth_ray.config.resolve import ResolvedJob, data_share
from diffsynth_ray.data.cached import CachedBatch, CachedRows, read_batches
from diffsynth_ray.data.samples import SampleIndex
from diffsynth_ray.data.stream import StreamedBatch, build_stream
from diffsynth_ray.errors import DsrayError, RunError, is_lost_connection
from diffsynth_ray.models.family import EncodedBatch
from diffsynth_ray.run_dir import Progress, RunDir
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.cached_input import CachedInput
from diffsynth_ray.train.checkpoint import Checkpoint, damage_of, find_checkpoints, find_restorable, read_checkpoint
from diffsynth_ray.train.export import export_weights
from diffsynth_ray.train.figures import FigureWriter
from diffsynth_ray.train.group import Group
from diffsynth_ray.train.heartbeat import Heartbeat
from diffsynth_ray.train.initial import load_initial_weights, merge_presets
from diffsynth_ray.train.memory_report import measure, out_of_memory
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.saver import CheckpointSaver, WriterIdentity
from diffsynth_ray.train.split import job_of_stage
from diffsynth_ray.train.storage import Storage
from diffsynth_ray.train.trainer import (
    HalfEncodedBatch,
    MicroInput,
    SampleBatch,
    StepResult,
    Trainer,
    load_family,
    select_trained,
)

AnyStreamed = StreamedBatch | CachedBatch
"""A micro batch as it comes from Ray Data, or from the cache of split training."""

_STOP, _CHECKPOINT, _LOOK_FOR_PREEMPTION = 1, 2, 4
_LOOK_EVERY_S = 2.0
"""Asking Ray Train whether a node will be taken away is a meeting of all workers."""
_FOLLOWER_WAIT_S = 20.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SPEED_WINDOW = 20
"""Steps that the shown speed is averaged over."""


def train_loop(
    *,
    resolved_json: str,
    token: str,
    index: ray.ObjectRef,
    cached: ray.ObjectRef,
    components: tuple[str, ...] | None,
    board: Any,
) -> dict[str, Any]:
    """Ray Train's train function on every worker.

    `token` is the attempt's right to commit, `index` holds a SampleIndex, `board` is the handle of the run's Board. Under split
    training `cached` holds the CachedRows (else None), and `components` are what stage two loads (else None: all).
    Returns {"state", "step", "num_steps"} of the run.
    """
    rank = ray.train.get_context().get_world_rank()
    resolved = ResolvedJob.model_validate_json(resolved_json)
    board.enter.remote(rank, _log_path())
    heartbeat = Heartbeat(partial(board.beat.remote, rank), every_s=min(5.0, resolved.job.distributed.timeout_s / 4))
    worker = _Worker(
        resolved, token=token, index=index, cached=ray.get(cached), components=components, board=board, heartbeat=heartbeat
    )
    try:
        return worker.run()
    except DsrayError as error:
        # A user's mistake does not go away by a restart: the driver ends the run when it sees this.
        ray.get(board.fail.remote(rank, error))
        raise
    except torch.OutOfMemoryError as error:
        ray.get(board.fail.remote(rank, worker.out_of_memory(error)))
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise
        ray.get(board.fail.remote(rank, _disk_full(resolved, error)))
        raise
    except RuntimeError as error:
        if is_lost_connection(error):
            # The worker at the other end is the cause; Ray Train hears of its death a little later than we do.
            heartbeat.enter("waiting to be ended: another worker is gone", 0)
            time.sleep(_FOLLOWER_WAIT_S)
        raise
    finally:
        heartbeat.end()


def _log_path() -> str:
    """The file that this worker's output goes to."""
    try:
        return os.readlink("/proc/self/fd/2")
    except OSError:
        return ""


def _disk_full(resolved: ResolvedJob, error: OSError) -> RunError:
    return RunError(
        f"{error.filename or resolved.output_path}: {error.strerror}",
        hint="make room and submit the job again: it continues from its last checkpoint, which is whole",
    )


class _Worker:
    """One worker's side of a run, in the order in which things happen."""

    def __init__(
        self,
        resolved: ResolvedJob,
        *,
        token: str,
        index: ray.ObjectRef,
        cached: CachedRows | None,
        components: tuple[str, ...] | None,
        board: Any,
        heartbeat: Heartbeat,
    ) -> None:
        context = ray.train.get_context()
        self.resolved, self.job, self.token, self.index_ref = resolved, resolved.job, token, index
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.local_world_size = context.get_local_world_size()
        self.run_dir = RunDir(resolved.output_path)
        self.storage = Storage.at(self.run_dir.checkpoint_location(resolved))
        self.index: SampleIndex = ray.get(index)
        self.device = ray.train.torch.get_device()
        self.cached = CachedInput(self.index, cached, device=self.device) if cached is not None else None
        self.components = components
        self.schedule = build_schedule(
            self.job, num_samples=self.index.order.num_samples, global_batch_size=self.resolved.global_batch_size
        )
        self.heartbeat = heartbeat
        self.computed = "the weights"
        """What an out-of-memory error names."""
        self.say: Callable[[str], object] = board.say.remote if self.rank == 0 else _silent

    def run(self) -> dict[str, Any]:
        """Train from the newest checkpoint to the end, or to a stop."""
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.local_world_size))
        # Flags from rank 0 travel on the CPU, so that they never wait for the GPU; checkpoints are written by a thread.
        self.control = Group(self.world_size)
        self.writers = Group(self.world_size)
        self.writer = self._claim_writer()
        checkpoint = self._choose_start()
        # Ray Data's processes start while the model is loaded.
        stream = Prefetched(self._build_stream(checkpoint.step if checkpoint else 0))
        self._build_trainer()
        self._restore(checkpoint)
        result = self._train(stream)
        return {"state": result, "step": self.trainer.step, "num_steps": self.schedule.num_steps}

    def _build_trainer(self) -> None:
        started = time.monotonic()
        self.say("loading the model")
        self.heartbeat.enter("loading the model", 0)
        job = self.job if self.components is None else job_of_stage(self.job, self.components)
        family = load_family(job, device=self.device, components=self.components)
        merge_presets(family, job, self.say)
        select_trained(family, self.job)
        residency = settle(family, job, say=self.say)
        load_initial_weights(family, self.job, self.say)
        self.trainer = Trainer(self.job, family, self.schedule, residency=residency)
        count = sum(param.numel() for param in self.trainer.trained.values())
        self.say(f"model loaded in {time.monotonic() - started:.1f} s, {count:,} trained parameters")
        probe = self._probe_input()
        self.computed = f"the costliest micro batch, tried before the first step ({_describe(probe)})"
        self.trainer.start(probe)

    def out_of_memory(self, error: torch.OutOfMemoryError) -> RunError:
        """What the user is told of a full device."""
        cause = str(error).splitlines()[0]
        if not hasattr(self, "trainer"):
            return RunError(f"rank {self.rank}: the weights do not fit the device's memory. {cause}")
        return out_of_memory(
            self.job,
            measure(self.trainer, self.device),
            rank=self.rank,
            world_size=self.world_size,
            computed=self.computed,
            cause=cause,
        )

    def _probe_input(self) -> MicroInput:
        """Noise in the shape of the costliest micro batch: no media file is read for it."""
        micro = self.index.largest_micro_batch()
        if self.cached is not None:
            return self.cached.probe(micro)
        shape = (len(micro.rows), micro.num_frames, micro.height, micro.width, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        prompts = tuple(self.index.prompt(row) for row in micro.rows)
        return MicroInput(SampleBatch(pixels, prompts, micro.rows), micro.indices)

    def _claim_writer(self) -> str:
        """The name of this group of workers, given by rank 0; from here on no earlier group commits anything."""
        writer = self.control.from_rank_zero(self.run_dir.claim_writer(self.token) if self.rank == 0 else None)
        if writer is None:
            raise superseded()
        return str(writer)

    def _choose_start(self) -> Checkpoint | None:
        """The newest whole checkpoint, the same for all ranks, or None. Each rank checks its share of the files."""
        self.heartbeat.enter("checking the checkpoint", 0)
        found = self.control.from_rank_zero(find_checkpoints(self.storage) if self.rank == 0 else None)

        def damage(checkpoint: Checkpoint) -> str | None:
            shards = checkpoint.shards[self.rank :: self.world_size]
            return next((each for each in self.control.gather(damage_of(self.storage, shards)) if each), None)

        return find_restorable(found, damage, say=self.say)

    def _data_share(self) -> tuple[float, int]:
        """CPUs and number of the decoding tasks; for an elastic run from what the cluster has now."""
        if not self.resolved.is_elastic:
            return self.resolved.decode_cpus, self.resolved.decode_tasks
        found = data_share(
            ray.cluster_resources().get("CPU", 0.0),
            num_workers=self.world_size,
            worker_cpus=self.resolved.resources_per_worker.get("CPU", 0.0),
            most_tasks=self.job.dataset.num_workers,
        )
        # Ray Train counts on whole nodes for workers. Without a free CPU, decoding takes none rather than wait forever.
        return found or (0.0, 1)

    def _build_stream(self, start_step: int) -> Iterator[list[AnyStreamed]]:
        if self.cached is not None and self.cached.rows.has("image"):
            return _steps(
                read_batches(
                    self.index,
                    self.cached.rows,
                    start_step=start_step,
                    num_steps=self.schedule.num_steps,
                    rank=self.rank,
                    world_size=self.world_size,
                )
            )
        decode_cpus, decode_tasks = self._data_share()
        return _steps(
            build_stream(
                self.index_ref,
                start_step=start_step,
                num_steps=self.schedule.num_steps,
                rank=self.rank,
                world_size=self.world_size,
                decode_cpus=decode_cpus,
                decode_tasks=decode_tasks,
            )
        )

    def _micro_input(self, batch: AnyStreamed) -> MicroInput:
        if isinstance(batch, CachedBatch):
            assert self.cached is not None  # it comes from there
            return self.cached.from_cache(batch)
        micro = batch.micro_batch
        if self.cached is not None:
            return self.cached.from_pixels(micro, batch.pixels)
        return MicroInput(SampleBatch(batch.pixels, batch.prompts, micro.rows), micro.indices, micro.is_dummy)

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        self.heartbeat.enter("restoring the checkpoint", checkpoint.step)
        state = read_checkpoint(self.storage, checkpoint, expected_masters=set(self.trainer.trained))
        assert self.trainer.strategy is not None  # built by start()
        self.trainer.strategy.load_state(state)
        state.close()
        self.trainer.step = checkpoint.step
        self.say(f"continuing after step {checkpoint.step} of {self.schedule.num_steps}")

    def _train(self, steps: Iterator[list[AnyStreamed]]) -> str:
        if self.trainer.step >= self.schedule.num_steps:
            return "SUCCEEDED"
        figures = FigureWriter(self.run_dir, self.job.logging, start_step=self.trainer.step) if self.rank == 0 else None
        reporter = _Reporter(self, figures)
        self.saver = self._build_saver()
        self.last_checkpoint = self.last_look = time.monotonic()
        self.preempted_nodes: set[str] = set()
        self.say("waiting for the first samples")
        try:
            while (step := self.trainer.step) < self.schedule.num_steps:
                started = time.monotonic()
                self.heartbeat.enter("waiting for samples", step)
                streamed = next(steps)
                data_wait_s = time.monotonic() - started
                self.heartbeat.enter("training", step + 1)
                inputs = [self._micro_input(batch) for batch in streamed]
                self.computed = f"step {step + 1} ({'; '.join(map(_describe, inputs))})"
                result = self.trainer.train_step(inputs, num_samples=streamed[0].num_samples)
                reporter.after_step(result, streamed, started=started, data_wait_s=data_wait_s)
                self._export()
                flags = self._flags()
                if flags & _CHECKPOINT:
                    self._checkpoint()
                self.saver.check()
                if flags & _STOP:
                    break
            self.heartbeat.enter("writing a checkpoint", self.trainer.step)
            self.saver.finish()
        finally:
            if figures is not None:
                figures.close()
        return "SUCCEEDED" if self.trainer.step == self.schedule.num_steps else "STOPPED"

    def _flags(self) -> int:
        """What rank 0 wants after this step, the same on all ranks."""
        flags = self.control.number_from_rank_zero(self._wishes() if self.rank == 0 else 0)
        if flags & _LOOK_FOR_PREEMPTION and self._is_new_preemption():
            flags |= _CHECKPOINT
        return flags

    def _wishes(self) -> int:
        flags = 0
        step, output = self.trainer.step, self.job.output
        now = time.monotonic()
        stop_reason = self.run_dir.stop_reason()
        if stop_reason is not None and step < self.schedule.num_steps:
            self.say(f"stopping after step {step}: {stop_reason}")
            flags |= _STOP | _CHECKPOINT
        # By time or on request, a checkpoint can wait for the one that is still being written; by steps, training waits.
        due = output.checkpoint_minutes is not None and (now - self.last_checkpoint) / 60 >= output.checkpoint_minutes
        due = (due or self.run_dir.is_checkpoint_requested()) and not self.saver.in_flight
        due |= output.checkpoint_steps is not None and step % output.checkpoint_steps == 0
        if due or step == self.schedule.num_steps:
            flags |= _CHECKPOINT
        if now - self.last_look >= _LOOK_EVERY_S:
            self.last_look = now
            flags |= _LOOK_FOR_PREEMPTION
        return flags

    def _is_new_preemption(self) -> bool:
        """Whether a worker's node will be taken away that was not known of; the same on all ranks."""
        info = ray.train.get_preemption_info()
        nodes = set(info.preempted_node_ids) - self.preempted_nodes if info is not None else set()
        if nodes:
            self.preempted_nodes |= nodes
            self.say(f"the nodes of ranks {info.preempted_ranks} will go: checkpoint after step {self.trainer.step}")
        return bool(nodes)

    def _build_saver(self) -> CheckpointSaver:
        return CheckpointSaver(
            self.storage,
            WriterIdentity(rank=self.rank, world_size=self.world_size, token=self.token, writer=self.writer),
            keep=self.job.output.keep_checkpoints,
            may_commit=self.may_commit,
            gather=self.writers.gather,
            on_commit=self.run_dir.checkpoint_is_done,
            say=self.say,
        )

    def may_commit(self) -> bool:
        return self.run_dir.may_commit(self.token, self.writer)

    def _checkpoint(self) -> None:
        assert self.trainer.strategy is not None  # built by start()
        self.saver.start(self.trainer.step, self.trainer.strategy.state_slices())
        self.last_checkpoint = time.monotonic()

    def _export(self) -> None:
        stem = self.schedule.export_stem(self.trainer.step)
        if stem is None:
            return
        assert self.trainer.strategy is not None  # built by start()
        self.heartbeat.enter("exporting", self.trainer.step)
        masters = self.trainer.strategy.full_masters()
        if self.rank != 0:
            return
        if not self.may_commit():
            raise superseded()
        paths = export_weights(self.trainer.family, self.job, masters=masters, output_dir=self.run_dir.path, stem=stem)
        self.say(f"wrote {', '.join(str(path.relative_to(self.run_dir.path)) for path in paths)}")


def superseded() -> RunError:
    return RunError("a newer attempt of this run has taken over; this one writes nothing and ends")


class _Reporter:
    """Loss and speed to the log, loss.csv, TensorBoard, Ray's metrics and progress.json."""

    def __init__(self, worker: _Worker, figures: FigureWriter | None) -> None:
        self.worker = worker
        self.figures = figures
        self.times: deque[tuple[float, float, int]] = deque(maxlen=_SPEED_WINDOW)
        tags = {"run": worker.resolved.run, "stage": "train", "rank": str(worker.rank)}
        names = ("loss", "lr", "grad_norm", "step_s", "samples_per_s", "data_wait_s", "step", "gpu_memory_gib")
        self.gauges = {name: Gauge(f"dsray_{name}", tag_keys=tuple(tags)) for name in names}
        for gauge in self.gauges.values():
            gauge.set_default_tags(tags)

    def after_step(self, result: StepResult, streamed: list[AnyStreamed], *, started: float, data_wait_s: float) -> None:
        """Called after every step; reads the device only where the step is logged, exported or the last."""
        worker, step = self.worker, self.worker.trainer.step
        logged = step % worker.job.logging.every_steps == 0 or worker.schedule.export_stem(step) is not None
        if not logged:
            self.times.append((time.monotonic() - started, data_wait_s, streamed[0].num_samples))
            return
        assert worker.trainer.strategy is not None  # built by start()
        loss_sum = worker.trainer.strategy.sum_over_workers(result.loss_sum)
        loss, grad_norm = torch.stack([loss_sum, result.grad_norm.to(loss_sum)]).tolist()
        loss /= streamed[0].num_samples
        self.times.append((time.monotonic() - started, data_wait_s, streamed[0].num_samples))
        if not np.isfinite(loss):
            rows = [row + 1 for batch in streamed for row in batch.micro_batch.rows]
            raise RunError(
                f"the loss of step {step} is {loss}; rank {worker.rank} trained on the metadata rows {rows}",
                hint="lower training.learning_rate, or look at those rows; the last checkpoint and exports are from before",
            )
        self._publish(step, loss=loss, lr=result.lr, grad_norm=grad_norm, started=started)

    def _publish(self, step: int, *, loss: float, lr: float, grad_norm: float, started: float) -> None:
        worker = self.worker
        # The first step of an attempt waits for everything to start: it says nothing about speed once there are others.
        times = list(self.times)[1:] or list(self.times)
        step_s = sum(spent for spent, _, _ in times) / len(times)
        figures = {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "step_s": step_s,
            "samples_per_s": sum(count for _, _, count in times) / max(sum(spent for spent, _, _ in times), 1e-9),
            "data_wait_s": sum(wait for _, wait, _ in times) / len(times),
        }
        for name, value in figures.items():
            self.gauges[name].set(value)
        self.gauges["step"].set(step)
        if torch.cuda.is_available():
            self.gauges["gpu_memory_gib"].set(torch.cuda.max_memory_allocated() / 2**30)
        if self.figures is None:
            return
        if not worker.may_commit():
            raise superseded()
        self.figures.write(step, figures)
        progress = Progress(
            step=step,
            num_steps=worker.schedule.num_steps,
            left_s=round((worker.schedule.num_steps - step) * step_s),
            **figures,
        )
        worker.say(progress.line())
        with suppress(OSError):  # a full disk: the log has the line too
            worker.run_dir.write_progress(progress)


class Prefetched(Iterator[list[AnyStreamed]]):
    """A stream whose first step is fetched at once, in a thread; an error is raised where the step is asked for."""

    def __init__(self, steps: Iterator[list[AnyStreamed]]) -> None:
        self._steps = steps
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="first-step")
        # None marks an empty stream: StopIteration does not pass through a future.
        self._first: Future[list[AnyStreamed] | None] | None = self._pool.submit(next, steps, None)

    def __next__(self) -> list[AnyStreamed]:
        if self._first is None:
            return next(self._steps)
        first = self._first.result()
        self._first = None
        self._pool.shutdown()
        if first is None:
            raise StopIteration
        return first


def _steps(stream: Iterator[AnyStreamed]) -> Iterator[list[AnyStreamed]]:
    """The micro batches of one step after the other."""
    group: list[AnyStreamed] = []
    for batch in stream:
        group.append(batch)
        if batch.is_last:
            yield group
            group = []


def _describe(micro: MicroInput) -> str:
    """The samples of a micro batch, for an error."""
    batch = micro.batch
    if isinstance(batch, EncodedBatch):
        shape = "x".join(str(side) for side in batch.latents.shape[1:])
        rows = f"metadata rows {[int(row) + 1 for row in batch.sample_ids]}"
        return f"{len(batch.sample_ids)} x latents {shape} from the cache, {rows}"
    rows = f"metadata rows {[row + 1 for row in batch.rows]}"
    if isinstance(batch, HalfEncodedBatch):
        return f"{len(batch.rows)} samples, half of each from the cache, {rows}"
    height, width, num_frames = batch.size
    size = f"{height}x{width}" + (f", {num_frames} frames" if num_frames > 1 else "")
    return f"{len(batch.rows)} x {size}, {rows}"


def _silent(line: str) -> None:
    """What other ranks than 0 say."""
