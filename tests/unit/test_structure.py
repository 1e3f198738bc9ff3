"""DESIGN section 1 as a test: which module may import what. It reads syntax trees, so that late imports count too."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "diffsynth_ray"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# cli -> {launch, plan} -> train -> {data, models, memory} -> run_dir -> config -> errors. Layers of one brace do not
# import each other, but for launch -> plan: the driver writes the plan into the run's log.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "schedule": {"config", "errors"},
    "run_dir": {"config", "errors"},
    "data": {"run_dir", "schedule", "config", "errors"},
    "models": {"run_dir", "schedule", "config", "errors"},
    "memory": {"run_dir", "schedule", "config", "errors"},
    "train": {"data", "models", "memory", "run_dir", "schedule", "config", "errors"},
    "report": {"run_dir", "config", "errors"},
    "migrate": {"models", "config", "errors"},
    "plan": {"data", "models", "run_dir", "schedule", "config", "errors"},
    "launch": {"plan", "train", "data", "models", "memory", "run_dir", "schedule", "config", "errors"},
    "cli": {
        *("launch", "plan", "migrate", "report", "train", "data", "models", "memory", "run_dir", "schedule", "config"),
        "errors",
    },
}
# plan promises to need no torch: of data it reads the metadata, what of them is held out, or the manifest of a cache, of models
# where files are and what their headers say, so that a wrong file is found before a cluster starts.
PLAN_READS = {
    "diffsynth_ray.data.metadata",
    "diffsynth_ray.data.holdout",
    "diffsynth_ray.data.cache",
    "diffsynth_ray.data.manifest",
    "diffsynth_ray.data.teacher",
    "diffsynth_ray.models.inspection",
}
NEED_NO_TORCH = {f"diffsynth_ray.models.{name}" for name in ("inspection", "layouts", "sources", "hubs", "download")}

LIBRARY_HOMES: dict[str, tuple[str, ...]] = {
    "ray": ("launch.", "data.stream", "data.nodes", "train.worker", "train.encode"),
    "diffusers": ("models.",),
    "transformers": ("models.",),
    "peft": ("models.",),
    "modelscope": ("models.hubs",),
    "modelscope_hub": ("models.hubs",),
    "huggingface_hub": ("models.hubs",),
    "deepspeed": ("train.strategy.deepspeed", "train.optim"),
    "typer": ("cli.",),
    "rich": ("cli.",),
    "click": ("cli.",),
    "av": ("train.video",),
    "wandb": ("train.services",),
    "swanlab": ("train.services",),
    "mlflow": ("train.services",),
}

# Where DESIGN's tree puts a module. A command group of the same name may stand beside it in cli.
TREE: dict[str, set[str]] = {
    "": {"errors", "plan", "run_dir", "schedule"},
    "config": {"schema", "load", "resolve", "flags", "origins"},
    "data": {"metadata", "media", "order", "batches", "samples", "tables", "stream", "cache"},
    "models": {
        "layouts",
        "inspection",
        "sources",
        "hubs",
        "download",
        "family",
        "weights",
        "flow_matching",
        "lora",
        "names",
        "qwen_image",
        "wan",
        "flux",
        "flux2",
        "z_image",
    },
    "memory": {"offload", "fp8", "checkpointing"},
    "train": {"trainer", "optim", "checkpoint", "export", "worker", "encode"},
    "train.strategy": {"ddp", "deepspeed"},
    "launch": {"client", "embedded", "stages", "fetch", "driver", "board", "registry", "runs"},
}


def imports_of(module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports; `from a import b` gives a.b where that is a module."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in MODULES else str(node.module)


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_are_found_wherever_they_stand() -> None:
    found = {name for _, name in imports_of("diffsynth_ray.launch.stages")}
    late = {"diffsynth_ray.train.worker", "ray.train.torch"}
    assert late | {"diffsynth_ray.run_dir"} <= found
    assert "diffsynth_ray.launch.registry" in {name for _, name in imports_of("diffsynth_ray.launch.runs")}


def test_the_table_itself_points_one_way() -> None:
    order = list(MAY_IMPORT)
    for layer, allowed in MAY_IMPORT.items():
        assert allowed <= set(order[: order.index(layer)]), layer


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    layer = layer_of(module)
    wrong = []
    for line, name in imports_of(module):
        target = layer_of(name)
        if name.split(".")[0] != "diffsynth_ray" or target in ("", layer):
            continue
        if target not in MAY_IMPORT[layer] or (layer == "plan" and target in ("data", "models") and name not in PLAN_READS):
            wrong.append(f"line {line}: {name}")
    assert wrong == [], f"{module} ({layer or 'the package'}) may not import these"


@pytest.mark.parametrize("module", MODULES)
def test_libraries_stay_at_home(module: str) -> None:
    inner = module.removeprefix("diffsynth_ray.")
    wrong = []
    for line, name in imports_of(module):
        homes = LIBRARY_HOMES.get(name.split(".")[0])
        if homes is not None and not any(inner == home or (home.endswith(".") and inner.startswith(home)) for home in homes):
            wrong.append(f"line {line}: {name}")
    assert wrong == []


def test_errors_and_flags_need_the_standard_library_only() -> None:
    for module in ("diffsynth_ray.errors", "diffsynth_ray.config.flags"):
        assert {name.split(".")[0] for _, name in imports_of(module)} <= sys.stdlib_module_names


def test_config_run_dir_and_schedule_need_no_torch() -> None:
    for module in MODULES:
        if layer_of(module) in ("config", "run_dir", "schedule", "plan", "cli", "report") or module in NEED_NO_TORCH:
            assert not any(name.split(".")[0] == "torch" for _, name in imports_of(module)), module


def test_modules_of_the_tree_stand_where_it_puts_them() -> None:
    home = {name: folder for folder, names in TREE.items() for name in names}
    for module, path in MODULES.items():
        folder, _, name = module.removeprefix("diffsynth_ray.").rpartition(".")
        if path.name != "__init__.py" and name in home and not folder.startswith("cli"):
            assert folder == home[name], f"{module} belongs into {home[name]!r}"


def test_every_module_is_in_a_known_layer() -> None:
    assert {layer_of(module) for module in MODULES} - {"", "__init__"} <= MAY_IMPORT.keys()


def test_no_drawers() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [module for module in MODULES if drawers & set(module.split("."))] == []


def test_only_the_renderer_prints() -> None:
    for module, path in MODULES.items():
        lines = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
        assert not lines or module == "diffsynth_ray.cli.render", f"{module} prints in lines {lines}"


def test_the_packages_of_pyproject_are_the_package_directories() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in MODULES.values()}
    assert folders == there, "a folder without __init__.py"
    assert set(listed) == there | {"diffsynth_ray.jobs"}
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    "entry",
    [
        "import diffsynth_ray.cli.app",
        "from diffsynth_ray.plan import build_plan",
        "from diffsynth_ray.models.download import download_dataset",
    ],
)
def test_help_and_plan_import_neither_ray_nor_torch(entry: str) -> None:
    heavy = {"ray", "torch", "diffusers", "transformers", "peft", "rich", "modelscope_hub", "huggingface_hub", "requests"}
    program = f"import sys; {entry}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("board queue", {"torch", "ray.data", "pydantic", "numpy"}),
        ("driver", {"torch", "ray.data", "ray.train"}),
        ("supervisor", {"torch", "ray", "numpy"}),
    ],
)
def test_processes_of_a_run_import_no_more_than_they_need(modules: str, heavy: set[str]) -> None:
    """Each import is up to seconds of a CPU in every such process, before the first step."""
    names = ", ".join(f"diffsynth_ray.launch.{module}" for module in modules.split())
    program = f"import sys, {names}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
