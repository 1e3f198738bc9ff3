"""The workers' process group as Ray Train's controller makes it, with a group of workers that records its calls."""

import pickle
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray.train.torch
import torch
import torch.distributed as dist

from diffsynth_ray.launch import process_group
from diffsynth_ray.launch.process_group import ProcessGroup

CONFIG = ProcessGroup(backend="gloo", timeout_s=70)


class Workers:
    """Three workers; runs nothing."""

    def __init__(self):
        self.calls = []

    def __len__(self):
        return 3

    def execute_single(self, rank, function):
        assert (rank, function) == (0, process_group._free_address)
        return "10.0.0.1", 4711

    def execute_single_async(self, rank, function, **given):
        self.calls.append((rank, function, given))
        return f"reference {rank}"


def test_all_workers_meet_at_rank_zero(monkeypatch):
    waited = []
    monkeypatch.setattr(ray, "get", waited.extend)
    workers = Workers()
    CONFIG.backend_cls().on_start(workers, CONFIG)
    common = {"address": "10.0.0.1", "port": 4711, "world_size": 3, "config": CONFIG}
    assert workers.calls == [(rank, process_group._join, {"world_rank": rank} | common) for rank in range(3)]
    assert waited == ["reference 0", "reference 1", "reference 2"]


def test_a_worker_joins_with_the_variables_of_torchrun(monkeypatch):
    context = SimpleNamespace(get_local_rank=lambda: 1, get_local_world_size=lambda: 2, get_node_rank=lambda: 3)
    environment, joined = {}, []
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(process_group.os, "environ", environment)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: joined.append((backend, given)))
    process_group._join(address="10.0.0.1", port=4711, world_rank=7, world_size=8, config=CONFIG)
    expected = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711", "RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    expected |= {"LOCAL_WORLD_SIZE": "2", "NODE_RANK": "3", "ACCELERATE_TORCH_DEVICE": "cpu"}
    assert environment.items() >= expected.items()
    ((backend, given),) = joined
    assert (backend, given["rank"], given["world_size"], given["timeout"].total_seconds()) == ("gloo", 7, 8, 70)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_port_is_free(monkeypatch, address):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    host, port = process_group._free_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((host, port))


def test_who_holds_one_imports_no_torch_and_shows_its_version(tmp_path):
    (tmp_path / "config").write_bytes(pickle.dumps(CONFIG))
    program = (
        "import pathlib, pickle, sys; config = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()); config.backend_cls();"
        "print(config.to_dict(), config.framework, 'torch' in sys.modules)"
    )
    root = Path(process_group.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "config")], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.strip() == f"{{'backend': 'gloo', 'timeout_s': 70, 'torch': '{torch.__version__}'}} None False"
