"""Whole runs on real Ray processes, from a job to the files on disk, without a job server."""

import json
import shutil
import threading
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training_runs import Run, distance
from waiting import wait_until

from diffsynth_ray.errors import ExitCode
from diffsynth_ray.train.checkpoint import find_checkpoints
from diffsynth_ray.train.shards import ShardedState
from diffsynth_ray.train.storage import Storage

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, local_ray):
    """An undisturbed run on one worker: 40 samples, 10 steps."""
    repository = Path(__file__).resolve().parents[2]
    run = Run(tmp_path_factory.mktemp("reference"), repository / "jobs/data/photos")
    assert run.start() == ExitCode.DONE, run.said
    return run


def test_files_of_a_run(reference):
    names = {path.name for path in reference.output.iterdir()}
    assert {"step-4.safetensors", "step-8.safetensors", "step-10.safetensors", "job.json", "loss.csv"} <= names
    assert not any(name.startswith("epoch") for name in names)
    assert sorted(reference.losses()) == list(range(1, 11))
    key = "transformer_blocks.0.attn.to_q.lora_A.default.weight"
    assert reference.weights()[key].shape == (4, 64)
    assert reference.dir.attempts()[-1]["state"] == "SUCCEEDED"
    assert find_checkpoints(Storage.at(reference.dir.checkpoints_dir))[0].step == 10


def test_two_workers_train_the_same(reference, tmp_path, photos):
    run = Run(tmp_path, photos)
    assert run.start("distributed.num_workers=2") == ExitCode.DONE, run.said
    assert run.losses() == pytest.approx(reference.losses(), abs=1e-5)
    assert 0 < distance(reference.weights(), run.weights()) < 1e-3


@pytest.mark.slow  # the killed worker below goes on from a checkpoint too
def test_stopped_and_continued_is_bit_equal(reference, tmp_path, photos):
    run = Run(tmp_path, photos)

    def stop_after_step_3():
        run.wait_for_step(3)
        run.dir.request_stop(reason="the test asks for it")

    thread = threading.Thread(target=stop_after_step_3)
    thread.start()
    assert run.start() == ExitCode.STOPPED, run.said
    thread.join()
    stopped_at = run.dir.attempts()[-1]["step"]
    assert 3 <= stopped_at < 10
    assert any("the test asks for it" in line for line in run.said)
    assert run.start() == ExitCode.DONE, run.said
    assert any(f"continuing after step {stopped_at} of 10" in line for line in run.said)
    assert run.losses() == reference.losses()
    assert distance(reference.weights(), run.weights()) == 0
    assert [entry["attempt"] for entry in run.dir.attempts()] == [1, 1, 2, 2]


@pytest.mark.slow
def test_a_run_that_goes_on_with_another_data_set_says_so(tmp_path, photos):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    run = Run(tmp_path, folder)
    assert run.start("training.max_steps=2") == ExitCode.DONE, run.said
    assert run.start("training.max_steps=3") == ExitCode.DONE, run.said
    assert not any("the data set is not the one" in line for line in run.said)
    table = folder / "metadata.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join(rows[:-1]) + "\n")
    assert run.start("training.max_steps=4") == ExitCode.DONE, run.said
    assert any(f"({len(rows) - 1} rows then, {len(rows) - 2} now)" in line for line in run.said), run.said


def test_a_killed_worker_comes_back_and_changes_nothing(reference, tmp_path, photos):
    run, hold = Run(tmp_path, photos), tmp_path / "hold"
    hold.touch()

    def kill_after_step_5():
        run.wait_for_step(5, 200)
        wait_until(lambda: find_checkpoints(Storage.at(run.dir.checkpoints_dir)), explain=lambda: run.said)
        run.kill(0)
        hold.unlink()

    thread = threading.Thread(target=kill_after_step_5)
    thread.start()
    held = ["training.optimizer=held_optimizer.HeldAdamW", f"training.optimizer_args={{hold = '{hold}', at = 6}}"]
    assert run.start("output.checkpoint_steps=2", *held) == ExitCode.DONE, run.said
    thread.join()
    assert run.killed
    assert any("continuing after step" in line for line in run.said), run.said
    assert run.losses() == reference.losses()
    assert distance(reference.weights(), run.weights()) == 0


