"""A cluster of two nodes on this machine, reached from outside with a token: `dsray doctor`, and a run on both nodes.

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
from pathlib import Path

import psutil
import pytest

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
resources_per_worker = {{ CPU = 0.5, half_a_node = 1 }}
[output]
path = "{output}"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head, and a second node on 127.0.0.2; yields the dashboard's address and the token."""
    folder = tmp_path_factory.mktemp("ray")
    token_path = folder / "token"
    token_path.write_text(secrets.token_hex(32))
    ports = _free_ports(5)
    named = dict(zip(("--port", "--dashboard-port", "--ray-client-server-port"), ports, strict=False))
    temp_dir = Path(f"/tmp/dsray-doctor-{os.getpid()}")
    head = head_command(cpus=2, gpus=0, temp_dir=temp_dir, ports=named, object_store_bytes=100 << 20)
    node = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address=127.0.0.1:{ports[0]}",
        "--node-ip-address=127.0.0.2", "--num-cpus=2", "--object-store-memory=104857600",
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
    ]  # fmt: skip
    environment = os.environ | head_environment(token_path, metric_ports=ports[3:5])
    environment.pop("PYTHONPATH", None)
    environment.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")  # "0" keeps Ray on the loopback, and forbids a second node
    extra = ['--resources={"half_a_node": 1}']  # so that each node gets one worker
    started = []
    log_path = folder / "log"
    try:
        with log_path.open("wb") as log:
            for number, command in enumerate((head, node), start=1):
                started.append(subprocess.Popen([*command, *extra], env=environment, stdout=log, stderr=log, cwd="/"))
                _wait_for_nodes(named["--dashboard-port"], token_path, number, log_path)
        yield f"http://127.0.0.1:{named['--dashboard-port']}", token_path.read_text()
    finally:
        _end(started)
        shutil.rmtree(temp_dir, ignore_errors=True)


def _wait_for_nodes(port, token_path, count, log_path):
    reached = client.Cluster(url=f"http://127.0.0.1:{port}", token=token_path.read_text())
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
    """The nodes, the second first, and whatever of theirs does not end with them."""
    ours = [child for process in started for child in psutil.Process(process.pid).children(recursive=True)]
    for process in reversed(started):
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
    for process in [*psutil.wait_procs(ours, timeout=5)[1], *started]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture
def job_file(cluster, tmp_path, photos, monkeypatch):
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster[1])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(photos=photos, output=tmp_path / "out"))
    return path


@pytest.fixture
def doctor(cluster, job_file, capsys):
    def run(*overrides):
        arguments = [part for override in overrides for part in ("--set", override)]
        code = app.main(["doctor", str(job_file), "--address", cluster[0], "--json", *arguments])
        shown = json.loads(capsys.readouterr().out)
        return code, {check["name"]: check for check in shown["checks"]}

    return run


def test_two_nodes_are_looked_at_in_parallel_and_speak_to_each_other(doctor, tmp_path):
    code, checks = doctor()
    failed = {name: check["findings"] for name, check in checks.items() if check["state"] == "failed"}
    assert (code, failed) == (0, {})
    assert checks["cluster"]["findings"][0]["detail"].endswith("took the token")
    where = [finding["where"] for finding in checks["nodes"]["findings"]]
    assert where[0].endswith(" (head)")
    assert where[1:] == ["127.0.0.2"]
    assert [finding["state"] for finding in checks["versions"]["findings"]] == ["ok", "ok"]
    assert "shared with the head" in checks["output"]["findings"][1]["detail"]
    assert checks["all_reduce"]["findings"][0]["detail"].startswith("2 workers on 2 node(s), gloo: ")
    assert checks["all_reduce"]["state"] == "ok"
    assert [path for path in tmp_path.rglob(".dsray-probe-*")] == []


def test_what_is_missing_is_told_of_every_node(doctor):
    code, checks = doctor("dataset.base_path=/nowhere", "distributed.resources_per_worker={ CPU = 0.5, half_a_node = 2 }")
    assert code == ExitCode.UNEXPECTED
    assert len({finding["where"] for finding in checks["data"]["findings"]}) == 2
    assert checks["data"]["state"] == "failed"
    assert checks["resources"]["state"] == "failed"
    assert "of 2 workers with 0.5 CPU, 2 half_a_node only 0 fit" in checks["resources"]["findings"][-1]["detail"]
    assert checks["all_reduce"]["state"] == "skipped"


def test_a_wrong_token_is_exit_3(doctor, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 10)
    code, checks = doctor()
    assert code == ExitCode.CLUSTER
    assert "refuses us" in checks["cluster"]["findings"][0]["detail"]


@pytest.mark.slow
def test_a_run_on_both_nodes_and_the_metrics_that_the_dashboard_shows(cluster, job_file, tmp_path, capsys):
    board = json.loads((Path(__file__).parents[2] / "cluster" / "grafana_dashboard.json").read_text())
    expressions = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    shown = {name for name in re.findall(r"ray_\w+", expressions) if "gpu" not in name}
    scraped: set[str] = set()
    has_ended = threading.Event()

    def scrape():
        while not has_ended.wait(0.5):
            for address in metric_addresses():
                with suppress(OSError), urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as reply:
                    scraped.update(re.findall(r"^(ray_\w+)\{", reply.read().decode(), re.MULTILINE))

    def metric_addresses():
        path = Path(f"/tmp/dsray-doctor-{os.getpid()}/prom_metrics_service_discovery.json")
        return [target for entry in json.loads(path.read_text()) for target in entry["targets"]] if path.exists() else []

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        arguments = ["--address", cluster[0], "--json", "--set", "training.max_steps=30", "--set", "dataset.repeat=20"]
        code = app.main(["submit", str(job_file), *arguments])
    finally:
        has_ended.set()
        thread.join()
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "sending job.json" in captured.err
    assert "the package diffsynth_ray" in captured.err
    assert json.loads(captured.out)["state"] == "SUCCEEDED"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "starting 2 training worker(s)" in log
    assert shown <= scraped, shown - scraped
