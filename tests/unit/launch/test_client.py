"""The parts of the Jobs client that need no cluster."""

import asyncio
import json
import shlex
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from diffsynth_ray.config.resolve import Resources
from diffsynth_ray.errors import ClusterError, ExitCode
from diffsynth_ray.launch import client, follow
from diffsynth_ray.launch.client import Cluster, Ended

pytestmark = pytest.mark.timeout(200)


class Dashboard:
    """Answers GET requests from a dictionary: path -> (status, text)."""

    def __init__(self):
        self.answers = {}
        self.authorizations = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.authorizations.append(self.headers.get("Authorization"))
                status, text = outer.answers.get(self.path, (404, "no such page"))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def dashboard(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nonexistent")
    served = Dashboard()
    yield served
    served.server.shutdown()


class Streams:
    """A job client whose log streams break off: each has its chunks and perhaps an error."""

    def __init__(self, *streams):
        self.streams = list(streams)

    async def tail_job_logs(self, submission_id):
        for chunk in self.streams.pop(0):
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


def read(lines, *streams, log=None):
    job_client, reader = Streams(*streams), follow._LogReader(lines.append)
    for _ in range(len(streams)):
        asyncio.run(reader.read(job_client, "x"))
    reader.finish(log)


def test_who_no_longer_takes_the_lines_ends_the_following(monkeypatch):
    """`dsray logs -f RUN | head -1`: at the next line, not at the end of the run."""
    streams, given = Streams(["a\nb\n"], ["a\nb\nc\n"]), []
    monkeypatch.setattr(follow, "job_client", lambda cluster: streams)
    jobs = iter([{"status": "RUNNING"}, {"status": "RUNNING"}, {"status": "SUCCEEDED"}])
    monkeypatch.setattr(Cluster, "job", lambda self, submission_id: next(jobs))

    def take(line):
        if given:
            raise BrokenPipeError(32, "Broken pipe")
        given.append(line)

    with pytest.raises(BrokenPipeError):
        follow.follow(Cluster(url="http://127.0.0.1:9", token=None), "x", take)
    assert (given, len(streams.streams)) == (["a"], 1)


def test_a_reconnected_stream_repeats_and_loses_nothing():
    lines = []
    read(lines, ["a\nb", OSError("gone")], ["a\n", "bb\nc"], ["a\nbb\nccc\n", RuntimeError("closed")], log="a\nbb\nccc\nend")
    assert lines == ["a", "bb", "ccc", "end"]


def test_a_log_that_cannot_be_read_again_leaves_what_the_stream_brought():
    lines = []
    read(lines, ["a\nb\n"], log=None)
    assert lines == ["a", "b"]


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, Ended("SUCCEEDED", ExitCode.DONE)),
        ({"status": "STOPPED"}, Ended("STOPPED", ExitCode.STOPPED)),
        ({"status": "FAILED", "driver_exit_code": 103}, Ended("STOPPED", ExitCode.STOPPED)),
        ({"status": "FAILED", "driver_exit_code": 100, "message": "m"}, Ended("FAILED", ExitCode.RUN_FAILED, "m")),
        ({"status": "FAILED", "driver_exit_code": -9}, Ended("FAILED", ExitCode.RUN_FAILED)),
    ],
)
def test_the_drivers_exit_code_says_how_a_job_ended(job, expected):
    assert client.ended(job) == expected


def test_submission_ids():
    assert client.run_of("my-a1-0123abcd-a12") == ("my-a1-0123abcd", 12)
    assert client.run_of("raysubmit_x") is None


