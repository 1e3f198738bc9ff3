"""What `dsray doctor` looks at on one node. Imports no Ray: the same functions serve this machine and every node."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from diffsynth_ray import __version__
from diffsynth_ray.errors import DsrayError, OutputError, first_line

State = Literal["ok", "warning", "failed", "skipped"]
MUST_BE_EQUAL = ("python", "dsray", "ray", "torch", "diffusers", "transformers", "peft", "deepspeed")
_SHOULD_BE_EQUAL = ("numpy", "pyarrow", "pillow", "safetensors", "decord")
_MIN_FREE_GIB = 20.0
_MIN_SHM_GIB = 1.0
_FP8_CAPABILITY = (8, 9)
_GPU_TIMEOUT_S = 60.0
_CUDA_PROGRAM = (
    "import json, torch; "
    "print(json.dumps([torch.version.cuda, torch.cuda.is_available(), torch.cuda.device_count(), "
    "hasattr(torch, 'float8_e4m3fn')]))"
)


@dataclass(frozen=True)
class Finding:
    """What one check found in one place."""

    check: str
    """Name of the check, from `CHECKS`."""
    where: str
    """"here", "cluster" or the node's address."""
    state: State
    detail: str
    cure: str = ""
    """What to do about a warning or failure."""

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


CHECKS = {
    "job": "job file",
    "cluster": "cluster and authentication",
    "resources": "resources for the plan",
    "nodes": "nodes run our code",
    "versions": "versions",
    "output": "output, cache and checkpoints, writable and shared",
    "data": "data",
    "weights": "weights",
    "decoding": "decoding of pictures and videos",
    "disk": "disk space",
    "shm": "/dev/shm",
    "gpu": "GPUs",
    "fp8": "FP8",
    "all_reduce": "all-reduce between the workers",
}
"""The checks in their order; a check's number is its place here."""


@dataclass(frozen=True)
class Request:
    """What is to be looked at; travels to the cluster as JSON."""

    output_path: str | None = None
    cache_path: str | None = None
    """Where split training keeps encoded samples; None without it."""
    checkpoint_path: str | None = None
    """Where checkpoints go; None = under the output path."""
    base_path: str | None = None
    metadata_path: str | None = None
    data_file_keys: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    """Files and folders that the job names."""
    fp8: bool = False
    """Whether the job stores weights in FP8."""
    num_workers: int | None = None
    resources_per_worker: dict[str, float] | None = None

    def to_json(self) -> str:
        """For `from_json` in another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """What `to_json` wrote."""
        return cls(**json.loads(text))


def check_node(request: Request, *, where: str, ray_gpus: float, probe: str | None = None) -> list[Finding]:
    """All checks of this machine. `ray_gpus`: GPUs that Ray thinks it has; `probe`: a file that another node wrote."""
    checks: dict[str, Iterator[tuple[State, str, str]]] = {
        "output": chain(_output(request.output_path, probe), _apart(request)),
        "data": _data(request),
        "weights": _weights(request.weights),
        "decoding": _decoding(),
        "disk": _disk(request),
        "shm": _shm(),
    }
    findings = [Finding(name, where, state, detail, cure) for name, check in checks.items() for state, detail, cure in check]
    return findings + _gpu_findings(where, ray_gpus=ray_gpus, fp8=request.fp8)


def versions() -> dict[str, str]:
    """Versions of Python, dsray and the libraries that have a say in a run's numbers or in Ray's protocol."""
    found = {"python": platform.python_version(), "dsray": __version__}
    for name in (*MUST_BE_EQUAL[2:], *_SHOULD_BE_EQUAL):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def compare_versions(by_node: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Findings about versions; the first node (the head) is what the others are held against."""
    (head, wanted), *others = by_node.items()
    missing = [name for name in MUST_BE_EQUAL if wanted[name] == "missing"]
    shown = ", ".join(f"{name} {wanted[name]}" for name in MUST_BE_EQUAL)
    cure = "install the missing packages: pip install diffsynth_ray"
    findings = [Finding("versions", head, "failed" if missing else "ok", shown, cure if missing else "")]
    for node, found in others:
        unequal = [name for name in wanted if found.get(name) != wanted[name]]
        hard = [name for name in unequal if name in MUST_BE_EQUAL]
        detail = ", ".join(f"{name} {found.get(name)} (head: {wanted[name]})" for name in unequal) or "as on the head"
        cure = "use one image or environment on all nodes (cluster/Dockerfile)" if unequal else ""
        findings.append(Finding("versions", node, "failed" if hard else "warning" if unequal else "ok", detail, cure))
    return findings


