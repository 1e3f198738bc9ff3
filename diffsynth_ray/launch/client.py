"""A cluster as its dashboard shows it, and Ray Jobs on it: connect, submit, stop.

Small requests go straight to the REST interface, because they need a time-out, a readable error and no import of ray;
submitting and tailing (`launch/follow.py`) go through Ray's JobSubmissionClient.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import shlex
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import diffsynth_ray
from diffsynth_ray.config.resolve import ResolvedJob, Resources
from diffsynth_ray.errors import ClusterError, ExitCode
from diffsynth_ray.launch import embedded
from diffsynth_ray.run_dir import RunDir

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ACTIVE = ("PENDING", "RUNNING")
_TIMEOUT_S = 8.0
_KILL_S = 30.0
_PACKAGE = Path(diffsynth_ray.__file__).resolve().parent
_MAX_CODE_BYTES = 16 << 20


@dataclass(frozen=True)
class Cluster:
    """A reachable cluster."""

    url: str
    """Of the dashboard, which is also the job server."""
    token: str | None
    local: embedded.LocalRay | None = None
    """Set where it is the local Ray of this user."""

    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def request(self, path: str, *, method: str = "GET", timeout_s: float = _TIMEOUT_S) -> Any:
        """The JSON answer of the REST interface. Raises ClusterError with address, cause and cure."""
        request = urllib.request.Request(self.url + path, method=method, headers=self.headers())
        host = urlsplit(self.url).hostname or ""
        loopback = host == "localhost" or host.startswith("127.")
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if loopback else []))
        try:
            with opener.open(request, timeout=timeout_s) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise self._refused(error, path) from error
        except (json.JSONDecodeError, UnicodeDecodeError, http.client.HTTPException) as error:
            raise ClusterError(f"{self.url} does not speak Ray's REST interface", hint=_ADDRESS_HINT) from error
        except OSError as error:  # URLError, time-outs and resets alike
            cause = getattr(error, "reason", None) or error
            raise ClusterError(f"the cluster at {self.url} does not answer: {cause}", hint=_ADDRESS_HINT) from error

    def _refused(self, error: urllib.error.HTTPError, path: str) -> ClusterError:
        if error.code in (401, 403):
            given = "the token was refused" if self.token else "it wants a token and none was found"
            return ClusterError(
                f"the cluster at {self.url} refuses us: {given} (HTTP {error.code})",
                hint="set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that the head was started with",
            )
        body = error.read(500).decode(errors="replace").strip()
        return ClusterError(f"{self.url}{path} answers HTTP {error.code}: {body}", hint=_ADDRESS_HINT)

    def jobs(self) -> list[dict[str, Any]]:
        """All submitted jobs: submission_id, status, metadata, driver_exit_code, message, start_time, end_time."""
        return [job for job in self.request("/api/jobs/") if job.get("submission_id")]

    def job(self, submission_id: str) -> dict[str, Any] | None:
        """One job, or None where the cluster does not know it."""
        return next((job for job in self.jobs() if job["submission_id"] == submission_id), None)


_ADDRESS_HINT = (
    "give the dashboard's address, as in --address http://HEAD:8265 (RAY_API_SERVER_ADDRESS, RAY_ADDRESS), "
    "and check that it can be reached from here"
)


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    state: str
    """SUCCEEDED, FAILED or STOPPED."""
    exit_code: ExitCode
    message: str | None = None
    """Ray's words on a failure."""


def named_address(address: str | None) -> str | None:
    """The cluster that the user names by option or environment; None or "local" = the local Ray."""
    named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    return None if named in (None, "", "local") else named


def connect(address: str) -> Cluster:
    """A named cluster, checked to answer and to accept us. Raises ClusterError within about ten seconds."""
    token = _user_token()
    local = embedded.find()
    if local is not None and token is None and address in (local.address, local.dashboard_url):
        return _of_local(local)
    cluster = Cluster(url=_dashboard_url(address, token), token=token)
    cluster.request("/api/version")
    return cluster


def connect_local() -> Cluster | None:
    """The local Ray where one runs."""
    local = embedded.find()
    return _of_local(local) if local else None


@contextmanager
def open_cluster(address: str | None, resources: Resources, *, say: Callable[[str], None]) -> Iterator[Cluster]:
    """The cluster to submit to; inside the context a local Ray does not go away for lack of jobs."""
    named = named_address(address)
    if named is not None:
        yield connect(named)
        return
    with embedded.lock(say=say):
        yield _of_local(embedded.find_or_start(resources, say=say))


def _of_local(local: embedded.LocalRay) -> Cluster:
    return Cluster(url=local.dashboard_url, token=local.token(), local=local)


