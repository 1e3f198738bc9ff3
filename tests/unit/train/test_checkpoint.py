"""Checkpoints: committed by the manifest, checked on reading, fenced, in shards that any number of workers reads."""

import json
import shutil
import threading
import time

import pytest
import torch
from held_saver import hold
from pyarrow import fs as pafs
from safetensors.torch import load_file

from diffsynth_ray.errors import ModelError, OutputError, RunError
from diffsynth_ray.run_dir import RunDir
from diffsynth_ray.train import saver as saver_module
from diffsynth_ray.train.checkpoint import (
    TrainedOn,
    commit_checkpoint,
    damage_of,
    find_checkpoints,
    find_restorable,
    read_checkpoint,
    shard_name,
)
from diffsynth_ray.train.saver import CheckpointNotWrittenError, CheckpointSaver, WriterIdentity
from diffsynth_ray.train.shards import ShardedState, balanced_slices, write_shard
from diffsynth_ray.train.storage import Storage

TENSORS = {
    "master/w": torch.arange(12.0).reshape(3, 4),
    "exp_avg/w": torch.ones(3, 4, dtype=torch.bfloat16) / 3,
    "step/w": torch.tensor(7.0),
    "count/w": torch.tensor([2**53 + 1, 5]),
    "empty/w": torch.empty(0, 4),
}


class ObjectStoreHandler(pafs.FileSystemHandler):
    """An object store: nothing can be renamed or appended to, and an object is there when its stream is closed."""

    def __init__(self, base):
        self.base = base

    def get_type_name(self):
        return "object-store"

    def __eq__(self, other):
        return self is other

    def __ne__(self, other):
        return self is not other

    def normalize_path(self, path):
        return path

    def get_file_info(self, paths):
        return self.base.get_file_info(paths)

    def get_file_info_selector(self, selector):
        return self.base.get_file_info(selector)

    def create_dir(self, path, recursive):
        self.base.create_dir(path, recursive=recursive)

    def delete_dir(self, path):
        self.base.delete_dir(path)

    def delete_file(self, path):
        self.base.delete_file(path)

    def open_input_stream(self, path):
        return self.base.open_input_stream(path)

    def open_input_file(self, path):
        return self.base.open_input_file(path)

    def open_output_stream(self, path, metadata):
        return self.base.open_output_stream(path)

    def _refuse(self, *arguments):
        raise NotImplementedError("an object store cannot do that")

    delete_dir_contents = delete_root_dir_contents = move = copy_file = open_append_stream = _refuse


@pytest.fixture(params=["local", "object store"])
def storage(request, tmp_path):
    if request.param == "local":
        return Storage.at(tmp_path / "checkpoints")
    return Storage(pafs.PyFileSystem(ObjectStoreHandler(pafs.LocalFileSystem())), str(tmp_path / "checkpoints"))


def save(storage, step, *, keep=2, may_commit=True, world_size=2, writer="one", tensors=TENSORS, trained_on=None):
    shards = [
        write_shard(
            storage,
            shard_name(step, rank=rank, world_size=world_size, writer=writer),
            balanced_slices(tensors, rank=rank, world_size=world_size),
        )
        for rank in range(world_size)
    ]
    return commit_checkpoint(
        storage, step=step, shards=shards, token="t", may_commit=lambda: may_commit, keep=keep, trained_on=trained_on
    )


def test_a_checkpoint_says_what_it_was_trained_on(tmp_path):
    storage = Storage.at(tmp_path)
    save(storage, 1)  # as older versions have written them
    save(storage, 2, trained_on=TrainedOn(5, "ab"))
    assert [found.trained_on for found in find_checkpoints(storage)] == [TrainedOn(5, "ab"), None]


def restorable(storage, say=print):
    found = find_checkpoints(storage, say=say)
    return find_restorable(found, lambda checkpoint: damage_of(storage, checkpoint.shards), say=say)


def equal(state, tensors):
    assert state.names() == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        found = state.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found.reshape(tensor.shape), tensor), name


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_every_number_of_workers_writes_what_any_other_reads(storage, world_size):
    save(storage, 10, world_size=world_size)
    equal(read_checkpoint(storage, restorable(storage), expected_masters={"w"}), TENSORS)


def test_parts_are_read_across_shards(storage):
    save(storage, 10, world_size=5)
    state = read_checkpoint(storage, restorable(storage), expected_masters={"w"})
    for start in range(12):
        for stop in range(start, 13):
            assert torch.equal(state.read("master/w", start, stop), torch.arange(float(start), stop))


