"""VACE through the trainer: two components in one forward pass, wherever weights and activations live."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_trainer import build_job, train, weights

from diffsynth_ray.models.wan import Wan
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.export import export_weights
from diffsynth_ray.train.graph import SampleBatch, probe_inputs
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import MicroInput, Trainer, load_family, select_trained

torch.set_num_threads(1)
COLUMNS = ["vace_video", "vace_reference_image"]
MODEL = {"family": "wan", "tiny": True, "extra_inputs": COLUMNS}
LORA = {"lora": {"base_model": "vace"}}
FULL = {"training": {"trainable_models": ["vace"]}, "lora": {"base_model": None}}
BESIDE = {"training": {"trainable_models": ["vace"]}, "lora": {"base_model": "dit"}}


def micro(indices):
    clips = [np.random.default_rng(index).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8) for index in indices]
    samples = SampleBatch(np.stack(clips), ("a cat",) * len(indices), tuple(indices), probe_inputs(Wan, COLUMNS, clips))
    return MicroInput(samples, tuple(indices))


def build(**sections):
    job = build_job(**{**sections, "model": MODEL | sections.get("model", {})})
    family = load_family(job, device=torch.device("cpu"))
    select_trained(family, job)
    residency = settle(family, job, say=print)
    trainer = Trainer(job, family, build_schedule(job, num_samples=40, global_batch_size=4), residency=residency)
    trainer.start(micro([0]))
    return trainer


MOVED = {
    "offload": {"offload": {"cpu_offload": True}},
    "offload in parts": {"offload": {"cpu_offload": True, "param_size_threshold": 0.02, "vram_budget_gib": 0.001}},
    "everything": {
        "gradient": {"checkpointing_offload": True},
        "offload": {"cpu_offload": True, "optimize_on_cpu": True},
    },
}


TRAINED = {"lora": LORA, "full": FULL, "both": BESIDE}
ON_EVERY_RUN = {("everything", "full"), ("offload in parts", "lora")}


@pytest.mark.parametrize(
    ("memory", "trained"),
    [
        pytest.param(memory, trained, marks=() if (memory, trained) in ON_EVERY_RUN else pytest.mark.slow)
        for memory in MOVED
        for trained in TRAINED
    ],
)
def test_where_weights_and_activations_live_is_bit_equal(memory, trained, monkeypatch):
    monkeypatch.setattr("diffsynth_ray.memory.activations.MIN_BYTES", 1)
    sections = TRAINED[trained]
    plain, moved = build(**sections, gradient={"checkpointing": False}), build(**sections, **MOVED[memory])
    assert train(moved, [micro([0, 1]), micro([2])]) == train(plain, [micro([0, 1]), micro([2])])
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(moved)[name]), name
    assert {unit.name.split(".")[0] for unit in moved.residency.offload.units} >= {"dit", "text_encoder", "vae"}
    assert moved.residency.offload.moved_bytes > 0


def test_a_teacher_s_noise_begins_with_its_last_frame():
    """DiffSynth-Studio's pipeline draws noise for clip and reference, and gives the last frame's to the reference."""
    job = build_job(model=MODEL, **LORA, task="direct_distill")
    family = load_family(job, device=torch.device("cpu"))
    select_trained(family, job)
    trainer = Trainer(job, family, build_schedule(job, num_samples=4, global_batch_size=1))
    cells = {"seed": ("7",), "rand_device": ("cpu",), "num_inference_steps": ("4",), "cfg_scale": ("4",)}
    one = micro([0])
    noise, _ = trainer._draw(replace(one, batch=replace(one.batch, extra=one.batch.extra | cells)), step=0)
    drawn = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(noise, torch.cat([drawn[:, :, -1:], drawn[:, :, :-1]], dim=2))


def test_fp8_weights_of_both_are_close():
    plain = train(build(**LORA), [micro([0, 1])])
    stored = train(build(**LORA, model={"fp8_models": ["dit", "vace"]}), [micro([0, 1])])
    assert stored != plain
    assert stored == pytest.approx(plain, rel=2e-2)


@pytest.mark.slow  # compiles
def test_compiled_blocks_give_the_same():
    plain = train(build(**LORA), [micro([0, 1])])
    compiled = build(**LORA, training={"compile": True})
    assert all(call.is_compiled for call in (block.forward for block in compiled.family.repeated_blocks("vace")))
    assert train(compiled, [micro([0, 1])]) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(("trained", "expected"), [(FULL, {"vace"}), (BESIDE, {"vace", "dit"})], ids=["full", "both"])
def test_what_is_trained_is_exported_under_diffsynth_s_names(trained, expected, tmp_path):
    trainer = build(**trained)
    before = weights(trainer)
    train(trainer, [micro([0])], steps=1)
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in moved} == expected
    whole = {name for name, _ in trainer.family.component("vace").named_parameters()}
    assert {name.removeprefix("vace.") for name in before if name.startswith("vace.")} == whole
    paths = export_weights(
        trainer.family, trainer.job, masters=trainer.strategy.full_masters(), output_dir=tmp_path, stem="step-1"
    )
    keys = {key for path in paths for key in load_file(path)}
    assert {"vace_patch_embedding.weight", "vace_blocks.0.before_proj.weight", "vace_blocks.1.self_attn.q.weight"} <= keys
    assert ("blocks.0.self_attn.q.lora_A.default.weight" in keys) == ("dit" in expected)


def test_the_full_weights_have_diffsynth_s_prefix_where_it_is_asked_for(tmp_path):
    trainer = build(**FULL, output={"remove_prefix_in_ckpt": "pipe."})
    (path,) = export_weights(
        trainer.family, trainer.job, masters=trainer.strategy.full_masters(), output_dir=tmp_path, stem="step-1"
    )
    assert all(key.startswith("vace.vace_") for key in load_file(path))
