"""What a job wants of other packages: the optimizer's class, the trackers. Looked for without importing anything of them."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Collection
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from diffsynth_ray.config.schema import Job, LoggingSection
from diffsynth_ray.errors import Problem

TORCH_OPTIMIZERS = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop"),
    "SGD",
)
"""Of torch.optim, those that can train here."""
_USELESS = {
    "LBFGS": "computes the loss several times a step",
    "Rprop": "takes no weight_decay and needs gradients of the whole data set",
    "SparseAdam": "takes sparse gradients only",
}
"""The others."""
_ESTIMATING = re.compile(r"prodigy|d_?adapt|\bl?dog$", re.IGNORECASE)
"""In the names of optimizers that estimate their step size from all weights: Prodigy, D-Adaptation, DoG."""
TRACKERS = {"wandb_project": "wandb", "swanlab_project": "swanlab", "mlflow_tracking_uri": "mlflow"}
"""Key of [logging] -> the package that it needs."""


def check_optimizer_name(name: str) -> list[Problem]:
    """What is wrong with training.optimizer whatever is installed."""
    module, _, leaf = name.rpartition(".")
    advice, have = _advice(leaf, TORCH_OPTIMIZERS, before="torch.optim."), f"torch.optim has {', '.join(TORCH_OPTIMIZERS)}"
    if module == "torch.optim" and leaf in _USELESS:
        message = f"{name} {_USELESS[leaf]}, which training here does not do; {have}"
    elif module == "torch.optim" and leaf not in TORCH_OPTIMIZERS:
        message = f"got {name!r}; {have}{advice}"
    elif not module or not all(part.isidentifier() for part in name.split(".")):
        message = f"got {name!r}; the dotted name of a class is needed, as torch.optim.AdamW{advice}"
    else:
        return []
    return [Problem("training.optimizer", message)]


def note_on_estimates(job: Job) -> str | None:
    """What becomes of the step size of an optimizer that estimates it, where no optimizer sees all weights."""
    name = job.training.optimizer
    if not _ESTIMATING.search(name):
        return None
    if job.offload.optimize_on_cpu:
        whose = "with offload.optimize_on_cpu every block has an optimizer of its own, and with it an estimate"
    elif job.distributed.strategy == "deepspeed":
        whose = "under DeepSpeed every worker sees its share of the weights only, and has an estimate of its own"
    else:
        return None
    leaf = name.rpartition(".")[2]
    return f'{leaf} estimates its step size: {whose}; use strategy = "ddp" without optimize_on_cpu for one of all weights'


def missing_trackers(logging: LoggingSection) -> dict[str, str]:
    """Key of [logging] -> its package, of those that are not installed here."""
    return {
        key: package
        for key, package in TRACKERS.items()
        if getattr(logging, key) is not None and importlib.util.find_spec(package) is None
    }


def extra_of(tracker: str) -> str:
    """What to install for a key of `TRACKERS`."""
    return f"diffsynth_ray[{tracker.partition('_')[0]}]"


def is_installed(dotted: str) -> bool:
    """Whether the package that a dotted name begins with is here."""
    return importlib.util.find_spec(dotted.partition(".")[0]) is not None


def missing_name(dotted: str) -> str | None:
    """What of a dotted class name the package, which is installed, does not have; None where only its code could tell."""
    before, *inner, name = dotted.split(".")
    spec = importlib.util.find_spec(before)
    for module in inner:
        places = spec.submodule_search_locations or [] if spec else []
        found = PathFinder.find_spec(f"{before}.{module}", [str(place) for place in places])  # transformers has Paths there
        if found is None:
            return f"{before} has no module {module!r}"
        spec, before = found, f"{before}.{module}"
    known = _names_in(spec) if spec else None
    if known is None or name in known:
        return None
    return f"{before} has no {name!r}{_advice(name, known, before=f'{before}.')}"


def _names_in(spec: ModuleSpec) -> set[str] | None:
    """Names that a module's source binds, wherever in it; None where only its code can tell."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, ValueError, SyntaxError):  # of another Python
        return None
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return None if names & {"*", "__getattr__"} else names


def _advice(name: str, known: Collection[str], *, before: str) -> str:
    lowered = {each.lower(): each for each in sorted(known, reverse=True)}  # of torch's adamw and AdamW the class
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f"; did you mean {before}{lowered[near[0]]}?" if near else ""
