"""`dsray report`: one page of whatever a run's folder holds."""

import json
import re
from pathlib import Path

import pytest
from page_check import check
from PIL import Image

from diffsynth_ray.cli import app
from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.errors import RunNotFoundError
from diffsynth_ray.report.curves import WIDTH, Curve, draw_chart, smoothed, ticks
from diffsynth_ray.report.page import build_page
from diffsynth_ray.report.record import read_record
from diffsynth_ray.run_dir import RunDir, ValidationEntry

JOB = """
[dataset]
base_path = "{photos}"
[model]
family = "qwen_image"
tiny = true
[lora]
base_model = "dit"
[validation]
prompts = ["a <b>cat</b> & a dog"]
[output]
path = "{output}"
"""


@pytest.fixture
def run_dir(tmp_path: Path, photos: Path) -> RunDir:
    """A run whose first attempt lost a worker and failed, and whose second ended well."""
    path = tmp_path / "photos.toml"
    path.write_text(JOB.format(photos=photos, output=tmp_path / "out"))
    resolved = resolve(load_job(str(path)), Resources(cpus=4, gpus=0))
    run_dir = RunDir(resolved.output_path)
    for state in ("FAILED", "SUCCEEDED"):
        attempt = run_dir.begin_attempt(resolved, "run-a1")
        cause = "rank 0 <died>" if state == "FAILED" else None
        if cause:
            run_dir.note_attempt(attempt, "workers lost", cause="killed", rank=1, step=7, is_preemption=False)
        run_dir.note_attempt(attempt, "ended", state=state, step=10, num_steps=20, cause=cause)
    rows = [f"{step},{key},{1 / step}\n" for step in range(1, 21) for key in ("loss", "lr", "step_s", "samples_per_s")]
    run_dir.loss_path.write_text("step,key,value\n" + "".join(rows) + "21,los")
    for step in (0, 10, 20):
        run_dir.note_validation(ValidationEntry(step, 2.0 - step / 20, [3.0, 2.0, 1.5, 1.0], num_samples=3, seconds=1.0))
    run_dir.samples_dir.mkdir()
    Image.new("RGB", (300, 200), "orange").save(run_dir.contact_sheet_path)
    run_dir.environment_path.write_text(json.dumps({"torch": "2.13.0"}))
    (run_dir.path / "epoch-0.safetensors").write_bytes(b"x" * 1000)
    return run_dir


@pytest.mark.parametrize(("waited_s", "is_shown"), [(0.25, True), (0.0, False)])
def test_waits_for_other_workers_are_shown_where_there_are_any(run_dir: RunDir, waited_s: float, is_shown: bool) -> None:
    rows = "".join(f"{step},communication_s,{waited_s}\n" for step in range(1, 21))
    run_dir.loss_path.write_text(run_dir.loss_path.read_text().removesuffix("21,los") + rows)
    assert ("Waiting for other workers" in build_page(read_record(run_dir))) == is_shown


def test_waiting_in_the_queue_is_no_loss(run_dir: RunDir) -> None:
    resolved = run_dir.owner()
    assert resolved is not None
    before = read_record(run_dir).attempts
    attempt = run_dir.begin_attempt(resolved, "run-a3")
    run_dir.note_attempt(attempt, "waiting", reason="0 of 1 GPU free")
    run_dir.note_attempt(attempt, "admitted", reason=None)
    record = read_record(run_dir)
    assert [each.num_recoveries for each in record.attempts] == [*(each.num_recoveries for each in before), 0]
    assert "lost and replaced: None" not in build_page(record)


def test_a_run_that_failed_and_recovered(run_dir: RunDir) -> None:
    page = build_page(read_record(run_dir))
    check(page)
    for text in ("succeeded", "worker rank 1 lost and replaced: killed", "rank 0 &lt;died&gt;", "torch", "2.13.0"):
        assert text in page, text
    assert "<died>" not in page
    assert "Dashed lines" in page
    assert page.count('class="mark"') >= 2
    assert "lowest validation loss, step 20" in page
    assert "a &lt;b&gt;cat&lt;/b&gt; &amp; a dog" in page
    assert "epoch-0.safetensors" in page
    assert page.count("<polyline") == 2 + 1 + 4 + 3
    assert "data:image/png;base64," in page


