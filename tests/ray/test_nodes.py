"""Two nodes on one machine, each with an address of its own: one dies, is drained, comes back; an elastic run goes on."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
import ray
from PIL import Image
from training_runs import JOB, note_recovery, recovery
from waiting import wait_until

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.errors import ExitCode
from diffsynth_ray.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
FAST_DETECTION = {
    "health_check_initial_delay_ms": 5000, "health_check_period_ms": 1000, "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}  # fmt: skip
ELASTIC = (
    "distributed.num_workers=[1, 2]", "distributed.resources_per_worker={CPU = 1.2}", "output.checkpoint_steps=5",
    "training.max_steps=1000", "output.save_steps=1000",
)  # fmt: skip


class Nodes:
    """A head and a second node at 127.0.0.2, two CPUs each; a worker of 1.2 CPUs fits once on each."""

    def __init__(self, tmp_path):
        self.temp_dir = f"/tmp/dsray-nodes-{os.getpid()}"
        self.log = (tmp_path / "nodes.log").open("w")
        self.port = 20000 + os.getpid() % 10000
        self.head_ip = ray.util.get_node_ip_address()
        self.address = f"{self.head_ip}:{self.port}"
        self.environment = os.environ | {"RAY_ADDRESS": self.address}
        self.head = self._start(
            "--head", f"--node-ip-address={self.head_ip}", f"--port={self.port}", "--include-dashboard=false",
            f"--temp-dir={self.temp_dir}", f"--system-config={json.dumps(FAST_DETECTION)}",
        )  # fmt: skip
        wait_until(lambda: self._answers(), 90)
        self.start_second()

    def _answers(self):
        with suppress(OSError):
            socket.create_connection((self.head_ip, self.port), timeout=1).close()
            return True

    def _start(self, *options):
        common = ("--num-cpus=2", f"--object-store-memory={200 << 20}", "--min-worker-port=0", "--max-worker-port=0")
        return subprocess.Popen(
            [*RAY, "start", "--block", "--disable-usage-stats", *common, *options],
            env=self.environment, stdout=self.log, stderr=self.log,
        )  # fmt: skip

    def start_second(self):
        self.second = self._start(f"--address={self.address}", "--node-ip-address=127.0.0.2")

    def kill_second(self):
        kill_tree(self.second.pid)

    def close(self):
        for process in (self.second, self.head):
            kill_tree(process.pid)
        self.log.close()


def kill_tree(pid):
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        parent.wait(10)


@pytest.fixture
def nodes(tmp_path):
    nodes = Nodes(tmp_path)
    yield nodes
    nodes.close()


class DrivenRun:
    """A run whose driver is a process of its own, as a Ray job's is."""

    def __init__(self, tmp_path, photos, nodes, *overrides, name="run"):
        self.dir = RunDir(tmp_path / name)
        job_path = tmp_path / f"{name}.toml"
        job_path.write_text(JOB.format(photos=photos, output=self.dir.path))
        resolved = resolve(load_job(str(job_path), list(overrides)), Resources(cpus=4, gpus=0))
        (tmp_path / f"{name}.json").write_text(resolved.model_dump_json())
        command = ["-m", "diffsynth_ray.launch.driver", "--job", str(tmp_path / f"{name}.json"), "--submission-id", name]
        self.told = []
        """(when, line) of all that the driver has said."""
        self.process = subprocess.Popen(
            [sys.executable, *command], env=nodes.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.process.stdout:
            self.told.append((time.monotonic(), line.rstrip()))

    def recovery(self, began, pattern):
        """What it took to train again after a line with `pattern`, counted from `began`."""
        told = list(self.told)
        start = next(number for number, (when, line) in enumerate(told) if when > began and re.search(pattern, line))
        return recovery(told, start=start, killed=began)

    def log(self):
        path = self.dir.path / "log.txt"
        return path.read_text() if path.exists() else ""

    def wait_for(self, pattern, seconds=240, after=0):
        """Until the log has the pattern beyond position `after`; returns the position behind it."""

        def found():
            assert self.process.poll() is None or re.search(pattern, self.log()[after:]), self.log()
            return re.search(pattern, self.log()[after:])

        return after + wait_until(found, seconds, self.log).end()

    def losses(self):
        rows = (line.split(",") for line in self.dir.loss_path.read_text().splitlines())
        return {int(step): float(value) for step, key, value in rows if key == "loss"}


def test_an_elastic_run_shrinks_when_a_node_dies_and_grows_when_it_comes_back(tmp_path, photos, nodes):
    run = DrivenRun(tmp_path, photos, nodes, *ELASTIC)
    # Where the second node is late, the run starts on one and grows.
    at = run.wait_for(r"2 training worker\(s\): rank 0 .*rank 1 .*")
    assert "127.0.0.2" in run.log()
    at = run.wait_for(r"checkpoint after step \d+:", after=at)
    killed = time.monotonic()
    nodes.kill_second()
    at = run.wait_for(r"lost rank \d \(pid \d+ on 127\.0\.0\.2.*", after=at)
    at = run.wait_for(r"1 training worker\(s\): rank 0", after=at)
    at = run.wait_for(r"continuing after step (\d+) of 1000", after=at)
    at = run.wait_for(r"step \d+/1000", after=at)
    note_recovery("a node, of two, elastic: on one worker", [run.recovery(killed, "lost rank")])
    nodes.start_second()
    back = time.monotonic()
    at = run.wait_for(r"going on with 2 worker\(s\): a checkpoint first", after=at)
    at = run.wait_for(r"2 training worker\(s\): rank 0", after=at)
    at = run.wait_for(r"continuing after step \d+ of 1000", after=at)
    at = run.wait_for(r"step \d+/1000", after=at)
    note_recovery("a node that comes back, elastic: on two workers", [run.recovery(back, "going on with 2 worker")])
    run.dir.request_stop(reason="the test has seen enough")
    assert run.process.wait(120) == ExitCode.STOPPED, run.log()
    [loss] = [entry for entry in run.dir.attempts() if entry["event"] == "workers lost"]
    assert loss["node"] == "127.0.0.2"
    losses = run.losses()
    assert sorted(losses) == list(range(1, len(losses) + 1))
    settings = [*ELASTIC[1:], "distributed.num_workers=1", f"training.max_steps={len(losses)}"]
    whole = DrivenRun(tmp_path, photos, nodes, *settings, name="whole")
    assert whole.process.wait(400) == 0, whole.log()
    assert losses == pytest.approx(whole.losses(), abs=1e-5)


def test_a_node_that_will_be_taken_away_means_a_checkpoint_first(tmp_path, photos, nodes):
    overrides = [each.replace("checkpoint_steps=5", "checkpoint_steps=1000") for each in ELASTIC]
    overrides.append("distributed.max_failures=0")  # it is no failure
    run = DrivenRun(tmp_path, photos, nodes, *overrides)
    at = run.wait_for(r"2 training worker\(s\): rank 0 .*rank 1 .*")
    at = run.wait_for(r"step \d+/1000", after=at)
    program = "import ray, json; ray.init(address='auto', logging_level='ERROR'); print(json.dumps(ray.nodes()))"
    listed = subprocess.run([sys.executable, "-c", program], env=nodes.environment, capture_output=True, text=True, check=True)
    [node] = [node for node in json.loads(listed.stdout.splitlines()[-1]) if node["NodeManagerAddress"] == "127.0.0.2"]
    subprocess.run(
        [*RAY, "drain-node", f"--address={nodes.address}", f"--node-id={node['NodeID']}", "--deadline-remaining-seconds=30",
         "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"],
        env=nodes.environment, check=True, capture_output=True,
    )  # fmt: skip
    drained = time.monotonic()
    at = run.wait_for(r"the nodes of ranks \[\d\] will go: checkpoint after step (\d+)", after=at)
    step = int(re.findall(r"will go: checkpoint after step (\d+)", run.log())[0])
    at = run.wait_for(rf"checkpoint after step {step}:", after=at)
    # The node is used to its end. It is there even longer than it said, but nothing starts on it any more.
    at = run.wait_for(r"1 training worker\(s\): rank 0", after=at)
    saved = [int(found) for found in re.findall(r"checkpoint after step (\d+):", run.log()[:at])]
    at = run.wait_for(rf"continuing after step {saved[-1]} of 1000", after=at)
    run.wait_for(r"step \d+/1000", after=at)
    note_recovery("a node that goes 30 s after it said so: on one worker", [run.recovery(drained, "will go: checkpoint")])
    assert "127.0.0.2" not in re.findall(r"1 training worker\(s\): (.*)", run.log())[-1]
    run.dir.request_stop(reason="the test has seen enough")
    assert run.process.wait(120) == ExitCode.STOPPED, run.log()
    assert sorted(run.losses()) == list(range(1, len(run.losses()) + 1))


def test_stage_one_of_split_training_survives_a_node_that_dies(tmp_path, nodes):
    photos = tmp_path / "photos"
    photos.mkdir()
    lines = ["image,prompt"]
    for number in range(400):
        Image.effect_noise((64, 64), 20 + number % 50).convert("RGB").save(photos / f"{number}.png")
        lines.append(f"{number}.png,picture number {number}")
    (photos / "metadata.csv").write_text("\n".join(lines) + "\n")
    overrides = ("split.enabled=true", f"split.cache_path={tmp_path}/cache", "split.num_workers=2",
                 "split.resources_per_worker={CPU = 1.2}", "training.max_steps=3")  # fmt: skip
    wait_until(lambda: "127.0.0.2" in alive(nodes), 90)
    run = DrivenRun(tmp_path, photos, nodes, *overrides)
    wait_until(lambda: any(map(is_encoder, psutil.Process(nodes.second.pid).children(recursive=True))), 240, run.log)
    at = run.wait_for(r"encode \d+/800 samples")
    nodes.kill_second()
    at = run.wait_for(r"encoded (\d+) texts and (\d+) images, reused 0 texts and 0 images", after=at)
    run.wait_for(r"step 3/3", after=at)
    assert run.process.wait(120) == ExitCode.DONE
    assert "encoded 400 texts and 400 images" in run.log()


def is_encoder(process):
    with suppress(psutil.NoSuchProcess):
        return any("_EncodeUnit" in argument for argument in process.cmdline())


def alive(nodes):
    program = (
        "import ray; ray.init(address='auto', logging_level='ERROR'); "
        "print([node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=nodes.environment, capture_output=True, text=True, check=False)
    return done.stdout
