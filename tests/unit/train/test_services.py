"""Trackers against stand-ins for their packages, and against the packages themselves where they are installed."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffsynth_ray.config import packages
from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.config.schema import LoggingSection
from diffsynth_ray.errors import DsrayError, JobFileError
from diffsynth_ray.run_dir import RunDir
from diffsynth_ray.train import services
from diffsynth_ray.train.figures import FigureWriter
from diffsynth_ray.train.sample_file import SampleFile
from diffsynth_ray.train.services import check_services
from diffsynth_ray.train.video import write_video

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


def write_samples(run_dir, *, step, newest=3):
    """A picture and a clip of `step`, shown after the figures of the `newest` one; returns the picture's pixels."""
    picture, clip = (run_dir.sample_path(step, number, is_clip=number == 1) for number in (0, 1))
    picture.parent.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    frames = np.zeros((5, 32, 64, 3), dtype=np.uint8)
    frames[..., 0] = 40 * np.arange(1, 6)[:, None, None]
    write_video(clip, frames, fps=16)
    said = []
    writer = FigureWriter(run_dir, run_dir.owner().job.logging, start_step=0, say=said.append)
    for each in range(1, newest + 1):
        writer.write(each, {"loss": 1.0 / each})
    writer.write_samples(step, [SampleFile(0, "a cat / or\ntwo", picture), SampleFile(1, "a running dog", clip)])
    writer.write(newest + 1, {"loss": 0.0})
    writer.close()
    assert said == []
    return pixels


class Wandb(ModuleType):
    """What we use of wandb and of swanlab, written down."""

    errors = SimpleNamespace(Error=type("Error", (Exception,), {}))

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))
        if os.environ.get("NO_KEY"):
            raise self.errors.Error("no API key")
        return self

    def log(self, figures, *, step=None, commit=None):
        assert (step is None) == (commit is False)  # or it would go on to another step by itself
        self.calls.append((step, figures))

    def finish(self):
        self.calls.append(("finish",))

    class Image:
        def __init__(self, content, caption=None):
            self.content, self.caption = content, caption

    class Video(Image):
        pass


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


@pytest.mark.parametrize(("name", "error"), [("wandb", Wandb.errors.Error), ("swanlab", RuntimeError)])
def test_a_tracker_that_refuses_is_an_error_with_its_cure(run_of, monkeypatch, name, error):
    package = Wandb(name)
    monkeypatch.setattr(package, "errors", SimpleNamespace(Error=error))
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setenv("NO_KEY", "1")
    run_dir, resolved = run_of(f'{name}_project = "animals"')
    with pytest.raises(DsrayError, match="no API key") as failure:
        write_three_steps(run_dir, resolved)
    assert f"{name.upper()}_API_KEY" in failure.value.hint
    assert f"{name.upper()}_MODE=offline" in failure.value.hint, "which needs no other package"


