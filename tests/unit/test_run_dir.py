import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from diffsynth_ray.config.resolve import ResolvedJob, Resources, resolve
from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import ExitCode, OutputError
from diffsynth_ray.run_dir import EncodeProgress, Progress, RunDir, parse_encode_progress, parse_progress, write_whole


def build(folder: Path, *, name: str = "job", **training: Any) -> ResolvedJob:
    job = Job.model_validate(
        {
            "name": name,
            "dataset": {"base_path": "/data"},
            "model": {"family": "qwen_image", "tiny": True},
            "lora": {"base_model": "dit"},
            "training": training,
            "output": {"path": str(folder)},
        }
    )
    return resolve(job, Resources(cpus=4, gpus=0))


# Ownership


def test_an_empty_directory_is_free(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "new")
    assert run_dir.owner() is None
    run_dir.check_owner(build(tmp_path))  # does not raise


def test_a_run_owns_its_directory(tmp_path: Path) -> None:
    run_dir, resolved = RunDir(tmp_path / "out"), build(tmp_path / "out")
    run_dir.begin_attempt(resolved, f"{resolved.run}-a1")
    assert run_dir.owner() == resolved
    run_dir.check_owner(build(tmp_path / "out", num_epochs=5))  # the same run, longer


def test_another_run_is_refused_with_the_differing_keys(tmp_path: Path) -> None:
    run_dir, first = RunDir(tmp_path), build(tmp_path)
    run_dir.begin_attempt(first, "first-a1")
    second = build(tmp_path, learning_rate=5e-5, max_grad_norm=0.5)
    with pytest.raises(OutputError) as caught:
        run_dir.check_owner(second)
    message = caught.value.message
    assert caught.value.exit_code == ExitCode.USAGE
    assert first.run in message
    assert second.run in message
    assert "training.learning_rate: 0.0001 there, 5e-05 here" in message
    assert "training.max_grad_norm: 1.0 there, 0.5 here" in message
    assert message.count("\n") == 2  # these two keys and no other
    assert "--new" in str(caught.value.hint)
    with pytest.raises(OutputError):
        run_dir.begin_attempt(second, "second-a1")
    assert run_dir.owner() == first


@pytest.mark.parametrize("content", ["", '{"job": {'])
def test_a_torn_job_file_is_called_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "job.json").write_text(content)
    with pytest.raises(OutputError, match=r"job\.json is damaged: it is not JSON") as caught:
        RunDir(tmp_path).owner()
    assert "it goes on from its checkpoints" in str(caught.value.hint)


def test_new_moves_the_old_content_aside(tmp_path: Path) -> None:
    run_dir, resolved = RunDir(tmp_path), build(tmp_path)
    assert run_dir.move_aside() is None
    run_dir.begin_attempt(resolved, "a1")
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)
    (tmp_path / "epoch-0.safetensors").write_text("weights")
    target = run_dir.move_aside()
    assert target == tmp_path / "previous" / resolved.run
    assert (target / "epoch-0.safetensors").read_text() == "weights"
    assert (target / "checkpoints" / "step-2").is_dir()
    assert [entry.name for entry in tmp_path.iterdir()] == ["previous"]
    assert run_dir.owner() is None
    # The same run again: nothing is overwritten.
    run_dir.begin_attempt(resolved, "a1")
    assert run_dir.move_aside() == tmp_path / "previous" / f"{resolved.run}.2"
    assert (target / "epoch-0.safetensors").exists()


@pytest.mark.parametrize("suffix", ["a12", "local-4711"])
def test_a_folder_whose_job_file_was_deleted_still_belongs_to_its_run(tmp_path: Path, suffix: str) -> None:
    """Its exports and checkpoints are as good as before, and its own job may go on from them."""
    run_dir, resolved, other = RunDir(tmp_path), build(tmp_path), build(tmp_path, learning_rate=5e-5)
    run_dir.begin_attempt(resolved, f"{resolved.run}-{suffix}")
    (tmp_path / "step-4.safetensors").write_text("weights")
    run_dir.job_path.unlink()
    with pytest.raises(
        OutputError, match=rf"has files of the run {resolved.run}, .* job\.json .*; this job is {other.run}"
    ) as caught:
        run_dir.begin_attempt(other, f"{other.run}-a1")
    assert str(tmp_path / "previous" / resolved.run) in str(caught.value.hint)
    assert run_dir.owner_name() == resolved.run
    run_dir.begin_attempt(resolved, f"{resolved.run}-a13")
    run_dir.job_path.unlink()
    assert run_dir.move_aside() == tmp_path / "previous" / resolved.run
    assert (tmp_path / "previous" / resolved.run / "step-4.safetensors").exists()
    run_dir.begin_attempt(other, f"{other.run}-a1")


