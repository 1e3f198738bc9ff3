"""The Ray Train loop: one process a worker. Loads, restores, streams, steps, logs, checkpoints and exports."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.util.metrics import Gauge

from diffsynth_ray.config.distillation import DIRECT_DISTILL, condition_columns
from diffsynth_ray.config.resolve import ResolvedJob, available_cpus, data_share
from diffsynth_ray.data.bad_samples import BadSample
from diffsynth_ray.data.cached import CachedBatch, CachedRows, read_batches
from diffsynth_ray.data.nodes import staying_resources
from diffsynth_ray.data.samples import SampleIndex
from diffsynth_ray.data.stream import StreamedBatch, build_stream
from diffsynth_ray.data.teacher import longest_run
from diffsynth_ray.errors import DsrayError, RunError, SupersededError, first_line, is_lost_connection
from diffsynth_ray.memory.compilation import CompileTime
from diffsynth_ray.memory.host import NodePlace
from diffsynth_ray.run_dir import RunDir, write_whole
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train import selection
from diffsynth_ray.train.cached_input import CachedInput
from diffsynth_ray.train.checkpoint import Checkpoint, TrainedOn, damage_of, find_checkpoints, find_restorable, read_checkpoint
from diffsynth_ray.train.environment import describe_environment
from diffsynth_ray.train.export import export_weights
from diffsynth_ray.train.feed import DeviceFeed
from diffsynth_ray.train.figures import FigureWriter
from diffsynth_ray.train.graph import SampleBatch, probe_inputs
from diffsynth_ray.train.group import Group, NodeWorkers
from diffsynth_ray.train.heartbeat import Heartbeat
from diffsynth_ray.train.loading import load_for_training
from diffsynth_ray.train.memory_report import measure, out_of_memory
from diffsynth_ray.train.reporter import Reporter
from diffsynth_ray.train.sampler import Errand, Spare
from diffsynth_ray.train.saver import CheckpointSaver, WriterIdentity
from diffsynth_ray.train.split import job_of_stage
from diffsynth_ray.train.storage import Storage
from diffsynth_ray.train.trainer import MicroInput, Trainer
from diffsynth_ray.train.validation import Surroundings, Validation

_STOP, _CHECKPOINT, _LOOK_FOR_PREEMPTION = 1, 2, 4
_LOOK_EVERY_S = 2.0
"""Asking Ray Train whether a node will be taken away is a meeting of all workers."""
_LAST_CALL_S = 5.0
"""Before a node goes, beside what a step and twice a checkpoint take: for a last checkpoint."""
_FOLLOWER_WAIT_S = 20.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train_loop(
    *,
    resolved_json: str,
    token: str,
    index: ray.ObjectRef,
    cached: ray.ObjectRef,
    components: tuple[str, ...] | None,
    board: Any,
    spare: Spare,
) -> dict[str, Any]:
    """Ray Train's train function on every worker.

    `token` is the attempt's right to commit, `index` holds a SampleIndex, `board` is the handle of the run's Board, `spare` is
    where samples may be made while the training goes on. Under split training `cached` holds the CachedRows (else None), and
    `components` are what stage two loads (else None: all).
    Returns {"state", "step", "num_steps"} of the run.
    """
    rank = ray.train.get_context().get_world_rank()
    resolved = ResolvedJob.model_validate_json(resolved_json)
    board.enter.remote(rank, _log_path())
    heartbeat = Heartbeat(partial(board.beat.remote, rank), every_s=min(5.0, resolved.job.distributed.timeout_s / 4))
    worker = _Worker(
        resolved,
        token=token,
        index=index,
        cached=ray.get(cached),
        components=components,
        board=board,
        spare=spare,
        heartbeat=heartbeat,
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
            heartbeat.enter("waiting to be ended: another worker is gone")
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
        hint="make room and submit the job again: it continues from its last checkpoint, if there is one",
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
        spare: Spare,
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
        self.cached_holdout: CachedInput | None = None
        if cached is not None and self.index.holdout is not None:
            self.cached_holdout = CachedInput(self.index.holdout, cached.holdout or cached, device=self.device)
        self.components = components
        self.schedule = build_schedule(
            self.job, num_samples=self.index.order.num_samples, global_batch_size=self.resolved.global_batch_size
        )
        self.heartbeat, self.spare = heartbeat, spare
        self.computed = "the weights"
        """What an out-of-memory error names."""
        self.say: Callable[[str], object] = board.say.remote if self.rank == 0 else _silent
        self.note_bad: Callable[[list[BadSample]], object] = board.note_bad.remote

    def run(self) -> dict[str, Any]:
        """Train from the newest checkpoint to the end, or to a stop."""
        self._take_threads()
        # Flags from rank 0 travel on the CPU, so that they never wait for the GPU; checkpoints are written by a thread.
        self.control = Group(self.world_size)
        self.writers = Group(self.world_size)
        self.writer = self._claim_writer()
        checkpoint = self._choose_start()
        # Ray Data's processes start while the model is loaded.
        feed = self._build_feed(checkpoint.step if checkpoint else 0)
        with CompileTime(self.say) as self.compile_time:
            self._build_trainer()
            self._restore(checkpoint)
            result = self._train(feed)
        feed.close()
        return {"state": result, "step": self.trainer.step, "num_steps": self.schedule.num_steps}

    def _take_threads(self) -> None:
        """Ray allows one thread a CPU that was asked for; an update on the host needs what the node has."""
        if self.device.type == "cpu" or self.job.updates_on_host:
            torch.set_num_threads(max(1, available_cpus() // self.local_world_size))

    def _build_trainer(self) -> None:
        started = time.monotonic()
        self.say("loading the model")
        self.heartbeat.enter("loading the model", 0)
        job = self.job if self.components is None else job_of_stage(self.job, self.components)
        family, residency = load_for_training(
            job,
            device=self.device,
            components=self.components,
            group=self._node_workers(),
            num_sizes=len(self.index.order.buckets),
            say=self.say,
        )
        if self.cached is not None:
            family.known_texts = self.cached.sample_texts()
        self.trainer = Trainer(self.job, family, self.schedule, residency=residency)
        count = sum(param.numel() for param in self.trainer.trained.values())
        self.say(f"model loaded in {time.monotonic() - started:.1f} s, {count:,} trained parameters")
        probe = self._probe_input()
        self.computed = f"the costliest micro batch, tried before the first step ({probe.describe()})"
        selects = bool(self.trainer.residency.selectable)
        if selects:
            selection.watch(self.trainer)
        self.trainer.start(probe, say=self.say)
        self._tell_compile_time()
        if selects:
            selection.keep_what_fits(self.trainer, selection.read_memory(), gather=self.control.gather, say=self.say)

    def _tell_compile_time(self) -> None:
        if seconds := self.compile_time.take_s():
            self.say(f"blocks were compiled, which took {seconds:.1f} s")

    def _node_workers(self) -> NodeWorkers | None:
        context = ray.train.get_context()
        place = NodePlace(context.get_node_rank(), context.get_local_rank(), self.local_world_size)
        return NodeWorkers(self.control, place) if self.world_size > 1 else None

    def out_of_memory(self, error: torch.OutOfMemoryError) -> RunError:
        """What the user is told of a full device."""
        cause = first_line(error)
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
        extra = probe_inputs(self.trainer.family, condition_columns(self.job), pixels)
        if self.job.task == DIRECT_DISTILL:
            run = longest_run(self.index.metadata)
            extra |= {name: (value,) * len(micro.rows) for name, value in asdict(run).items()}
        return MicroInput(SampleBatch(pixels, prompts, micro.rows, extra), micro.indices)

    def _claim_writer(self) -> str:
        """The name of this group of workers, given by rank 0; from here on no earlier group commits anything."""
        writer = self.control.from_rank_zero(self.run_dir.claim_writer(self.token) if self.rank == 0 else None)
        if writer is None:
            raise SupersededError
        return str(writer)

    def _choose_start(self) -> Checkpoint | None:
        """The newest whole checkpoint, the same for all ranks, or None. Each rank checks its share of the files."""
        self.heartbeat.enter("checking the checkpoint", 0)
        found = self.control.from_rank_zero(find_checkpoints(self.storage, say=self.say) if self.rank == 0 else None)

        def damage(checkpoint: Checkpoint) -> str | None:
            shards = checkpoint.shards[self.rank :: self.world_size]
            return next((each for each in self.control.gather(damage_of(self.storage, shards)) if each), None)

        checkpoint = find_restorable(found, damage, say=self.say)
        if checkpoint is None and self.rank == 0 and self.storage.list():
            self.say("none of the checkpoints is whole: the training starts at step 0")
        return checkpoint

    def _data_share(self) -> tuple[float, int]:
        """CPUs and number of the decoding tasks; for an elastic run from what the nodes that stay have now."""
        if not self.resolved.is_elastic:
            return self.resolved.decode_cpus, self.resolved.decode_tasks
        found = data_share(
            staying_resources().get("CPU", 0.0),
            num_workers=self.world_size,
            worker_cpus=self.resolved.resources_per_worker.get("CPU", 0.0),
            most_tasks=self.job.dataset.num_workers,
        )
        # Ray Train counts on whole nodes for workers. Without a free CPU, decoding takes none rather than wait forever.
        return found or (0.0, 1)

    def _build_feed(self, start_step: int) -> DeviceFeed:
        bounds = {
            "start_step": start_step,
            "num_steps": self.schedule.num_steps,
            "rank": self.rank,
            "world_size": self.world_size,
        }
        stream: Iterator[StreamedBatch | CachedBatch]
        if self.cached is not None and self.cached.rows.has("image"):
            stream = read_batches(self.index, self.cached.rows, **bounds)
        else:
            decode_cpus, decode_tasks = self._data_share()
            stream = build_stream(self.index_ref, **bounds, decode_cpus=decode_cpus, decode_tasks=decode_tasks)
        return DeviceFeed(stream, self.device, cached=self.cached)

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        self.heartbeat.enter("restoring the checkpoint", checkpoint.step)
        state = read_checkpoint(self.storage, checkpoint, expected_masters=set(self.trainer.trained))
        assert self.trainer.strategy is not None  # built by start()
        self.trainer.strategy.load_state(state)
        state.close()
        self.trainer.step = checkpoint.step
        before = checkpoint.trained_on
        if before is not None and before != self._trained_on:
            self.say(
                f"note: the data set is not the one of the steps before ({before.num_rows} rows then, "
                f"{self._trained_on.num_rows} now): from here on samples come in the order of the new one"
            )
        self.say(f"continuing after step {checkpoint.step} of {self.schedule.num_steps}")

    def _train(self, feed: DeviceFeed) -> str:
        if self.trainer.step >= self.schedule.num_steps:
            return "SUCCEEDED"
        figures = None
        if self.rank == 0:
            figures = FigureWriter(self.run_dir, self.job.logging, start_step=self.trainer.step, say=self.say)
        reporter = Reporter(
            trainer=self.trainer,
            run_dir=self.run_dir,
            rank=self.rank,
            gauges=_gauges(self.resolved.run, self.rank),
            figures=figures,
            may_commit=self.may_commit,
            say=self.say,
        )
        if self.rank == 0:
            environment = describe_environment(self.device, world_size=self.world_size)
            write_whole(self.run_dir.environment_path, json.dumps(environment, indent=2))
        self.saver = self._build_saver()
        self.last_checkpoint = self.last_look = time.monotonic()
        self.preempted_nodes: set[str] = set()
        self.node_goes_at: float | None = None
        self.step_s = 0.0
        self.validation = self._build_validation(reporter)
        try:
            self.validation.start()
            self.say("waiting for the first samples")
            while (step := self.trainer.step) < self.schedule.num_steps and not self.validation.has_ended:
                started = time.monotonic()
                self.heartbeat.enter("waiting for samples", step)
                fed = next(feed)
                data_wait_s = time.monotonic() - started
                if fed.bad:
                    self.note_bad(list(fed.bad))
                self.heartbeat.enter("training", step + 1)
                self.computed = f"step {step + 1} ({'; '.join(micro.describe() for micro in fed.micro_inputs)})"
                result = self.trainer.train_step(fed.micro_inputs, num_samples=fed.num_samples)
                reporter.after_step(result, fed, started=started, data_wait_s=data_wait_s)
                self.validation.after_step()
                self._tell_compile_time()
                self._export()
                self.step_s = time.monotonic() - started
                flags = self._flags()
                if flags & _CHECKPOINT:
                    reporter.before_checkpoint(result, fed)
                    self._checkpoint()
                self.saver.check()
                if flags & _STOP:
                    break
            self.heartbeat.enter("writing a checkpoint", self.trainer.step)
            self.saver.finish()
            self.validation.finish()
        finally:
            if figures is not None:
                figures.close()
        is_done = self.trainer.step == self.schedule.num_steps or self.validation.has_ended
        return "SUCCEEDED" if is_done else "STOPPED"

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
        due = (due or self.run_dir.checkpoint_request() is not None) and not self.saver.in_flight
        due |= output.checkpoint_steps is not None and step % output.checkpoint_steps == 0
        due |= self._is_last_call()
        if due or step == self.schedule.num_steps or self.validation.has_ended:
            flags |= _CHECKPOINT
        if now - self.last_look >= _LOOK_EVERY_S:
            self.last_look = now
            flags |= _LOOK_FOR_PREEMPTION
        return flags

    def _is_last_call(self) -> bool:
        """Whether a node goes so soon that another checkpoint can only just be written; the one of its notice may be old."""
        if self.node_goes_at is None or self.saver.in_flight:
            return False
        left_s = self.node_goes_at - time.time()
        if left_s > _LAST_CALL_S + 2 * self.saver.took_s + self.step_s:
            return False
        self.node_goes_at = None
        self.say(f"a node goes in {max(left_s, 0):.0f} s: checkpoint after step {self.trainer.step}")
        return True

    def _is_new_preemption(self) -> bool:
        """Whether a worker's node will be taken away that was not known of; the same on all ranks."""
        info = ray.train.get_preemption_info()
        nodes = set(info.preempted_node_ids) - self.preempted_nodes if info is not None else set()
        if nodes:
            self.preempted_nodes |= nodes
            self.node_goes_at = info.deadline_ms / 1000 if info.deadline_ms else None
            self.say(f"the nodes of ranks {info.preempted_ranks} will go: checkpoint after step {self.trainer.step}")
        return bool(nodes)

    def _build_saver(self) -> CheckpointSaver:
        return CheckpointSaver(
            self.storage,
            WriterIdentity(self.rank, self.world_size, self.token, self.writer, self._trained_on),
            keep=self.job.output.keep_checkpoints,
            may_commit=self.may_commit,
            gather=self.writers.gather,
            say=self.say,
        )

    @property
    def _trained_on(self) -> TrainedOn:
        return TrainedOn(len(self.index.metadata), self.index.order.digest)

    def may_commit(self) -> bool:
        return self.run_dir.may_commit(self.token, self.writer)

    def _checkpoint(self) -> None:
        assert self.trainer.strategy is not None  # built by start()
        # A request that comes while this one is written is not answered by it: who asks would lose the steps in between.
        request = self.run_dir.checkpoint_request() if self.rank == 0 else None
        answer = partial(self.run_dir.answer_checkpoint_request, request)
        self.saver.start(self.trainer.step, self.trainer.strategy.state_slices(), on_commit=answer)
        self.last_checkpoint = time.monotonic()

    def _build_validation(self, reporter: Reporter) -> Validation:
        around = Surroundings(
            run_dir=self.run_dir,
            group=self.control,
            rank=self.rank,
            world_size=self.world_size,
            enter=self._enter,
            say=self.say,
            publish=reporter.publish_validation,
            export=self._export_as,
            show=reporter.show_samples,
            may_write=self.may_commit,
            spare=self.spare if self.rank == 0 else None,
            cached=self.cached_holdout,
            errand=self._errand,
        )
        return Validation(self.job, self.trainer, self.index, around)

    def _errand(self, step: int, weights_path: Path) -> Errand:
        return Errand(
            step=step,
            resolved_json=self.resolved.model_dump_json(),
            rule=self.index.rule,
            weights_path=weights_path,
            token=self.token,
            writer=self.writer,
            num_threads=torch.get_num_threads(),
            components=self.components,
            texts=self.trainer.family.known_texts,
        )

    def _enter(self, what: str) -> None:
        self.heartbeat.enter(what)
        self.computed = what

    def _export(self) -> None:
        step = self.trainer.step
        stem = self.schedule.export_stem(step)
        if stem is None and self.validation.has_ended:
            stem = self.schedule.last_stem(step)
        if stem is not None:
            self._export_as(stem)

    def _export_as(self, stem: str) -> None:
        assert self.trainer.strategy is not None  # built by start()
        self.heartbeat.enter("exporting", self.trainer.step)
        with self.trainer.strategy.eval_weights():
            self._write_export(stem)

    def _write_export(self, stem: str) -> None:
        assert self.trainer.strategy is not None  # built by start()
        masters = self.trainer.strategy.full_masters()
        averages = self.trainer.strategy.full_averages()
        if self.rank != 0:
            return
        if not self.may_commit():
            raise SupersededError
        family, folder = self.trainer.family, self.run_dir.path
        paths = export_weights(family, self.job, masters=masters, output_dir=folder, stem=stem)
        if averages:
            paths += export_weights(family, self.job, masters=averages, output_dir=folder, stem=f"{stem}.ema")
        self.say(f"wrote {', '.join(str(path.relative_to(self.run_dir.path)) for path in paths)}")


def _gauges(run: str, rank: int) -> dict[str, Gauge]:
    """Ray's metrics of a worker by name."""
    tags = {"run": run, "stage": "train", "rank": str(rank)}
    names = (
        *("loss", "lr", "grad_norm", "validation_loss", "step", "stage_progress", "samples_per_s", "tokens_per_s"),
        *("step_s", "data_wait_s", "encode_s", "transfer_s", "communication_s", "moved_gib", "gpu_memory_gib"),
    )
    gauges = {name: Gauge(f"dsray_{name}", tag_keys=tuple(tags)) for name in names}
    for gauge in gauges.values():
        gauge.set_default_tags(tags)
    return gauges


def _silent(line: str) -> None:
    """What other ranks than 0 say."""
