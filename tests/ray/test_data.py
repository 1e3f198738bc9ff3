"""The stream, bad samples and `dsray data check` on real Ray processes."""

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.data.media import decode
from diffsynth_ray.data.samples import SampleRule, build_sample_index
from diffsynth_ray.data.stream import build_stream
from diffsynth_ray.errors import DataError, ExitCode
from diffsynth_ray.launch.data_check import check_data
from diffsynth_ray.launch.driver import run_job
from diffsynth_ray.run_dir import RunDir

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]

VIDEO = Path(__file__).parents[1] / "assets" / "videos" / "bigbuckbunny.mp4"
JOB = """
[dataset]
base_path = "{data}"
metadata_path = "{data}/metadata.csv"
max_pixels = 4096
[model]
family = "qwen_image"
tiny = true
[lora]
base_model = "dit"
rank = 4
[training]
precision = "fp32"
max_steps = 3
[output]
path = "{output}"
[logging]
tensorboard = false
"""


def resolved_job(folder, data, *overrides, cpus=2):
    path = folder / "job.toml"
    path.write_text(JOB.format(data=data, output=folder / "out"))
    return resolve(load_job(str(path), list(overrides)), Resources(cpus=cpus, gpus=0))


def damaged_photos(folder, photos):
    """The photographs, with the cat (row 3) cut in half."""
    shutil.copytree(photos, folder / "photos")
    cat = folder / "photos" / "cat.jpg"
    cat.write_bytes(cat.read_bytes()[: cat.stat().st_size // 2])
    return folder / "photos"


def test_a_clip_and_pictures_for_two_consumers(tmp_path, photos):
    """No video family is needed for the stream: two consumers get their clips and pictures, whole and in order."""
    shutil.copytree(photos, tmp_path / "data")
    with (tmp_path / "data" / "metadata.csv").open("w") as file:
        file.write(f"video,prompt\n{VIDEO},a rabbit\ncat.jpg,a cat\nrocket.jpg,a rocket\n")
    resolved = resolved_job(tmp_path, tmp_path / "data", "dataset.repeat=4", "dataset.global_batch_size=4")
    dataset = resolved.job.dataset.model_copy(update={"num_frames": 17})
    resolved = resolved.model_copy(update={"job": resolved.job.model_copy(update={"dataset": dataset})})
    index = build_sample_index(resolved, lambda line: None, rule=SampleRule(clip_step=4))
    assert {bucket.num_frames for bucket in index.order.buckets} == {1, 17}
    reference = ray.put(index)

    def read(rank, start_step=0):
        stream = build_stream(
            reference, start_step=start_step, num_steps=3, rank=rank, world_size=2, decode_cpus=0.4, decode_tasks=1
        )
        return [(batch.step, batch.micro_batch, batch.decoded) for batch in stream]

    found = [read(0), read(1)]
    for rank in (0, 1):
        plan = index.micro_batches(start_step=0, num_steps=3, rank=rank, world_size=2)
        assert [(step, micro) for step, micro, _ in found[rank]] == [(step, micro) for step, _, _, micro in plan]
    clips = 0
    for _, micro, decoded in found[0] + found[1]:
        clips += micro.num_frames == 17
        for row, pixels in zip(micro.rows, decoded.pixels, strict=True):
            size = {"height": micro.height, "width": micro.width, "num_frames": micro.num_frames}
            assert np.array_equal(pixels, decode(index.path(row), **size))
    assert clips == 4, "each row four times in the epoch"
    again = read(1, start_step=2)
    expected = [one for one in found[1] if one[0] == 2]
    assert [(step, micro) for step, micro, _ in again] == [(step, micro) for step, micro, _ in expected]
    assert all(np.array_equal(a[2].pixels, b[2].pixels) for a, b in zip(again, expected, strict=True))


SKIP = ('dataset.bad_sample="skip"', "dataset.repeat=4", "dataset.batch_size=2", "dataset.global_batch_size=8")


@pytest.mark.slow
def test_a_bad_sample_is_replaced_and_listed_and_training_goes_on(tmp_path, photos):
    """Photographs in buckets, batches of two, two workers."""
    resolved = resolved_job(
        tmp_path, damaged_photos(tmp_path, photos), *SKIP, "dataset.bad_sample_limit=0.2", "distributed.num_workers=2"
    )
    said = []
    assert run_job(resolved, submission_id="test", say=said.append) == ExitCode.DONE, said
    run_dir = RunDir(resolved.output_path)
    lines = [json.loads(line) for line in run_dir.bad_samples_path.read_text().splitlines()]
    assert [line["row"] for line in lines] == [3]
    assert lines[0]["file"].endswith("cat.jpg")
    assert "truncated" in lines[0]["cause"]
    assert lines[0]["replaced_by_row"] not in (None, 3)
    assert any("bad sample replaced: row 3" in line and "1 of 5 rows so far (20.00%" in line for line in said)
    with run_dir.loss_path.open() as file:
        losses = [float(row["value"]) for row in csv.DictReader(file) if row["key"] == "loss"]
    assert len(losses) == 3
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_bad_samples_above_the_limit_end_the_run(tmp_path, photos):
    resolved = resolved_job(tmp_path, damaged_photos(tmp_path, photos), *SKIP)
    said = []
    assert run_job(resolved, submission_id="test", say=said.append) == ExitCode.RUN_FAILED, said
    cause = json.loads(RunDir(resolved.output_path).error_path.read_text())["cause"]
    assert "1 of 5 rows are bad, above dataset.bad_sample_limit = 0.01" in cause
    assert "row 3" in cause
    assert "dsray data check" in cause


def test_data_check_names_the_bad_file_and_the_sizes(tmp_path, photos):
    data = damaged_photos(tmp_path, photos)
    said = []
    report = check_data(resolved_job(tmp_path, data), said.append)
    assert (report.num_rows, report.num_bad, report.exit_code) == (5, 1, ExitCode.USAGE)
    assert report.bad[0]["row"] == 3
    assert sum(bucket["rows"] for bucket in report.buckets) == 4, "the bad one has no size"
    assert len(report.causes) == 1
    text = "\n".join(report.lines())
    assert "cat.jpg" in text
    assert "would be ended by them" in text
    skipping = check_data(resolved_job(tmp_path, data, *SKIP, "dataset.bad_sample_limit=0.5"), said.append)
    assert skipping.exit_code == ExitCode.DONE


NUM_IMAGES, NUM_SHAPES = 2000, 40


def write_folder(folder):
    """2,000 images of 40 aspect ratios, 20 of them broken in ten ways. Returns the broken rows (from 0) by kind."""
    random.seed(0)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    kinds = ["jpg", "png", "webp", "bmp"]
    names = []
    for number in range(NUM_IMAGES):
        width, height = 64 + 16 * (number % NUM_SHAPES), 64 + 16 * (number * 7 % NUM_SHAPES)
        names.append(f"{number:04}.{kinds[number % 4]}")
        noise.resize((width, height)).save(folder / names[-1])
    broken = dict(zip(sorted(random.sample(range(0, NUM_IMAGES, 4), 20)), range(20), strict=True))  # all of them jpg
    for row, number in broken.items():
        break_file(folder / names[row], number % 10)
    (folder / "metadata.csv").write_text("image,prompt\n" + "".join(f"{name},picture {name}\n" for name in names))
    return broken


def break_file(path, how):
    content = path.read_bytes()
    if how == 0:
        path.write_bytes(content[: len(content) // 2])
    elif how == 1:
        path.write_bytes(b"")
    elif how == 2:
        path.write_bytes(content[:30])
    elif how == 3:
        path.write_bytes(b"<html>404 Not Found</html>")
    elif how == 4:
        path.unlink()
    elif how == 5:
        Image.new("RGB", (500, 7)).save(path)
    elif how == 6:
        path.write_bytes(bytes(len(content)))
    elif how == 7:
        path.unlink()
        path.mkdir()
    elif how == 8:
        path.write_bytes(content[:-20])
    else:
        path.write_bytes(VIDEO.read_bytes()[:5000])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_images_with_twenty_broken(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    broken = write_folder(data)
    said = []

    report = check_data(resolved_job(tmp_path, data), said.append)
    assert {one["row"] - 1 for one in report.bad} == set(broken)
    assert (report.num_rows, report.num_bad, report.exit_code) == (NUM_IMAGES, 20, ExitCode.USAGE)
    assert sum(report.causes.values()) == 20
    assert len(report.causes) >= 5
    assert sum(bucket["rows"] for bucket in report.buckets) == NUM_IMAGES - 20
    assert any("decoded" in line for line in said)

    with pytest.raises(DataError, match=r"no such file"):
        build_sample_index(resolved_job(tmp_path, data), said.append)

    skip = ('dataset.bad_sample="skip"', "dataset.batch_size=4", "dataset.global_batch_size=16")
    index = build_sample_index(resolved_job(tmp_path, data, *skip), said.append)
    reference = ray.put(index)
    used = {}
    for world_size in (1, 2):
        for rank in range(world_size):
            stream = build_stream(
                reference,
                start_step=0,
                num_steps=index.order.steps_per_epoch,
                rank=rank,
                world_size=world_size,
                decode_cpus=0.4,
                decode_tasks=2,
            )
            for batch in stream:
                if batch.micro_batch.is_dummy:
                    continue
                planned = batch.micro_batch.rows
                assert batch.pixels.shape[0] == len(planned) == len(batch.decoded.prompts)
                for place, row, real in zip(batch.micro_batch.indices, planned, batch.decoded.rows, strict=True):
                    assert (row != real) == (row in broken)
                    assert used.setdefault((batch.step, place), real) == real, "the same for any number of workers"
    assert len(used) == NUM_IMAGES

    with pytest.raises(DataError, match=r"of 2000 rows are bad, above dataset.bad_sample_limit = 0.005"):
        build_sample_index(resolved_job(tmp_path, data, *skip, "dataset.bad_sample_limit=0.005"), said.append)