def write_probe(output_path: str) -> str | None:
    """Write a file below the output path, or the deepest folder above it that exists; None where that cannot be done."""
    path = _existing(Path(output_path)) / f".dsray-probe-{secrets.token_hex(8)}"
    try:
        path.write_text(path.name)
    except OSError:
        return None
    return str(path)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _output(path: str | None, probe: str | None) -> Iterator[tuple[State, str, str]]:
    if path is None:
        yield "skipped", "no job", ""
        return
    if "://" in path:
        yield "skipped", f"{path} is not a folder of this machine", ""
        return
    folder = _existing(Path(path))
    own = write_probe(path)
    if own is None:
        yield (
            "failed",
            f"{folder} cannot be written by user {os.getuid()}",
            "choose another output.path or mend its permissions",
        )
        return
    Path(own).unlink(missing_ok=True)
    if probe is None:
        yield "ok", f"{folder} is writable", ""
    elif sees(probe):
        yield "ok", f"{folder} is writable, and shared with the head", ""
    else:
        yield (
            "failed",
            f"{folder} is another folder here than on the head: what it wrote there is not seen",
            "put output.path on storage that every node mounts at the same place",
        )


def _apart(request: Request) -> Iterator[tuple[State, str, str]]:
    """A small file is written, read back and deleted where the run writes beside the output path: in a folder or at a URL."""
    places = {"split.cache_path": request.cache_path, "output.checkpoint_path": request.checkpoint_path}
    for key, path in ((key, path) for key, path in places.items() if path is not None):
        shown = path.rpartition("@")[2].partition("?")[0]  # an address may hold a password
        cause = _why_not_writable(path)
        cure = f"choose another {key}, or mend its permissions, the network, the credentials in the nodes' environment"
        yield ("ok", f"{shown} is writable ({key})", "") if cause is None else ("failed", f"{shown} ({key}): {cause}", cure)


def _why_not_writable(path: str) -> str | None:
    from diffsynth_ray.train.storage import Storage

    name = f".dsray-probe-{secrets.token_hex(8)}"
    path = path.removeprefix("file://")
    try:
        storage = Storage.at(path if "://" in path else _existing(Path(path)))
    except (OSError, OutputError):
        return "no address that pyarrow can open"
    try:
        storage.write_text(name, name)
        is_same = storage.read_text(name) == name
        storage.delete(name)
    except OSError as error:
        return f"cannot be written: {error.strerror or first_line(error)}"
    return None if is_same else "what was written there reads differently"


def sees(probe: str) -> bool:
    """Whether the file that `write_probe` wrote elsewhere is here, with its content."""
    try:
        return Path(probe).read_text() == Path(probe).name
    except OSError:
        return False