def test_address_by_option_then_environment(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert client.named_address(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "b:6379")
    assert client.named_address(None) == "b:6379"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://a:8265")
    assert client.named_address(None) == "http://a:8265"
    assert client.named_address("http://c:1") == "http://c:1"
    assert client.named_address("local") is None


def test_resources_are_those_of_live_nodes(dashboard):
    nodes = [
        {"state": "ALIVE", "resources_total": {"CPU": 8.0, "GPU": 2.0}},
        {"state": "ALIVE", "resources_total": {"CPU": 4.0}},
        {"state": "DEAD", "resources_total": {"CPU": 64.0, "GPU": 8.0}},
    ]
    dashboard.answers["/api/v0/nodes?limit=10000"] = (200, json.dumps({"data": {"result": {"result": nodes}}}))
    assert client.cluster_resources(Cluster(url=dashboard.url, token=None)) == Resources(cpus=12, gpus=2)


def test_jobs_of_a_run(dashboard):
    jobs = [
        {"submission_id": "r-a1", "status": "FAILED"},
        {"submission_id": "r-a2", "status": "RUNNING"},
        {"submission_id": "r2-a3", "status": "RUNNING"},
        {"submission_id": None, "status": "RUNNING", "type": "DRIVER"},
    ]
    dashboard.answers["/api/jobs/"] = (200, json.dumps(jobs))
    cluster = Cluster(url=dashboard.url, token=None)
    assert sorted(client.job_states(cluster, "r")) == [1, 2]
    assert client.active_job(cluster, "r") == jobs[1]
    assert client.active_job(cluster, "other") is None


def test_the_token_goes_as_bearer(dashboard, monkeypatch):
    dashboard.answers["/api/version"] = (200, "{}")
    client.connect(dashboard.url + "/")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    client.connect(dashboard.url.removeprefix("http://"))
    assert dashboard.authorizations[0] is None
    assert set(dashboard.authorizations[1:]) == {"Bearer secret"}


@pytest.mark.parametrize(("status", "text"), [(401, "no"), (403, "no"), (500, "broken"), (200, "<html>")])
def test_refusals_say_address_and_cure(dashboard, status, text):
    dashboard.answers["/api/version"] = (status, text)
    with pytest.raises(ClusterError) as failure:
        client.connect(dashboard.url)
    assert dashboard.url in failure.value.message
    assert failure.value.hint
    assert ("token" in failure.value.message) == (status in (401, 403))


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:9", "ray://127.0.0.1:9", "http://no.such.host.invalid:1"])
def test_unreachable_is_quick(address, monkeypatch):
    """Whatever this machine's network does with names that nobody has."""
    resolve = socket.getaddrinfo

    def nobody(host, *arguments, **options):
        if host == "no.such.host.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setenv("NO_PROXY", "*")
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(ClusterError, match="does not answer"):
            client.connect(address)
    assert time.monotonic() - began < 10, "the second time, when all is imported"


def test_the_entrypoint_is_absolute():
    python, dash_m, module, *_ = client.entrypoint("r-a1").split()
    assert python.startswith("/")
    assert (dash_m, module) == ("-m", "diffsynth_ray.launch.driver")


def test_a_command_runs_where_our_interpreter_is_not(tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\necho other $*\n")
    (tmp_path / "python3").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for python, said in (("/no where/python", "other -m x 'a b'"), ("/bin/echo", "-m x 'a b'")):
        command = client.with_any_python(f"{shlex.quote(python)} -m x \"'a b'\"", python=python)
        done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{said}\n"
    assert client.with_any_python("make all") == "make all"


def test_what_travels_is_listed_and_bounded(monkeypatch, tmp_path):
    remote = Cluster(url="http://x", token=None)
    listed = client.travelling(remote, "{}" * 2048)
    assert listed.startswith("job.json (4 KB) and the package diffsynth_ray (")
    assert float(listed.rsplit("(", 1)[1].split()[0]) < 4, "MB; about two are the tiny VAE's"
    (tmp_path / "weights.bin").write_bytes(b"x" * 2000)
    monkeypatch.setattr(client, "_PACKAGE", tmp_path)
    monkeypatch.setattr(client, "_MAX_CODE_BYTES", 1000)
    with pytest.raises(ClusterError, match=r"weights\.bin is the largest"):
        client.travelling(remote, "{}")


@pytest.mark.parametrize("address", ["http://[::1", "http://", "https://head:port", "head:99999"])
def test_an_address_that_is_none_is_told_as_such(dashboard, monkeypatch, tmp_path, address):
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path))
    with pytest.raises(ClusterError, match="is not an address"):
        client.connect(address)


def test_a_driver_that_does_not_end_is_ended_on_a_named_cluster_too(monkeypatch):
    """Its Ray sends SIGTERM, and SIGKILL where that does not help; who only waited would wait for ever."""
    now, told, requests = [0.0], [], []

    class Away:
        local = None

        def job(self, submission_id):
            return {"status": "STOPPED" if requests else "RUNNING"}

        def request(self, path, *, method):
            requests.append((method, path))

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(client, "time", clock)
    assert client.wait_until_ended(Away(), "run-a1", say=told.append).state == "STOPPED"
    assert requests == [("POST", "/api/jobs/run-a1/stop")]
    assert 30 < now[0] < 40
    assert told[0] == "waiting for run-a1 to end, 5 s ..."
