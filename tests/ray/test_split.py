"""Split training on real Ray processes: two stages of one run, killed wherever it hurts, and always the same numbers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import training_runs
from PIL import Image
from safetensors.torch import load_file
from training_in_process import train_in_process
from waiting import wait_until

from diffsynth_ray.config.resolve import Resources, available_cpus, resolve
from diffsynth_ray.config.schema import Job
from diffsynth_ray.data.cache import Cache
from diffsynth_ray.data.manifest import manifest_ids
from diffsynth_ray.data.samples import SampleRule
from diffsynth_ray.errors import ExitCode
from diffsynth_ray.run_dir import RunDir
from diffsynth_ray.train import encode

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]
JOB = """
[dataset]
base_path = "{photos}"
metadata_path = "{photos}/metadata.csv"
repeat = 4
max_pixels = 1024
global_batch_size = 4
[split]
cache_path = "{folder}/cache"
[model]
family = "qwen_image"
tiny = true
[lora]
base_model = "dit"
rank = 4
[training]
learning_rate = 1e-3
precision = "fp32"
max_steps = 3
[output]
path = "{folder}/{name}"
save_steps = 3
[logging]
tensorboard = false
"""
ENCODING = "encode [0-9]+/120 samples"
FULL_JOB = JOB.replace('[lora]\nbase_model = "dit"\nrank = 4\n', "").replace(
    "max_steps = 3", 'max_steps = 3\ntrainable_models = ["dit"]'
)


class Run(training_runs.Run):
    """One job with the cache of its folder; in two stages unless told otherwise."""

    def __init__(self, folder, photos, name="run", *, job=JOB):
        super().__init__(folder, photos, name)
        self.job_path.write_text(job.format(photos=photos, folder=folder, name=name))
        self.cache = Cache(str(folder / "cache"))

    def start(self, *overrides, split=True):
        return super().start(f"split.enabled={str(split).lower()}", *overrides)

    def start_apart(self):
        """`dsray run` as a process of its own; its lines go to `said`."""
        command = [sys.executable, "-m", "diffsynth_ray.cli.app", "run", str(self.job_path), "--set", "split.enabled=true"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        process = subprocess.Popen(
            command,
            env=environment | {"DSRAY_STATE_DIR": str(self.output.parent / "state")},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=lambda: self.said.extend(process.stderr), daemon=True).start()
        return process

    def wait_for_line(self, pattern):
        """Until a line that begins like this."""
        wait_until(lambda: any(re.match(pattern, line) for line in list(self.said)), 200, lambda: self.said)

    def weights(self):
        return load_file(self.output / "step-3.safetensors")

    def undisturbed_losses(self, steps=3):
        """Those of combined training in this process, with as many threads as the worker has, as loss.csv has them."""
        before = torch.get_num_threads()
        torch.set_num_threads(available_cpus())
        try:
            losses, _ = train_in_process(self.dir.owner(), steps=steps)
        finally:
            torch.set_num_threads(before)  # the tests that follow compute with as many as without this one
        # Nine digits tell one float32 from every other.
        return {step: float(f"{loss:.9g}") for step, loss in losses.items()}

    def counts(self):
        return [line.strip() for line in self.said if line.startswith("encoded ")]


def flip_a_bit_of_an_image(cache):
    """The shard in which it was."""
    index = cache.index()
    location = next(index.location(place) for place in range(len(index)) if index.location(place).kind == "image")
    shard = Path(cache.path) / location.shard
    content = bytearray(shard.read_bytes())
    content[location.offset] ^= 1
    shard.write_bytes(content)
    return location.shard


def assert_same(first, second):
    assert first.losses() == second.losses()
    one, other = first.weights(), second.weights()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def processes(part):
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(part in argument for argument in process.info["cmdline"] or [])
    ]


def kill_with_ray(process):
    """SIGKILL a `dsray run` and the Ray that it started, as a machine that goes down would."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("split")


class Recipe(Run):
    """The shipped quickstart_split, made short."""

    def __init__(self, folder, name):
        self.job_path = "quickstart_split"
        self.output = folder / name
        self.dir = RunDir(self.output)
        self.cache = Cache(str(folder / "cache"))
        self.said, self.heard = [], []

    def start(self, *overrides, split=True):
        short = ["training.max_steps=3", "output.save_steps=3", "dataset.max_pixels=1024", "logging.tensorboard=false"]
        places = [f"output.path={self.output}", f"split.cache_path={self.cache.path}"]
        return super().start(*short, *places, *overrides, split=split)


