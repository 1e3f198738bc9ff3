"""A cluster of three nodes on this machine, reached from outside: `dsray doctor`, and runs on two nodes, one after the other.

The nodes do not have our package: it travels with the jobs.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from line import Line

from diffsynth_ray.cli import app
from diffsynth_ray.errors import ClusterError, ExitCode
from diffsynth_ray.launch import client
from diffsynth_ray.launch.supervisor import _free_ports, head_command, head_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

JOB = """
[dataset]
base_path = "{photos}"
metadata_path = "{photos}/metadata.csv"
max_pixels = 4096
[model]
family = "qwen_image"
tiny = true
[lora]
base_model = "dit"
[distributed]
num_workers = 2
resources_per_worker = {{ CPU = 0.5, place = 1 }}
[output]
path = "{output}"
"""


NODES = 3
ABSENT = re.compile("gpu|validation|transfer")
"""Figures of what this run does not have."""
OTHER_NODES = ("127.0.0.2", "127.0.0.3")


@dataclass(frozen=True)
class Reached:
    """A cluster as a client knows it."""

    port: int
    token: str | None
    temp_dir: Path

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self):
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token} if self.token else {"RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """With token authentication, as `ray up` and the shipped manifests have it."""
    yield from start_cluster(tmp_path_factory, with_token=True)


@pytest.fixture
def open_cluster(tmp_path_factory):
    """Without authentication."""
    yield from start_cluster(tmp_path_factory, with_token=False)


def start_cluster(tmp_path_factory, *, with_token):
    folder = tmp_path_factory.mktemp("ray")
    token_path = folder / "token"
    token_path.write_text(secrets.token_hex(32))
    ports = _free_ports(5)
    named = dict(zip(("--port", "--dashboard-port", "--ray-client-server-port"), ports, strict=False))
    temp_dir = Path(f"/tmp/dsray-doctor-{os.getpid()}-{int(with_token)}")
    head = head_command(cpus=2, gpus=0, temp_dir=temp_dir, ports=named, object_store_bytes=100 << 20)
    node = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address=127.0.0.1:{ports[0]}",
        "--num-cpus=2", "--object-store-memory=104857600",
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
    ]  # fmt: skip
    others = [[*node, f"--node-ip-address={address}"] for address in OTHER_NODES]
    environment = os.environ | head_environment(token_path, metric_ports=ports[3:5])
    environment.pop("PYTHONPATH", None)
    environment.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")  # "0" keeps Ray on the loopback, and forbids a second node
    if not with_token:
        del environment["RAY_AUTH_TOKEN_PATH"]
        environment["RAY_AUTH_MODE"] = "disabled"
    extra = ['--resources={"place": 1}']  # so that each node gets one worker
    reached = Reached(named["--dashboard-port"], token_path.read_text() if with_token else None, temp_dir)
    started = []
    log_path = folder / "log"
    try:
        with log_path.open("wb") as log:
            for number, command in enumerate((head, *others), start=1):
                started.append(subprocess.Popen([*command, *extra], env=environment, stdout=log, stderr=log, cwd="/"))
                _wait_for_nodes(reached, number, log_path)
        yield reached
    finally:
        _end(started)
        shutil.rmtree(temp_dir, ignore_errors=True)


def _wait_for_nodes(cluster, count, log_path):
    reached = client.Cluster(url=cluster.address, token=cluster.token)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if client.cluster_resources(reached).cpus == 2 * count:
                return
        except ClusterError:
            pass
        time.sleep(0.3)
    raise TimeoutError(f"{count} node(s) did not come up: {log_path.read_text()[-2000:]}")


def _end(started):
    """The nodes, the head last, and whatever of theirs does not end with them."""
    ours = [child for process in started for child in psutil.Process(process.pid).children(recursive=True)]
    for process in reversed(started):
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
    for process in [*psutil.wait_procs(ours, timeout=5)[1], *started]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture
def job_file(tmp_path, photos, monkeypatch):
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(photos=photos, output=tmp_path / "out"))
    return path


def enter(cluster, monkeypatch):
    """What a user's shell knows of the cluster."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def doctor(cluster, job_file, capsys, monkeypatch):
    enter(cluster, monkeypatch)

    def run(*overrides):
        arguments = [part for override in overrides for part in ("--set", override)]
        code = app.main(["doctor", str(job_file), "--address", cluster.address, "--json", *arguments])
        shown = json.loads(capsys.readouterr().out)
        return code, {check["name"]: check for check in shown["checks"]}

    return run


def test_all_nodes_are_looked_at_in_parallel_and_speak_to_each_other(doctor, tmp_path):
    code, checks = doctor()
    failed = {name: check["findings"] for name, check in checks.items() if check["state"] == "failed"}
    assert (code, failed) == (0, {})
    assert checks["cluster"]["findings"][0]["detail"].endswith("took the token")
    where = [finding["where"] for finding in checks["nodes"]["findings"]]
    assert where[0].endswith(" (head)")
    assert sorted(where[1:]) == list(OTHER_NODES)
    assert [finding["state"] for finding in checks["versions"]["findings"]] == ["ok"] * NODES
    assert "shared with the head" in checks["output"]["findings"][1]["detail"]
    assert checks["all_reduce"]["findings"][0]["detail"].startswith("2 workers on 2 node(s), gloo: ")
    assert checks["all_reduce"]["state"] == "ok"
    assert [path for path in tmp_path.rglob(".dsray-probe-*")] == []


