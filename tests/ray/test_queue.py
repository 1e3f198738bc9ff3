"""Two runs at once on a cluster that has CPUs to decode for one of them only, through the command line."""

import json
import os
import subprocess
import sys

import pytest
from waiting import wait_until

from diffsynth_ray.launch import embedded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture
def dsray(tmp_path, monkeypatch):
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)

    def call(*arguments):
        command = [sys.executable, "-m", "diffsynth_ray.cli.app", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)

    yield call
    embedded.stop()


def submit(dsray, path, *overrides):
    sets = [part for override in (f"output.path={path}", *overrides) for part in ("--set", override)]
    done = dsray("submit", "quickstart", "--detach", "--json", *sets)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["run"]


def status(dsray, run):
    return json.loads(dsray("status", run, "--json").stdout)


def test_a_run_waits_for_its_turn_list_says_why_and_the_urgent_one_goes_first(dsray, tmp_path):
    first = submit(dsray, tmp_path / "first", "name=first", "dataset.repeat=40000")  # goes on until it is stopped
    wait_until(lambda: status(dsray, first)["step"] > 0)
    patient = submit(dsray, tmp_path / "patient", "name=patient", "training.max_steps=2")
    urgent = submit(dsray, tmp_path / "urgent", "name=urgent", "training.max_steps=2", "distributed.priority=1")
    unwanted = submit(dsray, tmp_path / "unwanted", "name=unwanted", "training.max_steps=2")
    for run in (patient, urgent, unwanted):
        seen = wait_until(lambda run=run: (found := status(dsray, run))["state"] == "PENDING" and found["note"] and found)
        assert f"held by {first}" in seen["note"], seen
    listed = dsray("list").stdout
    assert f"{patient} waits for a place on the cluster: " in listed
    assert dsray("stop", unwanted).returncode == 0
    wait_until(lambda: status(dsray, unwanted)["state"] == "STOPPED", 60)
    assert dsray("stop", first).returncode == 0
    wait_until(lambda: status(dsray, urgent)["state"] == "SUCCEEDED")
    assert status(dsray, patient)["state"] in ("PENDING", "RUNNING")
    wait_until(lambda: status(dsray, patient)["state"] == "SUCCEEDED")
    assert status(dsray, first)["state"] == "STOPPED"