def test_shares_are_even_and_hold_everything_once():
    tensors = {f"master/{n}": torch.zeros(size) for n, size in enumerate((1, 1000, 3, 17, 500))}
    parts = [balanced_slices(tensors, rank=rank, world_size=4) for rank in range(4)]
    sizes = [sum(part.values.numel() for part in each.values()) for each in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == 1521


def test_a_shard_is_a_safetensors_file(tmp_path):
    write_shard(Storage.at(tmp_path), "x.safetensors", balanced_slices(TENSORS, rank=0, world_size=1))
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["exp_avg/w"].reshape(3, 4), TENSORS["exp_avg/w"])


def test_shards_with_a_hole_are_refused(storage):
    write_shard(storage, "a", balanced_slices(TENSORS, rank=0, world_size=2))
    with pytest.raises(ModelError, match="do not hold 'exp_avg/w' exactly once"):
        ShardedState(storage, ["a"])
    write_shard(storage, "b", balanced_slices(TENSORS, rank=1, world_size=2))
    with pytest.raises(ModelError, match="exactly once"):
        ShardedState(storage, ["a", "b", "b"])


def test_the_newest_are_kept_and_leftovers_go(storage):
    write_shard(storage, shard_name(2, rank=0, world_size=1, writer="dead"), balanced_slices(TENSORS, rank=0, world_size=1))
    for step in (3, 6):
        save(storage, step)
    write_shard(storage, shard_name(10, rank=0, world_size=1, writer="dead"), balanced_slices(TENSORS, rank=0, world_size=1))
    save(storage, 10)
    assert [found.step for found in find_checkpoints(storage)] == [10, 6]
    assert storage.list() == ["step-10", "step-6"]
    assert len(storage.list("step-10")) == 3


def test_who_may_not_commit_changes_nothing(storage):
    save(storage, 3)
    before = storage.read_text("step-3/manifest.json")
    assert save(storage, 3, writer="old", may_commit=False) is False
    assert storage.read_text("step-3/manifest.json") == before
    assert restorable(storage).step == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no manifest", "torn manifest", "foreign manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, damage):
    storage = Storage.at(tmp_path)
    save(storage, 3)
    save(storage, 6)
    shard = tmp_path / find_checkpoints(storage)[0].shards[1].name
    manifest = tmp_path / "step-6" / "manifest.json"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-3])
    elif damage == "flipped":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "missing":
        shard.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "torn manifest":
        manifest.write_text('{"step": ')
    else:
        manifest.write_text(json.dumps({"step": 6, "files": {}}))
    said = []
    assert restorable(storage, said.append).step == 3
    manifest_words = "step-6/manifest.json is not what was written"
    words = {
        "truncated": "bytes instead of", "flipped": "another checksum", "missing": "is missing",
        "torn manifest": manifest_words, "foreign manifest": manifest_words,
    }  # fmt: skip
    if damage in words:
        assert "checkpoint step-6 is damaged" in said[0]
        assert words[damage] in said[0]
    save(storage, 4)
    assert [found.step for found in find_checkpoints(storage)] == [4, 3], "what was passed over does not count as kept"


def test_a_checkpoint_that_cannot_be_read_now_is_neither_passed_over_nor_deleted(tmp_path, monkeypatch):
    storage = Storage.at(tmp_path)
    save(storage, 3)
    save(storage, 6)
    original = storage.read_text

    def read_text(name):
        if name.startswith("step-6/"):
            raise OSError(5, "Input/output error")
        return original(name)

    monkeypatch.setattr(storage, "read_text", read_text)
    with pytest.raises(OSError, match="Input/output error"):
        restorable(storage)
    assert save(storage, 9)
    monkeypatch.undo()
    assert [found.step for found in find_checkpoints(storage)] == [9, 6, 3]


def test_a_checkpoint_of_other_parameters_is_refused(storage):
    save(storage, 3)
    with pytest.raises(ModelError, match=r"1 are missing there \(first: \['v'\]\), 1 are not trained now \(first: \['w'\]\)"):
        read_checkpoint(storage, restorable(storage), expected_masters={"v"})


def test_what_cannot_be_deleted_is_no_checkpoint_any_more(storage, monkeypatch):
    save(storage, 1)
    monkeypatch.setattr(Storage, "delete_folder", lambda self, name: None)
    save(storage, 2, keep=1)
    assert [found.step for found in find_checkpoints(storage)] == [2]


def test_a_copy_under_another_name_is_no_checkpoint(tmp_path):
    storage = Storage.at(tmp_path)
    save(storage, 3)
    shutil.copytree(tmp_path / "step-3", tmp_path / "step-9")
    assert [found.step for found in find_checkpoints(storage)] == [3]


def test_nothing_there(storage):
    assert restorable(storage) is None


