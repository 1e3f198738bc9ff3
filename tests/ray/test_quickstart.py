"""`dsray submit quickstart` as a newcomer types it, from another directory; nothing is left running afterwards."""

import csv
import http.client
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffsynth_ray.data.media import decode
from diffsynth_ray.models.family import get_family
from diffsynth_ray.models.sampling import SampleRequest
from diffsynth_ray.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


def dsray(*arguments, state_dir, cwd):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "diffsynth_ray.cli.app", *arguments],
        env=environment | {"DSRAY_STATE_DIR": str(state_dir), "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0"},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def listening(pids):
    return {
        connection.laddr.port
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid in pids
    }


def gauges(local_ports):
    """All `ray_dsray_` figures that some metrics port of the local Ray serves."""
    found = {}
    for port in local_ports:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
                text = answer.read().decode(errors="replace")
        except (OSError, ValueError, http.client.HTTPException):  # most ports speak gRPC
            continue
        for line in text.splitlines():
            if line.startswith("ray_dsray_"):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
    return found


def read_rows(photos):
    with (photos / "metadata.csv").open() as file:
        return list(csv.DictReader(file))


def draw(photos, seed, weights=None):
    """A picture a prompt [5, 64, 64, 3], made here from exported weights, or from those that the training begins with."""
    family = get_family("qwen_image").build_tiny(0, dtype=torch.float32, options={"trained_vae": True})
    if weights is not None:
        family.component("dit").load_state_dict(load_file(weights))
    return np.stack([family.sample(SampleRequest(row["prompt"], 64, 64, 1, 20, 1.0, seed))[0] for row in read_rows(photos)])


def made_by(output, step):
    """The pictures that the run has made after a step."""
    return np.stack([np.array(Image.open(RunDir(output).find_sample(step, number))) for number in range(5)])


def nearest(pictures, photos):
    """Which photograph each picture is nearest to."""
    paths = [str(photos / row["image"]) for row in read_rows(photos)]
    originals = np.stack([decode(path, height=64, width=64, num_frames=1)[0] for path in paths])
    errors = ((pictures[:, None].astype(float) - originals[None]) ** 2).mean(axis=(2, 3, 4))
    return errors.argmin(axis=1).tolist()


def test_the_quickstart(tmp_path, photos):
    state_dir, output = tmp_path / "state", tmp_path / "out"
    process = dsray("submit", "quickstart", "--json", "--set", f"output.path={output}", state_dir=state_dir, cwd=tmp_path)
    lines, family, seen = [], set(), {}
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    while process.poll() is None:
        if (state_dir / "local.json").exists():
            supervisor = json.loads((state_dir / "local.json").read_text())["supervisor_pid"]
            if psutil.pid_exists(supervisor):
                family |= {child.pid for child in psutil.Process(supervisor).children(recursive=True)} | {supervisor}
            # The validation's loss is shown before the training's.
            if any("step 20/" in line for line in lines) and not any("ray_dsray_loss" in name for name in seen):
                seen = gauges(listening(family))
        time.sleep(1)
    reader.join()
    assert process.returncode == 0, lines
    result = json.loads(process.stdout.read())
    assert result["state"] == "SUCCEEDED"

    names = {path.name for path in output.iterdir()}
    assert {"step-200.safetensors", "step-400.safetensors", "loss.csv", "log.txt", "tensorboard", "attempts.jsonl"} <= names
    assert "transformer_blocks.1.attn.to_q.weight" in load_file(output / "step-400.safetensors")
    before, *_, after = RunDir(output).validations()
    assert after.loss < 0.5 * before.loss
    each_its_own = [0, 1, 2, 3, 4]
    assert nearest(made_by(output, 0), photos) != each_its_own
    assert nearest(made_by(output, 400), photos) == each_its_own
    for seed in range(3):
        untrained, trained = draw(photos, seed), draw(photos, seed, output / "step-400.safetensors")
        assert nearest(untrained, photos) != each_its_own
        assert nearest(trained, photos) == each_its_own
        if seed == 0:  # the run's own: what is drawn here is of the same weights
            assert abs(untrained.astype(int) - made_by(output, 0)).max() <= 1
            assert abs(trained.astype(int) - made_by(output, 400)).max() <= 1
    assert any("ray_dsray_loss" in name and 'stage="train"' in name and 'rank="0"' in name for name in seen), sorted(seen)

    end = time.monotonic() + 60
    while (left := [pid for pid in family if psutil.pid_exists(pid)]) and time.monotonic() < end:
        time.sleep(0.5)
    assert left == [], "the local Ray ends when no run is active"
    assert not (state_dir / "local.json").exists()

    again = dsray("submit", "quickstart", "--set", f"output.path={output}", state_dir=state_dir, cwd=tmp_path)
    result, message = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "loading the model" not in message
    assert "SUCCEEDED" in result
    assert "--new starts afresh" in message
    status = dsray("status", str(output), "--json", state_dir=state_dir, cwd=tmp_path)
    answer, _ = status.communicate(timeout=60)
    assert (status.returncode, json.loads(answer)["state"]) == (0, "SUCCEEDED")
