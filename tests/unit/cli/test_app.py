"""The command line without a cluster: exit codes, --json, the error boundary, what is imported."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import wait_until

from diffsynth_ray import __version__
from diffsynth_ray.cli import app, inspect
from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.errors import ExitCode, RunError
from diffsynth_ray.launch import registry, runs
from diffsynth_ray.run_dir import Progress, RunDir

JOB = """
[dataset]
base_path = "{folder}"
height = 32
width = 32
[model]
family = "qwen_image"
tiny = true
[lora]
base_model = "dit"
[training]
max_steps = {steps}
[output]
path = "{folder}/out"
"""


@pytest.fixture(autouse=True)
def state_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "state"


@pytest.fixture
def job_file(tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "red.png")
    (tmp_path / "red.txt").write_text("red")
    path = tmp_path / "tiny.toml"
    path.write_text(JOB.format(folder=tmp_path, steps=4))
    return path


def finish(job_file, *, state="SUCCEEDED", step=4, cause=None):
    """An output path as a run leaves it that ended in this way."""
    resolved = resolve(load_job(str(job_file)), Resources(cpus=len(os.sched_getaffinity(0)), gpus=0))
    run_dir = RunDir(resolved.output_path)
    attempt = run_dir.begin_attempt(resolved, f"{resolved.run}-a1")
    run_dir.write_progress(Progress(step, 4, 0.5, 1e-4, 0.1, 1.0, 1.0, 0.0, 0))
    if state is not None:
        run_dir.note_attempt(attempt, "ended", state=state, step=step, num_steps=4, cause=cause)
    (run_dir.path / "step-4.safetensors").write_bytes(b"")
    return resolved, run_dir


def remember(resolved, job_file, **options):
    registry.note(
        registry.Submission(
            run=resolved.run, output=str(resolved.output_path), job_file=str(job_file), address=None,
            submission_id=f"{resolved.run}-a1", **options,
        )
    )  # fmt: skip


def run(*arguments):
    return app.main([str(each) for each in arguments])


def subprocess_run(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, **options)


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"dsray {__version__}\n"


def test_import_and_plan_need_neither_ray_nor_torch(job_file):
    code = (
        "import sys\nfrom diffsynth_ray.cli import app\nimported = set(sys.modules)\n"
        f"codes = [app.main(['plan', {str(job_file)!r}]), app.main(['submit', '--dry-run', {str(job_file)!r}])]\n"
        "assert codes == [0, 0], codes\n"
        "heavy = {'ray', 'torch', 'diffusers', 'transformers', 'peft', 'deepspeed'}\n"
        "assert not heavy & imported, heavy & imported\nassert 'rich' not in imported\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess_run(code)
    assert done.returncode == 0, done.stderr


def test_help_takes_under_half_a_second_of_cpu():
    best = 9.0
    for _ in range(3):  # the first run may have to compile the modules
        before = os.times()
        assert subprocess_run("import sys; from diffsynth_ray.cli.app import main; sys.exit(main(['--help']))").stdout
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, used)
    assert best < 0.5


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["plan"], ["plan", "--frob"], ["submit"], ["plan", "no.toml"]])
def test_usage_errors_are_exit_2_and_leave_stdout_alone(arguments, capsys):
    assert run(*arguments) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


def test_a_mistyped_command_gets_a_suggestion(capsys):
    run("sumbit")
    assert "submit" in capsys.readouterr().err


def test_job_file_errors_name_all_problems(job_file, capsys):
    job_file.write_text(job_file.read_text() + "\n[trainning]\nx = 1\n[gradient]\naccumulation_steps = 0\n")
    assert run("submit", job_file) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert "[training]" in error
    assert "gradient.accumulation_steps" in error


def test_json_errors_are_one_object_on_stdout(capsys):
    assert run("plan", "no.toml", "--json") == ExitCode.USAGE
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["kind"] == "JobFileError"
    assert error["exit_code"] == 2
    assert error["problems"][0]["message"].startswith("no such file")
    assert captured.err == ""


def test_plan_prints_its_result_to_stdout(job_file, capsys):
    assert run("plan", job_file, "--json", "--set", "training.max_steps=7") == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 7
    assert run("plan", job_file) == 0
    captured = capsys.readouterr()
    assert "7" not in captured.out.split("steps")[-1].splitlines()[0]
    assert captured.err == ""


def test_dry_run_writes_nothing(job_file, tmp_path, capsys):
    assert run("submit", "--dry-run", job_file) == 0
    assert "steps" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_all_job_files_are_read_before_the_first_starts(job_file, tmp_path, capsys):
    (tmp_path / "bad.toml").write_text("nonsense = 1\n")
    assert run("submit", job_file, tmp_path / "bad.toml") == ExitCode.USAGE
    assert "bad.toml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "state" / "local.json").exists()


def test_problems_of_several_job_files_name_their_file(job_file, tmp_path, capsys):
    other = tmp_path / "other.toml"
    other.write_text("[lora\n")
    assert run("submit", job_file, other, "--set", "lora.rank=big") == ExitCode.USAGE
    told = capsys.readouterr().err
    assert f"  {job_file}: lora.rank: got " in told
    assert f"  {other}: not valid TOML: " in told


def test_unreachable_cluster_is_exit_3_and_quick(job_file, capsys):
    for _ in range(2):
        capsys.readouterr()
        began = time.monotonic()
        assert run("submit", job_file, "--address", "http://127.0.0.1:9") == ExitCode.CLUSTER
    assert time.monotonic() - began < 10, "the second time, when all is imported"
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9" in error
    assert "hint:" in error
    assert "refused" in error


def test_unexpected_errors_keep_their_traceback_in_a_file(monkeypatch, job_file, state_dir, capsys):
    monkeypatch.setattr("diffsynth_ray.plan.build_plan", lambda *args, **options: 1 / 0)
    assert run("plan", job_file) == ExitCode.UNEXPECTED
    error = capsys.readouterr().err
    (kept,) = state_dir.glob("error-*.txt")
    assert str(kept) in error
    assert "Traceback" in kept.read_text()
    assert "Traceback" not in error


@pytest.mark.parametrize("command", ["plan", "status", "submit"])
def test_a_name_too_long_for_a_file_is_no_bug(command, state_dir, capsys):
    assert run(command, "x" * 300) == ExitCode.USAGE
    assert "xxx: File name too long" in capsys.readouterr().err
    assert list(state_dir.glob("error-*.txt")) == []


def test_an_error_without_a_file_of_the_users_is_unexpected(monkeypatch, job_file, state_dir, capsys):
    def fail(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("diffsynth_ray.plan.build_plan", fail)
    assert run("plan", job_file) == ExitCode.UNEXPECTED


def test_keyboard_interrupt_is_130(monkeypatch, job_file):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffsynth_ray.plan.build_plan", interrupt)
    assert run("plan", job_file) == ExitCode.INTERRUPTED


def test_errors_carry_their_exit_code(monkeypatch, job_file):
    def fail(*args, **options):
        raise RunError("no")

    monkeypatch.setattr("diffsynth_ray.plan.build_plan", fail)
    assert run("plan", job_file) == ExitCode.RUN_FAILED


@pytest.mark.parametrize(
    ("state", "code"),
    [("SUCCEEDED", ExitCode.DONE), ("FAILED", ExitCode.RUN_FAILED), ("STOPPED", ExitCode.STOPPED)],
)
def test_status_answers_from_the_output_path(job_file, state, code, capsys):
    resolved, run_dir = finish(job_file, state=state, cause="it rained" if state == "FAILED" else None)
    remember(resolved, job_file)
    for reference in (resolved.run, "tiny", job_file, run_dir.path, f"{resolved.run}-a1"):
        assert run("status", reference, "--json") == code
        shown = json.loads(capsys.readouterr().out)
        assert (shown["run"], shown["state"], shown["step"]) == (resolved.run, state, 4)
        assert shown["files"] == ["step-4.safetensors"]
    assert run("status", "tiny") == code
    assert ("it rained" in capsys.readouterr().out) == (state == "FAILED")
    assert run("list", "--json") == 0
    assert [each["state"] for each in json.loads(capsys.readouterr().out)["runs"]] == [state]


def test_status_knows_an_output_path_that_was_never_submitted_from_here(job_file):
    _, run_dir = finish(job_file)
    assert run("status", run_dir.path) == 0
    assert run("status", job_file) == 0


def test_a_run_whose_folder_was_deleted_is_not_said_to_have_written_nothing(job_file, monkeypatch, capsys):
    resolved, run_dir = finish(job_file)
    remember(resolved, job_file)
    shutil.rmtree(run_dir.path)
    assert run("status", "tiny") == ExitCode.RUN_FAILED
    assert "nothing of it is in its output path: it ended before it wrote anything, or was deleted" in capsys.readouterr().out
    job = {"submission_id": f"{resolved.run}-a1", "status": "SUCCEEDED", "start_time": 1000, "end_time": 2000}
    cluster = SimpleNamespace(url="http://127.0.0.1:1")
    monkeypatch.setattr(runs, "cluster_of", lambda submission: (cluster, None))
    monkeypatch.setattr(runs.client, "job_states", lambda cluster, name: {1: job})
    assert run("status", "tiny") == ExitCode.DONE
    assert "nothing of it is in its output path: deleted, or not visible here" in capsys.readouterr().out


def test_an_attempt_whose_process_is_gone_has_failed(job_file, capsys):
    resolved, _ = finish(job_file, state=None, step=2)
    remember(resolved, job_file)
    assert run("status", "tiny") == ExitCode.RUN_FAILED
    assert "continue" in capsys.readouterr().out


def test_a_run_in_the_foreground_is_running_as_long_as_its_process(job_file):
    resolved, run_dir = finish(job_file, state=None, step=2)
    remember(resolved, job_file, pid=os.getpid())
    assert run("status", "tiny") == ExitCode.NOT_FINISHED
    assert run("stop", "tiny") == 0
    assert run_dir.stop_reason() == "dsray stop"


def test_an_empty_name_is_not_the_run_of_the_working_directory(job_file, monkeypatch):
    resolved, run_dir = finish(job_file, state=None, step=2)
    remember(resolved, job_file, pid=os.getpid())
    monkeypatch.chdir(run_dir.path)
    assert run("stop", "") == ExitCode.NOT_FOUND
    assert run_dir.stop_reason() is None
    assert run("status", ".") == ExitCode.NOT_FINISHED


def test_unknown_runs_are_exit_102_with_a_suggestion(job_file, capsys):
    resolved, _ = finish(job_file)
    remember(resolved, job_file)
    for command in ("status", "logs", "stop"):
        assert run(command, resolved.run[:-1]) == ExitCode.NOT_FOUND
        assert f"did you mean {resolved.run}?" in capsys.readouterr().err


def test_a_finished_run_is_reported_not_repeated(job_file, state_dir, capsys):
    _, run_dir = finish(job_file)
    assert run("submit", job_file) == 0
    out = capsys.readouterr().out
    assert "already finished" in out
    assert str(run_dir.path / "step-4.safetensors") in out
    assert len(run_dir.attempts()) == 2
    assert not (state_dir / "local.json").exists()


def test_another_run_in_the_output_path_is_refused(job_file, capsys):
    finish(job_file)
    assert run("submit", job_file, "--set", "seed=5") == ExitCode.USAGE
    error = capsys.readouterr().err
    assert "seed: 0 there, 5 here" in error
    assert "--new" in error


def test_stop_of_a_run_that_has_ended_is_refused(job_file, capsys):
    finish(job_file)
    assert run("stop", job_file) == ExitCode.USAGE
    assert "has finished" in capsys.readouterr().err


def test_logs_come_from_the_output_path(job_file, capsys):
    _, run_dir = finish(job_file, state="FAILED")
    (run_dir.path / "log.txt").write_text("one\ntwo\n")
    assert run("logs", job_file) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert run("logs", "-f", job_file) == ExitCode.RUN_FAILED


def test_logs_follow_a_run_in_the_foreground_to_its_end(job_file, monkeypatch, capsys):
    resolved, run_dir = finish(job_file, state=None)
    remember(resolved, job_file, pid=os.getpid())
    log = run_dir.path / "log.txt"
    log.write_text("one\ntw")

    def end(seconds):
        log.write_text("one\ntwo\nthree\n")
        entry = run_dir.attempts()[-1] | {"event": "ended", "state": "STOPPED", "step": 3, "num_steps": 4, "cause": None}
        with run_dir.attempts_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    monkeypatch.setattr(inspect, "time", SimpleNamespace(sleep=end))
    assert run("logs", "-f", job_file) == ExitCode.STOPPED
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_state_dir_is_private(state_dir):
    assert registry.state_dir() == state_dir
    assert Path(state_dir).stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_read_hides_no_other_run_from_the_list(job_file, tmp_path, capsys):
    resolved, _ = finish(job_file)
    remember(resolved, job_file)
    for name, content in (("other", "{}"), ("cut", '{"job"')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(content)
        registry.note(
            registry.Submission(run=f"{name}-1", output=str(tmp_path / name), job_file="", address=None, submission_id="")
        )
    (tmp_path / "folder" / "job.json").mkdir(parents=True)
    registry.note(
        registry.Submission(run="folder-1", output=str(tmp_path / "folder"), job_file="", address=None, submission_id="")
    )
    assert run("list") == 0
    out = capsys.readouterr().out
    assert f"{resolved.run}  SUCCEEDED" in out
    assert out.count("UNKNOWN") == 3
    assert "other-1 output.path" in out
    assert "not a job of this version" in out
    assert "cannot be read" in out


def test_a_process_that_has_got_the_number_of_a_run_is_not_the_run(job_file, capsys):
    resolved, _ = finish(job_file, state=None)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        remember(resolved, job_file, pid=stranger.pid, time=time.time() - 3600)
        assert run("status", job_file) == 100
        assert "ended without a word" in capsys.readouterr().out
        for option in ([], ["--now"]):
            assert run("stop", job_file, *option) == 2
        assert stranger.poll() is None, "it was interrupted"
    finally:
        stranger.kill()
        stranger.wait()


def test_a_run_on_another_machine_that_shares_the_home_folder_has_not_failed(job_file, capsys):
    resolved, run_dir = finish(job_file, state=None)
    remember(resolved, job_file, pid=2**22 - 1, host="another-host")
    assert run("status", job_file) == 101
    assert "it was started on another-host" in capsys.readouterr().out
    assert run("stop", job_file, "--now") == 2
    assert "stop it there" in capsys.readouterr().err
    assert run("stop", job_file) == 0
    assert run_dir.stop_reason() == "dsray stop"


_FOREGROUND = """
import signal, sys, time
from pathlib import Path
from diffsynth_ray.run_dir import RunDir
count, folder, busy_s = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
asked = []
def interrupted(*_):
    count.write_text(str(len(asked) + 1))
    if asked:
        time.sleep(1)
        sys.exit(130)
    asked.append(1)
    RunDir(folder).request_stop(reason="Ctrl-C")