def test_a_run_that_goes_on_does_so_without_a_tracker_that_refuses(run_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    swanlab = Wandb("swanlab")
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    monkeypatch.setattr(swanlab, "init", lambda **options: 1 / 0)
    monkeypatch.setenv("NO_KEY", "1")
    run_dir, resolved = run_of('wandb_project = "animals"\nswanlab_project = "animals"')
    said = []
    writer = FigureWriter(run_dir, resolved.job.logging, start_step=4, say=said.append)
    writer.write(5, {"loss": 1.0})
    writer.close()
    assert ["no API key" in said[0], "ZeroDivisionError" in said[1]] == [True, True]


def test_a_tracker_that_raises_is_told_once_and_ends_no_training(run_of, monkeypatch):
    package = Wandb("wandb")
    monkeypatch.setitem(sys.modules, "wandb", package)
    run_dir, resolved = run_of('wandb_project = "animals"')
    logging = resolved.job.logging.model_copy(update={"csv": True, "tensorboard": True})
    said = []
    writer = FigureWriter(run_dir, logging, start_step=0, say=said.append)

    def fail(*arguments, **options):
        raise RuntimeError("gone")

    monkeypatch.setattr(package, "log", fail)
    monkeypatch.setattr(package, "finish", fail)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
    for step in (1, 2):
        writer.write(step, {"loss": 1.0})
        writer.write_samples(step, [SampleFile(0, "a cat", run_dir.path / "missing.png")])
    writer.close()
    assert run_dir.loss_path.read_text().splitlines() == ["step,key,value", "1,loss,1", "2,loss,1"]
    assert sum("Weights & Biases: RuntimeError: gone; training goes on" in line for line in said) == 1
    assert sum("TensorBoard: RuntimeError: gone" in line for line in said) == 1
    assert sum("TensorBoard: " in line and "missing.png" in line for line in said) == 1
    assert len(said) == 3


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_samples_go_there_too(run_of, monkeypatch, name):
    package = Wandb(name)
    monkeypatch.setitem(sys.modules, name, package)
    run_dir, _ = run_of(f'{name}_project = "animals"')
    write_samples(run_dir, step=2)
    sent = [(step, shown) for step, *rest in package.calls for shown in rest if any("samples" in key for key in shown)]
    if name == "wandb":  # beside the newest figures: it drops what is for an earlier step
        [(step, shown)] = sent
        assert (step, shown.pop("samples/step")) == (None, 2)
    else:
        assert [step for step, _ in sent] == [2, 2]
        shown = sent[0][1] | sent[1][1]
    picture, clip = shown["samples/1"], shown["samples/2"]
    assert picture.caption.startswith("a cat / or\ntwo")
    assert (type(picture), type(clip)) == (package.Image, package.Video)
    assert picture.content == str(run_dir.sample_path(2, 0, is_clip=False))
    if name == "wandb":
        assert clip.content == str(run_dir.sample_path(2, 1, is_clip=True))
    else:
        assert clip.content.startswith(b"GIF89a")


def test_samples_that_come_late_replace_none_at_weights_and_biases(run_of, monkeypatch):
    package = Wandb("wandb")
    monkeypatch.setitem(sys.modules, "wandb", package)
    run_dir, resolved = run_of('wandb_project = "animals"')
    writer = FigureWriter(run_dir, resolved.job.logging, start_step=0)
    sample = [SampleFile(0, "a cat", run_dir.path / "cat.png")]
    writer.write_samples(0, sample)
    writer.write(4, {"loss": 1.0})
    for step in (4, 1, 2):
        writer.write_samples(step, sample)
    writer.write(5, {"loss": 1.0})
    writer.close()
    sent = [(step, shown.get("samples/step", shown.get("train/loss"))) for step, shown in package.calls[1:-1]]
    # One step's beside the figures of another, and at the end in rows of their own.
    assert sent == [(None, 0), (4, 1.0), (None, 4), (5, 1.0), (None, 1), (6, 2)]


def test_tensorboard_has_figures_pictures_and_clips(run_of):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, resolved = run_of("")
    logging = resolved.job.logging.model_copy(update={"tensorboard": True})
    run_dir.job_path.write_text(
        resolved.model_copy(update={"job": resolved.job.model_copy(update={"logging": logging})}).model_dump_json()
    )
    pixels = write_samples(run_dir, step=2)
    events = EventAccumulator(str(run_dir.tensorboard_dir)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert events.Tags()["images"] == ["samples/1 a cat / or\ntwo", "samples/2 a running dog"]
    [picture] = events.Images("samples/1 a cat / or\ntwo")
    assert picture.step == 2
    assert (np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))) == pixels).all()
    [clip] = events.Images("samples/2 a running dog")
    assert (clip.width, clip.height) == (64, 32)
    moving = Image.open(io.BytesIO(clip.encoded_image_string))
    assert (moving.format, moving.n_frames) == ("GIF", 3)


