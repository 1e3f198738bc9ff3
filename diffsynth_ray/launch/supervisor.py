"""The process that owns the local Ray (`python -m diffsynth_ray.launch.supervisor`).

It starts the head, watches the jobs and, when none is left, stops everything it ever started: it is a child subreaper,
so that no process of Ray can escape it. Every port listens on the loopback interface only, and every request needs the
token of a file that only this user can read.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from diffsynth_ray.launch.embedded import FIRST_JOB_TIMEOUT_S, IDLE_GRACE_S, START_TIMEOUT_S, LocalRay, lock, state_path
from diffsynth_ray.launch.environment import local_environment
from diffsynth_ray.launch.registry import state_dir
from diffsynth_ray.run_dir import write_whole

_POLL_S = 1.0
_MAX_OBJECT_STORE_BYTES = 2 << 30
_MIN_OBJECT_STORE_BYTES = 80 << 20  # Ray refuses less than 75 MiB
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PORTS = ("--port", "--dashboard-port", "--ray-client-server-port")
_PORT_RANGE = range(20000, 32768)
"""Outside the range of outgoing connections, one of which could take the port before Ray does, and of Ray's workers."""
_LOCAL_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy cannot reach our loopback interface, whatever http_proxy says."""


class _Supervisor:
    """The process behind local.json."""

    def __init__(self, *, cpus: int, gpus: int, idle_grace_s: float, first_job_timeout_s: float) -> None:
        self.cpus = cpus
        self.gpus = gpus
        self.idle_grace_s = idle_grace_s
        self.first_job_timeout_s = first_job_timeout_s
        # Ray opens its folder, with its sockets, to everybody; nobody else gets through the one above. Short, for the sockets.
        self.private_dir = Path(f"/tmp/dsray-{os.getuid()}-{secrets.token_hex(4)}")
        self.temp_dir = self.private_dir / "r"
        self.token = secrets.token_hex(32)
        self.token_path = state_dir() / "token"
        numbers = _free_ports(len(_PORTS) + 2)
        self.ports = dict(zip(_PORTS, numbers[2:], strict=True))
        self.metric_ports = numbers[:2]
        self.dashboard_url = f"http://127.0.0.1:{self.ports['--dashboard-port']}"
        self.head_pid = 0
        self.head_ended = False
        self.asked_to_end = False

    def run(self) -> int:
        """Start, watch, clean up. 0: idle or asked to end; 1: Ray died by itself."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            self._start_head()
            if self._wait_until_ready():
                self._write_state()
                self._watch()
        finally:
            self._clean_up()
        return 1 if self.head_ended and not self.asked_to_end else 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_end = True

    def _start_head(self) -> None:
        self.token_path.unlink(missing_ok=True)
        descriptor = os.open(self.token_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(self.token)
        self.private_dir.mkdir(mode=0o700)
        self.head_pid = subprocess.Popen(
            head_command(
                cpus=self.cpus, gpus=self.gpus, temp_dir=self.temp_dir, ports=self.ports,
                object_store_bytes=_object_store_bytes(),
            ),
            env=os.environ
            | head_environment(self.token_path, metric_ports=self.metric_ports)
            | local_environment(self.dashboard_url),
            stdin=subprocess.DEVNULL,
            cwd="/",
            preexec_fn=_end_with_parent,
        ).pid  # fmt: skip

    def _wait_until_ready(self) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and not self._ended():
            if self._get_jobs(timeout_s=2) is not None:
                return True
            time.sleep(0.1)
        return False

    def _write_state(self) -> None:
        me = psutil.Process()
        local = LocalRay(
            supervisor_pid=me.pid,
            supervisor_started=me.create_time(),
            address=f"127.0.0.1:{self.ports['--port']}",
            dashboard_url=self.dashboard_url,
            token_path=str(self.token_path),
            temp_dir=str(self.temp_dir),
            cpus=self.cpus,
            gpus=self.gpus,
            started=time.time(),
        )
        write_whole(state_path(), json.dumps(asdict(local)))

    def _watch(self) -> None:
        """Return when everything should end; the state file is gone by then."""
        idle_since = time.monotonic()
        patience = self.first_job_timeout_s
        while not self._ended():
            jobs = self._get_jobs(timeout_s=10)
            # No answer counts as busy: a loaded machine must not lose its run.
            if jobs is None or any(_is_active(job) for job in jobs):
                idle_since = time.monotonic()
            if jobs:
                patience = self.idle_grace_s
            if time.monotonic() - idle_since > patience:
                with lock():
                    jobs = self._get_jobs(timeout_s=10)
                    if jobs is not None and not any(_is_active(job) for job in jobs):
                        state_path().unlink(missing_ok=True)
                        return
                idle_since = time.monotonic()
            self._pause(_POLL_S)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._ended():
            time.sleep(0.1)

    def _ended(self) -> bool:
        """Whether there is nothing left to watch. Reaps whatever has died, ours or adopted."""
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.head_ended = True
                break
            if pid == 0:
                break
            self.head_ended |= pid == self.head_pid
        return self.head_ended or self.asked_to_end

    def _get_jobs(self, *, timeout_s: float) -> list[dict[str, Any]] | None:
        request = urllib.request.Request(f"{self.dashboard_url}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"})
        try:
            with _LOCAL_OPENER.open(request, timeout=timeout_s) as reply:
                jobs: list[dict[str, Any]] = json.load(reply)
                return jobs
        except (OSError, urllib.error.URLError, json.JSONDecodeError):
            return None

    def _clean_up(self) -> None:
        state_path().unlink(missing_ok=True)
        if self.head_pid and not self.head_ended:
            # Ray ends its processes in an order that leaves no orphans; what it leaves all the same is killed below.
            os.kill(self.head_pid, signal.SIGTERM)
            deadline = time.monotonic() + 5
            while not self.head_ended and time.monotonic() < deadline:
                self._ended()
                time.sleep(0.05)
        deadline = time.monotonic() + 20
        while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._ended()
            time.sleep(0.05)
        self.token_path.unlink(missing_ok=True)
        shutil.rmtree(self.private_dir, ignore_errors=True)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_with_parent() -> None:
    """In the head: a supervisor that is killed takes it along, or nothing would ever end it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_active(job: dict[str, Any]) -> bool:
    # Jobs of type DRIVER are connections; ours and the users' submissions have an id of their own.
    return job.get("status") in ("PENDING", "RUNNING")


def head_command(*, cpus: int, gpus: int, temp_dir: Path, ports: dict[str, int], object_store_bytes: int) -> list[str]:
    """The `ray start` of the head."""
    return [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
        f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--object-store-memory={object_store_bytes}",
        f"--temp-dir={temp_dir}",
        # The autoscaler's and the log monitor's processes have nothing to do here; they cost seconds of a small machine.
        "--no-monitor", "--include-log-monitor=false",
        # Workers take any free port: the default range 10002-19999 is shared with every other Ray of this machine.
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        *(f"{option}={port}" for option, port in ports.items()),
    ]  # fmt: skip


def head_environment(token_path: Path, *, metric_ports: list[int]) -> dict[str, str]:
    """Environment of the head, which its jobs inherit."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        # Without it `ray start` replaces 127.0.0.1 by the machine's address, and most ports listen on all interfaces.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # A driver that was sent SIGTERM may be writing a checkpoint; Ray's default is to kill it after 3 s.
        "RAY_JOB_STOP_WAIT_TIME_S": "600",
        "RAY_USAGE_STATS_ENABLED": "0",
        "AUTOSCALER_METRIC_PORT": str(metric_ports[0]),
        "DASHBOARD_METRIC_PORT": str(metric_ports[1]),
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
    }


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(_PORT_RANGE, len(_PORT_RANGE)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def _object_store_bytes() -> int:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except FileNotFoundError:
        free = _MAX_OBJECT_STORE_BYTES
    return max(_MIN_OBJECT_STORE_BYTES, min(_MAX_OBJECT_STORE_BYTES, int(free * 0.3)))


def _main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-cpus", type=int, required=True)
    parser.add_argument("--num-gpus", type=int, required=True)
    parser.add_argument("--idle-grace", type=float, default=IDLE_GRACE_S)
    parser.add_argument("--first-job-timeout", type=float, default=FIRST_JOB_TIMEOUT_S)
    options = parser.parse_args()
    return _Supervisor(
        cpus=options.num_cpus,
        gpus=options.num_gpus,
        idle_grace_s=options.idle_grace,
        first_job_timeout_s=options.first_job_timeout,
    ).run()


if __name__ == "__main__":
    sys.exit(_main())
