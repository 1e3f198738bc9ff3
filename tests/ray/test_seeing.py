"""What a run shows of itself, on real Ray processes: its report, and samples that are the same elsewhere."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from page_check import check
from PIL import Image
from safetensors.torch import load_file
from training_runs import Run

from diffsynth_ray.cli import app
from diffsynth_ray.errors import ExitCode
from diffsynth_ray.launch.environment import WITHOUT_DASHBOARD_ENV
from diffsynth_ray.models.family import get_family

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.usefixtures("local_ray")]

SAMPLES = (
    'validation.prompts=["a tabby cat", "a rocket"]',
    "validation.size=[32, 48]",
    "validation.num_inference_steps=2",
    "validation.every_steps=4",
)


def test_the_report_of_a_run_that_recovered_failed_and_was_continued(tmp_path, photos, monkeypatch):
    """Killed twice where one loss is allowed: the first recovers, the second ends the attempt, and the next one goes on."""
    undisturbed = Run(tmp_path, photos, "undisturbed")
    keys = (*SAMPLES, f"validation.holdout={photos}/metadata.csv", "output.checkpoint_steps=1", "distributed.num_workers=1")
    assert undisturbed.start(*keys) == ExitCode.DONE, undisturbed.said
    run = Run(tmp_path, photos)
    run.begin(*keys, "distributed.max_failures=1")
    run.wait_for("step 3/10")
    run.kill(0)
    run.wait_for("continuing after step")
    run.wait_for("step 6/10")
    run.kill(0)
    assert run.end() == ExitCode.RUN_FAILED, run.said
    assert run.start(*keys) == ExitCode.DONE, run.said
    assert run.losses() == undisturbed.losses()
    found, expected = ([(each.step, each.loss, each.quantiles) for each in one.dir.validations()] for one in (run, undisturbed))
    assert found == expected, "computed by another process, from a checkpoint: the same bits"
    for path in undisturbed.dir.samples_dir.glob("step-*/*.png"):
        again = run.dir.samples_dir / path.relative_to(undisturbed.dir.samples_dir)
        assert again.read_bytes() == path.read_bytes(), path.name

    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))
    assert app.main(["report", str(run.output)]) == 0
    page = (run.output / "report.html").read_text()
    check(page)
    rows = [row.split("</tr>")[0] for row in page.split("<tr>")]
    attempts = rows[next(number for number, row in enumerate(rows) if "what happened" in row) + 1 :]
    [first, one_loss, other_loss, second] = attempts[:4]
    assert ['"number">1</td>' in first, "failed: it was loss 2" in first, "max_failures = 1" in first] == [True] * 3
    for row, loss, kind in zip((one_loss, other_loss), run.lost(), ("lost and replaced", "lost: one too many"), strict=True):
        assert f"worker rank 0 {kind}" in row
        assert f'"number">{loss["step"]}</td>' in row
    assert ['"number">2</td>' in second, "succeeded" in second] == [True, True]
    assert "attempts, 1 recovery<" in page
    assert page.count('class="mark"') >= 2, "where it was interrupted"
    assert "data:image/png;base64," in page, "the contact sheet"


def test_the_sample_of_a_lora_run_in_plain_diffusers(tmp_path, photos):
    """From what a run has written alone: its exported LoRA gives its picture, in the library's own pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from diffsynth_ray.models import qwen_image_configs as configs

    run = Run(tmp_path, photos)
    keys = ('output.formats=["diffusers"]', "training.learning_rate=0.05", "validation.guidance_scale=4.0", "validation.seed=7")
    assert run.start(*SAMPLES, *keys) == ExitCode.DONE, run.said
    ours = [np.array(Image.open(run.dir.find_sample(10, number))).astype(int) for number in (0, 1)]

    base = get_family("qwen_image").build_tiny(0, dtype=torch.float32)
    transformer = QwenImageTransformer2DModel(**configs.TINY["dit"])
    transformer.load_state_dict(base.component("dit").state_dict())
    text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**configs.TINY["text_encoder"]))
    text_encoder.load_state_dict(base.component("text_encoder").state_dict(), strict=False)
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**configs.SCHEDULER), vae=base.component("vae"),
        text_encoder=text_encoder.eval(), tokenizer=base.tokenizers["tokenizer_path"], transformer=transformer.eval(),
    )  # fmt: skip
    arguments = {"negative_prompt": " ", "height": 32, "width": 48, "num_inference_steps": 2, "true_cfg_scale": 4.0}

    def pictures():
        made = [
            pipeline(prompt, generator=torch.Generator().manual_seed(7), **arguments).images[0]
            for prompt in ("a tabby cat", "a rocket")
        ]
        return [np.array(picture).astype(int) for picture in made]

    without = pictures()
    pipeline.load_lora_weights(str(run.output / "diffusers" / "step-10.safetensors"))
    for number, picture in enumerate(pictures()):
        assert abs(picture - ours[number]).max() <= 1, "rounding"
        assert abs(without[number] - ours[number]).max() > 10, "the LoRA is what makes the difference"


