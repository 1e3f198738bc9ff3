"""Fixtures for all tests. Tests of real Ray processes are in tests/ray; nothing in tests/unit starts Ray."""

import os
from pathlib import Path

import pytest

# Decided before anything imports ray or tokenizers, and alike for every process that a test starts.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def repository() -> Path:
    """Root of the source checkout."""
    return REPOSITORY


@pytest.fixture
def photos() -> Path:
    """The shipped photographs."""
    return REPOSITORY / "jobs" / "data" / "photos"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