@pytest.fixture(scope="module")
def split(module_folder, local_ray):
    """An undisturbed run in two stages."""
    run = Recipe(module_folder, "split")
    assert run.start() == ExitCode.DONE, run.said
    return run


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sixty pictures: enough to be interrupted in the middle."""
    folder = tmp_path_factory.mktemp("many")
    lines = ["image,prompt"]
    for number in range(60):
        Image.effect_noise((64, 48), 20 + number).convert("RGB").save(folder / f"{number}.png")
        lines.append(f"{number}.png,picture number {number}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_two_stages_are_one_run(split):
    text = "\n".join(split.said)
    assert split.counts() == ["encoded 5 texts and 5 images, reused 0 texts and 0 images"]
    assert "encode 10/10 samples" in text
    assert text.index("encode 10/10") < text.index("stage train loads dit") < text.index("step 1/3")
    assert split.dir.attempts()[-1]["state"] == "SUCCEEDED"
    assert split.dir.encode_progress().done == 10
    assert len(split.cache.index_files()) == 1
    # The encoders are gone with their stage: their GPUs would be free.
    wait_until(lambda: not processes("_EncodeUnit"))


def test_its_losses_are_those_of_combined_training(split):
    assert split.losses() == split.undisturbed_losses()


@pytest.mark.slow
def test_split_and_combined_are_bit_identical(split, module_folder):
    combined = Recipe(module_folder, "combined")
    assert combined.start(split=False) == ExitCode.DONE, combined.said
    assert_same(split, combined)


@pytest.mark.slow
@pytest.mark.parametrize("of_its_own", [False, True], ids=["share", "metadata of its own"])
def test_validation_loss_and_pictures_are_those_of_combined_training(tmp_path, photos, of_its_own):
    held = tmp_path / "held.csv"
    held.write_text("image,prompt\ncat.jpg,a cat that no other row has\nrocket.jpg,\n")
    keys = [f"validation.holdout={held if of_its_own else 0.4}", "validation.every_steps=1", "validation.keep_best=true"]
    keys += ['validation.prompts=["a cat", "a dog"]', "validation.size=[32, 32]", "validation.num_inference_steps=2"]
    one, other = Run(tmp_path, photos, "split"), Run(tmp_path, photos, "combined")
    assert one.start(*keys) == ExitCode.DONE, one.said
    assert other.start(*keys, split=False) == ExitCode.DONE, other.said
    assert_same(one, other)
    assert [(entry.step, entry.num_samples) for entry in one.dir.validations()] == [(step, 2) for step in range(4)]
    assert [entry.quantiles for entry in one.dir.validations()] == [entry.quantiles for entry in other.dir.validations()]
    assert (one.output / "best.safetensors").exists() == (other.output / "best.safetensors").exists()
    assert len(manifest_ids(one.cache)) == (2 if of_its_own else 1)
    pictures = [
        {p.relative_to(run.output): p.read_bytes() for p in run.output.rglob("samples/*/*.png")} for run in (one, other)
    ]
    assert len(pictures[0]) == 8
    assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_with_all_weights_trained_it_is_bit_identical(tmp_path, photos):
    one, other = Run(tmp_path, photos, "split", job=FULL_JOB), Run(tmp_path, photos, "combined", job=FULL_JOB)
    assert one.start() == ExitCode.DONE, one.said
    assert other.start(split=False) == ExitCode.DONE, other.said
    assert_same(one, other)


@pytest.mark.slow
def test_a_trained_encoder_keeps_its_half_combined(tmp_path, photos):
    trained = 'training.trainable_models=["text_encoder"]'
    one, other = Run(tmp_path, photos, "split"), Run(tmp_path, photos, "combined")
    assert one.start(trained) == ExitCode.DONE, one.said
    assert one.counts() == ["encoded 0 texts and 5 images, reused 0 texts and 0 images"]
    assert "stage train loads dit, text_encoder" in one.said
    assert other.start(trained, split=False) == ExitCode.DONE, other.said
    assert_same(one, other)


@pytest.mark.slow
def test_two_workers_and_two_encoders(split, tmp_path):
    run = Recipe(tmp_path, "run")
    overrides = ["distributed.num_workers=2", "split.num_workers=2", "split.resources_per_worker={CPU=0.5}"]
    assert run.start(*overrides) == ExitCode.DONE, run.said
    assert run.losses() == pytest.approx(split.losses(), abs=1e-5)


@pytest.mark.slow
def test_killed_in_stage_one_and_between_the_stages(tmp_path, many):
    run = Run(tmp_path, many)
    process = run.start_apart()
    run.wait_for_line(ENCODING)
    kill_with_ray(process)
    written = len(run.cache.index())
    assert 0 < written < 120, run.said
    run.said.clear()
    process = run.start_apart()
    run.wait_for_line("encoded [0-9]")
    kill_with_ray(process)
    (first,) = run.counts()
    numbers = [int(word) for word in first.replace(",", "").split() if word.isdigit()]
    assert numbers[0] + numbers[1] == 120 - written
    assert numbers[2] + numbers[3] == written
    run.said.clear()
    assert run.start() == ExitCode.DONE, run.said
    assert run.counts() == ["encoded 0 texts and 0 images, reused 60 texts and 60 images"]
    assert run.losses() == run.undisturbed_losses()


@pytest.mark.slow
def test_a_killed_encoder_is_replaced(tmp_path, many):
    run = Run(tmp_path, many)
    killed = []

    def kill():
        run.wait_for_line(ENCODING)
        for encoder in processes("_EncodeUnit"):
            encoder.kill()
            killed.append(encoder.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    assert run.start() == ExitCode.DONE, run.said
    thread.join()
    assert killed, run.said
    assert run.counts() == ["encoded 60 texts and 60 images, reused 0 texts and 0 images"]
    assert run.losses() == run.undisturbed_losses()


@pytest.mark.slow
def test_stopped_in_stage_one_and_continued(tmp_path, many):
    run = Run(tmp_path, many)

    def stop():
        run.wait_for_line(ENCODING)
        run.dir.request_stop(reason="the test asks for it")

    thread = threading.Thread(target=stop)
    thread.start()
    assert run.start() == ExitCode.STOPPED, run.said
    thread.join()
    assert run.start() == ExitCode.DONE, run.said
    assert "reused 0 texts" not in run.counts()[-1]


@pytest.mark.slow
def test_changed_texts_damage_and_bad_files(tmp_path, photos):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    run = Run(tmp_path, folder)
    assert run.start() == ExitCode.DONE, run.said
    metadata = folder / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("cat.jpg,", "cat.jpg,New: "))
    run.dir.move_aside()
    assert run.start() == ExitCode.DONE, run.said
    assert run.counts()[-1] == "encoded 1 texts and 0 images, reused 4 texts and 5 images"
    # A flipped bit: the run ends with shard and cure, and the next one encodes that entry anew.
    losses = run.losses()
    run.dir.move_aside()
    shard = flip_a_bit_of_an_image(run.cache)
    assert run.start() == ExitCode.RUN_FAILED
    cause = json.loads(run.dir.error_path.read_text())["cause"]
    assert shard in cause
    assert "submit the job again" in cause
    assert run.start() == ExitCode.DONE, run.said
    assert run.counts()[-1] == "encoded 0 texts and 1 images, reused 5 texts and 4 images"
    assert run.losses() == losses
    # One that `verify` has found is encoded anew by the next run, which need not stumble over it.
    shard = flip_a_bit_of_an_image(run.cache)
    command = [sys.executable, "-m", "diffsynth_ray.cli.app", "cache", "verify", run.cache.path]
    verified = subprocess.run(command, capture_output=True, text=True)
    assert verified.returncode == ExitCode.RUN_FAILED, verified.stderr
    # The first one lies in its shard as before.
    assert re.search(rf"{shard}: [12] of \d entries damaged", verified.stdout)
    run.dir.move_aside()
    assert run.start() == ExitCode.DONE, run.said
    assert run.counts()[-1] == "encoded 0 texts and 1 images, reused 5 texts and 4 images"
    assert run.losses() == losses
    # A cache of other encoder weights: the tiny ones follow from the seed.
    run.dir.move_aside()
    assert run.start("seed=1", "training.max_steps=1") == ExitCode.DONE, run.said
    assert run.counts()[-1] == "encoded 5 texts and 5 images, reused 0 texts and 0 images"
    (folder / "cat.jpg").write_bytes((folder / "cat.jpg").read_bytes()[:1000])
    run.dir.move_aside()
    assert run.start() == ExitCode.RUN_FAILED
    cause = json.loads(run.dir.error_path.read_text())["cause"]
    assert "1 files cannot be encoded" in cause
    assert "cat.jpg" in cause


@pytest.mark.slow
def test_extra_inputs_are_bit_identical(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, grain in (("cat.gif", 10), ("rocket.gif", 40)):
        first, *others = (Image.effect_noise((32, 32), grain + number).convert("RGB") for number in range(5))
        first.save(folder / name, save_all=True, append_images=others)
    (folder / "metadata.csv").write_text("video,prompt\ncat.gif,a cat\nrocket.gif,a rocket\n")
    first_frame = ['model.family="wan"', 'model.extra_inputs=["input_image"]', "dataset.num_frames=5"]
    one, other = Run(tmp_path, folder, "split"), Run(tmp_path, folder, "combined")
    assert one.start(*first_frame) == ExitCode.DONE, one.said
    counts = ["encoded 2 texts, 2 images and 2 extra inputs, reused 0 texts, 0 images and 0 extra inputs"]
    assert one.counts() == counts
    assert other.start(*first_frame, split=False) == ExitCode.DONE, other.said
    assert_same(one, other)


@pytest.mark.slow
def test_bad_files_that_are_skipped_are_replaced_as_in_combined_training(tmp_path, photos):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "cat.jpg").write_bytes((folder / "cat.jpg").read_bytes()[:1000])
    (folder / "coffee.jpg").unlink()
    skipping = ['dataset.bad_sample="skip"', "dataset.bad_sample_limit=0.5", "dataset.height=32", "dataset.width=32"]
    one, other = Run(tmp_path, folder, "split"), Run(tmp_path, folder, "combined")
    assert one.start(*skipping) == ExitCode.DONE, one.said
    assert any("2 of 5 rows cannot be used" in line for line in one.said), one.said
    assert one.counts() == ["encoded 5 texts and 3 images, reused 0 texts and 0 images"]
    assert other.start(*skipping, split=False) == ExitCode.DONE, other.said
    assert_same(one, other)


@pytest.mark.slow
def test_a_run_is_continued_in_one_stage_and_in_two(tmp_path, photos):
    run = Run(tmp_path, photos)
    assert run.start("training.max_steps=1") == ExitCode.DONE, run.said
    assert run.start("training.max_steps=2", split=False) == ExitCode.DONE, run.said
    assert run.start() == ExitCode.DONE, run.said
    assert run.losses() == run.undisturbed_losses()


@pytest.mark.slow
def test_stage_two_under_zero_3_on_two_workers(tmp_path, photos):
    run = Run(tmp_path, photos)
    zero = ["distributed.strategy=deepspeed", "distributed.zero_stage=3", "distributed.num_workers=2"]
    assert run.start(*zero) == ExitCode.DONE, run.said
    assert "stage train loads dit" in run.said
    assert run.losses() == pytest.approx(run.undisturbed_losses(), abs=1e-5)


@pytest.mark.slow
def test_a_killed_worker_of_an_elastic_run_goes_on_in_stage_two(tmp_path, photos):
    run = Run(tmp_path, photos)
    run.begin("distributed.num_workers=[1, 2]", "output.checkpoint_steps=1", "training.max_steps=16", "output.save_steps=16")
    run.wait_for("step 3/16", 200)
    os.kill(run.pids()[0], signal.SIGKILL)
    assert run.end(300) == ExitCode.DONE, run.said
    assert len(run.lost()) == 1
    assert run.counts() == ["encoded 5 texts and 5 images, reused 0 texts and 0 images"]
    assert run.losses() == pytest.approx(run.undisturbed_losses(steps=16), abs=1e-5)


def test_encoders_on_gpus(tmp_path, photos):
    """Ray Data has rules of its own for actors on GPUs; it looks at them before anything runs."""
    raw = {
        "name": "job",
        "dataset": {"base_path": str(photos), "metadata_path": str(photos / "metadata.csv"), "max_pixels": 1024},
        "model": {"family": "qwen_image", "tiny": True},
        "lora": {"base_model": "dit"},
        "split": {"enabled": True, "cache_path": str(tmp_path)},
    }
    resolved = resolve(Job.model_validate(raw), Resources(cpus=4, gpus=2))
    assert resolved.encode.device == "cuda"
    arguments = {"rule": SampleRule(16, None), "shard_entries": 1, "components": ("vae",), "encoders": {}, "board": None}
    assert encode._build_dataset(resolved, [], **arguments) is not None