def test_the_loss_that_ends_an_attempt_is_no_recovery(run_dir: RunDir) -> None:
    newest = run_dir.begin_attempt(read_record(run_dir).resolved, "run-a3")
    for step in (12, 14):
        run_dir.note_attempt(newest, "workers lost", cause="its process died", rank=0, step=step, is_preemption=False)
    assert "attempts, 3 recoveries<" in build_page(read_record(run_dir)), "it may still go on"
    cause = "rank 0 failed at step 14: its process died\n  it was loss 2"
    run_dir.note_attempt(newest, "ended", state="FAILED", step=14, num_steps=20, cause=cause)
    page = build_page(read_record(run_dir))
    assert "attempts, 2 recoveries<" in page
    assert page.count("lost and replaced") == 2
    assert page.count("worker rank 0 lost: one too many") == 1
    assert "failed: it was loss 2<" in page, "the rest is in the row of the loss"


def test_a_run_that_has_only_begun(tmp_path: Path, run_dir: RunDir) -> None:
    (tmp_path / "bare").mkdir()
    bare = RunDir(tmp_path / "bare")
    bare.job_path.write_bytes(run_dir.job_path.read_bytes())
    page = build_page(read_record(bare))
    check(page)
    assert "no step was logged" in page
    assert "pending" in page


def test_a_failed_run_shows_its_cause_and_traceback(run_dir: RunDir) -> None:
    run_dir.error_path.write_text(json.dumps({"cause": "no <room>", "rank": 3, "step": 9, "details": "Traceback <module>"}))
    page = build_page(read_record(run_dir))
    check(page)
    assert "What ended it" in page
    assert "no &lt;room&gt;" in page
    assert "Traceback &lt;module&gt;" in page


def test_no_run_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError):
        read_record(RunDir(tmp_path))


def test_the_command(run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))
    assert app.main(["report", str(run_dir.path)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir.path / "report.html")
    check((run_dir.path / "report.html").read_text())
    elsewhere = tmp_path / "new" / "page.html"
    assert app.main(["report", str(run_dir.path), "-o", str(elsewhere), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "SUCCEEDED"
    assert elsewhere.exists()
    assert app.main(["report", "no-such-run"]) == 102
    (tmp_path / "file").write_text("")
    assert app.main(["report", str(run_dir.path), "-o", str(tmp_path / "file" / "page.html")]) == 2
    assert "-o" in capsys.readouterr().err


def test_ticks_are_round_and_cover_the_values() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for low, high in ((0.013, 0.0131), (-5, 1e6), (1e-9, 2e-9)):
        found = ticks(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert 2 <= len(found) <= 8


def test_curves_stay_inside_and_odd_values_do_not_break_them() -> None:
    points = [(step, float("nan") if step == 3 else step * 0.5) for step in range(5000)]
    drawn = draw_chart([Curve("loss", points, "a")])
    found = re.findall(r"(-?[\d.]+),(-?[\d.]+)", re.search(r'points="([^"]+)"', drawn)[1])
    assert len(found) <= 600
    assert all(0 <= float(x) <= WIDTH for x, _ in found)
    assert draw_chart([Curve("one", [(7, 1.0)], "a")]).count("<circle") == 1
    assert draw_chart([Curve("none", [(1, float("nan"))], "a")]) == ""
    assert "<svg" in draw_chart([Curve("flat", [(0, 0.0), (5, 0.0)], "a")])


def test_smoothing_starts_at_the_first_value() -> None:
    found = smoothed([(1, 8.0), (2, float("inf")), (3, 8.0)], window=10)
    assert [step for step, _ in found] == [1, 2, 3]
    assert [value for _, value in found] == pytest.approx([8.0] * 3)


@pytest.mark.parametrize("content", [b"", b"step,key,value\n1,loss,2.0\n\xff\xfe", b"1,loss,2.0\n2,loss,1.0\n"])
def test_a_run_with_damaged_files_has_a_page(run_dir: RunDir, content: bytes) -> None:
    run_dir.loss_path.write_bytes(content)
    run_dir.progress_path.write_bytes(b"garbage")
    run_dir.environment_path.write_bytes(b"\xff")
    assert "<html" in build_page(read_record(run_dir))
