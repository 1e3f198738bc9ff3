"""Checkpoints in an S3 bucket, written by time, with a killed worker; needs `pip install 'moto[server]'`."""

import secrets
import shutil
import subprocess

import psutil
import pytest
from pyarrow.fs import FileSystem
from training_runs import Run, distance, wait_until

from diffsynth_ray.errors import ExitCode
from diffsynth_ray.launch.supervisor import _free_ports
from diffsynth_ray.train.checkpoint import find_checkpoints
from diffsynth_ray.train.storage import Storage

MOTO = shutil.which("moto_server")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(MOTO is None, reason="moto_server is not installed"),
    pytest.mark.usefixtures("local_ray"),
]


@pytest.fixture
def bucket():
    """URL of an empty bucket."""
    [port] = _free_ports(1)
    server = subprocess.Popen([MOTO, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"s3://key:{secrets.token_hex(8)}@bucket?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
    wait_until(lambda: any(each.status == "LISTEN" for each in psutil.Process(server.pid).net_connections()))
    FileSystem.from_uri(f"{url}&allow_bucket_creation=true")[0].create_dir("bucket")
    yield url
    server.kill()
    server.wait()


def test_a_killed_worker_goes_on_from_checkpoints_in_a_bucket(bucket, tmp_path, photos):
    settings = ("distributed.num_workers=2", "training.max_steps=30", "output.save_steps=30")
    whole, run = Run(tmp_path, photos, "whole"), Run(tmp_path, photos)
    assert whole.start(*settings) == ExitCode.DONE, whole.said
    base = bucket.replace("@bucket", "@bucket/runs")
    run.begin(*settings, f"output.checkpoint_path={base}", "output.checkpoint_minutes=0.02", "output.keep_checkpoints=3")
    run.wait_for("checkpoint after step", count=2)
    run.kill(1)
    assert run.end() == ExitCode.DONE, run.said
    assert run.losses() == whole.losses()
    assert distance(whole.weights(30), run.weights(30)) == 0
    assert sum("continuing after step" in line for line in run.said) == 1
    assert not run.dir.checkpoints_dir.exists()
    storage = Storage.at(bucket.replace("@bucket", "@bucket/runs"))
    [name] = storage.list()
    found = find_checkpoints(Storage(storage.file_system, storage.path(name)))
    assert (len(found), found[0].step) == (3, 30)
