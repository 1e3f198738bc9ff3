"""The local one-node Ray that is started when no cluster is named: how clients find, start and stop it.

A process of its own (`launch/supervisor.py`) owns it and writes `local.json` in the state directory. Clients hold the
lock beside it from finding to submitting, so that the supervisor never shuts down under one that is about to submit.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

import diffsynth_ray
from diffsynth_ray.config.resolve import Resources
from diffsynth_ray.errors import ClusterError
from diffsynth_ray.launch.registry import state_dir

START_TIMEOUT_S = 60.0
IDLE_GRACE_S = 10.0
FIRST_JOB_TIMEOUT_S = 120.0
_LOG_LINES = 15


@dataclass(frozen=True)
class LocalRay:
    """The running local Ray: the content of local.json."""

    supervisor_pid: int
    supervisor_started: float
    """Start time of the supervisor's process: tells it from a later process with the same id."""
    address: str
    """host:port of the GCS."""
    dashboard_url: str
    token_path: str
    temp_dir: str
    cpus: float
    gpus: float
    started: float

    def token(self) -> str:
        """The token that every request needs."""
        return Path(self.token_path).read_text().strip()

    def alive(self) -> bool:
        """Whether the supervisor still runs."""
        try:
            process = psutil.Process(self.supervisor_pid)
            return process.create_time() == self.supervisor_started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def kill_job(self, submission_id: str) -> None:
        """SIGKILL to the driver of a job that does not end otherwise."""
        try:
            processes = psutil.Process(self.supervisor_pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                if submission_id in process.cmdline():
                    process.kill()


def state_path() -> Path:
    """The file that tells where the local Ray is."""
    return state_dir() / "local.json"


def log_path() -> Path:
    """Log of the supervisor and of `ray start`."""
    return state_dir() / "local.log"


@contextmanager
def lock(*, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the state lock. Clients hold it from `find_or_start` until the job is submitted."""
    descriptor = os.open(state_dir() / "local.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if say:
                say("waiting for another dsray that is starting or stopping the local Ray ...")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def find() -> LocalRay | None:
    """The running local Ray, or None. A state file that nobody stands behind is removed."""
    try:
        local = LocalRay(**json.loads(state_path().read_text()))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, TypeError):
        state_path().unlink(missing_ok=True)
        return None
    if local.alive():
        return local
    state_path().unlink(missing_ok=True)
    return None


def find_or_start(
    resources: Resources,
    *,
    say: Callable[[str], None],
    idle_grace_s: float = IDLE_GRACE_S,
    first_job_timeout_s: float = FIRST_JOB_TIMEOUT_S,
) -> LocalRay:
    """The running local Ray, else a new one; the caller holds `lock`.

    Raises ClusterError with the log's path and tail where it does not come up.
    """
    local = find()
    if local is not None:
        return local
    say(f"starting a local Ray ({resources.cpus:g} CPUs, {resources.gpus:g} GPUs) ...")
    process = _spawn_supervisor(resources, idle_grace_s=idle_grace_s, first_job_timeout_s=first_job_timeout_s)
    began = time.monotonic()
    told = began
    while time.monotonic() - began < START_TIMEOUT_S:
        local = find()
        if local is not None:
            return local
        if process.poll() is not None:
            break
        if time.monotonic() - told > 10:
            told = time.monotonic()
            say(f"still starting, {told - began:.0f} s (log: {log_path()})")
        time.sleep(0.1)
    if process.poll() is None:
        process.terminate()
    raise ClusterError(
        f"the local Ray did not start; the end of {log_path()}:\n{_tail(log_path())}",
        hint="read the log above; --address names another cluster",
    )


def _spawn_supervisor(resources: Resources, *, idle_grace_s: float, first_job_timeout_s: float) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "diffsynth_ray.launch.supervisor",
        f"--num-cpus={int(resources.cpus)}", f"--num-gpus={int(resources.gpus)}",
        f"--idle-grace={idle_grace_s}", f"--first-job-timeout={first_job_timeout_s}",
    ]  # fmt: skip
    if log_path().exists():
        log_path().replace(log_path().with_suffix(".log.1"))
    with log_path().open("wb") as log:
        # "/": a folder of the user's named ray or torch must not be imported, and stays removable.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=_environment(),
            start_new_session=True,
        )  # fmt: skip


def _environment() -> dict[str, str]:
    """Environment of the supervisor: like ours, and this package importable whether it is installed or a checkout."""
    environment = os.environ | {"DSRAY_STATE_DIR": str(state_dir()), "PYTHONUNBUFFERED": "1"}
    root = str(Path(diffsynth_ray.__file__).parent.parent)
    if Path(root).name != "site-packages":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return environment


def stop(*, timeout_s: float = 30.0) -> bool:
    """Stop the local Ray with everything on it; False where none runs."""
    local = find()
    if local is None:
        return False
    process = psutil.Process(local.supervisor_pid)
    process.terminate()
    try:
        process.wait(timeout_s)
    except psutil.TimeoutExpired as error:
        raise ClusterError(f"the local Ray (process {local.supervisor_pid}) does not end; see {log_path()}") from error
    return True


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return "  (no log)"
    return "\n".join(f"  {line}" for line in lines[-_LOG_LINES:])
