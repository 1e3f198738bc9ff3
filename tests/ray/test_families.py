"""Every family on two workers in Ray, with real photographs and a real video, against one process without Ray."""

import csv
import shutil
from pathlib import Path

import pytest
from training_in_process import train_in_process

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.errors import ExitCode
from diffsynth_ray.launch.driver import run_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.usefixtures("local_ray")]

VIDEOS = Path(__file__).parents[1] / "assets" / "videos"
JOB = """
[dataset]
base_path = "{data}"
metadata_path = "{data}/metadata.csv"
max_pixels = 4096
repeat = 4
global_batch_size = 4
{dataset}
[model]
family = "{family}"
tiny = true
[lora]
base_model = "dit"
rank = 4
[training]
precision = "fp32"
max_steps = 2
[distributed]
num_workers = 2
[output]
path = "{output}"
[logging]
tensorboard = false
"""


@pytest.fixture
def data(tmp_path, photos):
    """Folder by kind of media."""
    shutil.copytree(photos, tmp_path / "image")
    shutil.copytree(VIDEOS, tmp_path / "video")
    return {kind: tmp_path / kind for kind in ("image", "video")}


@pytest.mark.parametrize(
    ("family", "media", "dataset"),
    [
        ("qwen_image", "image", "batch_size = 2"),
        ("wan", "video", "num_frames = 9"),
        ("flux", "image", "batch_size = 2"),
        ("z_image", "image", "batch_size = 2"),
        ("flux2", "image", "batch_size = 2"),
    ],
)
def test_two_workers_train_as_one_process(tmp_path, data, family, media, dataset):
    train_both_ways(tmp_path, JOB.format(data=data[media], dataset=dataset, family=family, output=tmp_path / "out"))


@pytest.mark.parametrize(("family", "media", "dataset"), [("qwen_image", "image", ""), ("wan", "video", "num_frames = 5")])
def test_two_workers_distill_as_one_process(tmp_path, data, family, media, dataset):
    metadata = data[media] / "metadata.csv"
    with metadata.open() as file:
        rows = list(csv.DictReader(file))
    with metadata.open("w") as file:
        writer = csv.DictWriter(file, [*rows[0], "seed", "rand_device", "num_inference_steps", "cfg_scale"])
        writer.writeheader()
        for number, row in enumerate(rows):
            writer.writerow(row | {"seed": number, "rand_device": "cpu", "num_inference_steps": 2 + number % 2, "cfg_scale": 4})
    text = JOB.format(data=data[media], dataset=dataset, family=family, output=tmp_path / "out")
    columns = 'extra_inputs = ["seed", "rand_device", "num_inference_steps", "cfg_scale"]'
    train_both_ways(tmp_path, 'task = "direct_distill"\n' + text.replace("tiny = true", f"tiny = true\n{columns}"))


FULL = 'strategy = "deepspeed"\nzero_stage = 3'


@pytest.mark.parametrize("strategy", ['strategy = "ddp"', FULL], ids=["a LoRA", "in full under ZeRO-3"])
def test_two_workers_train_vace_as_one_process(tmp_path, data, photos, strategy):
    metadata = data["video"] / "metadata.csv"
    with metadata.open() as file:
        rows = list(csv.DictReader(file))
    shutil.copy(photos / "coffee.jpg", data["video"])
    with metadata.open("w") as file:
        writer = csv.DictWriter(file, [*rows[0], "vace_video", "vace_reference_image"])
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"vace_video": row["video"], "vace_reference_image": "coffee.jpg"})
    columns = '["vace_video", "vace_reference_image"]'
    dataset = 'num_frames = 5\ndata_file_keys = ["video", "vace_video", "vace_reference_image"]'
    text = JOB.format(data=data["video"], dataset=dataset, family="wan", output=tmp_path / "out")
    text = text.replace("tiny = true", f"tiny = true\nextra_inputs = {columns}")
    text = text.replace("num_workers = 2", f"num_workers = 2\n{strategy}")
    if strategy == FULL:
        text = text.replace('[lora]\nbase_model = "dit"\nrank = 4\n[training]', '[training]\ntrainable_models = ["vace"]')
    else:
        text = text.replace('"dit"', '"vace"')
    train_both_ways(tmp_path, text)


def train_both_ways(tmp_path, text):
    path = tmp_path / "job.toml"
    path.write_text(text)
    resolved = resolve(load_job(str(path)), Resources(cpus=2, gpus=0))
    expected, _ = train_in_process(resolved)
    said = []
    assert run_job(resolved, submission_id="test", say=said.append) == ExitCode.DONE, said
    with (tmp_path / "out" / "loss.csv").open() as file:
        losses = {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["key"] == "loss"}
    assert losses == pytest.approx(expected, abs=1e-5)
    assert (tmp_path / "out" / "step-2.safetensors").exists() or (tmp_path / "out" / "epoch-0.safetensors").exists()
