"""Two ranks in processes of their own, without Ray, killed at random moments: the run ends with the very bits.

The processes are forked from this one, so that an attempt starts in a second. What they do between kills is what
train/worker.py does: claim, choose, restore, train, figures, checkpoints in the background.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from diffsynth_ray.config.schema import Job, LoggingSection
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.run_dir import RunDir, write_whole
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.checkpoint import damage_of, find_checkpoints, find_restorable, read_checkpoint
from diffsynth_ray.train.figures import FigureWriter
from diffsynth_ray.train.group import Group
from diffsynth_ray.train.saver import CheckpointSaver, WriterIdentity
from diffsynth_ray.train.storage import Storage
from diffsynth_ray.train.trainer import MicroInput, SampleBatch, Trainer, select_trained

WORLD_SIZE = 2
JOB = Job.model_validate({
    "name": "kills", "training": {"precision": "fp32", "learning_rate": 1e-3, "lr_scheduler": "cosine"},
    "lora": {"base_model": "dit", "rank": 2},
})  # fmt: skip


def micro(step, rank):
    """A sample that follows from its position."""
    pixels = np.random.default_rng([step, rank]).integers(0, 256, (1, 1, 32, 32, 3), dtype=np.uint8)
    return MicroInput(SampleBatch(pixels, ("a cat",), (rank,)), (rank,))


def train(path, rank, num_steps, every):
    """One rank of one attempt."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(path / f"store-{os.getppid()}-{RunDir(path).attempts()[-1]['attempt']}"), WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))
    control, writers = Group(WORLD_SIZE), Group(WORLD_SIZE)
    run_dir, storage = RunDir(path), Storage.at(path / "checkpoints")
    token = json.loads(run_dir.attempt_path.read_text())["token"]
    writer = control.from_rank_zero(run_dir.claim_writer(token) if rank == 0 else None)
    found = control.from_rank_zero(find_checkpoints(storage) if rank == 0 else None)
    checkpoint = find_restorable(
        found,
        lambda each: next((d for d in control.gather(damage_of(storage, each.shards[rank::WORLD_SIZE])) if d), None),
        say=lambda line: None,
    )
    family = QwenImage.build_tiny(0, dtype=torch.float32)
    select_trained(family, JOB)
    trainer = Trainer(JOB, family, build_schedule(JOB, num_samples=WORLD_SIZE * num_steps, global_batch_size=WORLD_SIZE))
    trainer.start(micro(0, rank))
    if checkpoint is not None:
        trainer.strategy.load_state(read_checkpoint(storage, checkpoint, expected_masters=set(trainer.trained)))
        trainer.step = checkpoint.step
    figures = FigureWriter(run_dir, LoggingSection(tensorboard=False), start_step=trainer.step) if rank == 0 else None
    saver = CheckpointSaver(
        storage, WriterIdentity(rank=rank, world_size=WORLD_SIZE, token=token, writer=writer), keep=2,
        may_commit=lambda: run_dir.may_commit(token, writer), gather=writers.gather, say=lambda line: None,
    )  # fmt: skip
    while trainer.step < num_steps:
        result = trainer.train_step([micro(trainer.step, rank)], num_samples=WORLD_SIZE)
        loss = trainer.strategy.sum_over_workers(result.loss_sum) / WORLD_SIZE
        if figures is not None:
            figures.write(trainer.step, {"loss": loss.item(), "grad_norm": result.grad_norm.item()})
        if trainer.step % every == 0 or trainer.step == num_steps:
            saver.start(trainer.step, trainer.strategy.state_slices())
        saver.check()
    saver.finish()
    if rank == 0:
        torch.save(trainer.strategy.full_masters(), path / "masters.pt")


def attempt(path, number, num_steps, every, *, kill=None):
    """Run both ranks; `kill` = (rank, whether to wait for a step first, seconds). Returns whether they ended well."""
    path.mkdir(exist_ok=True)
    write_whole(path / "attempt.json", json.dumps({"number": number, "token": f"token-{number}"}))
    with (path / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"attempt": number, "event": "started"}) + "\n")
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=train, args=(path, rank, num_steps, every)) for rank in range(WORLD_SIZE)]
    for process in ranks:
        process.start()
    if kill is not None:
        rank, in_training, moment = kill
        size = file_size(path / "loss.csv")
        # The first row of an attempt comes after loss.csv is cut down to the step that it goes on from.
        while in_training and all(process.is_alive() for process in ranks) and file_size(path / "loss.csv") <= size:
            size = min(size, file_size(path / "loss.csv"))
            time.sleep(0.005)
        ranks[rank].join(moment)
        if ranks[rank].is_alive():
            os.kill(ranks[rank].pid, signal.SIGKILL)
        # The other one fails by itself, or waits for ever: Ray Train ends it.
        time.sleep(0.1)
        for process in ranks:
            process.kill()
    for process in ranks:
        process.join()
    return all(process.exitcode == 0 for process in ranks)


def file_size(path):
    return path.stat().st_size if path.exists() else 0


def soak(tmp_path, *, num_kills, num_steps, every, seed=0):
    torch.set_num_threads(1)
    assert attempt(tmp_path / "whole", 1, num_steps, every)
    times = [entry.stat().st_mtime for entry in (tmp_path / "whole" / "checkpoints").glob("step-*/manifest.json")]
    between_s = max(times) - min(times)  # of two checkpoints that follow each other
    draw = random.Random(seed)
    kills = progressed = 0
    last_step = -1
    while kills < num_kills:
        kills += 1
        # Most while training, from the first step to beyond the second checkpoint; some while the model is loaded.
        in_training = draw.random() < 0.8
        moment = draw.uniform(0.0, 2.5 * between_s if in_training else 2.0)
        kill = (draw.randrange(WORLD_SIZE), in_training, moment)
        assert not attempt(tmp_path / "killed", kills, num_steps, every, kill=kill), kills
        found = find_checkpoints(Storage.at(tmp_path / "killed" / "checkpoints"))
        if found:
            assert found[0].step >= last_step, "nothing that was committed is lost"
            progressed += found[0].step > last_step
            last_step = found[0].step
    assert attempt(tmp_path / "killed", kills + 1, num_steps, every)
    assert (tmp_path / "killed" / "loss.csv").read_text() == (tmp_path / "whole" / "loss.csv").read_text()
    whole, killed = (torch.load(tmp_path / name / "masters.pt") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    return progressed, last_step


def test_two_kills_change_no_bit(tmp_path):
    soak(tmp_path, num_kills=2, num_steps=6, every=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_kills_change_no_bit(tmp_path):
    progressed, last_step = soak(tmp_path, num_kills=40, num_steps=200, every=2)
    assert progressed >= 10, "most kills must fall into the training, not before it"
    print(f"\n40 kills over 200 steps, {progressed} of them after a new checkpoint, the last at step {last_step} or later")