def _user_token() -> str | None:
    """The token of a named cluster, from where Ray itself looks for it."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _dashboard_url(address: str, token: str | None) -> str:
    """http(s) addresses as they are; a GCS address (host:6379, ray://) is asked for its dashboard."""
    if address != "auto":
        try:
            parts = urlsplit(address if "://" in address else f"//{address}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ClusterError(f"{address!r} is not an address: {error}", hint=_ADDRESS_HINT) from error
        if host is None:
            raise ClusterError(f"{address!r} is not an address", hint=_ADDRESS_HINT)
        if parts.scheme in ("http", "https"):
            return address.rstrip("/")
        try:
            socket.create_connection((host, port or 8265), timeout=_TIMEOUT_S).close()
        except OSError as error:
            raise ClusterError(f"the cluster at {address} does not answer: {error}", hint=_ADDRESS_HINT) from error
        if parts.scheme == "" and _speaks_http(host, port or 8265, token):
            return f"http://{host}:{port or 8265}"
    return _ask_gcs(address, token)


def _ask_gcs(address: str, token: str | None) -> str:
    local = embedded.find()
    if local is not None and address == local.address:
        return local.dashboard_url
    _set_auth_mode(token)
    from ray.dashboard.utils import get_address_for_submission_client
    from ray.exceptions import RayError

    # Ray itself gives up after 40 s only; a daemon thread does not keep this process from ending.
    answers: list[str] = []
    failures: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(str(get_address_for_submission_client(address)).rstrip("/"))
        except (OSError, RuntimeError, ValueError, RayError) as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_TIMEOUT_S)
    if not answers:
        cause = failures[0] if failures else f"no answer in {_TIMEOUT_S:g} s"
        raise ClusterError(f"the cluster at {address} does not tell its dashboard: {cause}", hint=_ADDRESS_HINT)
    return answers[0]


def _speaks_http(host: str, port: int, token: str | None) -> bool:
    try:
        Cluster(url=f"http://{host}:{port}", token=token).request("/api/version", timeout_s=3)
    except ClusterError as error:
        return "refuses us" in error.message
    return True


def _set_auth_mode(token: str | None) -> None:
    # Ray's client never turns authentication on by itself, and a wrong mode fails late with a misleading message.
    os.environ["RAY_AUTH_MODE"] = "token" if token else "disabled"
    if token:
        os.environ["RAY_AUTH_TOKEN"] = token


def job_client(cluster: Cluster) -> JobSubmissionClient:
    """Ray's own client. Raises ClusterError where the cluster does not answer or refuses us."""
    if cluster.local:
        os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
    # The Authorization header is given explicitly, so that Ray's own reading of tokens must not add another.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # "Uploading package", "WebSocket closed"
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    cluster.request("/api/version")  # Ray's client waits without limit for a host that does not answer
    try:
        return JobSubmissionClient(cluster.url, headers=cluster.headers())
    except (OSError, RuntimeError) as error:
        raise ClusterError(f"the cluster at {cluster.url} does not take us: {error}", hint=_ADDRESS_HINT) from error


def _node_totals(cluster: Cluster) -> list[dict[str, float]]:
    """Ray's resources of all live nodes."""
    answer = cluster.request("/api/v0/nodes?limit=10000")
    return [node.get("resources_total") or {} for node in answer["data"]["result"]["result"] if node.get("state") == "ALIVE"]


def accelerators(cluster: Cluster) -> list[str]:
    """Kinds of GPUs in the cluster, as Ray names them ("H100")."""
    if cluster.local:
        return []
    prefix = "accelerator_type:"
    return sorted({name.removeprefix(prefix) for total in _node_totals(cluster) for name in total if name.startswith(prefix)})


def cluster_resources(cluster: Cluster) -> Resources:
    """CPUs and GPUs of all live nodes."""
    if cluster.local:
        return Resources(cpus=cluster.local.cpus, gpus=cluster.local.gpus)
    totals = _node_totals(cluster)
    return Resources(cpus=sum(total.get("CPU", 0.0) for total in totals), gpus=sum(total.get("GPU", 0.0) for total in totals))


def run_of(submission_id: str) -> tuple[str, int] | None:
    """Run and attempt of a submission id, or None where it is not one of ours."""
    found = re.fullmatch(r"(.+)-a(\d+)", submission_id)
    return (found[1], int(found[2])) if found else None


def job_states(cluster: Cluster, run: str) -> dict[int, dict[str, Any]]:
    """The jobs of a run on the cluster, by attempt."""
    found = {}
    for job in cluster.jobs():
        parsed = run_of(job["submission_id"])
        if parsed and parsed[0] == run:
            found[parsed[1]] = job
    return found


def active_job(cluster: Cluster, run: str) -> dict[str, Any] | None:
    """The run's pending or running job on the cluster, or None."""
    jobs = job_states(cluster, run)
    return next((jobs[number] for number in sorted(jobs, reverse=True) if jobs[number]["status"] in ACTIVE), None)


def next_attempt(cluster: Cluster, resolved: ResolvedJob) -> int:
    """One more than the highest attempt that the cluster or the output path knows."""
    known = [*job_states(cluster, resolved.run)]
    for entry in RunDir(resolved.output_path).attempts():
        parsed = run_of(str(entry.get("submission_id", "")))
        if parsed is None or parsed[0] == resolved.run:
            known.append(int(entry["attempt"]))
    return 1 + max(known, default=0)


def entrypoint(submission_id: str, *, python: str = sys.executable) -> str:
    """Command line of the driver."""
    return f"{entrypoint_of('driver', python=python)} --submission-id {submission_id}"


def entrypoint_of(module: str, *, python: str = sys.executable) -> str:
    """Command line of a module of `launch`. The interpreter is absolute: `python` of the head's PATH may lack ray."""
    return f"{shlex.quote(python)} -m diffsynth_ray.launch.{module} --job job.json"


def submit(resolved: ResolvedJob, cluster: Cluster, *, attempt: int) -> str:
    """Submit a new attempt; returns its submission id. `job.json` is all that travels.

    Raises ClusterError where the cluster has a job of this run and attempt already.
    """
    submission_id = f"{resolved.run}-a{attempt}"
    return submit_entrypoint(
        cluster,
        submission_id=submission_id,
        command=entrypoint(submission_id),
        job_json=resolved.model_dump_json(indent=2),
        metadata={"run": resolved.run, "job": resolved.job.name, "output": str(resolved.output_path)},
    )


def with_any_python(command: str, *, python: str = sys.executable) -> str:
    """A command of our interpreter, run by `python3` where the head does not have ours at the same place."""
    ours = shlex.quote(python)
    if not command.startswith(f"{ours} "):
        return command
    rest = command.removeprefix(ours)
    return f"if [ -x {ours} ]; then exec {ours}{rest}; else exec python3{rest}; fi"


def travelling(cluster: Cluster, job_json: str) -> str:
    """What is sent to the cluster, with its size. Raises ClusterError where the package has grown out of bounds."""
    parts = [f"job.json ({len(job_json.encode()) / 1024:.0f} KB)"]
    if cluster.local is None:
        files = [path for path in _PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        size = sum(path.stat().st_size for path in files)
        if size > _MAX_CODE_BYTES:
            largest = max(files, key=lambda path: path.stat().st_size)
            raise ClusterError(
                f"{_PACKAGE} has {size / 2**20:.0f} MiB, of which {largest} is the largest: code of at most "
                f"{_MAX_CODE_BYTES >> 20} MiB is sent to a cluster",
                hint="move data, weights and outputs out of the package's folder",
            )
        parts.append(f"the package diffsynth_ray ({size / 2**20:.1f} MB)")
    return " and ".join(parts)


def submit_entrypoint(cluster: Cluster, *, submission_id: str, command: str, job_json: str, metadata: dict[str, str]) -> str:
    """Submit a command whose working directory holds job.json; to a cluster of other machines our code travels too."""
    client = job_client(cluster)
    runtime_env: dict[str, Any] = {}
    if cluster.local is None:
        command = with_any_python(command)
        runtime_env["py_modules"] = [str(_PACKAGE)]
        runtime_env["excludes"] = ["__pycache__"]
    with tempfile.TemporaryDirectory(prefix="dsray-job-") as folder:
        (Path(folder) / "job.json").write_text(job_json)
        try:
            return str(client.submit_job(
                entrypoint=command,
                submission_id=submission_id,
                runtime_env={"working_dir": folder, **runtime_env},
                entrypoint_num_cpus=0,
                metadata=metadata,
            ))  # fmt: skip
        except (RuntimeError, OSError) as error:
            raise ClusterError(f"{cluster.url} did not take the job {submission_id}: {error}") from error


def ended(job: dict[str, Any]) -> Ended:
    """How a job in a terminal state ended. The driver's exit code says more than Ray's status."""
    status, code = str(job["status"]), job.get("driver_exit_code")
    if status == "SUCCEEDED":
        return Ended("SUCCEEDED", ExitCode.DONE)
    if status == "STOPPED" or code == ExitCode.STOPPED:
        return Ended("STOPPED", ExitCode.STOPPED)
    return Ended("FAILED", ExitCode.RUN_FAILED, job.get("message"))


def request_end(cluster: Cluster, submission_id: str) -> None:
    """SIGTERM to the driver, which takes it as a wish to stop."""
    cluster.request(f"/api/jobs/{submission_id}/stop", method="POST")


def wait_until_ended(cluster: Cluster, submission_id: str, *, say: Callable[[str], None]) -> Ended:
    """Wait for the job's terminal state; a driver that does not end is killed after a while, on a cluster by Ray."""
    began = told = time.monotonic()
    while True:
        job = cluster.job(submission_id)
        if job is None:
            return Ended("STOPPED", ExitCode.STOPPED, "the cluster no longer knows the job")
        if job["status"] not in ACTIVE:
            return ended(job)
        if time.monotonic() - told > 5:
            told = time.monotonic()
            say(f"waiting for {submission_id} to end, {told - began:.0f} s ...")
            if told - began > _KILL_S:
                if cluster.local:
                    cluster.local.kill_job(submission_id)
                else:
                    request_end(cluster, submission_id)
        time.sleep(0.3)