def test_only_the_newest_writer_of_the_newest_attempt_may_commit(tmp_path):
    run_dir = RunDir(tmp_path)
    assert run_dir.claim_writer("mine") is None
    (tmp_path / "attempt.json").write_text(json.dumps({"token": "mine"}))
    first = run_dir.claim_writer("mine")
    assert run_dir.may_commit("mine", first)
    second = run_dir.claim_writer("mine")
    assert not run_dir.may_commit("mine", first)
    assert run_dir.may_commit("mine", second)
    (tmp_path / "attempt.json").write_text(json.dumps({"token": "newer"}))
    assert not run_dir.may_commit("mine", second)
    shutil.rmtree(tmp_path)
    assert not run_dir.may_commit("mine", second)


# ---- saving beside the training


class Threads:
    """`gather` among threads that stand for ranks."""

    def __init__(self, world_size):
        self.barrier = threading.Barrier(world_size)
        self.values = [None] * world_size

    def of(self, rank):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait(100)
            found = list(self.values)
            self.barrier.wait(100)
            return found

        return gather


def build_savers(storage, world_size=2, *, may_commit=lambda: True, say=print):
    threads = Threads(world_size)
    return [
        CheckpointSaver(
            storage,
            WriterIdentity(rank=rank, world_size=world_size, token="t", writer="w"),
            keep=2,
            may_commit=may_commit,
            gather=threads.of(rank),
            say=say,
        )
        for rank in range(world_size)
    ]


def start(savers, step, tensors):
    for rank, saver in enumerate(savers):
        saver.start(step, balanced_slices(tensors, rank=rank, world_size=len(savers)))


def test_training_goes_on_while_a_checkpoint_is_written(storage, monkeypatch):
    may_write = hold(monkeypatch, "write_shard")
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    savers = build_savers(storage)
    start(savers, 3, tensors)
    for tensor in tensors.values():
        tensor.add_(1)  # the training goes on
    assert all(saver.in_flight for saver in savers)
    assert find_checkpoints(storage) == []
    may_write.set()
    for saver in savers:
        saver.finish()
    equal(read_checkpoint(storage, restorable(storage), expected_masters={"w"}), TENSORS)
    start(savers, 4, tensors)  # into the same buffers
    for saver in savers:
        saver.finish()
    equal(read_checkpoint(storage, restorable(storage), expected_masters={"w"}), tensors)


def test_no_worker_writes_the_next_checkpoint_while_one_is_committed(storage, monkeypatch):
    """Whatever is there of other steps is deleted then; a manifest was written over the lack of a shard."""
    may_commit = hold(monkeypatch, "commit_checkpoint")
    savers = build_savers(storage)
    start(savers, 3, TENSORS)
    ahead = threading.Thread(target=savers[1].start, args=(4, balanced_slices(TENSORS, rank=1, world_size=2)))
    ahead.start()
    end = time.monotonic() + 1
    while storage.list("step-4") == [] and time.monotonic() < end:
        time.sleep(0.02)
    may_commit.set()
    savers[0].start(4, balanced_slices(TENSORS, rank=0, world_size=2))
    ahead.join(100)
    for saver in savers:
        saver.finish()
    assert restorable(storage).step == 4
    equal(read_checkpoint(storage, restorable(storage), expected_masters={"w"}), TENSORS)


def test_a_full_disk_under_one_worker_costs_a_checkpoint_only(storage, monkeypatch):
    original = saver_module.write_shard

    def full(storage, name, slices):
        if "state-00001" in name and "step-6" in name:
            raise OSError(28, "No space left on device")
        return original(storage, name, slices)

    monkeypatch.setattr(saver_module, "write_shard", full)
    said = []
    savers = build_savers(storage, say=said.append)
    for step in (3, 6, 9):
        start(savers, step, TENSORS)
    for saver in savers:
        saver.finish()
    assert [found.step for found in find_checkpoints(storage)] == [9, 3]
    assert any("step-6" in line and "rank 1: No space left on device" in line for line in said)
    start(savers, 6, TENSORS)
    for saver in savers:
        with pytest.raises(CheckpointNotWrittenError, match="rank 1: No space left"):
            saver.finish()
    assert storage.list("step-6") == [], "what could not be completed is not left on the full disk"


def test_an_older_attempt_ends_when_it_may_not_commit(storage):
    savers = build_savers(storage, may_commit=lambda: False)
    start(savers, 3, TENSORS)
    with pytest.raises(RunError, match="newer attempt"):
        savers[0].finish()
    assert find_checkpoints(storage) == []


def test_a_url_that_pyarrow_does_not_know_is_the_users_to_mend():
    """A worker that raises it is not started again."""
    with pytest.raises(OutputError, match=r"output\.checkpoint_path: .* \(foo://\.\.\.\)$"):
        Storage.at("foo://key:secret@x")
