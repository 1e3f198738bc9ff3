"""`dsray download`, in this process and, through the libraries' own variables, in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffsynth_ray.cli import app
from diffsynth_ray.errors import ExitCode

TINY = Path(__file__).parents[2] / "assets" / "qwen_image_tiny"
DATASET = "DiffSynth-Studio/diffsynth_example_dataset"
JOB = """
[dataset]
base_path = "data"
[model]
id_with_origin_paths = [
  "Qwen/Qwen-Image:transformer/*.safetensors",
  "Qwen/Qwen-Image:text_encoder/*.safetensors",
  "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors",
]
[lora]
base_model = "dit"
[distributed]
num_workers = 64
"""


@pytest.fixture
def run(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    hub.add_folder("Qwen/Qwen-Image", TINY)
    (tmp_path / "job.toml").write_text(JOB)

    def run(*arguments):
        code = app.main(["download", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_jobs_model_is_fetched_ahead(run, hub, tmp_path):
    code, out, err = run("job.toml")  # whatever the machine: this one has no 64 GPUs
    assert code == ExitCode.DONE, err
    folder = tmp_path / "models" / "Qwen" / "Qwen-Image"
    assert out.splitlines()[-1] == str(folder / "tokenizer")
    assert all(Path(line).exists() and folder in Path(line).parents for line in out.splitlines())
    assert "qwen_image: dit, text_encoder, vae are complete" in err
    hub.requests.clear()
    again = run("job.toml", "--json")
    assert json.loads(again[1])["files"] == out.splitlines()
    assert hub.requests == []


def test_the_folder_of_the_environment_is_used(run, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "shared"))
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "huggingface")
    code, out, err = run("job.toml")
    assert code == ExitCode.DONE, err
    assert out.startswith(str(tmp_path / "shared" / "Qwen" / "Qwen-Image"))
    assert "Hugging Face" in err


def test_a_data_set_is_fetched(run, hub, tmp_path):
    for name in ("qwen_image/metadata.csv", "qwen_image/1.png", "wan/1.mp4"):
        hub.add(DATASET, name, name.encode(), kind="dataset")
    code, out, _ = run("--dataset", DATASET, "--include", "qwen_image/*")
    assert code == ExitCode.DONE
    folder = tmp_path / "data" / "diffsynth_example_dataset"
    assert out.splitlines() == [str(folder / "qwen_image/metadata.csv"), str(folder / "qwen_image/1.png")]
    assert not (folder / "wan").exists()
    code, out, _ = run("--dataset", DATASET, "--output", "elsewhere")
    assert (tmp_path / "elsewhere" / "wan" / "1.mp4").read_bytes() == b"wan/1.mp4"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give a job file, or --dataset"),
        (["job.toml", "--dataset", DATASET], "give a job file, or --dataset"),
        (["job.toml", "--include", "x"], "belong to --dataset"),
        (["nothing.toml"], "no such file"),
        (["--dataset", "nowhere"], "is no repository"),
        (["--dataset", "no/where"], "no such repository"),
        (["job.toml", "--set", 'model.id_with_origin_paths=["Qwen/Qwen-Image:vae/x.safetensors"]'], "did you mean"),
    ],
)
def test_mistakes_are_exit_2(run, arguments, expected):
    code, out, err = run(*arguments)
    assert code == ExitCode.USAGE
    assert expected in err
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_a_hub_that_wants_a_token_is_exit_3(run, hub, source):
    hub.token = "secret"
    code, _, err = run("job.toml", "--set", f"model.source={source}")
    assert code == ExitCode.CLUSTER
    assert "hint: set " in err


def test_a_tiny_model_needs_nothing(run):
    code, out, err = run("job.toml", "--set", "model.tiny=true", "--set", "model.id_with_origin_paths=[]",
                         "--set", "model.family=qwen_image")  # fmt: skip
    assert (code, out) == (ExitCode.DONE, "")
    assert "nothing to download" in err


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_the_libraries_variables_choose_the_endpoint(run, hub, tmp_path, repository, source):
    """In a process of its own: the libraries read MODELSCOPE_DOMAIN and HF_ENDPOINT when they are imported."""
    hub.add(DATASET, "qwen_image/1.png", b"a picture", kind="dataset")
    environment = {name: value for name, value in os.environ.items() if name != "MODELSCOPE_ENDPOINT"}
    environment |= {"MODELSCOPE_DOMAIN": hub.url, "PYTHONPATH": str(repository), "DIFFSYNTH_DOWNLOAD_SOURCE": source}
    command = [sys.executable, "-m", "diffsynth_ray.cli.app", "download", "--dataset", DATASET]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == b"a picture"
    assert "it/s" not in done.stderr  # no bar of a library runs through ours
    assert all(line.startswith(DATASET) for line in done.stderr.splitlines() if "Warning" not in line), done.stderr
