"""`dsray submit` and what may happen to it: driver, head, stop, other workers, more epochs, another job in the same folder."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file
from training_runs import JOB, distance, note_recovery
from waiting import wait_until

from diffsynth_ray.errors import ExitCode
from diffsynth_ray.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("a_terminal")]


class Cli:
    """The command line, with a state directory of its own."""

    def __init__(self, tmp_path, photos):
        self.tmp_path = tmp_path
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment |= {"DSRAY_STATE_DIR": str(tmp_path / "state")}
        self.dir = RunDir(tmp_path / "out")
        self.job = tmp_path / "job.toml"
        self.job.write_text(JOB.format(photos=photos, output=self.dir.path))

    def start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "diffsynth_ray.cli.app", *map(str, arguments)],
            env=self.environment, cwd=self.tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, *arguments, timeout_s=400):
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output

    def submit(self, *settings):
        return self.start("submit", self.job, *(part for each in settings for part in ("--set", each)))

    def log(self):
        path = self.dir.path / "log.txt"
        return path.read_text() if path.exists() else ""

    def wait_for(self, pattern, seconds=240, after=0):
        found = wait_until(lambda: re.search(pattern, self.log()[after:]), seconds, self.log)
        return after + found.end()

    def local(self):
        return json.loads((self.tmp_path / "state" / "local.json").read_text())

    def processes(self):
        supervisor = psutil.Process(self.local()["supervisor_pid"])
        return [supervisor, *supervisor.children(recursive=True)]

    def driver(self):
        return next(each for each in self.processes() if "diffsynth_ray.launch.driver" in each.cmdline())


@pytest.fixture
def cli(tmp_path, photos):
    cli = Cli(tmp_path, photos)
    yield cli
    if (tmp_path / "state" / "local.json").exists():
        for process in reversed(cli.processes()):
            process.kill()


def seconds(killed, detected):
    """From the kill to the end of `submit`, and from there to a step of the next one."""
    return {"detected_s": round(detected - killed, 1), "training_s": round(time.monotonic() - detected, 1)}


def assert_weights_of_an_undisturbed_run(cli, photos):
    other = Cli(cli.tmp_path, photos)
    other.dir = RunDir(cli.tmp_path / "whole")
    code, output = other.run("run", cli.job, "--set", f"output.path={other.dir.path}")
    assert code == ExitCode.DONE, output
    weights = [load_file(each.dir.path / "step-10.safetensors") for each in (cli, other)]
    assert distance(*weights) == 0


def test_a_killed_driver_and_then_a_killed_head(cli, photos):
    submit = cli.submit("output.checkpoint_steps=1")
    at = cli.wait_for(r"checkpoint after step 2:")
    cli.driver().kill()
    killed = time.monotonic()
    output, _ = submit.communicate(timeout=120)
    assert submit.returncode == ExitCode.RUN_FAILED, output
    detected = time.monotonic()
    submit = cli.submit("output.checkpoint_steps=1")
    at = cli.wait_for(r"continuing after step (\d+) of 10", after=at)
    cli.wait_for(r"step \d+/10", after=at)
    note_recovery("the driver, going on by the next submit", [seconds(killed, detected)])
    at = cli.wait_for(r"checkpoint after step \d+:", after=at)
    head = next(each for each in cli.processes() if "ray.scripts.scripts" in " ".join(each.cmdline()))
    head.kill()
    killed = time.monotonic()
    output, _ = submit.communicate(timeout=200)
    assert submit.returncode != ExitCode.DONE, output
    detected = time.monotonic()
    wait_until(lambda: not (cli.tmp_path / "state" / "local.json").exists(), 60)
    submit = cli.submit("output.checkpoint_steps=1")
    at = cli.wait_for(r"continuing after step (\d+) of 10", after=at)
    cli.wait_for(r"step \d+/10", after=at)
    note_recovery("the head, with a new one by the next submit", [seconds(killed, detected)])
    output, _ = submit.communicate(timeout=200)
    assert submit.returncode == ExitCode.DONE, output
    assert cli.log().count("continuing after step") == 2
    assert_weights_of_an_undisturbed_run(cli, photos)


def test_stop_continue_with_more_epochs_and_workers_and_what_the_folder_belongs_to(cli, photos):
    # Long enough for commands that take seconds to meet it while it runs: 75 steps an epoch.
    cli.job.write_text(cli.job.read_text().replace("repeat = 8", "repeat = 60"))
    submit = cli.submit()
    at = cli.wait_for(r"step 2/75")
    follower = cli.submit()
    code, output = cli.run("stop", cli.dir.path)
    assert code == ExitCode.DONE, output
    assert "was asked to stop" in output
    for process in (submit, follower):
        output, _ = process.communicate(timeout=200)
        assert process.returncode == ExitCode.STOPPED, output
    assert "following it" in output, "the second submit followed the first"
    assert cli.run("status", cli.dir.path)[0] == ExitCode.STOPPED

    submit = cli.submit("training.num_epochs=2", "distributed.num_workers=2")
    at = cli.wait_for(r"continuing after step \d+ of 150", after=at)
    cli.wait_for(r"step \d+/150", after=at)
    cli.driver().send_signal(signal.SIGTERM)
    output, _ = submit.communicate(timeout=200)
    assert submit.returncode == ExitCode.STOPPED, output
    assert "the driver got SIGTERM" in cli.log()

    submit = cli.submit("training.num_epochs=2")
    at = cli.wait_for(r"continuing after step \d+ of 150", after=at)
    cli.wait_for(r"step \d+/150", after=at)
    submit.send_signal(signal.SIGINT)
    output, _ = submit.communicate(timeout=60)
    assert submit.returncode == ExitCode.INTERRUPTED
    assert "goes on" in output
    code, output = cli.run("stop", cli.dir.path, "--now")
    assert (code, "STOPPED" in output) == (ExitCode.DONE, True), output

    code, output = cli.run("submit", cli.job, "--set", "training.learning_rate=0.5")
    assert code == ExitCode.USAGE
    assert "training.learning_rate: 0.001 there, 0.5 here" in output
    assert "--new" in output
    code, output = cli.run("submit", cli.job, "--set", "training.num_epochs=2")
    assert code == ExitCode.DONE, output
    code, output = cli.run("submit", cli.job, "--set", "training.num_epochs=2")
    assert (code, "loading the model" in output) == (ExitCode.DONE, False), "a finished one is reported"
    run_name = cli.dir.owner().run
    code, output = cli.run("submit", cli.job, "--new", "--set", "training.max_steps=1")
    assert code == ExitCode.DONE, output
    assert (cli.dir.path / "previous" / run_name / "epoch-0.safetensors").exists() or list(
        (cli.dir.path / "previous" / run_name).glob("step-*.safetensors")
    )


@pytest.mark.parametrize("command", ["submit", "run"])
def test_stop_now_waits_for_no_worker(cli, command):
    """As one that sits in a collective, in a step of minutes, or frees gigabytes of pinned memory: it answers nobody."""
    cli.job.write_text(cli.job.read_text().replace("repeat = 8", "repeat = 60"))
    submit = cli.start(command, cli.job, "--set", "distributed.num_workers=2")
    cli.wait_for(r"step \d+/75")
    processes = cli.processes() if command == "submit" else psutil.Process(submit.pid).children(recursive=True)
    workers = [each for each in processes if "RayTrainWorker" in " ".join(each.cmdline())]
    assert len(workers) == 2
    for worker in workers:
        worker.suspend()
    asked = time.monotonic()
    code, output = cli.run("stop", cli.dir.path, "--now")
    seconds_to_end = time.monotonic() - asked
    assert (code, "STOPPED" in output) == (ExitCode.DONE, True), output
    assert seconds_to_end < 15, output
    wait_until(lambda: not any(worker.is_running() for worker in workers), 15)
    output, _ = submit.communicate(timeout=60)
    assert submit.returncode in (ExitCode.STOPPED, ExitCode.INTERRUPTED), output
    assert cli.run("status", cli.dir.path)[0] == ExitCode.STOPPED


def test_signals_under_run(cli):
    cli.job.write_text(cli.job.read_text().replace("repeat = 8", "repeat = 60"))  # 75 steps, so that none comes after the end
    at = 0
    for number, reason in ((signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")):
        process = cli.start("run", cli.job, "--set", "output.checkpoint_minutes=1000")
        at = cli.wait_for(r"step \d+/75", after=at)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == ExitCode.STOPPED, output
        at = cli.wait_for(rf"stopping after step \d+: .*{reason}", after=at)
    process = cli.start("run", cli.job)
    at = cli.wait_for(r"continuing after step \d+ of 75", after=at)
    cli.wait_for(r"step \d+/75", after=at)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (ExitCode.INTERRUPTED, ExitCode.STOPPED)
    assert cli.run("status", cli.job)[0] == ExitCode.STOPPED
