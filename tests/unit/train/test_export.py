"""Files of weights: who may read them, and what becomes of a full disk."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_trainer import build_job

from diffsynth_ray.config.schema import Job
from diffsynth_ray.models.family import ModelFamily
from diffsynth_ray.train import export
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import load_family, select_trained


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_weights_are_readable_for_those_who_may_read_other_files(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        path = export.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_full_disk_is_told_as_one_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*a\.safetensors") as caught:
        export.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def exported(job: Job, folder: Path) -> tuple[ModelFamily, list[Path]]:
    family = load_family(job, device=torch.device("cpu"))
    select_trained(family, job)
    settle(family, job, say=print)
    masters = {
        f"{component}.{name}": parameter.detach().float()
        for component, module in family.components.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    return family, export.export_weights(family, job, masters=masters, output_dir=folder, stem="a")


@pytest.mark.parametrize("formats", [[], ["kohya"], ["kohya", "diffsynth", "kohya"]])
@pytest.mark.parametrize("full", [False, True])
def test_diffsynths_names_are_written_whatever_else_is(tmp_path: Path, formats: list[str], full: bool) -> None:
    trained = {"training": {"trainable_models": ["dit"]}, "lora": {"base_model": None}} if full else {}
    job = build_job(output={"formats": formats}, **trained)
    written = exported(job, tmp_path)[1]
    others = ["kohya/a.safetensors"] if formats and not full else []
    assert [str(path.relative_to(tmp_path)) for path in written] == ["a.safetensors", *others]


def test_the_asked_prefix_is_taken_off_the_first_component_only(tmp_path: Path) -> None:
    """The LoRA's file; a component trained in full beside it loses its own prefix."""
    job = build_job(training={"trainable_models": ["vae"]}, output={"remove_prefix_in_ckpt": "pipe."})
    family, written = exported(job, tmp_path)
    lora, vae = (set(load_file(path)) for path in written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "a.vae.safetensors"]
    assert all(key.startswith("dit.") and ".lora_" in key for key in lora)
    assert vae == set(family.checkpoint_tensors("vae", dict(family.component("vae").named_parameters())))
