"""What a job wants of other packages, looked for without importing them."""

import re
import sys
import tomllib

import pytest
import torch

from diffsynth_ray.config import packages
from diffsynth_ray.config.packages import TORCH_OPTIMIZERS, check_optimizer_name, is_installed, missing_name
from diffsynth_ray.config.schema import TrainingSection
from diffsynth_ray.errors import JobFileError
from diffsynth_ray.train.optim import build_optimizer, load_optimizer_class

PACKAGE = {
    "__init__.py": "from .late import Late\nraise AssertionError('imported')\n",
    "late.py": "class Late: pass\ntry:\n    import fast as Fast\nexcept ImportError:\n    Fast = None\ndef late(): pass\n",
    "stars.py": "from .late import *\n",
    "inner/__init__.py": "def __getattr__(name): ...\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Its code must not run."""
    for name, text in PACKAGE.items():
        path = tmp_path / "of_somebody" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "of_somebody"
    assert "of_somebody" not in sys.modules


def test_the_optimizers_of_torch_are_those_that_can_train_here():
    """Each of torch's own does a step here, or is refused."""
    trains = set()
    for name in dir(torch.optim):
        found = getattr(torch.optim, name)
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer:
            param = torch.nn.Parameter(torch.ones(4, 4))
            param.grad = torch.ones(4, 4)
            try:
                build_optimizer([param], TrainingSection(optimizer=f"torch.optim.{name}")).step()
                trains.add(name)
            except (JobFileError, TypeError, RuntimeError):
                assert "which training here does not do" in check_optimizer_name(f"torch.optim.{name}")[0].message
    assert trains == set(TORCH_OPTIMIZERS)
    assert [name for name in TORCH_OPTIMIZERS if check_optimizer_name(f"torch.optim.{name}")] == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("torch.optim.Adamw", "got 'torch.optim.Adamw'; torch.optim has ASGD, .*; did you mean torch.optim.AdamW\\?"),
        ("torch.optim.Xyz", "torch.optim has ASGD, .*, SGD$"),
        ("adamw", "got 'adamw'; the dotted name of a class is needed, .*; did you mean torch.optim.AdamW\\?"),
        ("torch.", "got 'torch.'; the dotted name of a class is needed"),
        ("my-package.Adam", "got 'my-package.Adam'; the dotted name"),
        ("torch.optim.LBFGS", "computes the loss several times a step"),
    ],
)
def test_what_no_machine_can_have_is_told(name, told):
    [problem] = check_optimizer_name(name)
    assert problem.key == "training.optimizer"
    assert re.search(told, problem.message), problem.message
    with pytest.raises(JobFileError):
        build_optimizer([torch.nn.Parameter(torch.ones(2, 2))], TrainingSection(optimizer=name)).step()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Late", None),
        ("late.Late", None),
        ("late.Fast", None),
        ("stars.Anything", None),
        ("inner.Anything", None),
        ("Latte", "of_somebody has no 'Latte'; did you mean of_somebody.Late?"),
        ("late.Latte", "of_somebody.late has no 'Latte'; did you mean of_somebody.late.Late?"),
        ("later.Late", "of_somebody has no module 'later'"),
        ("late.Late.Later", "of_somebody.late has no module 'Late'"),
        ("inner.module.Late", "of_somebody.inner has no module 'module'"),
    ],
)
def test_a_class_is_looked_for_without_running_the_package(package, name, told):
    assert is_installed(f"{package}.{name}")
    assert missing_name(f"{package}.{name}") == told


def test_real_classes_are_found():
    for name in ("torch.optim.adamw.AdamW", "transformers.optimization.Adafactor", "estimating_optimizer.Estimating"):
        assert load_optimizer_class(name)
        assert missing_name(name) is None
    assert missing_name("torch.optm.AdamW") == "torch has no module 'optm'"
    assert not is_installed("no_such_package.Adam")


def test_trackers_have_an_extra_to_install(repository):
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {packages.extra_of(key) for key in packages.TRACKERS} <= {f"diffsynth_ray[{name}]" for name in extras}
