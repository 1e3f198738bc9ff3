"""Every family through the trainer: blocks recomputed or not, an optimizer step, exports that start another run."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffsynth_ray.config.schema import Job
from diffsynth_ray.models import edit_pictures
from diffsynth_ray.models.lora import load_lora, lora_state_dict
from diffsynth_ray.models.names import LORA_FORMATS
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.export import export_weights
from diffsynth_ray.train.graph import SampleBatch, probe_inputs
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import MicroInput, Trainer, load_family, select_trained

torch.set_num_threads(1)
CASES = {
    "wan": ("wan", []),
    "wan, image to video": ("wan", ["input_image"]),
    "wan, vace": ("wan", ["vace_video", "vace_reference_image"]),
    "flux": ("flux", []),
    "flux, kontext": ("flux", ["kontext_images"]),
    "z_image": ("z_image", []),
    "qwen_image, edit": ("qwen_image", ["edit_image"]),
    "flux2": ("flux2", []),
    "flux2, edit": ("flux2", ["edit_image"]),
}


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(edit_pictures, "AREA", 64 * 64)


def build_trainer(case, *, checkpointing, **sections):
    family_name, extra_inputs = CASES[case]
    job = {
        "name": "test",
        "model": {"family": family_name, "tiny": True, "extra_inputs": extra_inputs},
        "training": {"precision": "fp32", "learning_rate": 1e-3},
        "lora": {"base_model": trained_in(case), "rank": 4},
        "gradient": {"checkpointing": checkpointing},
        "output": {"formats": list(LORA_FORMATS)},
    }
    for section, values in sections.items():
        job[section] = job.get(section, {}) | values
    job = Job.model_validate(job)
    family = load_family(job, device=torch.device("cpu"))
    select_trained(family, job)
    residency = settle(family, job, say=print)
    trainer = Trainer(job, family, build_schedule(job, num_samples=4, global_batch_size=2), residency=residency)
    trainer.start(micro(family, extra_inputs))
    return trainer


def trained_in(case):
    return "vace" if case == "wan, vace" else "dit"


def micro(family, extra_inputs):
    num_frames = 1 if family.clip_step is None else 5
    pixels = np.random.default_rng(0).integers(0, 256, (2, num_frames, 32, 32, 3), dtype=np.uint8)
    extra = probe_inputs(family, extra_inputs, pixels)
    return MicroInput(SampleBatch(pixels, ("a cat", "a rocket on its launch pad"), (0, 1), extra), (0, 1))


ON_EVERY_RUN = ("wan", "z_image")


@pytest.mark.parametrize(
    "case", [case if case in ON_EVERY_RUN else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_step_with_blocks_recomputed_is_one_without(case, tmp_path):
    seen = []
    for checkpointing in (True, False):
        trainer = build_trainer(case, checkpointing=checkpointing)
        start = {name: tensor.clone() for name, tensor in trainer.strategy.full_masters().items()}
        inputs = [micro(trainer.family, CASES[case][1])]
        results = [trainer.train_step(inputs, num_samples=2) for _ in range(2)]
        seen.append([(result.loss_sum.item(), float(result.grad_norm)) for result in results])
        assert seen[-1][0][1] > 0
        moved = [name for name, tensor in trainer.strategy.full_masters().items() if not torch.equal(tensor, start[name])]
        assert len(moved) > len(start) * 0.8
    assert np.array(seen[0]) == pytest.approx(np.array(seen[1]), rel=1e-6)

    family, masters = trainer.family, trainer.strategy.full_masters()
    paths = export_weights(family, trainer.job, masters=masters, output_dir=tmp_path, stem="step-2")
    component = trained_in(case)
    state = lora_state_dict(family.component(component))
    for path, target in zip(paths, LORA_FORMATS, strict=True):
        fresh = build_trainer(case, checkpointing=True).family
        load_lora(fresh.component(component), path, names=fresh.layer_names(component))
        loaded = lora_state_dict(fresh.component(component))
        assert all(torch.equal(loaded[key], state[key]) for key in state), target
    assert any("lora_A.default.weight" in key for key in load_file(paths[0]))


def figures(trainer, case, *, steps=2):
    inputs = [micro(trainer.family, CASES[case][1])]
    results = [trainer.train_step(inputs, num_samples=2) for _ in range(steps)]
    return [figure for result in results for figure in (result.loss_sum.item(), float(result.grad_norm))]


TEXT_ENCODER = {"wan": "text_encoder", "flux": "text_encoder_2"}
"""T5's kind."""


@pytest.mark.parametrize("case", TEXT_ENCODER)
def test_a_text_encoder_of_t5_s_kind_is_trained_wherever_weights_and_activations_live(case):
    trained = {"training": {"trainable_models": [TEXT_ENCODER[case]]}, "lora": {"base_model": None}}
    expected = figures(build_trainer(case, checkpointing=False, **trained), case)
    assert expected[1] > 0
    recomputed = figures(build_trainer(case, checkpointing=True, **trained), case)
    # T5's blocks share their table of positions: its gradients are summed in another order.
    assert recomputed == pytest.approx(expected, rel=1e-4)
    moved = build_trainer(case, checkpointing=True, **trained, offload={"cpu_offload": True})
    assert figures(moved, case) == recomputed


@pytest.mark.parametrize("case", TEXT_ENCODER)
def test_fp8_of_a_text_encoder_of_t5_s_kind_is_close(case):
    wide, narrow = (
        build_trainer(case, checkpointing=True),
        build_trainer(case, checkpointing=True, model={"fp8_models": [TEXT_ENCODER[case]]}),
    )
    assert any(param.dtype == torch.float8_e4m3fn for param in narrow.family.component(TEXT_ENCODER[case]).parameters())
    found, expected = figures(narrow, case, steps=1)[0], figures(wide, case, steps=1)[0]
    assert found != expected
    assert found == pytest.approx(expected, rel=2e-2)