signal.signal(signal.SIGINT, interrupted)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
count.write_text("0")
time.sleep(busy_s)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
time.sleep(200)
"""


@pytest.fixture
def foreground(request, job_file, tmp_path):
    """A process that ends by two interrupts, as `dsray run` does, known as the run in the foreground.

    Its parameter: for how many seconds it does not look at them.
    """
    resolved, run_dir = finish(job_file, state=None)
    count = tmp_path / "interrupts"
    arguments = [str(count), str(run_dir.path), str(getattr(request, "param", 0))]
    process = subprocess.Popen([sys.executable, "-c", _FOREGROUND, *arguments])
    wait_until(count.exists)
    remember(resolved, job_file, pid=process.pid)
    yield process, count
    process.kill()
    process.wait()


@pytest.mark.parametrize("foreground", [0, 1.5], indirect=True)
def test_stop_now_ends_a_run_in_the_foreground_and_waits(job_file, foreground, capsys):
    process, count = foreground
    assert run("stop", job_file, "--now") == 0
    assert capsys.readouterr().out.endswith(" STOPPED\n")
    assert process.poll() is not None
    assert count.read_text() == "2"


_PARENT = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(200)"


def test_a_run_in_the_foreground_whose_parent_does_not_ask_after_it_has_ended(job_file, tmp_path):
    """As one that a script has started: it stays in the table of processes, and half a minute was waited for."""
    resolved, run_dir = finish(job_file, state=None)
    count = tmp_path / "interrupts"
    foreground = [sys.executable, "-c", _FOREGROUND, str(count), str(run_dir.path), "0"]
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, *foreground], stdout=subprocess.PIPE, text=True)
    try:
        remember(resolved, job_file, pid=int(parent.stdout.readline()))
        wait_until(count.exists)
        asked = time.monotonic()
        assert run("stop", job_file, "--now") == 0
        assert time.monotonic() - asked < 20
        assert count.read_text() == "2"
    finally:
        parent.kill()
        parent.communicate()


@pytest.mark.parametrize("command", [["run"], ["run", "--new"], ["submit"], ["submit", "--new"]])
def test_what_a_run_in_the_foreground_writes_is_left_alone(job_file, foreground, tmp_path, monkeypatch, capsys, command):
    from diffsynth_ray.launch import client

    @contextmanager
    def nowhere(*_, **__):
        yield client.Cluster(url="http://127.0.0.1:9", token=None)

    monkeypatch.setattr(client, "open_cluster", nowhere)
    monkeypatch.setattr(client, "next_attempt", lambda *_: 2)
    monkeypatch.setattr(client, "active_job", lambda *_: None)
    assert run(command[0], job_file, *command[1:]) == 2
    assert f"is being written by process {foreground[0].pid}" in capsys.readouterr().err
    assert not (tmp_path / "out" / "previous").exists()
    (tmp_path / "out" / "job.json").unlink()
    assert run(command[0], job_file, *command[1:]) == 2, "it has not begun yet"


def test_an_earlier_run_of_this_very_process_is_over(job_file):
    """As in a notebook, where the one before did not get as far as its attempt."""
    from diffsynth_ray.launch import runs

    resolved, _ = finish(job_file, state=None)
    remember(resolved, job_file, pid=os.getpid())
    assert runs.claim_output(resolved, None, new=False) is None


@pytest.mark.parametrize("place", ["file", "homeless"])
def test_without_a_place_for_its_state_dsray_says_which_variable_names_one(place, job_file, tmp_path, monkeypatch, capsys):
    if place == "file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "file" / "state"))
    else:
        for name in ("DSRAY_STATE_DIR", "XDG_STATE_HOME"):
            monkeypatch.delenv(name, raising=False)

        def nobody():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", nobody)
    assert run("list") == 2
    err = capsys.readouterr().err
    assert "set DSRAY_STATE_DIR" in err
    assert "Traceback" not in err


def test_an_unexpected_error_without_a_place_for_its_traceback_is_shown(monkeypatch, job_file, tmp_path, capsys):
    from diffsynth_ray.config import resolve as resolving

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "file" / "state"))

    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(resolving, "resolve", broken)
    assert run("plan", job_file) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("inside", "shown"),
    [
        ("dataset.base_path={out}/data", "dataset.base_path: {out}/data"),
        ("split.cache_path={out}/data", "split.cache_path: {out}/data"),
        ("lora.checkpoint={out}/step-4.safetensors", "lora.checkpoint: {out}/step-4.safetensors"),
        ("", "another run: {out}/inner"),
        ("", "the working directory: {out}/data"),
    ],
)
def test_new_moves_nothing_aside_that_is_not_the_runs(job_file, tmp_path, monkeypatch, capsys, inside, shown):
    from diffsynth_ray.config.resolve import local_resources
    from diffsynth_ray.errors import OutputError
    from diffsynth_ray.launch import runs

    _, run_dir = finish(job_file)
    (run_dir.path / "data").mkdir()
    (run_dir.path / "previous" / "older").mkdir(parents=True)
    (run_dir.path / "previous" / "older" / "job.json").write_text("{}")
    if "another run" in shown:
        (run_dir.path / "inner").mkdir()
        (run_dir.path / "inner" / "job.json").write_text("{}")
    if "working directory" in shown:
        monkeypatch.chdir(run_dir.path / "data")
    overrides = [inside.format(out=run_dir.path)] if inside else []
    resolved = resolve(load_job(str(job_file), overrides), local_resources())
    with pytest.raises(OutputError) as caught:
        runs.claim_output(resolved, None, new=True)
    assert caught.value.message.splitlines()[1:] == [f"  {shown.format(out=run_dir.path)}"]
    assert (run_dir.path / "job.json").exists()
    monkeypatch.chdir(tmp_path)
    if not overrides and "another run" not in shown:
        assert runs.claim_output(resolved, None, new=True) == run_dir.path / "previous" / resolved.run


@pytest.mark.parametrize("has_begun", [True, False])
def test_new_is_refused_while_a_job_of_the_run_is_there(job_file, monkeypatch, has_begun):
    """Also between its submission and its first file: two attempts at once would train in one folder."""
    from diffsynth_ray.errors import OutputError
    from diffsynth_ray.launch import client, runs

    resolved, run_dir = finish(job_file, state=None)
    if not has_begun:
        shutil.rmtree(run_dir.path)
    job = {"submission_id": f"{resolved.run}-a1", "status": "PENDING"}
    monkeypatch.setattr(client, "active_job", lambda cluster, name: job if name == resolved.run else None)
    cluster = client.Cluster(url="http://127.0.0.1:9", token=None)
    with pytest.raises(OutputError, match=rf"is being written by {resolved.run}-a1"):
        runs.claim_output(resolved, cluster, new=True)
    assert runs.claim_output(resolved, cluster, new=False) is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("output.path=", "output.path: is empty; name a path, or remove the key"),
        ('output.path="a\\u0000b"', "output.path: got 'a\\x00b'; no path has the character \\0"),
        ("split.cache_path=", "split.cache_path: is empty"),
        ("model={paths=[''], base_path='', family='wan'}", "model.paths: is empty"),
        ("output.checkpoint_path=", "output.checkpoint_path: is empty"),
        ("lora.checkpoint=", "lora.checkpoint: is empty"),
        ("training.resume_from_checkpoint=['']", "training.resume_from_checkpoint: is empty"),
        ("model.options={a = 2024-01-01}", "model.options: got {'a': datetime.date(2024, 1, 1)}; only numbers"),
        ("model.options={a = inf}", "model.options: got {'a': inf}; only numbers"),
    ],
)
def test_values_that_cannot_be_meant(job_file, capsys, override, expected):
    assert run("plan", job_file, "--set", override) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "locale", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_that_cannot_show_a_character_gets_the_others(job_file, locale):
    resolved, run_dir = finish(job_file)
    run_dir.loss_path.write_text("step,key,value\n1,loss,1\n2,loss,2\n3,loss,1\n")
    environment = os.environ | locale
    code = f"from diffsynth_ray.cli import app; raise SystemExit(app.main(['status', {str(run_dir.path)!r}]))"
    done = subprocess_run(code, env=environment)
    assert done.returncode == 0, done.stderr
    assert "loss      1 ?" in done.stdout
    assert resolved.run in done.stdout


def test_two_runs_in_one_folder_are_refused_before_the_first_starts(job_file, tmp_path, capsys):
    other = tmp_path / "other.toml"
    other.write_text(job_file.read_text().replace("max_steps", "learning_rate = 1e-3\nmax_steps"))
    assert run("submit", job_file, other) == 2
    err = capsys.readouterr().err
    assert f"output.path: {tmp_path}/out is that of {job_file} too" in err
    assert not (tmp_path / "out").exists()


def test_run_looks_whether_it_can_write_before_ray_starts(job_file, tmp_path, monkeypatch, capsys):
    from diffsynth_ray.launch import driver

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(driver, "run_locally", None)
    assert run("run", job_file, "--set", f"output.path={tmp_path}/file/out") == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("state", [None, "SUCCEEDED"])
def test_a_run_that_another_took_over_has_failed_itself(job_file, monkeypatch, capsys, state):
    from diffsynth_ray.launch import driver

    def taken_over(*_, **__):
        finish(job_file, state=state)
        return ExitCode.RUN_FAILED

    monkeypatch.setattr(driver, "run_locally", taken_over)
    assert run("run", job_file) == 100
    assert ": FAILED" in capsys.readouterr().out


def test_a_reader_that_has_gone_is_no_error(monkeypatch, job_file):
    def gone(*args, **options):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("diffsynth_ray.cli.render.plan", gone)
    monkeypatch.setattr("diffsynth_ray.cli.render.close_quietly", lambda: None)
    monkeypatch.setattr("sys.stdout", sys.stdout)
    monkeypatch.setattr("sys.stderr", sys.stderr)
    assert run("plan", job_file) == ExitCode.DONE


@pytest.mark.parametrize("arguments", [["--version"], ["list", "--json"], ["--help"], ["plan", "nothing.toml", "--json"]])
@pytest.mark.parametrize("reader", ["full", "gone"])
def test_a_result_that_cannot_be_written_is_no_bug_of_dsray(arguments, reader, state_dir):
    """Of a full disk behind stdout the user hears, of a reader that has gone nobody."""
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "wb") if reader == "full" else os.fdopen(write, "wb") as stdout:
        process = subprocess.run(
            [sys.executable, "-m", "diffsynth_ray.cli.app", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True,
            check=False, timeout=60,
        )  # fmt: skip
    told = [line for line in process.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert "Traceback" not in process.stderr, process.stderr
    assert "Exception ignored" not in process.stderr, process.stderr
    assert "bug" not in process.stderr
    if "nothing.toml" in arguments:
        assert (process.returncode, told) == (2, ["error: nothing.toml: 1 problem"])
    elif reader == "full":
        assert (process.returncode, told) == (2, ["error: the result cannot be written: No space left on device"])
    else:
        assert (process.returncode, told) == (0, [])


def test_the_end_by_a_signal_is_no_success(monkeypatch, job_file):
    """Ray answers SIGTERM with SystemExit while it starts."""

    def ended(*args, **options):
        raise SystemExit(15)

    monkeypatch.setattr("diffsynth_ray.cli.render.plan", ended)
    with pytest.raises(SystemExit) as found:
        run("plan", job_file)
    assert found.value.code == 15


def test_stop_now_of_a_running_job_is_no_wish_for_a_checkpoint(job_file, monkeypatch):
    """SIGTERM, which a job server sends, is one: the run would go on to the end of its step and write a checkpoint."""
    from diffsynth_ray.launch import client, runs

    resolved, run_dir = finish(job_file, state=None)
    remember(resolved, job_file)
    seen = []
    attempt = run_dir.attempts()[-1]["submission_id"]
    monkeypatch.setattr(client, "connect_local", lambda: client.Cluster(url="http://127.0.0.1:9", token=None))
    job = {"submission_id": attempt, "status": "RUNNING"}
    monkeypatch.setattr(client, "job_states", lambda cluster, name: {1: job})
    monkeypatch.setattr(client, "request_end", lambda cluster, job: pytest.fail("it was sent SIGTERM"))

    def wait_until_ended(cluster, submission_id, *, say):
        seen.append((submission_id, run_dir.stop_reason(now=True)))
        return client.Ended("STOPPED", client.ExitCode.STOPPED)

    monkeypatch.setattr(runs.client, "wait_until_ended", wait_until_ended)
    assert run("stop", job_file, "--now") == 0
    assert seen == [(attempt, "dsray stop --now")]