ROOMY = """
import json, os, re, signal, sys, threading, time
from pathlib import Path
import psutil, ray
from training_runs import Run

def kill_errands(run):
    # As the memory of its node would.
    while run.end_is_near is False:
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith("ray::_run_errand"):
                process.kill()
        time.sleep(0.1)

folder, photos, name, *keys = json.loads(sys.argv[1])
ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         object_store_memory=512 << 20)
run = Run(Path(folder), photos, name)
run.end_is_near = False
if name == "killed":
    threading.Thread(target=kill_errands, args=(run,), daemon=True).start()
if name == "lost":
    def kill_rank_0():
        run.wait_for("are made on spare resources")
        run.wait_for("step 2/")
        run.kill(0)
    threading.Thread(target=kill_rank_0, daemon=True).start()
code = run.start(*keys)
run.end_is_near = True
groups = [group["state"] for group in ray.util.placement_group_table().values()]
Path(folder, f"{name}.json").write_text(json.dumps({"code": code, "said": run.said, "groups": groups}))
"""
"""A run on a Ray of six CPUs, where there is room beside it."""


def run_with_room(tmp_path, photos, name, *keys):
    program = [sys.executable, "-c", ROOMY, json.dumps([str(tmp_path), str(photos), name, *keys])]
    environment = os.environ | WITHOUT_DASHBOARD_ENV | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert set(result["groups"]) == {"REMOVED"}, "nothing is held any more"
    return result


LONG = ("training.max_steps=300", "output.save_steps=300", *SAMPLES[:-1], "validation.every_steps=150")


def test_samples_made_beside_the_training_are_the_same(tmp_path, photos):
    alone = Run(tmp_path, photos, "alone")
    assert alone.start(*LONG) == ExitCode.DONE, alone.said
    assert not any("spare resources" in line for line in alone.said), "two CPUs have no room"
    beside = run_with_room(tmp_path, photos, "beside", *LONG)
    assert beside["code"] == ExitCode.DONE, beside["said"]
    sent = {int(step) for step in re.findall(r"samples of step (\d+) are made on spare", "\n".join(beside["said"]))}
    assert {0, 150} == sent, beside["said"]
    late = re.findall(r"2 samples of step (\d+) in .*, while the training went on", "\n".join(beside["said"]))
    assert {int(step) for step in late} == sent
    first = next(number for number, line in enumerate(beside["said"]) if "step 1/300" in line)
    assert first < next(number for number, line in enumerate(beside["said"]) if line.startswith("2 samples of step 0"))
    steps = (0, 150, 300)
    for path in (f"samples/step-{step}/step-{step}-{number}.png" for step in steps for number in (0, 1)):
        assert (tmp_path / "beside" / path).read_bytes() == (alone.output / path).read_bytes(), path
    sheets = [Image.open(tmp_path / name / "samples/contact_sheet.png") for name in ("alone", "beside")]
    assert (np.asarray(sheets[0]) == np.asarray(sheets[1])).all()
    weights = [load_file(tmp_path / name / "step-300.safetensors") for name in ("alone", "beside")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not list((tmp_path / "beside/samples").glob(".*"))


def test_a_killed_sample_ends_no_training(tmp_path, photos):
    killed = run_with_room(tmp_path, photos, "killed", *SAMPLES)
    assert killed["code"] == ExitCode.DONE, killed["said"]
    told = [line for line in killed["said"] if "sample 1 of step 0" in line]
    assert "failed, training goes on: WorkerCrashedError" in told[0]
    assert not (tmp_path / "killed/samples/step-0").exists()
    assert len(list((tmp_path / "killed/samples/step-10").glob("*.png"))) == 2


def test_samples_that_a_lost_worker_had_sent_are_told_and_the_next_ones_are_made(tmp_path, photos):
    lost = run_with_room(tmp_path, photos, "lost", *SAMPLES, "distributed.num_workers=2", "output.checkpoint_steps=1")
    assert lost["code"] == ExitCode.DONE, lost["said"]
    assert "warning: the samples of step 0 were not finished when their worker was lost" in lost["said"]
    sent = {int(step) for step in re.findall(r"samples of step (\d+) are made on spare", "\n".join(lost["said"]))}
    assert {0, 4} <= sent, lost["said"]
    for step in (4, 8, 10):
        assert len(list((tmp_path / f"lost/samples/step-{step}").glob("*.png"))) == 2, (step, lost["said"])
    assert not list((tmp_path / "lost/samples").glob(".*"))
