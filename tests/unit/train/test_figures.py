"""loss.csv: forgets what comes after the step that a run goes on from, and survives a full disk."""

import pytest

from diffsynth_ray.config.schema import LoggingSection
from diffsynth_ray.run_dir import RunDir
from diffsynth_ray.train.figures import FigureWriter

CSV_ONLY = LoggingSection(tensorboard=False)


def test_a_resumed_run_writes_every_step_once(tmp_path):
    run_dir = RunDir(tmp_path)
    first = FigureWriter(run_dir, CSV_ONLY, start_step=0)
    for step in (1, 2, 3):
        first.write(step, {"loss": float(step)})
    with run_dir.loss_path.open("a") as file:
        file.write("4,los")  # cut by a kill
    second = FigureWriter(run_dir, CSV_ONLY, start_step=2)
    second.write(3, {"loss": 30.0})
    assert run_dir.loss_path.read_text() == "step,key,value\n1,loss,1\n2,loss,2\n3,loss,30\n"


def test_a_file_that_was_edited_by_hand_does_not_keep_a_run_from_going_on(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.loss_path.write_text("step,key,value\n1,loss,1\n\nmy remark\n2,loss,2\n3,loss,3\n")
    FigureWriter(run_dir, CSV_ONLY, start_step=2).close()
    assert run_dir.loss_path.read_text() == "step,key,value\n1,loss,1\n2,loss,2\n"


def test_rows_wait_while_the_disk_is_full(tmp_path, monkeypatch):
    run_dir = RunDir(tmp_path)
    writer = FigureWriter(run_dir, CSV_ONLY, start_step=0)
    writer.write(1, {"loss": 1.0})
    size = run_dir.loss_path.stat().st_size
    original = type(run_dir.loss_path).open

    def full(path, mode="r", *arguments, **options):
        file = original(path, mode, *arguments, **options)
        if mode == "a":
            file.write("2,lo")
            file.close()
            raise OSError(28, "No space left on device")
        return file

    with monkeypatch.context() as patch:
        patch.setattr(type(run_dir.loss_path), "open", full)
        writer.write(2, {"loss": 2.0})
    assert run_dir.loss_path.stat().st_size == size, "no half row"
    writer.write(3, {"loss": 3.0})
    assert run_dir.loss_path.read_text() == "step,key,value\n1,loss,1\n2,loss,2\n3,loss,3\n"


@pytest.mark.parametrize("csv", [True, False])
def test_csv_may_be_off(tmp_path, csv):
    FigureWriter(RunDir(tmp_path), LoggingSection(csv=csv, tensorboard=False), start_step=0).write(1, {"loss": 1.0})
    assert (tmp_path / "loss.csv").exists() is csv