def _data(request: Request) -> Iterator[tuple[State, str, str]]:
    if request.base_path is None:
        yield "skipped", "no job", ""
        return
    from diffsynth_ray.data.media import read_info
    from diffsynth_ray.data.metadata import read_metadata
    from diffsynth_ray.data.storage import is_url, read_stamps

    try:
        metadata = read_metadata(
            request.base_path, request.metadata_path, data_file_keys=request.data_file_keys, check_files=False
        )
        rows = sorted({0, len(metadata) // 2, len(metadata) - 1})
        files = [file for row in rows for column in metadata.file_columns for file in metadata.files(row, column)]
        for file in files:
            # Of a URL the whole file would be fetched: that its server answers for it is enough.
            if not is_url(file) or read_stamps([file])[file] is None:
                read_info(file)
    except DsrayError as error:
        yield "failed", error.message, error.hint or "mount the data on every node at the same place"
        return
    yield "ok", f"{len(metadata)} rows; {len(files)} files of the first, middle and last one can be read", ""


def _weights(paths: list[str]) -> Iterator[tuple[State, str, str]]:
    if not paths:
        yield "skipped", "the job names no weight files", ""
        return
    problems, total = [], 0
    for path in paths:
        try:
            total += _read_a_byte(Path(path))
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
    if problems:
        yield "failed", "; ".join(problems), "put the weights on storage that every node mounts at the same place"
    else:
        yield "ok", f"{len(paths)} files and folders, {total / 2**30:.1f} GiB", ""


def _read_a_byte(path: Path) -> int:
    """Size in bytes; raises OSError where it cannot be read."""
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file())
    with path.open("rb") as file:
        file.read(1)
    return path.stat().st_size


def _decoding() -> Iterator[tuple[State, str, str]]:
    try:
        importlib.import_module("PIL.Image")
        importlib.import_module("decord")
    except (ImportError, OSError) as error:
        yield "failed", f"{type(error).__name__}: {error}", "pip install pillow decord"
        return
    yield "ok", f"Pillow {importlib.metadata.version('pillow')}, decord {importlib.metadata.version('decord')}", ""


def _disk(request: Request) -> Iterator[tuple[State, str, str]]:
    places = {"output.path": request.output_path, "split.cache_path": request.cache_path}
    named = {key: path for key, path in places.items() if path is not None and "://" not in path}
    for key, path in (named or {"temporary files": "/tmp"}).items():
        folder = _existing(Path(path))
        free = shutil.disk_usage(folder).free / 2**30
        low = free < _MIN_FREE_GIB
        cure = "free some, or choose another place; checkpoints hold 12 bytes a trained parameter, two of them are kept"
        yield "warning" if low else "ok", f"{free:.0f} GiB free at {folder} ({key})", cure if low else ""


def _shm() -> Iterator[tuple[State, str, str]]:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        yield "warning", "there is no /dev/shm", "Ray falls back to /tmp, which is slow; mount a tmpfs there"
        return
    total, free = usage.total / 2**30, usage.free / 2**30
    low = total < _MIN_SHM_GIB
    cure = "give containers more: docker run --shm-size=8g, an emptyDir of medium Memory in Kubernetes"
    yield "warning" if low else "ok", f"{free:.1f} of {total:.1f} GiB free", cure if low else ""


def _gpu_findings(where: str, *, ray_gpus: float, fp8: bool) -> list[Finding]:
    gpus = _nvidia_smi()
    if not gpus:
        if ray_gpus:
            cure = "start Ray where nvidia-smi works, or without --num-gpus"
            return [
                Finding("gpu", where, "failed", f"Ray counts {ray_gpus:g} GPUs, nvidia-smi shows none", cure),
                Finding("fp8", where, "skipped", "no GPU"),
            ]
        return [Finding("gpu", where, "skipped", "no GPU"), Finding("fp8", where, "skipped", "no GPU")]
    return [_gpu(where, gpus, ray_gpus=ray_gpus), _fp8(where, gpus, wanted=fp8)]


def _gpu(where: str, gpus: list[dict[str, str]], *, ray_gpus: float) -> Finding:
    kinds = ", ".join(sorted({f"{gpu['name']} {int(gpu['memory.total']) / 1024:.0f} GiB" for gpu in gpus}))
    shown = f"{len(gpus)} x {kinds}"
    torch_says = _torch_cuda()
    if torch_says is None or not torch_says[1]:
        version = f"CUDA {torch_says[0]}" if torch_says and torch_says[0] else "no CUDA"
        cure = "install PyTorch for CUDA, and a driver that is new enough for it"
        return Finding("gpu", where, "failed", f"{shown}, but PyTorch (built for {version}) cannot use them", cure)
    if ray_gpus != len(gpus):
        cure = "as intended where CUDA_VISIBLE_DEVICES or --num-gpus hides some from Ray"
        return Finding("gpu", where, "warning", f"{shown}, of which Ray counts {ray_gpus:g}", cure)
    used = max(int(gpu["memory.used"]) for gpu in gpus) / 1024
    if used > 2:
        cure = "another program, or a run, uses it: nvidia-smi"
        return Finding("gpu", where, "warning", f"{shown}; up to {used:.0f} GiB are in use", cure)
    return Finding("gpu", where, "ok", f"{shown}, CUDA {torch_says[0]}")


def _fp8(where: str, gpus: list[dict[str, str]], *, wanted: bool) -> Finding:
    capabilities = sorted(tuple(int(part) for part in gpu["compute_cap"].split(".")) for gpu in gpus)
    lowest = ".".join(str(part) for part in capabilities[0])
    if capabilities[0] >= _FP8_CAPABILITY:
        return Finding("fp8", where, "ok", f"compute capability {lowest} multiplies in FP8")
    detail = f"compute capability {lowest} stores FP8 but does not multiply in it (8.9 does)"
    cure = "model.fp8_models saves memory here, and costs time" if wanted else ""
    return Finding("fp8", where, "warning" if wanted else "ok", detail, cure)


def _nvidia_smi() -> list[dict[str, str]]:
    fields = ("index", "name", "memory.total", "memory.used", "compute_cap")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def _torch_cuda() -> tuple[str | None, bool, int, bool] | None:
    # In a process of its own: Ray hides the GPUs from tasks that ask for none, and CUDA's memory would stay taken.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CUDA_PROGRAM], capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=True,
            env=environment,
        )  # fmt: skip
        version, available, count, has_fp8 = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return version, available, count, has_fp8