@pytest.mark.parametrize("name", ["step-4.safetensors", "epoch-0.text_encoder.safetensors", "checkpoints/step-4/a", "loss.csv"])
def test_what_is_nobodys_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(OutputError, match=rf"has files of a run, as {name.split('/')[0]}, without the job\.json") as caught:
        RunDir(tmp_path).check_owner(build(tmp_path))
    assert str(tmp_path / "previous" / "unknown") in str(caught.value.hint)
    assert RunDir(tmp_path).move_aside() == tmp_path / "previous" / "unknown"
    RunDir(tmp_path).check_owner(build(tmp_path))


def test_other_files_do_not_make_a_folder_somebodys(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "vae.safetensors").write_text("")
    RunDir(tmp_path).check_owner(build(tmp_path))
    assert RunDir(tmp_path).move_aside() is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        RunDir(tmp_path / "out").check_writable()
    tmp_path.chmod(0o700)


def test_a_file_in_the_way_says_so(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        RunDir(tmp_path / "out").check_writable()


# Attempts


def test_attempts_are_counted_and_the_newest_holds_the_token(tmp_path: Path) -> None:
    run_dir, resolved = RunDir(tmp_path), build(tmp_path)
    assert not run_dir.holds_token("anything")
    first = run_dir.begin_attempt(resolved, "job-a1")
    assert run_dir.holds_token(first.token)
    second = run_dir.begin_attempt(resolved, "job-a2")
    assert (first.number, second.number) == (1, 2)
    assert not run_dir.holds_token(first.token)
    assert run_dir.holds_token(second.token)
    assert [(entry["attempt"], entry["event"], entry["submission_id"]) for entry in run_dir.attempts()] == [
        (1, "started", "job-a1"),
        (2, "started", "job-a2"),
    ]


def test_an_attempt_clears_an_old_stop_and_an_old_error(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.request_stop(reason="dsray stop")
    run_dir.error_path.write_text("{}")
    run_dir.begin_attempt(build(tmp_path), "a1")
    assert run_dir.stop_reason() is None
    assert not run_dir.error_path.exists()


def test_a_stop_is_read_with_its_reason(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.stop_reason() is None
    run_dir.request_stop(reason="SIGTERM")
    assert run_dir.stop_reason() == "SIGTERM"
    assert run_dir.stop_reason(now=True) is None
    run_dir.request_stop(reason="stop --now", now=True)
    assert run_dir.stop_reason() == run_dir.stop_reason(now=True) == "stop --now"


def test_a_torn_line_of_attempts_is_left_out(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    attempt = run_dir.begin_attempt(build(tmp_path), "a1")
    run_dir.note_attempt(attempt, "ended", state="STOPPED")
    with run_dir.attempts_path.open("a") as file:
        file.write('{"attempt": 7, "event": "sta')
    assert [entry["event"] for entry in run_dir.attempts()] == ["started", "ended"]


def test_an_attempt_after_a_torn_line_is_not_lost(tmp_path: Path) -> None:
    run_dir, resolved = RunDir(tmp_path), build(tmp_path)
    run_dir.begin_attempt(resolved, "a1")
    with run_dir.attempts_path.open("a") as file:
        file.write('{"attempt": 1, "event": "en')
    run_dir.begin_attempt(resolved, "a2")
    assert [entry["attempt"] for entry in run_dir.attempts()] == [1, 2]


# Progress

PROGRESS = Progress(
    step=20,
    num_steps=40,
    loss=0.123456,
    lr=1e-4,
    grad_norm=1.25,
    step_s=0.75,
    samples_per_s=2.67,
    data_wait_s=0.001,
    left_s=15,
)


def test_a_progress_line_is_read_back() -> None:
    assert parse_progress(PROGRESS.line()) == PROGRESS
    assert parse_progress(f"12:00:01 {PROGRESS.line()} (rank 0)") == PROGRESS


@pytest.mark.parametrize("loss", [1e-9, 123456.0, 1e20, math.inf])
def test_progress_lines_of_odd_losses_are_read_back(loss: float) -> None:
    read = parse_progress(Progress(**{**PROGRESS.__dict__, "loss": loss}).line())
    assert read is not None
    assert read.loss == pytest.approx(loss, rel=1e-5)


def test_a_progress_line_that_is_not_a_number_is_read_back() -> None:
    read = parse_progress(Progress(**{**PROGRESS.__dict__, "grad_norm": math.nan}).line())
    assert read is not None
    assert math.isnan(read.grad_norm)


def test_a_progress_line_of_a_tiny_or_a_huge_learning_rate_is_read_back() -> None:
    for lr in (0.0, 1e-12, 12.5, 1e6):
        read = parse_progress(Progress(**{**PROGRESS.__dict__, "lr": lr}).line())
        assert read is not None, lr
        assert read.lr == pytest.approx(lr, rel=1e-2)


@pytest.mark.parametrize("line", ["", "loading the model", "wrote step-20.safetensors", "step 3/x | loss 1"])
def test_other_lines_are_no_progress(line: str) -> None:
    assert parse_progress(line) is None


def test_progress_is_kept(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.progress() is None
    run_dir.write_progress(PROGRESS)
    assert run_dir.progress() == PROGRESS


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"step": 1, "of_a_later_version": 2}'])
def test_a_damaged_progress_file_is_none(tmp_path: Path, content: bytes) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.progress_path.write_bytes(content)
    run_dir.encode_path.write_bytes(content)
    run_dir.attempts_path.write_bytes(b'{"attempt": 1}\n\xff\n')
    assert (run_dir.progress(), run_dir.encode_progress(), run_dir.attempts()) == (None, None, [{"attempt": 1}])


# Whole files


def test_a_file_is_never_seen_half_written(tmp_path: Path) -> None:
    path, contents = tmp_path / "file.json", [json.dumps([letter] * 5000) for letter in "ab"]
    write_whole(path, contents[0])
    seen: set[str] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(50):
        write_whole(path, contents[turn % 2])
    stop.set()
    reader.join()
    assert seen <= set(contents)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_a_data_bound_job_is_told_in_one_sentence():
    def note(step_s, data_wait_s):
        return Progress(
            step=1, num_steps=2, loss=0.1, lr=1e-4, grad_norm=1.0, step_s=step_s, samples_per_s=1.0,
            data_wait_s=data_wait_s, left_s=3,
        ).data_note()  # fmt: skip

    assert "data-bound: 50% of each step" in note(2.0, 1.0)
    assert "dataset.num_workers" in note(2.0, 1.0)
    assert note(2.0, 0.3) is None
    assert note(0.05, 0.04) is None
    assert note(0.0, 0.0) is None


# Where the checkpoints are


def with_checkpoint_path(resolved: ResolvedJob, base: str | None) -> ResolvedJob:
    output = resolved.job.output.model_copy(update={"checkpoint_path": base})
    return resolved.model_copy(update={"job": resolved.job.model_copy(update={"output": output})})


def test_checkpoints_are_in_the_folder_unless_another_place_is_named(tmp_path: Path) -> None:
    run_dir, resolved = RunDir(tmp_path), build(tmp_path)
    assert run_dir.checkpoint_location(resolved) == str(tmp_path / "checkpoints")
    elsewhere = with_checkpoint_path(resolved, "s3://bucket/here/")
    location = run_dir.checkpoint_location(elsewhere)
    assert location.startswith(f"s3://bucket/here/{resolved.run}-")
    assert run_dir.checkpoint_location(elsewhere) == location, "every attempt has the same"
    options = "?scheme=http&endpoint_override=minio:9000"
    with_options = with_checkpoint_path(resolved, f"s3://bucket/here/{options}")
    (tmp_path / "other").mkdir()
    found = RunDir(tmp_path / "other").checkpoint_location(with_options)
    assert found.startswith(f"s3://bucket/here/{resolved.run}-")
    assert found.endswith(options)
    run_dir.begin_attempt(elsewhere, "a1")
    run_dir.move_aside()
    assert run_dir.checkpoint_location(elsewhere) != location, "--new does not go on from the old ones"


def test_checkpoints_that_are_elsewhere_are_not_lost_from_sight(tmp_path: Path) -> None:
    run_dir, resolved = RunDir(tmp_path), build(tmp_path)
    run_dir.checkpoint_location(with_checkpoint_path(resolved, "s3://bucket"))
    with pytest.raises(OutputError, match="are at s3://bucket"):
        run_dir.begin_attempt(resolved, "a1")
    local = RunDir(tmp_path / "local")
    local.checkpoints_dir.mkdir(parents=True)
    with pytest.raises(OutputError, match=f"are at {local.checkpoints_dir}"):
        local.checkpoint_location(with_checkpoint_path(resolved, "s3://bucket"))


def test_a_request_for_a_checkpoint_is_taken_back_when_it_is_answered(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.checkpoint_request() is None
    run_dir.request_checkpoint()
    first = run_dir.checkpoint_request()
    assert first is not None
    run_dir.request_checkpoint()
    run_dir.answer_checkpoint_request(first)
    second = run_dir.checkpoint_request()
    assert second not in (first, None), "another request is not answered with it"
    run_dir.answer_checkpoint_request(second)
    run_dir.answer_checkpoint_request(second)
    assert run_dir.checkpoint_request() is None


def test_the_progress_of_stage_one_is_read_back(tmp_path: Path) -> None:
    progress = EncodeProgress(done=120, total=400, per_s=12.3, left_s=23)
    assert progress.line() == "encode 120/400 samples | 12.30 samples/s | 23 s left"
    assert parse_encode_progress(f"(pid=1) {progress.line()}") == progress
    assert parse_encode_progress("encode something") is None
    assert parse_progress(progress.line()) is None
    run_dir = RunDir(tmp_path)
    assert run_dir.encode_progress() is None
    run_dir.write_encode_progress(progress)
    assert run_dir.encode_progress() == progress


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", "x")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_whole(tmp_path / "progress.json", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
