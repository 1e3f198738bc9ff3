"""Checkpoints, data sets and the cache of split training in an S3 bucket, on a server here.

The server is moto's, a program of its own that is looked for on the PATH (`pip install 'moto[server]>=5.2.5'` into any
environment). It brings 80 packages, 300 MB, so that it is none of the `dev` extra's. 5.2.1 refuses what pyarrow writes.
"""

import csv
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass

import psutil
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from line import Line
from pyarrow.fs import FileSystem, LocalFileSystem, copy_files
from training_runs import JOB, Run, distance
from waiting import wait_until

from diffsynth_ray.data import storage
from diffsynth_ray.data.cache import Cache
from diffsynth_ray.data.manifest import manifest_ids
from diffsynth_ray.data.upkeep import delete_garbage, find_garbage, summarize
from diffsynth_ray.errors import ExitCode
from diffsynth_ray.launch.supervisor import _free_ports
from diffsynth_ray.train.checkpoint import find_checkpoints
from diffsynth_ray.train.storage import Storage

MOTO = shutil.which("moto_server")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(MOTO is None, reason="no moto_server on the PATH: pip install 'moto[server]>=5.2.5', not in dev"),
]


@dataclass(frozen=True)
class Bucket:
    """An empty bucket, and how it is reached."""

    port: int
    secret: str

    @property
    def url(self):
        """With everything in it."""
        return f"s3://key:{self.secret}@bucket?scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"

    @property
    def environment(self):
        """What s3:// addresses without anything in them need."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": self.secret,
        }  # fmt: skip


@pytest.fixture
def bucket():
    [port] = _free_ports(1)
    server = subprocess.Popen([MOTO, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = Bucket(port, secrets.token_hex(8))
    wait_until(lambda: any(each.status == "LISTEN" for each in psutil.Process(server.pid).net_connections()))
    FileSystem.from_uri(f"{found.url}&allow_bucket_creation=true")[0].create_dir("bucket")
    yield found
    server.kill()
    server.wait()


@pytest.fixture
def reached(bucket, monkeypatch):
    """The bucket as processes of this test reach it by s3://bucket: through a line that can be cut."""
    line = Line(bucket.port)
    for name, value in (bucket.environment | {"AWS_ENDPOINT_URL": line.address}).items():
        monkeypatch.setenv(name, value)
    storage._s3_of_bucket.cache_clear()
    yield line
    line.close()
    storage._s3_of_bucket.cache_clear()


@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_goes_on_from_checkpoints_in_a_bucket(bucket, tmp_path, photos):
    settings = ("distributed.num_workers=2", "training.max_steps=200", "output.save_steps=200")
    whole, run = Run(tmp_path, photos, "whole"), Run(tmp_path, photos)
    assert whole.start(*settings) == ExitCode.DONE, whole.said
    base = bucket.url.replace("@bucket", "@bucket/runs")
    run.begin(*settings, f"output.checkpoint_path={base}", "output.checkpoint_minutes=0.02", "output.keep_checkpoints=3")
    run.wait_for("checkpoint after step", count=2)
    run.kill(1)
    assert run.end() == ExitCode.DONE, run.said
    assert run.losses() == whole.losses()
    assert distance(whole.weights(200), run.weights(200)) == 0
    assert sum("continuing after step" in line for line in run.said) == 1
    assert not run.dir.checkpoints_dir.exists()
    runs = Storage.at(base)
    [name] = runs.list()
    found = find_checkpoints(Storage(runs.file_system, runs.path(name)))
    assert (len(found), found[0].step) == (3, 200)


STEPS = 4
CACHE = "s3://bucket/cache"


class Runs:
    """`dsray run` in processes of their own, with a Ray that inherits the credentials."""

    def __init__(self, folder):
        self._folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment["DSRAY_STATE_DIR"] = str(folder / "state")

    def command(self, *arguments):
        command = [sys.executable, "-m", "diffsynth_ray.cli.app", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=200)

    def train(self, name, *overrides):
        """(losses by step, what was said) of a run that ends well."""
        path = self.job_path = self._folder / f"{name}.toml"
        path.write_text(JOB.format(photos="s3://bucket/photos", output=self._folder / name))
        settings = (f"training.max_steps={STEPS}", f"output.save_steps={STEPS}", *overrides)
        done = self.command("run", str(path), *(part for each in settings for part in ("--set", each)))
        assert done.returncode == ExitCode.DONE, done.stderr
        with (self._folder / name / "loss.csv").open() as file:
            losses = {int(row["step"]): row["value"] for row in csv.DictReader(file) if row["key"] == "loss"}
        assert len(losses) == STEPS
        return losses, done.stderr


