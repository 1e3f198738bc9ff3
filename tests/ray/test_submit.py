"""`dsray submit` against the local Ray, with an entrypoint that stands in for the driver."""

import json
import os
import shlex
import signal
import sys
from functools import partial

import pytest
from waiting import wait_until

from diffsynth_ray.cli import app, render
from diffsynth_ray.errors import ExitCode
from diffsynth_ray.launch import client, embedded, registry

pytestmark = pytest.mark.timeout(600)

DRIVER = """
import json, sys, time, signal, os
job = json.load(open('job.json'))
def end(*_):
    print('stopping', flush=True)
    sys.exit(103)
signal.signal(signal.SIGTERM, end)
assert sorted(os.listdir('.')) == ['job.json'], os.listdir('.')
print('driver of', job['run'], flush=True)
seed = job['job']['seed']
if seed == 1: sys.exit(100)
if seed == 2: time.sleep(300)
print('done', flush=True)
"""
JOB = """
[dataset]
base_path = "{folder}"
height = 32
width = 32
[model]
family = "qwen_image"
tiny = true
[lora]
base_model = "dit"
[output]
path = "{folder}/out-{{name}}"
"""


@pytest.fixture
def job_file(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client, "entrypoint", lambda submission_id: shlex.join([sys.executable, "-c", DRIVER]))
    # It knows the jobs of a run for as long as it lasts.
    monkeypatch.setattr(embedded, "find_or_start", partial(embedded.find_or_start, idle_grace_s=500.0))
    Image.new("RGB", (64, 64)).save(tmp_path / "red.png")
    path = tmp_path / "tiny.toml"
    path.write_text(JOB.format(folder=tmp_path))
    yield path
    embedded.stop()


def run(capsys, *arguments):
    capsys.readouterr()
    code = app.main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.usefixtures("a_terminal")
def test_submit_follow_fail_detach_stop(job_file, capsys, monkeypatch):
    code, out, err = run(capsys, "submit", job_file, "--json")
    assert code == ExitCode.DONE, err
    shown = json.loads(out)
    assert shown["state"] == "SUCCEEDED"
    assert shown["submission_id"] == f"{shown['run']}-a1"
    assert f"driver of {shown['run']}\n" in err
    assert err.count("done\n") == 1
    assert "dashboard http://127.0.0.1:" in err
    assert f"dsray stop {shown['run']}" in err

    again = json.loads(run(capsys, "submit", job_file, "--json")[1])
    assert again["submission_id"] == f"{shown['run']}-a2", "a job that did not record its end is a new attempt"
    assert run(capsys, "submit", job_file, "--set", "seed=1")[0] == ExitCode.RUN_FAILED

    def interrupt(self, text):
        render.say(text)
        if "driver of" in text:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(render.LogView, "line", interrupt)
        code, out, err = run(capsys, "submit", job_file, "--set", "seed=2")
    assert code == ExitCode.INTERRUPTED
    assert "goes on" in err
    name = registry.submissions()[-1].run
    assert f"dsray logs -f {name}" in err
    assert run(capsys, "status", name)[0] == ExitCode.NOT_FINISHED
    code, out, err = run(capsys, "submit", job_file, "--set", "seed=2", "--detach", "--json")
    assert (code, json.loads(out)["submission_id"]) == (0, f"{name}-a1"), "the running one is found, not repeated"
    with monkeypatch.context() as patch:
        look, looks = client.active_job, []
        # Two submits at once: the other one's job comes after our look.
        patch.setattr(client, "next_attempt", lambda cluster, resolved: 1)
        patch.setattr(client, "active_job", lambda *of: looks.append(of) or (look(*of) if len(looks) > 1 else None))
        code, out, err = run(capsys, "submit", job_file, "--set", "seed=2", "--detach", "--json")
    assert (code, len(looks), json.loads(out)["submission_id"]) == (0, 2, f"{name}-a1"), err
    assert f"{name}-a1 is already running: following it" in err
    code, out, err = run(capsys, "stop", name, "--now")
    assert (code, out) == (0, f"{name} STOPPED\n")
    # On a busy machine it tells every five seconds that it waits, and nothing else.
    assert [line for line in err.splitlines() if not line.startswith(f"waiting for {name}-a1 to end, ")] == []
    assert run(capsys, "status", name)[0] == ExitCode.STOPPED
    assert "stopping" in run(capsys, "logs", name)[1]
    code, out, _ = run(capsys, "list", "--json")
    assert [each["state"] for each in json.loads(out)["runs"]] == ["STOPPED", "FAILED", "SUCCEEDED"]


def test_a_wrong_token_and_a_relative_path_on_a_named_cluster(job_file, capsys, monkeypatch, tmp_path):
    from diffsynth_ray.config.resolve import Resources

    with embedded.lock():
        local = embedded.find_or_start(Resources(cpus=2, gpus=0), say=lambda line: None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 10)
    code, _, err = run(capsys, "submit", job_file, "--address", local.dashboard_url)
    assert code == ExitCode.CLUSTER
    assert "refuses us" in err
    assert "RAY_AUTH_TOKEN" in err
    monkeypatch.setenv("RAY_AUTH_TOKEN", local.token())
    for address in (local.dashboard_url, local.address):
        cluster = client.connect(address)
        assert cluster.url == local.dashboard_url
    wait_until(lambda: client.cluster_resources(cluster).cpus > 0)  # the dashboard answers a second before the node is there
    arguments = ("submit", job_file, "--address", local.dashboard_url, "--set", "output.path=here")
    code, _, err = run(capsys, *arguments)
    assert code == ExitCode.USAGE
    assert "must be absolute" in err
    code, out, err = run(capsys, "submit", job_file, "--address", local.dashboard_url, "--json")
    assert code == 0, err
    assert json.loads(out)["state"] == "SUCCEEDED"
