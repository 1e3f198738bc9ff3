"""What a training worker does before it trains."""

import sys
from types import SimpleNamespace

import pytest
import ray
import ray.train

from diffsynth_ray.errors import ClusterError, ExitCode
from diffsynth_ray.launch import stages


def test_a_missing_package_ends_the_run_instead_of_new_workers(monkeypatch):
    failures = []
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setitem(sys.modules, "diffsynth_ray.train.worker", None)
    board = SimpleNamespace(fail=SimpleNamespace(remote=lambda rank, error: failures.append((rank, error))))
    with pytest.raises(ImportError):
        stages._train_loop({"resolved_json": "{}", "board": board})
    [(rank, error)] = failures
    assert rank == 1
    assert isinstance(error, ClusterError)
    assert error.exit_code == ExitCode.CLUSTER
    assert "diffsynth_ray.train.worker" in error.message
    assert sys.executable in error.message
    assert "dsray doctor" in error.hint
