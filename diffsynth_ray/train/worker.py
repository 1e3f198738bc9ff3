"""The Ray Train loop: one process a worker. Loads, restores, streams, steps, logs, checkpoints and exports."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from ray.util.metrics import Gauge

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.data.cached import CachedBatch, CachedRows, read_batches
from diffsynth_ray.data.samples import SampleIndex
from diffsynth_ray.data.stream import StreamedBatch, build_stream
from diffsynth_ray.errors import DsrayError, RunError
from diffsynth_ray.run_dir import Progress, RunDir
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.cached_input import CachedInput
from diffsynth_ray.train.checkpoint import find_restorable, read_checkpoint, save_checkpoint
from diffsynth_ray.train.export import export_weights
from diffsynth_ray.train.figures import FigureWriter
from diffsynth_ray.train.trainer import (
    MicroInput,
    SampleBatch,
    StepResult,
    Trainer,
    load_family,
    load_initial_weights,
    select_trained,
)

AnyStreamed = StreamedBatch | CachedBatch
"""A micro batch as it comes from Ray Data, or from the cache of split training."""

_STOP, _CHECKPOINT = 1, 2
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
    try:
        resolved = ResolvedJob.model_validate_json(resolved_json)
        cached_rows = ray.get(cached)
        worker = _Worker(resolved, token=token, index=index, cached=cached_rows, components=components, board=board)
        return worker.run()
    except DsrayError as error:
        # A user's mistake does not go away by a restart: the driver ends the run when it sees this.
        ray.get(board.fail.remote(rank, error))
        raise
    except torch.OutOfMemoryError as error:
        ray.get(board.fail.remote(rank, _out_of_memory(rank, error)))
        raise


def _out_of_memory(rank: int, error: torch.OutOfMemoryError) -> RunError:
    peak = torch.cuda.max_memory_allocated() / 2**30
    return RunError(
        f"rank {rank}: the GPU's memory is full (peak {peak:.1f} GiB): {str(error).splitlines()[0]}",
        hint="lower dataset.batch_size (with global_batch_size kept) or dataset.max_pixels, "
        "set gradient.checkpointing = true, or train a LoRA instead of all weights",
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
    ) -> None:
        context = ray.train.get_context()
        self.resolved, self.job, self.token, self.index_ref = resolved, resolved.job, token, index
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.local_world_size = context.get_local_world_size()
        self.run_dir = RunDir(resolved.output_path)
        self.index: SampleIndex = ray.get(index)
        self.device = ray.train.torch.get_device()
        self.cached = CachedInput(self.index, cached, device=self.device) if cached is not None else None
        self.components = components
        self.schedule = build_schedule(
            self.job, num_samples=self.index.order.num_samples, global_batch_size=self.resolved.global_batch_size
        )
        self.say: Callable[[str], object] = board.say.remote if self.rank == 0 else _silent

    def run(self) -> dict[str, Any]:
        """Train from the newest checkpoint to the end, or to a stop."""
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.local_world_size))
        # Flags from rank 0 travel on the CPU, so that they never wait for the GPU.
        self.control = dist.new_group(backend="gloo") if self.world_size > 1 else None
        start_step = self._choose_start()
        # Ray Data's processes start while the model is loaded.
        stream = Prefetched(self._build_stream(start_step))
        self.trainer = self._build_trainer()
        self._restore(start_step)
        result = self._train(stream)
        return {"state": result, "step": self.trainer.step, "num_steps": self.schedule.num_steps}

    def _build_trainer(self) -> Trainer:
        started = time.monotonic()
        self.say("loading the model")
        family = load_family(self.job, device=self.device, components=self.components)
        select_trained(family, self.job)
        load_initial_weights(family, self.job)
        trainer = Trainer(self.job, family, self.schedule)
        count = sum(param.numel() for param in trainer.trained.values())
        self.say(f"model loaded in {time.monotonic() - started:.1f} s, {count:,} trained parameters")
        trainer.start(self._probe_input())
        return trainer

    def _probe_input(self) -> MicroInput:
        """Noise in the shape of the costliest micro batch: no media file is read for it."""
        micro = self.index.largest_micro_batch()
        if self.cached is not None:
            return self.cached.probe(micro)
        shape = (len(micro.rows), micro.num_frames, micro.height, micro.width, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        prompts = tuple(self.index.prompt(row) for row in micro.rows)
        return MicroInput(SampleBatch(pixels, prompts, micro.rows), micro.indices)

    def _choose_start(self) -> int:
        """The step to go on from, chosen by rank 0 for all: that of the newest whole checkpoint, or 0."""
        step = 0
        if self.rank == 0:
            found = find_restorable(self.run_dir, self.say)
            step = found.step if found else 0
        return int(ray.train.collective.broadcast_from_rank_zero(step))

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
        return _steps(
            build_stream(
                self.index_ref,
                start_step=start_step,
                num_steps=self.schedule.num_steps,
                rank=self.rank,
                world_size=self.world_size,
                decode_cpus=self.resolved.decode_cpus,
                decode_tasks=self.resolved.decode_tasks,
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

    def _restore(self, step: int) -> None:
        if step == 0:
            return
        tensors = read_checkpoint(self.run_dir, step, expected_masters=set(self.trainer.trained))
        assert self.trainer.strategy is not None  # built by start()
        self.trainer.strategy.load_state_tensors(tensors)
        self.trainer.step = step
        self.say(f"continuing after step {step} of {self.schedule.num_steps}")

    def _train(self, steps: Iterator[list[AnyStreamed]]) -> str:
        if self.trainer.step >= self.schedule.num_steps:
            return "SUCCEEDED"
        figures = FigureWriter(self.run_dir, self.job.logging, start_step=self.trainer.step) if self.rank == 0 else None
        reporter = _Reporter(self, figures)
        self.say("waiting for the first samples")
        last_checkpoint = time.monotonic()
        try:
            while self.trainer.step < self.schedule.num_steps:
                started = time.monotonic()
                streamed = next(steps)
                data_wait_s = time.monotonic() - started
                result = self.trainer.train_step(
                    [self._micro_input(batch) for batch in streamed], num_samples=streamed[0].num_samples
                )
                reporter.after_step(result, streamed, started=started, data_wait_s=data_wait_s)
                self._export()
                flags = self._flags(last_checkpoint)
                if flags & _CHECKPOINT:
                    self._checkpoint()
                    last_checkpoint = time.monotonic()
                if flags & _STOP:
                    return "STOPPED"
        finally:
            if figures is not None:
                figures.close()
        return "SUCCEEDED"

    def _flags(self, last_checkpoint: float) -> int:
        """What rank 0 wants after this step, the same on all ranks."""
        flags = 0
        if self.rank == 0:
            step, output = self.trainer.step, self.job.output
            stop_reason = self.run_dir.stop_reason()
            minutes = (time.monotonic() - last_checkpoint) / 60
            if stop_reason is not None:
                self.say(f"stopping after step {step}: {stop_reason}")
                flags |= _STOP | _CHECKPOINT
            due = output.checkpoint_minutes is not None and minutes >= output.checkpoint_minutes
            due |= output.checkpoint_steps is not None and step % output.checkpoint_steps == 0
            if due or step == self.schedule.num_steps:
                flags |= _CHECKPOINT
        if self.control is not None:
            message = torch.tensor([flags])
            dist.broadcast(message, src=0, group=self.control)
            flags = int(message)
        return flags

    def _checkpoint(self) -> None:
        assert self.trainer.strategy is not None  # built by start()
        if self.rank != 0:
            return  # under DDP rank 0 has everything
        started = time.monotonic()
        path = save_checkpoint(
            self.run_dir,
            step=self.trainer.step,
            tensors=self.trainer.strategy.state_tensors(),
            token=self.token,
            keep=self.job.output.keep_checkpoints,
        )
        if path is None:
            raise RunError("a newer attempt of this run has taken over; this one commits nothing and ends")
        self.say(f"checkpoint after step {self.trainer.step} in {time.monotonic() - started:.1f} s")

    def _export(self) -> None:
        stem = self.schedule.export_stem(self.trainer.step)
        if stem is None or self.rank != 0:
            return
        if not self.run_dir.holds_token(self.token):
            raise RunError("a newer attempt of this run has taken over; this one writes nothing and ends")
        paths = export_weights(
            self.trainer.family, self.job, masters=self.trainer.masters(), output_dir=self.run_dir.path, stem=stem
        )
        self.say(f"wrote {', '.join(str(path.relative_to(self.run_dir.path)) for path in paths)}")


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

    def after_step(
        self, result: StepResult, streamed: list[AnyStreamed], *, started: float, data_wait_s: float
    ) -> None:
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
        self.figures.write(step, figures)
        progress = Progress(
            step=step,
            num_steps=worker.schedule.num_steps,
            left_s=round((worker.schedule.num_steps - step) * step_s),
            **figures,
        )
        worker.say(progress.line())
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


def _silent(line: str) -> None:
    """What other ranks than 0 say."""