@pytest.fixture
def runs(reached, photos, tmp_path):
    """With the photographs in the bucket, metadata as CSV and as Parquet."""
    system, _ = FileSystem.from_uri("s3://bucket")
    copy_files(str(photos), "bucket/photos", source_filesystem=LocalFileSystem(), destination_filesystem=system)
    table = pyarrow.csv.read_csv(photos / "metadata.csv")
    pq.write_table(table, "bucket/photos/metadata.parquet", filesystem=system)
    return Runs(tmp_path)


def counts(said):
    return re.findall(r"encoded (\d+) texts and (\d+) images, reused (\d+) texts and (\d+) images", said)[-1]


def test_a_data_set_and_a_cache_in_a_bucket_through_a_line_that_breaks(runs, reached, photos):
    local = (f"dataset.base_path={photos}", f"dataset.metadata_path={photos}/metadata.csv")
    expected, _ = runs.train("local", *local)
    assert runs.train("csv")[0] == expected
    cuts = []
    stop = reached.cut_every(1.0, cuts)
    parquet = "dataset.metadata_path=s3://bucket/photos/metadata.parquet"
    split = ("split.enabled=true", f"split.cache_path={CACHE}")
    losses, said = runs.train("split", parquet, *split)
    stop()
    assert sum(cuts) > 0, "the line was in use when it was cut"
    assert losses == expected
    assert counts(said) == ("5", "5", "0", "0")
    losses, said = runs.train("again", *split)
    assert losses == expected
    assert counts(said) == ("0", "0", "5", "5")


def test_a_cache_in_a_bucket_is_looked_after(runs):
    split = ("split.enabled=true", f"split.cache_path={CACHE}")
    expected, _ = runs.train("split", *split)
    report = runs.command("doctor", str(runs.job_path), *(part for each in split for part in ("--set", each)), "--json")
    checks = {check["name"]: check for check in json.loads(report.stdout)["checks"]}
    assert checks["output"]["findings"][-1]["detail"] == f"{CACHE} is writable (split.cache_path)"
    assert checks["data"]["findings"][0]["detail"].startswith("5 rows; ")
    assert checks["data"]["state"] == "ok"
    listed = runs.command("cache", "ls", CACHE, "--json")
    assert listed.returncode == ExitCode.DONE, listed.stderr
    [dataset] = json.loads(listed.stdout)["datasets"]
    assert (dataset["num_rows"], dataset["num_missing"]) == (5, 0)
    assert "10 entries checked, 0 lost" in runs.command("cache", "verify", CACHE).stdout
    # A flipped bit is found, and encoded anew by the next run.
    cache = Cache(CACHE)
    index = cache.index()
    location = next(index.location(place) for place in range(len(index)) if index.location(place).kind == "image")
    content = bytearray(cache.store.read(location.shard))
    content[location.offset] ^= 1
    cache.store.write(location.shard, bytes(content))
    verified = runs.command("cache", "verify", CACHE)
    assert verified.returncode == ExitCode.RUN_FAILED, verified.stderr
    assert re.search(rf"{location.shard}: 1 of \d entries damaged", verified.stdout)
    losses, said = runs.train("mended", *split)
    assert losses == expected
    assert counts(said) == ("0", "1", "5", "4")
    # What no data set refers to goes, but not while a running job may be about to use it.
    kept = runs.command("cache", "gc", CACHE, "--dataset", dataset["id"], "--json")
    assert kept.returncode == ExitCode.DONE, kept.stderr
    assert json.loads(kept.stdout)["shards"] == []
    names = manifest_ids(cache)
    garbage = find_garbage(cache, without=tuple(names), min_age_s=-1)
    assert garbage.num_entries == 11, "the damaged one lies in its shard as before"
    delete_garbage(cache, garbage)
    summary = summarize(cache)
    assert (manifest_ids(cache), summary.num_images, summary.num_texts, summary.num_shards) == ([], 0, 0, 0)
