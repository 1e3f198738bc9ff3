import os

import pytest

from diffsynth_ray.launch import diagnosis
from diffsynth_ray.launch.diagnosis import diagnose, find_bottleneck, sparkline
from diffsynth_ray.run_dir import RunDir


def write(path, losses, **figures):
    path.mkdir(exist_ok=True)
    lines = ["step,key,value"]
    for step, loss in enumerate(losses, start=1):
        lines += [f"{step},{key},{value}" for key, value in {"loss": loss, **figures}.items()]
    (path / "loss.csv").write_text("\n".join([*lines, ""]))
    return RunDir(path)


def test_the_course_of_the_loss_is_means_of_equal_stretches(tmp_path):
    run_dir = write(tmp_path / "run", [float(100 - step) for step in range(100)], step_s=1.0, data_wait_s=0.5)
    found = diagnose(run_dir)
    assert len(found.losses) == 40
    assert found.losses[0] == pytest.approx(99.5)
    assert found.losses == sorted(found.losses, reverse=True)
    assert sum(diagnose(write(tmp_path / "short", [3.0, 1.0])).losses) == 4.0


def test_a_run_without_figures_and_one_that_is_writing(tmp_path):
    assert diagnose(RunDir(tmp_path / "none")) == diagnosis.Diagnosis()
    run_dir = write(tmp_path / "run", [2.0])
    with run_dir.loss_path.open("a") as file:
        file.write("2,loss,1.0\n3,loss,0.")
    assert diagnose(run_dir).losses == [2.0, 1.0]


def test_only_the_end_of_a_long_file_is_read(tmp_path, monkeypatch):
    run_dir = write(tmp_path / "run", [float(step) for step in range(1000)])
    monkeypatch.setattr(diagnosis, "_TAIL_BYTES", 200)
    assert min(diagnose(run_dir).losses) > 980


def test_the_newest_whole_checkpoint(tmp_path):
    for step in (5, 10, 20):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    for step in (5, 10):
        manifest = tmp_path / "checkpoints" / f"step-{step}" / "manifest.json"
        manifest.write_text("{}")
        os.utime(manifest, (step, step))
    found = diagnose(RunDir(tmp_path))
    assert (found.checkpoint_step, found.checkpoint_time) == (10, 10.0)


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"data_wait_s": 1.5}, "the bottleneck is data: 75% of a step (1.50 of 2.00 s)"),
        ({"data_wait_s": 0.4}, "some time is lost on data: 20%"),
        ({"data_wait_s": 0.02}, "the model's computation takes 99% of a step (data 1%)"),
        ({"data_wait_s": 0.1, "encode_s": 1.2}, "the bottleneck is the encoders: 60%"),
        ({"data_wait_s": 0.1, "transfer_s": 1.4, "encode_s": 0.1}, "the bottleneck is transfer to the GPU"),
        ({"communication_s": 1.9}, "the bottleneck is communication"),
    ],
)
def test_the_bottleneck_is_named_from_measured_times(figures, told):
    assert told in find_bottleneck({"step_s": 2.0, **figures})


def test_the_times_of_the_last_twenty_logged_steps_count(tmp_path):
    run_dir = write(tmp_path / "run", [1.0] * 30, step_s=1.0, data_wait_s=0.01, transfer_s=0.9)
    with run_dir.loss_path.open("a") as file:
        for step in range(31, 51):
            # Every other step waits, and none for offloaded weights: the run goes on without offload.
            file.write(f"{step},step_s,2.0\n{step},data_wait_s,0.02\n{step},communication_s,{1.6 * (step % 2)}\n")
    told = diagnose(run_dir).bottleneck
    assert "some time is lost on communication: 40% of a step (0.80 of 2.00 s)" in told
    with run_dir.loss_path.open("a") as file:
        for step in range(51, 71):
            file.write(f"{step},step_s,2.0\n{step},data_wait_s,0.02\n{step},communication_s,0.0\n")
    assert "takes 99% of a step (data 1%)" in diagnose(run_dir).bottleneck


def test_no_sentence_without_measurements():
    assert find_bottleneck({}) is None
    assert find_bottleneck({"step_s": 0.0, "data_wait_s": 0.0}) is None
    assert find_bottleneck({"step_s": 1.0}) is None


@pytest.mark.parametrize(
    ("values", "bars"), [([], ""), ([1.0], "▁"), ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"), ([1.0, float("nan"), 0.0], "██▁")]
)
def test_sparkline(values, bars):
    assert sparkline(values) == bars