def test_what_is_missing_is_told_of_every_node(doctor):
    code, checks = doctor("dataset.base_path=/nowhere", "distributed.resources_per_worker={ CPU = 0.5, place = 2 }")
    assert code == ExitCode.UNEXPECTED
    assert len({finding["where"] for finding in checks["data"]["findings"]}) == NODES
    assert checks["data"]["state"] == "failed"
    assert checks["resources"]["state"] == "failed"
    assert "of 2 workers with 0.5 CPU, 2 place only 0 fit" in checks["resources"]["findings"][-1]["detail"]
    assert checks["all_reduce"]["state"] == "skipped"


def test_a_wrong_token_is_exit_3(doctor, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 10)
    code, checks = doctor()
    assert code == ExitCode.CLUSTER
    assert "refuses us" in checks["cluster"]["findings"][0]["detail"]


@pytest.fixture
def line(cluster):
    line = Line(cluster.port)
    yield line
    line.close()


class Scraper:
    """The names of all metrics that the nodes' Prometheus endpoints have served."""

    def __init__(self, temp_dir):
        self._targets = temp_dir / "prom_metrics_service_discovery.json"
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._scrape)
        self.names = set()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._has_ended.set()
        self._thread.join()

    def _scrape(self):
        while not self._has_ended.wait(0.5):
            entries = json.loads(self._targets.read_text()) if self._targets.exists() else []
            for target in (target for entry in entries for target in entry["targets"]):
                with suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as reply:
                    self.names.update(re.findall(r"^(ray_\w+)\{", reply.read().decode(), re.MULTILINE))


def call(capsys, *arguments):
    capsys.readouterr()
    code = app.main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def wait_for_state(capsys, run, *states, timeout_s=240):
    deadline = time.monotonic() + timeout_s
    while True:
        seen = json.loads(call(capsys, "status", run, "--json")[1])
        if seen["state"] in states:
            return seen
        assert time.monotonic() < deadline, seen
        time.sleep(1)


@pytest.mark.timeout(700)
def test_two_runs_of_two_nodes_each_one_after_the_other_and_a_line_that_breaks(
    cluster, line, job_file, tmp_path, capsys, monkeypatch
):
    enter(cluster, monkeypatch)
    board = json.loads((Path(__file__).parents[2] / "cluster" / "grafana_dashboard.json").read_text())
    expressions = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    shown = {name for name in re.findall(r"ray_\w+", expressions) if not ABSENT.search(name)}
    steps = ("--set", "training.max_steps=90", "--set", "dataset.repeat=40")
    with Scraper(cluster.temp_dir) as scraper:
        first = ("submit", job_file, "--address", cluster.address, "--detach", "--json", *steps)
        code, out, err = call(capsys, *first)
        assert code == 0, err
        run = json.loads(out)["run"]
        assert "sending job.json" in err
        assert "the package diffsynth_ray" in err
        second = ("--set", "name=second", "--set", f"output.path={tmp_path}/second", "--set", "training.max_steps=2")
        wait_for_state(capsys, run, "RUNNING")
        deadline = time.monotonic() + 200
        while not (tmp_path / "out" / "progress.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.3)
        code, out, err = call(capsys, "submit", job_file, "--address", line.address, "--detach", "--json", *second)
        assert code == 0, err
        waiting = json.loads(out)
        once = []
        cutter = threading.Timer(3.0, lambda: once.append(line.cut()))
        cutter.start()
        code, out, err = call(capsys, "submit", job_file, "--address", line.address, "--json", *steps)
        cutter.join()
        assert code == 0, err
        assert json.loads(out)["state"] == "SUCCEEDED"
        assert "step 90/90" in err, "followed to the end, whatever was cut"
        cuts = []
        stop = line.cut_every(2.5, cuts)
        code, out, err = call(capsys, "logs", "-f", waiting["run"])
        stop()
        assert code == 0, err
        assert len(cuts) >= 2
        log = (tmp_path / "second" / "log.txt").read_text().splitlines()
        followed = out.splitlines()
        assert any("step 2/2" in line for line in log)
        assert [line for line in followed if line in log] == log, "every line once and in order, whatever was cut"
    assert once
    assert once[0] > 0, "the line was in use when it was cut"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "starting 2 training worker(s)" in log
    assert len(set(re.findall(r"rank \d \(pid \d+ on ([\d.]+)", log))) == 2, "one worker a node"
    assert shown <= scraper.names, shown - scraper.names
    assert "1 of 2 place free; held by " in (tmp_path / "second" / "log.txt").read_text()


@pytest.mark.timeout(400)
def test_a_cluster_without_authentication_takes_a_run_too(open_cluster, job_file, tmp_path, capsys, monkeypatch):
    enter(open_cluster, monkeypatch)
    code, out, err = call(
        capsys, "submit", job_file, "--address", open_cluster.address, "--json", "--set", "training.max_steps=2"
    )
    assert code == 0, err
    assert json.loads(out)["state"] == "SUCCEEDED"
