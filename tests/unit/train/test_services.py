"""Trackers against stand-ins for their packages, and against the packages themselves where they are installed."""

import os
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.config.schema import LoggingSection
from diffsynth_ray.errors import DsrayError, JobFileError
from diffsynth_ray.run_dir import RunDir
from diffsynth_ray.train import services
from diffsynth_ray.train.figures import FigureWriter
from diffsynth_ray.train.services import check_services

JOB = """
[dataset]
base_path = "{folder}"
[model]
family = "qwen_image"
tiny = true
[lora]
base_model = "dit"
[output]
path = "{folder}/out"
[logging]
tensorboard = false
csv = false
{logging}
"""


@pytest.fixture
def run_of(tmp_path):
    def build(logging):
        path = tmp_path / "cats.toml"
        path.write_text(JOB.format(folder=tmp_path, logging=logging))
        resolved = resolve(load_job(str(path)), Resources(cpus=2, gpus=0))
        run_dir = RunDir(resolved.output_path)
        run_dir.begin_attempt(resolved, f"{resolved.run}-a1")
        return run_dir, resolved

    return build


def write_three_steps(run_dir, resolved, *, first=1):
    writer = FigureWriter(run_dir, resolved.job.logging, start_step=first - 1)
    for step in range(first, first + 3):
        writer.write(step, {"loss": 1.0 / step, "lr": 1e-4})
    writer.close()


class Wandb(ModuleType):
    """What we use of wandb, written down."""

    errors = SimpleNamespace(Error=type("Error", (Exception,), {}))

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))
        if os.environ.get("NO_KEY"):
            raise self.errors.Error("no API key")
        return self

    def log(self, figures, *, step):
        self.calls.append((step, figures))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_figures_go_to_one_run_of_the_tracker(run_of, monkeypatch, name):
    package = Wandb(name)
    monkeypatch.setitem(sys.modules, name, package)
    run_dir, resolved = run_of(f'{name}_project = "animals"')
    write_three_steps(run_dir, resolved)
    (_, options), *steps, end = package.calls
    assert [options[key] for key in ("project", "name", "id", "resume")] == ["animals", resolved.run, resolved.run, "allow"]
    assert options["config"]["lora"]["base_model"] == "dit"
    assert steps == [(step, {"train/loss": 1.0 / step, "train/lr": 1e-4}) for step in (1, 2, 3)]
    assert end == ("finish",)


