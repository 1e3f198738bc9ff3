"""Checkpoints: committed by the manifest, checked on reading, fenced by the token."""

import json
import shutil

import pytest
import torch

from diffsynth_ray.errors import ModelError
from diffsynth_ray.run_dir import RunDir
from diffsynth_ray.train.checkpoint import find_checkpoints, find_restorable, read_checkpoint, save_checkpoint

TENSORS = {"master/w": torch.arange(4.0), "exp_avg/w": torch.ones(4)}


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "attempt.json").write_text(json.dumps({"token": "mine"}))
    return RunDir(tmp_path)


def save(run_dir, step, keep=2, token="mine"):
    return save_checkpoint(run_dir, step=step, tensors=TENSORS, token=token, keep=keep)


def test_round_trip_and_keep(run_dir):
    for step in (3, 6, 10):
        save(run_dir, step)
    assert [found.step for found in find_checkpoints(run_dir)] == [10, 6]
    tensors = read_checkpoint(run_dir, 10, expected_masters={"w"})
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_an_older_attempt_commits_nothing(run_dir):
    assert save(run_dir, 3, token="old") is None
    assert find_checkpoints(run_dir) == []


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no manifest", "torn manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_said(run_dir, damage):
    save(run_dir, 3)
    path = save(run_dir, 6)
    state = path / "state.safetensors"
    if damage == "truncated":
        state.write_bytes(state.read_bytes()[:-3])
    elif damage == "flipped":
        content = bytearray(state.read_bytes())
        content[-1] ^= 1
        state.write_bytes(content)
    elif damage == "missing":
        state.unlink()
    elif damage == "no manifest":
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text('{"step": ')
    said = []
    assert find_restorable(run_dir, said.append).step == 3
    if "manifest" not in damage:
        assert "step-6" in said[0]
        assert "damaged" in said[0]


def test_what_a_dead_attempt_left_is_overwritten(run_dir):
    leftover = run_dir.checkpoints_dir / "step-3"
    leftover.mkdir(parents=True)
    (leftover / "state.safetensors").write_bytes(b"half")
    save(run_dir, 3)
    assert find_restorable(run_dir, print).step == 3


def test_a_checkpoint_of_other_parameters_is_refused(run_dir):
    save(run_dir, 3)
    with pytest.raises(ModelError, match=r"1 are missing there \(first: \['v'\]\), 1 are not trained now \(first: \['w'\]\)"):
        read_checkpoint(run_dir, 3, expected_masters={"v"})


def test_nothing_there(run_dir):
    assert find_restorable(run_dir, print) is None
    shutil.rmtree(run_dir.path)
    assert find_restorable(run_dir, print) is None
