"""Fixtures for all tests. Tests of real Ray processes are in tests/ray; nothing in tests/unit starts Ray."""

import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import HealthCheck, settings

# Decided before anything imports ray or tokenizers, and alike for every process that a test starts.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the driver sets it for its workers

# The same examples in every run, so that the commit decides and not chance; no limits of time, for machines that do other
# things; fewer than usual, because some examples are a whole epoch.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40
)
settings.load_profile("repeatable")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def repository() -> Path:
    """Root of the source checkout."""
    return REPOSITORY


@pytest.fixture
def photos() -> Path:
    """The shipped photographs."""
    return REPOSITORY / "jobs" / "data" / "photos"


@pytest.fixture
def a_terminal() -> Iterator[None]:
    """Signals as in a terminal, also for processes that are started: nohup, or a script's background, have them ignored."""
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class HubServer:
    """ModelScope and Hugging Face on one port: listings, files by range, and what can go wrong with them."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        """(kind, repository) -> path -> content."""
        self.cuts: dict[str, list[int]] = {}
        """Path -> bytes of the body after which its next replies break off."""
        self.broken: set[str] = set()
        """Paths whose content is not what the listing says."""
        self.served: dict[str, bytes] = {}
        """Path -> what is served instead, as by an outdated mirror."""
        self.knows_ranges = True
        self.token: str | None = None
        """What a request must bring, or be refused with 401."""
        self.requests: list[tuple[str, str | None]] = []
        """(path with query, Range header) of every request."""
        self.hold = threading.Event()
        """Replies with files wait for it."""
        self.hold.set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                server.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, path: str, content: bytes, *, kind: str = "model") -> None:
        """Put a file into a repository."""
        self.files.setdefault((kind, repo), {})[path] = content

    def add_folder(self, repo: str, folder: Path, *, under: str = "") -> None:
        """Put a folder's files into a repository."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.add(repo, under + path.relative_to(folder).as_posix(), path.read_bytes())

    def fetched(self) -> list[str]:
        """Paths of the files that were asked for, in order."""
        found = []
        for target, _ in self.requests:
            parts = urlsplit(target)
            if "FilePath" in parts.query:
                found.append(parse_qs(parts.query)["FilePath"][0])
            elif "/resolve/" in parts.path:
                found.append(parts.path.split("/resolve/main/")[1])
        return found

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """One request of either hub's interface."""
        self.requests.append((request.path, request.headers.get("Range")))
        if self.token is not None and self.token not in (request.headers.get("Authorization") or ""):
            return self._json(request, 401, {"Message": "a secret of the server", "error": "a secret of the server"})
        parts = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        path, file = parts.path, ""
        listing = re.fullmatch(r"/api(?:/v1)?/(model|dataset)s/([^/]+/[^/]+)/(?:repo/files|repo/tree|tree/main)", path)
        download = re.fullmatch(r"/api/v1/(model|dataset)s/([^/]+/[^/]+)/repo", path)
        resolve = re.fullmatch(r"/(?:(dataset)s/)?([^/]+/[^/]+)/resolve/main/(.+)", path)
        found = listing or download or resolve
        files = self.files.get((found[1] or "model", found[2])) if found else None
        if files is None or found is None:
            return self._json(request, 404, {"Message": "not found", "error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        if listing:
            return self._json(request, 200, self._listing(files, modelscope="/v1/" in path))
        file = resolve[3] if resolve else query["FilePath"]
        if file not in files:
            return self._json(request, 404, {"Message": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        self.hold.wait(30)
        return self._file(request, file, files[file])

    def _listing(self, files: dict[str, bytes], *, modelscope: bool) -> object:
        digests = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
        if modelscope:
            entries = [
                {"Path": path, "Name": path, "Type": "blob", "Size": len(content), "Sha256": digests[path]}
                for path, content in files.items()
            ]
            return {"Code": 200, "Success": True, "Data": {"Files": entries}}
        return [
            {"type": "file", "path": path, "size": len(content)}
            | (
                {"oid": "0" * 40, "lfs": {"oid": digests[path], "size": len(content), "pointerSize": 134}}
                if path.endswith(".safetensors")
                else {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
            )
            for path, content in files.items()
        ]

    def _file(self, request: BaseHTTPRequestHandler, path: str, content: bytes) -> None:
        content = bytes(len(content)) if path in self.broken else self.served.get(path, content)
        total = len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", (request.headers.get("Range") or "") * self.knows_ranges)
        start = int(asked[1]) if asked else 0
        end = int(asked[2]) + 1 if asked and asked[2] else total
        if asked and start >= total:
            return self._json(request, 416, {}, {"Content-Range": f"bytes */{total}"})
        body = content[start:end]
        request.send_response(206 if asked else 200)
        request.send_header("Content-Length", str(len(body)))
        if asked:
            request.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
        request.end_headers()
        cuts = self.cuts.get(path)
        if cuts:
            body = body[: cuts.pop(0)]
            request.close_connection = True
        if request.command != "HEAD":
            request.wfile.write(body)
        return None

    @staticmethod
    def _json(request: BaseHTTPRequestHandler, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        request.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A local model hub that this process and its children ask instead of ModelScope and Hugging Face."""
    server = HubServer()
    for name, value in {
        "MODELSCOPE_ENDPOINT": server.url,
        "MODELSCOPE_HOME": str(tmp_path / "modelscope"),
        "MODELSCOPE_CACHE": str(tmp_path / "modelscope" / "cache"),
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_HUB_OFFLINE": "0",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("MODELSCOPE_API_TOKEN", "HF_TOKEN", "DIFFSYNTH_MODEL_BASE_PATH", "DIFFSYNTH_DOWNLOAD_SOURCE",
                 "DIFFSYNTH_SKIP_DOWNLOAD", "MODELSCOPE_DOMAIN"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    # The libraries have read their settings when they were imported, perhaps by an earlier test.
    import modelscope_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    modelscope_hub.set_default_config(None)
    yield server
    modelscope_hub.set_default_config(None)
    server.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