def test_a_tracker_that_refuses_is_an_error_with_its_cure(run_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    monkeypatch.setenv("NO_KEY", "1")
    run_dir, resolved = run_of('wandb_project = "animals"')
    with pytest.raises(DsrayError, match="no API key") as failure:
        write_three_steps(run_dir, resolved)
    assert "WANDB_API_KEY" in failure.value.hint


def test_packages_that_are_missing_are_named_all_at_once(monkeypatch):
    monkeypatch.setattr(services.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobFileError) as failure:
        check_services(LoggingSection(wandb_project="a", swanlab_project="b", mlflow_tracking_uri="c"))
    assert [problem.key for problem in failure.value.problems] == [
        "logging.wandb_project", "logging.swanlab_project", "logging.mlflow_tracking_uri",
    ]  # fmt: skip
    assert "diffsynth_ray[mlflow]" in failure.value.problems[2].message
    check_services(LoggingSection())


def test_nothing_is_imported_unless_it_is_asked_for():
    program = (
        "import sys\nfrom diffsynth_ray.config.schema import LoggingSection\nfrom diffsynth_ray.run_dir import RunDir\n"
        "from pathlib import Path\nfrom diffsynth_ray.train.services import check_services, open_services\n"
        "check_services(LoggingSection())\nassert open_services(RunDir(Path('/nowhere')), LoggingSection()) == []\n"
        "assert not {'wandb', 'swanlab', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class MlflowServer:
    """What we use of MlflowClient; away for the first `away` requests."""

    def __init__(self, away=0):
        self.away, self.metrics, self.runs, self.ended, self.params = away, [], [], [], {}

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="7") if self.runs else None

    def create_experiment(self, name):
        return "7"

    def search_runs(self, experiments, *, filter_string, max_results):
        return [run for run in self.runs if run.tag in filter_string]

    def create_run(self, experiment_id, *, run_name, tags):
        self.runs.append(SimpleNamespace(info=SimpleNamespace(run_id=f"id-{run_name}"), tag=tags["dsray_run"]))
        return self.runs[-1]

    def update_run(self, run_id, *, status):
        assert status == "RUNNING"

    def log_param(self, run_id, key, value):
        self.params[key] = value

    def log_batch(self, run_id, *, metrics):
        if self.away > 0:
            self.away -= 1
            raise MlflowError("away")
        self.metrics += metrics

    def set_terminated(self, run_id):
        self.ended.append(run_id)


class MlflowError(Exception):
    pass


@pytest.fixture
def mlflow(monkeypatch):
    server = MlflowServer()
    modules = {
        "mlflow": SimpleNamespace(MlflowClient=lambda tracking_uri: server),
        "mlflow.exceptions": SimpleNamespace(MlflowException=MlflowError),
        "mlflow.entities": SimpleNamespace(Metric=lambda key, value, when, step: (key, value, step)),
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, content)
    monkeypatch.setattr(services, "_RETRY_S", 0.05)
    return server


def test_mlflow_gets_figures_and_keys_and_a_continued_run_goes_on(run_of, mlflow):
    run_dir, resolved = run_of('mlflow_tracking_uri = "http://tracker"')
    write_three_steps(run_dir, resolved)
    write_three_steps(run_dir, resolved, first=4)
    assert len(mlflow.runs) == 1
    assert sorted(step for key, _, step in mlflow.metrics if key == "train/loss") == [1, 2, 3, 4, 5, 6]
    assert mlflow.params["lora.base_model"] == "dit"
    assert mlflow.params["name"] == "cats"
    assert mlflow.ended == [f"id-{resolved.run}"] * 2


def test_a_server_that_is_away_for_a_while_costs_neither_time_nor_figures(run_of, mlflow):
    run_dir, resolved = run_of('mlflow_tracking_uri = "http://tracker"')
    mlflow.away = 3
    writer = FigureWriter(run_dir, resolved.job.logging, start_step=0)
    began = time.monotonic()
    for step in range(1, 301):
        writer.write(step, {"loss": 1.0, "lr": 1.0})
    assert time.monotonic() - began < 1.0
    writer.close()
    assert len(mlflow.metrics) == 600


def test_a_server_that_stays_away_does_not_hold_up_the_end(run_of, mlflow, monkeypatch):
    monkeypatch.setattr(services, "_LAST_TRY_S", 0.2)
    run_dir, resolved = run_of('mlflow_tracking_uri = "http://tracker"')
    mlflow.away = 10**9
    began = time.monotonic()
    write_three_steps(run_dir, resolved)
    assert time.monotonic() - began < 5
    mlflow.away = 0  # lets the thread end


def test_with_the_real_wandb(run_of, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir, resolved = run_of('wandb_project = "animals"')
    write_three_steps(run_dir, resolved)
    assert list(run_dir.path.glob("wandb/offline-run-*/*.wandb"))


def test_with_the_real_swanlab(run_of, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    run_dir, resolved = run_of('swanlab_project = "animals"')
    write_three_steps(run_dir, resolved)
    assert list(run_dir.path.glob("swanlab/run-*"))


def test_with_the_real_mlflow(run_of, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server's address in earnest
    mlflow = pytest.importorskip("mlflow")
    uri = f"file://{tmp_path}/mlruns"
    run_dir, resolved = run_of(f'mlflow_tracking_uri = "{uri}"')
    write_three_steps(run_dir, resolved)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("cats").experiment_id])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3]
    assert run.info.status == "FINISHED"
