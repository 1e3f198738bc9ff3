"""The local Ray: start, submit, follow, idle shutdown; nothing of it is left and nothing listens beyond loopback."""

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from waiting import wait_until

from diffsynth_ray.config.resolve import Resources
from diffsynth_ray.errors import ClusterError, ExitCode
from diffsynth_ray.launch import client, embedded, follow

pytestmark = pytest.mark.timeout(600)
CODE = """
import os, time
for i in range(6):
    print(f"line {{i}}", flush=True)
    while i == 2 and not os.path.exists({dropped!r}):
        time.sleep(0.1)
print("end without newline", end="")
"""


@pytest.fixture
def state_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "state"
    embedded.stop()


def start(**options):
    with embedded.lock():
        return embedded.find_or_start(Resources(cpus=2, gpus=0), say=lambda line: None, **options)


def submit(cluster, submission_id, code):
    (command := [sys.executable, "-c", code])
    quoted = " ".join("'" + part.replace("'", "'\"'\"'") + "'" for part in command)
    return client.submit_entrypoint(cluster, submission_id=submission_id, command=quoted, job_json="{}", metadata={"run": "r"})


def listeners(pids):
    return [
        (each.laddr.ip, each.laddr.port)
        for each in psutil.net_connections("inet")
        if each.status == psutil.CONN_LISTEN and each.pid in pids
    ]


def drop_log_streams(dashboard_port):
    """Close this process's connections to the dashboard, as a broken network would, and not those to the other tests' Ray."""
    import socket

    for each in psutil.Process().net_connections("tcp"):
        if each.status != psutil.CONN_ESTABLISHED or each.fd < 0 or each.raddr.port != dashboard_port:
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(each.fd)) as duplicate:  # some end by themselves
            if duplicate.getpeername()[1] == dashboard_port:
                duplicate.shutdown(socket.SHUT_RDWR)


def test_life(state_dir):
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import ray"], check=True)
    import_s = time.monotonic() - began  # how fast this machine is now
    began = time.monotonic()
    local = start(idle_grace_s=4)
    assert time.monotonic() - began < 40 * max(import_s, 1)
    assert start() == local, "a second client finds the first one's Ray"
    assert state_dir.stat().st_mode & 0o777 == 0o700
    assert Path(local.token_path).stat().st_mode & 0o777 == 0o600
    for header in ({}, {"Authorization": "Bearer wrong"}):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(urllib.request.Request(f"{local.dashboard_url}/api/jobs/", headers=header), timeout=10)
        assert refusal.value.code in (401, 403)
    with pytest.raises(ClusterError, match="refuses us"):
        client.Cluster(url=local.dashboard_url, token=None).jobs()

    cluster = client.connect_local()
    assert cluster is not None
    remote = client.Cluster(url=cluster.url, token=cluster.token)
    wait_until(lambda: client.cluster_resources(remote) == Resources(cpus=2, gpus=0), every_s=0.2)
    with embedded.lock():  # it does not end before it was looked at, however long that takes
        dropped = state_dir / "dropped"
        submission_id = submit(cluster, "r-a1", CODE.format(dropped=str(dropped)))
        lines: list[str] = []
        streams: list[int] = []
        original = follow._LogReader.read

        async def counted(self, *args):
            streams.append(len(lines))
            await original(self, *args)

        def drop_once():
            try:
                wait_until(lambda: len(lines) >= 2)
                drop_log_streams(urlsplit(local.dashboard_url).port)
            finally:
                dropped.touch()  # the job waits for it

        follow._LogReader.read = counted
        try:
            thread = threading.Thread(target=drop_once)
            thread.start()
            result = follow.follow(cluster, submission_id, lines.append)
            thread.join()
        finally:
            follow._LogReader.read = original
        own = [line for line in lines if line.startswith(("line", "end"))]
        assert own == [*(f"line {i}" for i in range(6)), "end without newline"]
        assert len(streams) >= 2, "the drop did not happen"
        assert result == client.Ended("SUCCEEDED", ExitCode.DONE)
        assert client.active_job(cluster, "r") is None
        assert list(client.job_states(cluster, "r")) == [1]

        tree = [psutil.Process(local.supervisor_pid), *psutil.Process(local.supervisor_pid).children(recursive=True)]
        ports = listeners({process.pid for process in tree})
        assert len(ports) > 5
        assert {ip.removeprefix("::ffff:") for ip, _ in ports} == {"127.0.0.1"}
    wait_until(lambda: not local.alive(), explain=lambda: "the idle Ray did not end")
    assert not [process for process in tree if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    still = {each.laddr.port for each in psutil.net_connections("inet") if each.status == psutil.CONN_LISTEN}
    assert not still & {port for _, port in ports}
    assert not (state_dir / "local.json").exists()
    assert not Path(local.temp_dir).exists()
    assert not Path(local.token_path).exists()


def test_ends_with_its_head_and_takes_all_jobs_with_it(state_dir):
    local = start()
    cluster = client.connect_local()
    assert cluster is not None
    pid_file = state_dir / "pid"
    code = (
        "import os, subprocess, sys, time; p = subprocess.Popen(['sleep', '1000'], start_new_session=True); "
        f"open({str(pid_file)!r}, 'w').write(str(p.pid)); sys.exit(103)"
    )
    submission_id = submit(cluster, "r-a1", code)
    wait_until(lambda: pid_file.exists() and pid_file.read_text())  # whom we wait for below is killed after a while
    assert client.wait_until_ended(cluster, submission_id, say=lambda line: None).exit_code == ExitCode.STOPPED
    orphan = psutil.Process(int(pid_file.read_text()))
    head = next(
        process
        for process in psutil.Process(local.supervisor_pid).children()
        if "ray.scripts.scripts" in " ".join(process.cmdline())
    )
    head.kill()
    wait_until(lambda: not local.alive())
    assert not (orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE)
    assert embedded.find() is None


def test_a_killed_supervisor_takes_its_head_along(state_dir):
    local = start()
    assert Path(local.temp_dir).parent.stat().st_mode & 0o777 == 0o700, "its sockets are for nobody else"
    supervisor = psutil.Process(local.supervisor_pid)
    tree = supervisor.children(recursive=True)
    supervisor.kill()
    _, left = psutil.wait_procs(tree, timeout=100)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    assert embedded.find() is None


def test_no_job_ends_it(state_dir):
    with embedded.lock():
        local = embedded.find_or_start(Resources(cpus=2, gpus=0), say=lambda line: None, first_job_timeout_s=2)
        time.sleep(4)
        assert local.alive(), "it must not end under a client that holds the lock"
        assert embedded.find() == local
    wait_until(lambda: not local.alive())
