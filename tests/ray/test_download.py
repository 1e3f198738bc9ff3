"""A run whose model comes from a hub: fetched once, before the workers start; never asked for again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.errors import HubError, ModelError
from diffsynth_ray.launch import fetch
from diffsynth_ray.launch.board import Board
from diffsynth_ray.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
TINY = Path(__file__).parents[1] / "assets" / "qwen_image_tiny"
JOB = """
[dataset]
base_path = "{photos}"
metadata_path = "{photos}/metadata.csv"
height = 32
width = 32
[model]
id_with_origin_paths = [
  "Qwen/Qwen-Image:transformer/*.safetensors",
  "Qwen/Qwen-Image:text_encoder/*.safetensors",
  "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors",
]
[lora]
base_model = "dit"
[training]
precision = "fp32"
[distributed]
num_workers = 2
"""
TWO_NODES = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.launch.board import Board
from diffsynth_ray.launch.environment import WORKER_ENV
from diffsynth_ray.launch.fetch import bring_model, worker_nodes

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
cluster.add_node(num_cpus=0)  # no worker fits on it
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": WORKER_ENV})
board = Board.remote()
resolved = resolve(load_job(sys.argv[1]), Resources(cpus=2, gpus=0))
bring_model(resolved, board)
print(json.dumps([len(worker_nodes(resolved.resources_per_worker)), ray.get(board.take.remote(600.0)).lines]))
"""


@pytest.fixture
def job_file(hub, tmp_path, photos):
    hub.add_folder("Qwen/Qwen-Image", TINY)
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(photos=photos))
    return path


def python(*arguments, cwd, repository):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"DSRAY_STATE_DIR": str(cwd / "state"), "PYTHONPATH": str(repository), "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=240
    )


@pytest.fixture
def resolved(job_file, tmp_path, monkeypatch, local_ray):
    """The job; what `bring_model` starts from here asks the local hub."""
    monkeypatch.chdir(tmp_path)
    endpoints = {name: os.environ[name] for name in ("MODELSCOPE_ENDPOINT", "MODELSCOPE_HOME", "HF_ENDPOINT", "no_proxy")}
    monkeypatch.setattr(fetch, "_ONLINE", fetch._ONLINE | endpoints)
    return resolve(load_job(str(job_file)), Resources(cpus=2, gpus=0))


def test_a_run_fetches_its_model_once(hub, job_file, tmp_path, repository, monkeypatch):
    hub.cuts["transformer/diffusion_pytorch_model-00001-of-00002.safetensors"] = [70_000]
    hub.token = "very-secret"
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "very-secret")
    command = ("-m", "diffsynth_ray.cli.app", "run", str(job_file), "--set", "training.max_steps=1")
    done = python(*command, cwd=tmp_path, repository=repository)
    assert done.returncode == 0, done.stderr
    assert "Qwen/Qwen-Image: asking ModelScope what it holds" in done.stderr
    assert done.stderr.index("checksums right") < done.stderr.index("starting 2 training worker(s)")
    assert "to be downloaded from modelscope" in done.stderr  # the plan
    fetched = hub.fetched()
    assert len(set(fetched)) == len(fetched) - 1, "once, not once a worker; one file came in two parts"
    assert (tmp_path / "outputs" / "job" / "epoch-0.safetensors").is_file()
    written = [path for path in (tmp_path / "outputs").rglob("*") if path.suffix in (".json", ".txt", ".jsonl", ".csv")]
    assert not any("very-secret" in path.read_text() for path in [*written, *tmp_path.glob("models/**/*.json")])
    assert "very-secret" not in done.stdout + done.stderr


def test_a_wrong_checksum_is_told_and_complete_files_need_no_hub(hub, resolved):
    board = Board.remote()
    hub.broken.add("vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model\.safetensors came with another checksum"):
        fetch.bring_model(resolved, board)
    hub.broken.clear()
    assert fetch.bring_model(resolved, board) is True
    hub.requests.clear()
    hub.close()
    assert fetch.bring_model(resolved, board) is True
    assert hub.requests == []


def test_a_worker_on_a_new_node_brings_what_its_node_lacks(hub, resolved):
    """A node that takes the place of a lost one has no files yet."""
    board = Board.remote()
    hub.token = "unknown here"
    with pytest.raises(HubError, match="refused"):
        fetch.bring_to_worker(resolved, board, rank=1)
    assert "refused" in ray.get(board.take.remote(600.0)).failure.error.message
    hub.token = None
    fetch.bring_to_worker(resolved, board, rank=1)
    assert (Path(resolved.job.model.base_path) / "Qwen/Qwen-Image/vae/diffusion_pytorch_model.safetensors").is_file()
    hub.requests.clear()
    fetch.bring_to_worker(resolved, board, rank=1)
    assert hub.requests == []


def test_a_stop_ends_a_download_too(hub, resolved):
    """Else it would wait for the hub's last byte."""
    hub.hold.clear()
    run_dir = RunDir(resolved.output_path)
    run_dir.path.mkdir(parents=True)
    run_dir.request_stop(reason="a test")
    board = Board.remote()
    assert fetch.bring_model(resolved, board) is False
    assert "stopping before the first step: a test" in ray.get(board.take.remote(600.0)).lines


def test_nodes_that_share_a_disk_download_once(hub, job_file, tmp_path, repository):
    done = python("-c", TWO_NODES, str(job_file), cwd=tmp_path, repository=repository)
    assert done.returncode == 0, done.stderr
    nodes, said = json.loads(done.stdout.splitlines()[-1])
    assert nodes == 2
    assert len(hub.fetched()) == len(set(hub.fetched())) > 5
    assert all(line.startswith("node ") for line in said)