def test_a_truncated_photograph_ends_the_run_with_its_name(tmp_path, photos):
    broken = tmp_path / "photos"
    shutil.copytree(photos, broken)
    cat = broken / "cat.jpg"
    cat.write_bytes(cat.read_bytes()[: cat.stat().st_size // 2])
    run = Run(tmp_path, broken)
    assert run.start() == ExitCode.RUN_FAILED
    cause = json.loads(run.dir.error_path.read_text())["cause"]
    assert "cat.jpg" in cause
    assert "row 3" in cause
    assert "truncated" in cause
    assert run.dir.attempts()[-1]["state"] == "FAILED"
    assert sum("loading the model" in line for line in run.said) == 1, "a user's mistake is not retried"


def test_a_loss_that_is_not_a_number_ends_the_run_with_its_rows(tmp_path, photos):
    run = Run(tmp_path, photos)
    assert run.start("training.learning_rate=1e30", "training.max_grad_norm=0") == ExitCode.RUN_FAILED
    cause = json.loads(run.dir.error_path.read_text())["cause"]
    assert "the loss of step" in cause
    assert "rows [" in cause
    assert "training.learning_rate" in cause
    assert not list(run.output.glob("step-10*"))


@pytest.mark.slow
def test_batches_of_two_in_buckets(tmp_path, photos):
    run = Run(tmp_path, photos)
    assert run.start("dataset.batch_size=2", "distributed.num_workers=2", "training.max_steps=4") == ExitCode.DONE, run.said
    assert sorted(run.losses()) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_lora_target_that_matches_nothing(tmp_path, photos):
    run = Run(tmp_path, photos)
    assert run.start('lora.target_modules=["to_qq"]') == ExitCode.RUN_FAILED
    cause = json.loads(run.dir.error_path.read_text())["cause"]
    assert "to_qq" in cause
    assert "to_q" in cause.replace("to_qq", "")


def test_shards_of_two_models_are_refused_before_a_worker_starts(tmp_path, photos, repository):
    tiny = repository / "tests/assets/qwen_image_tiny"
    run = Run(tmp_path, photos)
    shards = [
        str(tiny / "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"),
        str(tiny / "text_encoder/model-00002-of-00002.safetensors"),
    ]
    code = run.start("model.tiny=false", f"model.paths=[{json.dumps(shards)}]", f'model.tokenizer_path="{tiny}/tokenizer"')
    assert code == ExitCode.RUN_FAILED
    cause = json.loads(run.dir.error_path.read_text())["cause"]
    assert "diffusion_pytorch_model-00001-of-00002" in cause
    assert "model-00002-of-00002" in cause
    assert not any("loading the model" in line for line in run.said)


@pytest.mark.slow
def test_weights_from_files_and_full_training_beside_a_lora(tmp_path, photos, repository):
    tiny = repository / "tests/assets/qwen_image_tiny"
    run = Run(tmp_path, photos)
    paths = [
        [str(path) for path in sorted((tiny / "transformer").glob("*.safetensors"))],
        [str(path) for path in sorted((tiny / "text_encoder").glob("*.safetensors"))],
        str(tiny / "vae/diffusion_pytorch_model.safetensors"),
    ]
    code = run.start(
        "model.tiny=false",
        f"model.paths={json.dumps(paths)}",
        f'model.tokenizer_path="{tiny}/tokenizer"',
        'training.trainable_models=["text_encoder", "vae"]',
        "training.max_steps=2",
        "output.save_steps=2",
        "distributed.num_workers=2",
    )
    assert code == ExitCode.DONE, run.said
    assert {path.name for path in run.output.glob("*.safetensors")} == {
        "step-2.safetensors",
        "step-2.text_encoder.safetensors",
        "step-2.vae.safetensors",
    }
    assert "transformer_blocks.0.attn.to_q.lora_A.default.weight" in load_file(run.output / "step-2.safetensors")
    before = load_file(tiny / "vae/diffusion_pytorch_model.safetensors")
    after = load_file(run.output / "step-2.vae.safetensors")
    assert any((after[key] != before[key].to(after[key].dtype)).any() for key in after), "the VAE was trained"


@pytest.mark.slow
def test_a_schedule_free_optimizer_trains_goes_on_and_exports_its_average(tmp_path, photos):
    schedule_free = ("training.optimizer=schedule_free.AdamW", "training.max_steps=4")
    whole, parts = Run(tmp_path, photos, "whole"), Run(tmp_path, photos, "parts")
    assert whole.start(*schedule_free) == ExitCode.DONE, whole.said
    assert parts.start(*schedule_free, "training.max_steps=2") == ExitCode.DONE, parts.said
    assert parts.start(*schedule_free) == ExitCode.DONE, parts.said
    assert parts.losses() == whole.losses()
    assert distance(whole.weights(4), parts.weights(4)) == 0
    storage = Storage.at(whole.dir.checkpoints_dir)
    state = ShardedState(storage, [shard.name for shard in find_checkpoints(storage)[0].shards])
    trained = [state.read(name) for name in state.names() if name.startswith("master/")]
    learnt = {key: tensor for key, tensor in whole.weights(4).items() if "lora_B" in key and tensor.any()}
    assert learnt
    for key, tensor in learnt.items():
        assert not any(torch.equal(tensor.flatten(), each) for each in trained), f"{key} is what gradients are computed at"


@pytest.mark.slow
def test_the_files_tell_the_worker_which_component_an_fp8_entry_is(tmp_path, photos, repository):
    tiny = repository / "tests/assets/qwen_image_tiny"
    run = Run(tmp_path, photos)
    vae = str(tiny / "vae/diffusion_pytorch_model.safetensors")
    paths = [[str(path) for path in sorted((tiny / part).glob("*.safetensors"))] for part in ("transformer", "text_encoder")]
    code = run.start(
        "model.tiny=false",
        f"model.paths={json.dumps([*paths, vae])}",
        f'model.tokenizer_path="{tiny}/tokenizer"',
        f"model.fp8_models={json.dumps([paths[0][1], vae])}",
        "training.max_steps=1",
    )
    assert code == ExitCode.DONE, run.said
    assert "model.fp8_models: vae has no repeated blocks of Linear layers, and stays as it is" in run.said
    assert run.dir.owner().job.model.fp8_models == [paths[0][1], vae]


def test_no_training_or_decoding_process_is_left(reference):
    """On a shared Ray, after runs that ended well, failed and were killed. That the driver's end takes the rest with it is
    tested in test_quickstart."""

    def left():
        return [process.info for process in psutil.process_iter(["pid", "cmdline"]) if _is_training(process)]

    wait_until(lambda: not left(), explain=left, every_s=0.5)


def _is_training(process):
    return any(name in part for name in ("RayTrainWorker", "_decode_chunk") for part in process.info["cmdline"] or [])


@pytest.mark.slow  # a minute; the quickstart validates in CI
def test_validation_disturbs_nothing_and_is_the_same_on_two_workers(reference, tmp_path, photos):
    held = tmp_path / "held.csv"
    held.write_text("image,prompt\ncat.jpg,a cat\nrocket.jpg,a rocket\ncoffee.jpg,\n")
    keys = [f"validation.holdout={held}", "validation.every_steps=4", "validation.keep_best=true"]
    found = {}
    for num_workers in (1, 2):
        run = Run(tmp_path, photos, f"workers-{num_workers}")
        assert run.start(*keys, f"distributed.num_workers={num_workers}") == ExitCode.DONE, run.said
        found[num_workers] = run
    one, two = found[1], found[2]
    assert one.losses() == reference.losses()
    assert distance(reference.weights(), one.weights()) == 0
    assert [entry.step for entry in one.dir.validations()] == [0, 4, 8, 10]
    for alone, shared in zip(one.dir.validations(), two.dir.validations(), strict=True):
        assert (alone.step, alone.num_samples) == (shared.step, 3)
        # Not to the last bit: two workers of a node compute with fewer threads each.
        assert shared.loss == pytest.approx(alone.loss, abs=1e-6, rel=0)
        assert shared.quantiles == pytest.approx(alone.quantiles, abs=1e-6, rel=0)
    first = one.dir.validations()[0]
    best = min(one.dir.validations(), key=lambda entry: entry.loss).step
    assert (one.output / "best.safetensors").exists() == (best > 0)
    assert f"0,validation_loss,{first.loss:.9g}\n" in one.dir.loss_path.read_text()
