"""Weights to start from: exports of several components at once, LoRAs, and LoRAs merged beforehand."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import JobFileError, ModelError
from diffsynth_ray.models.lora import lora_state_dict
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.models.wan import Wan
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.export import export_weights
from diffsynth_ray.train.initial import load_exported, load_initial_weights, merge_presets, preset_loras
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import Trainer, check_components, load_family, select_trained

torch.set_num_threads(1)


def build_job(**sections):
    base = {"name": "t", "model": {"family": "qwen_image", "tiny": True}}
    base["training"] = {"precision": "fp32", "trainable_models": ["dit", "text_encoder"]}
    for section, values in sections.items():
        base[section] = base.get(section, {}) | values
    return Job.model_validate(base)


def exported(tmp_path, job, *, seed=1):
    """The exports of a model with other random weights, and that model."""
    family = QwenImage.build_tiny(seed, dtype=torch.float32)
    select_trained(family, job)
    trainer = Trainer(job, family, build_schedule(job, num_samples=4, global_batch_size=1))
    trainer.start(None)
    masters = trainer.strategy.full_masters()
    return family, export_weights(family, job, masters=masters, output_dir=tmp_path, stem="step-1")


@pytest.fixture
def family():
    return QwenImage.build_tiny(0, dtype=torch.float32)


def same(first, second, component):
    return all(
        torch.equal(a, b)
        for a, b in zip(first.component(component).parameters(), second.component(component).parameters(), strict=True)
    )


def test_several_components_start_from_their_exports_in_any_order(tmp_path, family):
    other, paths = exported(tmp_path, build_job())
    assert len(paths) == 2
    job = build_job(training={"resume_from_checkpoint": [str(path) for path in reversed(paths)]})
    select_trained(family, job)
    with torch.no_grad():
        next(family.component("vae").parameters()).add_(1)  # the tiny VAE is the same in every tiny model
    said = []
    load_initial_weights(family, job, said.append)
    assert same(family, other, "dit")
    assert same(family, other, "text_encoder")
    assert not same(family, other, "vae"), "what no file names stays as it is"
    assert "step-1.safetensors" in said[0]


def test_one_file_with_the_names_of_its_components(tmp_path, family):
    other, paths = exported(tmp_path, build_job())
    whole = {
        f"pipe.{component}.{key}": tensor
        for component, path in zip(("dit", "text_encoder"), paths, strict=True)
        for key, tensor in load_file(path).items()
    }
    save_file(whole, tmp_path / "whole.safetensors")
    load_exported(family, ["dit", "text_encoder"], [tmp_path / "whole.safetensors"])
    assert same(family, other, "dit")
    assert same(family, other, "text_encoder")


def test_what_is_unknown_and_what_is_missing_is_named_and_nothing_is_changed(tmp_path, family):
    _, paths = exported(tmp_path, build_job())
    state = load_file(paths[0])
    state["transformer_blocks.0.attn.to_q.weights"] = state.pop("transformer_blocks.0.attn.to_q.weight")
    state["img_in.weight"] = torch.zeros(3, 3)
    save_file(state, paths[0])
    before = {name: param.clone() for name, param in family.component("dit").named_parameters()}
    with pytest.raises(ModelError) as caught:
        load_exported(family, ["dit", "text_encoder"], [paths[0]])
    message = str(caught.value)
    assert "2 keys are unknown or of another shape (first img_in.weight" in message
    assert "transformer_blocks.0.attn.to_q.weights" in message
    assert "2 parameters of dit are missing (first img_in.weight, transformer_blocks.0.attn.to_q.weight)" in message
    assert "parameters of text_encoder are missing" in message
    assert all(torch.equal(param, before[name]) for name, param in family.component("dit").named_parameters())


def build_lora_job(**lora):
    return build_job(training={"trainable_models": ["text_encoder"]}, lora={"base_model": "dit", "rank": 4} | lora)


def export_lora(tmp_path, *, seed=3):
    family = QwenImage.build_tiny(0, dtype=torch.float32)
    select_trained(family, build_lora_job())
    generator = torch.Generator().manual_seed(seed)
    state = {
        key: torch.randn(tensor.shape, generator=generator) / 10
        for key, tensor in lora_state_dict(family.component("dit")).items()
    }
    save_file(state, tmp_path / f"lora-{seed}.safetensors")
    return str(tmp_path / f"lora-{seed}.safetensors"), state


def test_a_lora_and_a_component_in_full_at_once(tmp_path, family):
    path, state = export_lora(tmp_path)
    other, paths = exported(tmp_path, build_lora_job())
    job = build_lora_job(checkpoint=path)
    job = job.model_copy(update={"training": job.training.model_copy(update={"resume_from_checkpoint": str(paths[1])})})
    select_trained(family, job)
    load_initial_weights(family, job, print)
    assert all(torch.equal(tensor, state[key]) for key, tensor in lora_state_dict(family.component("dit")).items())
    assert same(family, other, "text_encoder")


def test_a_lora_given_as_full_weights_is_refused(tmp_path, family):
    path, _ = export_lora(tmp_path)
    with pytest.raises(ModelError, match=r"is a LoRA; give it as lora\.checkpoint"):
        load_exported(family, ["dit"], [Path(path)])


def test_full_weights_for_a_lora_are_refused(tmp_path, family):
    job = build_lora_job()
    job = job.model_copy(
        update={"training": job.training.model_copy(update={"trainable_models": [], "resume_from_checkpoint": "x"})}
    )
    with pytest.raises(JobFileError, match=r"a LoRA starts from lora\.checkpoint"):
        load_initial_weights(family, job, print)


def test_presets_are_merged_into_the_base_before_the_trained_lora_is_added(tmp_path):
    paths, states = zip(*(export_lora(tmp_path, seed=seed) for seed in (3, 4)), strict=True)
    job = build_lora_job(preset_path=list(paths))
    layer = "transformer_blocks.0.attn.to_q"
    family = load_family(job, device=torch.device("cpu"))
    before = family.component("dit").weight_source.read(f"{layer}.weight")
    said = []
    merge_presets(family, job, said.append)
    select_trained(family, job)
    settle(family, job, say=print)
    deltas = [state[f"{layer}.lora_B.default.weight"] @ state[f"{layer}.lora_A.default.weight"] for state in states]
    after = family.component("dit").get_submodule(layer).base_layer.weight
    assert torch.allclose(after, before + deltas[0] + deltas[1], atol=1e-6)
    assert "layers of dit" in said[1]
    fresh = lora_state_dict(family.component("dit"))
    assert not fresh[f"{layer}.lora_B.default.weight"].any(), "the trained LoRA starts from zero"


def test_each_preset_may_have_its_component():
    job = build_lora_job(preset_path=["a", "b"], preset_model=["dit", "text_encoder"])
    assert preset_loras(job) == [("a", "dit"), ("b", "text_encoder")]
    assert preset_loras(build_lora_job(preset_path="a", preset_model="vae")) == [("a", "vae")]
    with pytest.raises(JobFileError, match=r"lora\.preset_model: the family qwen_image has no component 'unet'"):
        check_components(QwenImage, build_lora_job(preset_path="a", preset_model="unet"))


ZERO_3 = {"strategy": "deepspeed", "zero_stage": 3}


@pytest.mark.parametrize(
    ("family", "sections", "message"),
    [
        (QwenImage, {"dataset": {"batch_size": 2}}, r"3 trains text_encoder with dataset\.batch_size = 1 or "),
        (Wan, {"training": {"trainable_models": ["vae"]}}, r"cannot share vae out, whose calls depend on a clip's length"),
        (QwenImage, {}, None),
        (QwenImage, {"dataset": {"batch_size": 2}, "distributed": ZERO_3 | {"num_workers": 1}}, None),
        (QwenImage, {"dataset": {"batch_size": 2}, "distributed": ZERO_3 | {"zero_stage": 2}}, None),
        (Wan, {"dataset": {"batch_size": 2}, "training": {"trainable_models": ["dit"]}}, None),
    ],
)
def test_encoders_that_workers_would_gather_unequally_often_are_refused_at_stage_3(family, sections, message):
    """Two workers with micro batches of 2 and 1 samples waited for each other in different collectives."""
    job = build_job(**{"distributed": ZERO_3, **sections})
    with nullcontext() if message is None else pytest.raises(JobFileError, match=message):
        check_components(family, job)
