"""Keeps what these tests found in the file that DSRAY_GPU_TESTS_JSON names (tests/bench/results/gpu_tests.json is one)."""

import json
import os
import platform
import time
from pathlib import Path

import pytest
import torch

FOUND = pytest.StashKey[dict]()
FOLDER = "tests/gpu/"


def pytest_configure(config):
    config.stash[FOUND] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    name = item.nodeid
    if name.startswith(FOLDER) and report.outcome != "skipped" and (report.when == "call" or report.failed):
        item.config.stash[FOUND][name.removeprefix(FOLDER)] = {"outcome": report.outcome, "s": round(report.duration, 1)}
    return report


def pytest_sessionfinish(session):
    path, found = os.environ.get("DSRAY_GPU_TESTS_JSON"), session.config.stash.get(FOUND, {})
    if path is None or not found:
        return
    known = json.loads(Path(path).read_text()) if Path(path).exists() else {"tests": {}}
    now = {
        "on": time.strftime("%Y-%m-%d", time.gmtime()),
        "gpus": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": os.environ.get("DSRAY_COMMIT", ""),
        "command": " ".join(["pytest", *map(str, session.config.invocation_params.args)]),
    }
    known["tests"] |= {name: result | now for name, result in found.items()}
    Path(path).write_text(json.dumps(known, indent=1) + "\n")
