"""Two ranks in processes of their own, without Ray, killed at random moments: the run ends with the very bits.

The processes are forked from this one, so that an attempt starts in a second. What they do between kills is what
train/worker.py does: claim, choose, restore, train, figures, checkpoints in the background.
"""

import json
import os
import random
import resource
import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked import fork
from waiting import wait_until

from diffsynth_ray.config.schema import Job, LoggingSection
from diffsynth_ray.errors import RunError
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.run_dir import RunDir, write_whole
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train import saver as saver_module
from diffsynth_ray.train.checkpoint import damage_of, find_checkpoints, find_restorable, read_checkpoint
from diffsynth_ray.train.figures import FigureWriter
from diffsynth_ray.train.graph import SampleBatch
from diffsynth_ray.train.group import Group
from diffsynth_ray.train.saver import CheckpointSaver, WriterIdentity
from diffsynth_ray.train.storage import Storage
from diffsynth_ray.train.trainer import MicroInput, Trainer, select_trained

WORLD_SIZE = 2
JOB = Job.model_validate({
    "name": "kills", "training": {"precision": "fp32", "learning_rate": 1e-3, "lr_scheduler": "cosine"},
    "lora": {"base_model": "dit", "rank": 2},
})  # fmt: skip


def micro(step, rank):
    """A sample that follows from its position."""
    pixels = np.random.default_rng([step, rank]).integers(0, 256, (1, 1, 32, 32, 3), dtype=np.uint8)
    return MicroInput(SampleBatch(pixels, ("a cat",), (rank,)), (rank,))


def build_trainer(num_steps):
    """The tiny model with its LoRA."""
    family = QwenImage.build_tiny(0, dtype=torch.float32)
    select_trained(family, JOB)
    schedule = build_schedule(JOB, num_samples=WORLD_SIZE * num_steps, global_batch_size=WORLD_SIZE)
    return Trainer(JOB, family, schedule)


def train(path, rank, num_steps, every, trouble):
    """One rank of one attempt; `trouble` is called before each step with the step and the rank."""
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
    trainer = build_trainer(num_steps)
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
        trouble(trainer.step, rank)
        result = trainer.train_step([micro(trainer.step, rank)], num_samples=WORLD_SIZE)
        loss = trainer.strategy.sum_over_workers(result.loss_sum) / WORLD_SIZE
        if figures is not None:
            if not run_dir.may_commit(token, writer):
                raise RunError("a newer attempt of this run has taken over")
            figures.write(trainer.step, {"loss": loss.item(), "grad_norm": result.grad_norm.item()})
        if trainer.step % every == 0 or trainer.step == num_steps:
            saver.start(trainer.step, trainer.strategy.state_slices())
        saver.check()
    saver.finish()
    if rank == 0:
        torch.save(trainer.strategy.full_masters(), path / "masters.pt")
    # Without it gloo's threads are still there when the process ends, which sometimes aborts it.
    dist.destroy_process_group()


def no_trouble(step, rank):
    """An undisturbed run."""


def begin(path, number, num_steps, every, trouble=no_trouble):
    """Start both ranks."""
    path.mkdir(exist_ok=True)
    write_whole(path / "attempt.json", json.dumps({"number": number, "token": f"token-{number}"}))
    with (path / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"attempt": number, "event": "started"}) + "\n")
    return [fork(train, path, rank, num_steps, every, trouble) for rank in range(WORLD_SIZE)]


def attempt(path, number, num_steps, every, *, kill=None):
    """Run both ranks; `kill` = (rank, whether to wait for a step first, seconds). Returns whether they ended well."""
    ranks = begin(path, number, num_steps, every)
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
    return ended_well(ranks)


def ended_well(ranks):
    for process in ranks:
        process.join()
    return all(process.exitcode == 0 for process in ranks)