def test_packages_that_are_missing_are_named_all_at_once(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
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
        "check_services(LoggingSection())\n"
        "assert open_services(RunDir(Path('/nowhere')), LoggingSection(), must_open=True, say=print) == []\n"
        "assert not {'wandb', 'swanlab', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class MlflowServer:
    """What we use of MlflowClient; away while it `is_down`, and for the first `away` requests then."""

    def __init__(self, away=0):
        self.away, self.metrics, self.runs, self.ended, self.params = away, [], [], [], {}
        self.shown, self.refuses, self.is_down = [], False, False

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
        if self.is_down or self.away > 0:
            self.away -= not self.is_down
            raise MlflowError("away")
        self.metrics += metrics

    def log_image(self, run_id, picture, *, key, step):
        if self.refuses:
            raise ValueError("no pictures")
        self.shown.append((key, step, picture.size))

    def log_artifact(self, run_id, path, *, artifact_path):
        self.shown.append((path, artifact_path))

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
    mlflow.away, mlflow.is_down = 3, True  # who waited for it would not get to the end
    writer = FigureWriter(run_dir, resolved.job.logging, start_step=0)
    for step in range(1, 301):
        writer.write(step, {"loss": 1.0, "lr": 1.0})
    mlflow.is_down = False
    writer.close()
    assert len(mlflow.metrics) == 600


def test_mlflow_gets_pictures_and_clips_when_the_server_is_back(run_of, mlflow):
    run_dir, _ = run_of('mlflow_tracking_uri = "http://tracker"')
    mlflow.away = 2
    write_samples(run_dir, step=2)
    clip = run_dir.sample_path(2, 1, is_clip=True)
    assert mlflow.shown == [("samples/1", 2, (48, 32)), (str(clip), "samples/step-2")]
    assert len(mlflow.metrics) == 4


def test_pictures_that_mlflow_refuses_cost_no_figures(run_of, mlflow):
    run_dir, resolved = run_of('mlflow_tracking_uri = "http://tracker"')
    mlflow.refuses, said = True, []
    writer = FigureWriter(run_dir, resolved.job.logging, start_step=0, say=said.append)
    Image.new("RGB", (16, 16)).save(run_dir.path / "cat.png")
    writer.write_samples(1, [SampleFile(0, "a cat", run_dir.path / "cat.png")])
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert len(mlflow.metrics) == 1
    assert said == ["warning: MLflow did not take the samples of step 1: ValueError: no pictures"]


def test_a_server_that_stays_away_does_not_hold_up_the_end(run_of, mlflow, monkeypatch):
    monkeypatch.setattr(services, "_LAST_TRY_S", 0.2)
    run_dir, resolved = run_of('mlflow_tracking_uri = "http://tracker"')
    mlflow.is_down = True
    began = time.monotonic()
    write_three_steps(run_dir, resolved)
    assert time.monotonic() - began < 20, "it waits for 30 s elsewhere"
    assert mlflow.metrics == mlflow.ended == []
    mlflow.is_down = False  # lets the thread end


def records(path):
    """Of a .wandb file: LevelDB's log format, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts = path.read_bytes(), 7, []
    while position < len(content):
        if (left := -position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


def test_with_the_real_wandb(run_of, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir, _ = run_of('wandb_project = "animals"')
    pixels = write_samples(run_dir, step=2)
    [path] = run_dir.path.glob("wandb/offline-run-*/*.wandb")
    rows = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows[items["_step"]] = items
    shown = [{key: rows[3][f"samples/{number}.{key}"] for key in ("_type", "caption", "path")} for number in (1, 2)]
    assert [rows[step]["train/loss"] for step in (1, 2, 3, 4)] == [1.0, 0.5, 1 / 3, 0.0]
    assert rows[3]["samples/step"] == 2, "late samples stand beside the newest figures"
    assert [each["_type"] for each in shown] == ["image-file", "video-file"]
    assert shown[0]["caption"] == "a cat / or\ntwo (step 2)"
    files = path.parent / "files"
    assert (np.asarray(Image.open(files / shown[0]["path"])) == pixels).all()
    assert (files / shown[1]["path"]).read_bytes() == run_dir.sample_path(2, 1, is_clip=True).read_bytes()


def test_with_the_real_swanlab(run_of, tmp_path, monkeypatch):
    """Without a key it refuses, and what our message then names is all that it needs."""
    pytest.importorskip("swanlab")
    monkeypatch.setenv("HOME", str(tmp_path))  # of somebody who has never logged in
    for name in [name for name in os.environ if name.startswith("SWANLAB_")]:
        monkeypatch.delenv(name)
    run_dir, resolved = run_of('swanlab_project = "animals"')
    with pytest.raises(DsrayError, match="SwanLab: ") as refused:
        write_three_steps(run_dir, resolved)
    monkeypatch.setenv("SWANLAB_MODE", re.search(r"SWANLAB_MODE=(\w+)", refused.value.hint)[1])
    assert f"keeps the run in {run_dir.path / 'swanlab'}" in refused.value.hint
    pixels = write_samples(run_dir, step=2)
    [folder] = run_dir.path.glob("swanlab/run-*")
    [picture] = folder.rglob("*.png")
    assert (np.asarray(Image.open(picture)) == pixels).all()
    [clip] = folder.rglob("*.gif")
    assert Image.open(clip).n_frames == 3
    assert picture.name.startswith("002-")


def test_with_the_real_mlflow(run_of, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server's address in earnest
    mlflow = pytest.importorskip("mlflow")
    uri = f"file://{tmp_path}/mlruns"
    run_dir, _ = run_of(f'mlflow_tracking_uri = "{uri}"')
    pixels = write_samples(run_dir, step=2)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("cats").experiment_id])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    assert run.info.status == "FINISHED"
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    [picture] = [path for path in pictures if "step+2+" in path.replace("%", "+")]
    local = client.download_artifacts(run.info.run_id, picture, str(tmp_path))
    assert (np.asarray(Image.open(local)) == pixels).all()
    clips = client.list_artifacts(run.info.run_id, "samples/step-2")
    assert [file.path for file in clips] == ["samples/step-2/step-2-1.mp4"]
