"""`plan --estimate`, and what submit says of a job that cannot fit."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffsynth_ray.cli import estimating
from diffsynth_ray.cli.app import main
from diffsynth_ray.errors import DsrayError, ExitCode, ModelError
from diffsynth_ray.memory.devices import DEVICES
from diffsynth_ray.train.estimate import GIB, Estimate

ROOT = Path(__file__).parents[3]
JOB = """
[dataset]
base_path = "{folder}"
[model]
family = "qwen_image"
tiny = true
[lora]
base_model = "dit"
rank = 4
[output]
path = "{folder}/out"
"""


@pytest.fixture
def job_file(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_text("a picture")
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(folder=tmp_path))
    return str(path)


def test_plan_estimates_for_a_named_gpu(job_file, capsys):
    assert main(["plan", job_file, "--gpu", "RTX 4090", "--json", "--set", "dataset.max_pixels=4096"]) == ExitCode.DONE
    found = json.loads(capsys.readouterr().out)["estimate"]
    assert (found["device"], found["fits"], found["advice"]) == ("4090", True, [])
    assert found["peak_bytes"] == sum(found["memory"].values())
    assert found["step_s"] > 0


@pytest.mark.parametrize(("recipe", "gpus", "workers"), [("qwen_lora", "h100", None), ("qwen_full", "8xH100", 8)])
def test_the_big_recipes_fit_what_they_say(recipe, gpus, workers, capsys):
    photos = ROOT / "jobs/data/photos"
    data = ["--set", f"dataset.base_path={photos}", "--set", f"dataset.metadata_path={photos}/metadata.csv"]
    assert main(["plan", recipe, "--gpu", gpus, "--json", *data]) == ExitCode.DONE
    found = json.loads(capsys.readouterr().out)
    assert found["estimate"]["fits"]
    assert workers is None or found["num_workers"] == workers


def test_an_unknown_gpu_is_told_with_those_that_are_known(job_file, capsys):
    for name in ("4091", "8x4091", "0xh100"):
        assert main(["plan", job_file, "--gpu", name]) == ExitCode.USAGE
        assert f"--gpu: got '{name}'; known are h100, " in capsys.readouterr().err


def build_estimate(**memory):
    return Estimate(
        device="4090", device_bytes=DEVICES["4090"].memory_bytes, memory=memory, moment="the update", host={},
        times={}, step_s=1.0, moved_bytes=0, advice=((5 * GIB, "offload.cpu_offload = true"),),
    )  # fmt: skip


RESOLVED = SimpleNamespace(device="cuda", job=SimpleNamespace(model=SimpleNamespace(tiny=False)))


@pytest.mark.parametrize(
    ("memory", "says"),
    [({"frozen weights": 10 * GIB}, ""), ({"frozen weights": 10 * GIB, "activations kept": 20 * GIB}, "does not fit")],
)
def test_submit_warns_of_what_does_not_fit(monkeypatch, capsys, memory, says):
    monkeypatch.setattr(estimating, "estimate", lambda resolved, device, is_remote: build_estimate(**memory))
    estimating.warn_before_submit(RESOLVED, ["G", "4090"], is_remote=True)
    err = capsys.readouterr().err
    assert says in err
    assert ("5.00 GiB less with offload.cpu_offload = true" in err) == bool(says)


def test_submit_refuses_weights_that_alone_exceed_the_device(monkeypatch):
    found = build_estimate(**{"frozen weights": 40 * GIB})
    monkeypatch.setattr(estimating, "estimate", lambda resolved, device, is_remote: found)
    with pytest.raises(DsrayError, match="does not fit") as refused:
        estimating.warn_before_submit(RESOLVED, ["4090"], is_remote=True)
    assert "--no-estimate" in refused.value.hint


def test_submit_goes_on_where_nothing_can_be_estimated(monkeypatch, capsys):
    def fails(resolved, device, is_remote):
        raise ModelError("its size is not known")

    monkeypatch.setattr(estimating, "estimate", fails)
    estimating.warn_before_submit(RESOLVED, ["H100"], is_remote=True)
    assert "whether the job fits h100 is not known: its size is not known" in capsys.readouterr().err
    estimating.warn_before_submit(RESOLVED, [], is_remote=True)  # no GPU of a known kind: nothing is said
    assert capsys.readouterr().err == ""