def assert_same(path, whole):
    assert (path / "loss.csv").read_text() == (whole / "loss.csv").read_text()
    ours, theirs = (torch.load(each / "masters.pt") for each in (path, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def file_size(path):
    return path.stat().st_size if path.exists() else 0


def warm_up():
    """Import here, once for all processes, what is imported late."""
    torch.set_num_threads(1)  # as the forked ranks
    trainer = build_trainer(1)
    trainer.start(micro(0, 0))
    trainer.train_step([micro(0, 0)], num_samples=1)


def soak(tmp_path, *, num_kills, num_steps, every, seed=0):
    warm_up()
    began = time.monotonic()
    whole = begin(tmp_path / "whole", 1, num_steps, every)
    wait_until(lambda: file_size(tmp_path / "whole" / "loss.csv") > 0)
    until_first_s = time.monotonic() - began  # while the model is loaded
    assert ended_well(whole)
    times = [entry.stat().st_mtime for entry in (tmp_path / "whole" / "checkpoints").glob("step-*/manifest.json")]
    between_s = max(times) - min(times)  # of two checkpoints that follow each other
    draw = random.Random(seed)
    kills = progressed = 0
    last_step = -1
    while kills < num_kills:
        kills += 1
        # Most while training, from the first step to beyond the second checkpoint; some while the model is loaded.
        in_training = draw.random() < 0.8
        moment = draw.uniform(0.0, 2.5 * between_s if in_training else until_first_s)
        kill = (draw.randrange(WORLD_SIZE), in_training, moment)
        assert not attempt(tmp_path / "killed", kills, num_steps, every, kill=kill), kills
        found = find_checkpoints(Storage.at(tmp_path / "killed" / "checkpoints"))
        if found:
            assert found[0].step >= last_step, "nothing that was committed is lost"
            progressed += found[0].step > last_step
            last_step = found[0].step
    assert attempt(tmp_path / "killed", kills + 1, num_steps, every)
    assert_same(tmp_path / "killed", tmp_path / "whole")
    return progressed, last_step


STEPS = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run, a checkpoint after each step."""
    warm_up()
    path = tmp_path_factory.mktemp("whole") / "run"
    assert attempt(path, 1, STEPS, 1)
    return path


def test_a_full_disk_and_then_a_kill_in_the_middle_of_a_file(tmp_path, whole):
    """Of step 2 rank 1 may write 1000 bytes only, by the kernel's limit; of step 4 it has written half when it is killed."""
    path, half_written = tmp_path / "run", tmp_path / "half"

    write_shard = saver_module.write_shard

    def trouble(step, rank):
        if rank == 1 and step == 0:
            saver_module.write_shard = write_troubled

    def write_troubled(storage, name, slices):
        if name.startswith("step-4/"):
            with storage.writing(name) as file:
                file.write(b"half of it")
                file.flush()
                half_written.touch()
                time.sleep(1000)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if name.startswith("step-2/") else soft, hard))
        try:
            return write_shard(storage, name, slices)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    ranks = begin(path, 1, STEPS, 1, trouble)
    wait_until(half_written.exists)
    wait_until((path / "checkpoints/step-3/manifest.json").exists)  # rank 0 writes it while rank 1 is at step 4
    wait_until(lambda: not (path / "checkpoints/step-2").exists())  # and then deletes what is not whole
    os.kill(ranks[1].pid, signal.SIGKILL)
    ranks[0].kill()
    assert not ended_well(ranks)
    storage = Storage.at(path / "checkpoints")
    # Of step 2 nothing is left, of step 4 no manifest; those of 1 and 3 are whole.
    assert [found.step for found in find_checkpoints(storage)] == [3, 1]
    assert storage.list() == ["step-1", "step-3", "step-4"]
    assert attempt(path, 2, STEPS, 1)
    assert_same(path, whole)
    assert storage.list() == ["step-4", "step-5"]


def test_of_two_attempts_at_once_the_older_one_ends_and_writes_nothing(tmp_path, whole):
    path = tmp_path / "run"

    def trouble(step, rank):
        if step == 3:
            wait_until((path / "newer").exists)

    older = begin(path, 1, STEPS, 1, trouble)
    wait_until(lambda: "3,loss" in ((path / "loss.csv").read_text() if (path / "loss.csv").exists() else ""))
    wait_until(lambda: (path / "checkpoints" / "step-3" / "manifest.json").exists())
    newer = begin(path, 2, STEPS, 1)
    wait_until(lambda: json.loads((path / "writer.json").read_text())["token"] == "token-2")
    (path / "newer").touch()
    older[0].join(60)
    for process in older:
        process.kill()
    assert not ended_well(older)
    assert ended_well(newer)
    assert_same(path, whole)
    assert {found.token for found in find_checkpoints(Storage.at(path / "checkpoints"))} == {"token-2"}


@pytest.mark.slow
def test_two_kills_change_no_bit(tmp_path):
    soak(tmp_path, num_kills=2, num_steps=20, every=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_kills_change_no_bit(tmp_path):
    progressed, last_step = soak(tmp_path, num_kills=40, num_steps=200, every=2)
    assert progressed >= 10, "most kills must fall into the training, not before it"
    print(f"\n40 kills over 200 steps, {progressed} of them after a new checkpoint, the last at step {last_step} or later")
