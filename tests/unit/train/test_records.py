"""DiffSynth-Studio's recorded runs, replayed through this project's own loss, LoRA, optimizer and export.

Its two quirks are put in by the test: the DiT's GELU is x * sigmoid(1.702 x), and the first five steps run at lr / 3.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.activations import GELU
from safetensors.torch import load_file

from diffsynth_ray.config.schema import Job
from diffsynth_ray.models.family import EncodedBatch
from diffsynth_ray.models.lora import load_lora
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.models.weights import load_components
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.export import export_weights
from diffsynth_ray.train.trainer import Trainer, select_trained

torch.set_num_threads(1)
ASSETS = Path(__file__).parents[2] / "assets"
TRANSFORMER = ASSETS / "qwen_image_tiny" / "transformer"
ENTRY = [str(TRANSFORMER / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors") for i in (1, 2)]


@pytest.fixture
def quirky_gelu(monkeypatch):
    def forward(self, hidden_states):
        projected = self.proj(hidden_states)
        return projected * torch.sigmoid(1.702 * projected)

    monkeypatch.setattr(GELU, "forward", forward)


def job_of(mode):
    return Job.model_validate(
        {
            "name": mode,
            "training": {"precision": "fp32", "max_grad_norm": 0, "trainable_models": ["dit"] if mode == "full" else []},
            "lora": {"base_model": "dit", "rank": 4} if mode == "lora" else {},
            "output": {"remove_prefix_in_ckpt": "pipe.dit."},
        }
    )


def replay(mode, output_dir):
    """Train and export as recorded; returns (losses, gradient norms, exported weights, record)."""
    directory = ASSETS / "records" / f"{mode}_float32"
    record = json.loads((directory / "record.json").read_text())
    inputs = load_file(directory / "loss_inputs.safetensors")
    job = job_of(mode)
    _, files = load_components([ENTRY])
    family = QwenImage.load(files, dtype=torch.float32)
    select_trained(family, job)
    if mode == "lora":
        load_lora(family.components["dit"], directory / "lora_init.safetensors")
    schedule = build_schedule(job, num_samples=8, global_batch_size=1)
    trainer = Trainer(job, family, schedule)
    trainer.start(probe=None)
    losses, norms = [], []
    for step, (sample, update) in enumerate(zip(record["records"], record["optimizer"], strict=True)):
        batch = EncodedBatch(inputs[f"{step:02d}.input_latents"], {"prompt_embeds": inputs[f"{step:02d}.prompt_emb"]})
        ids = torch.tensor([sample["timestep_id_drawn"]])
        noise = inputs[f"{step:02d}.noise"]
        [loss] = trainer.strategy.micro_step(batch, noise, ids, weight=1.0, num_samples=1, last=True)
        assert sum(param.grad is not None for param in trainer.trained.values()) == update["n_params"]
        norms.append(float(trainer.strategy.step(update["lr"])))
        losses.append(loss.item())
    [path] = export_weights(family, job, masters=trainer.strategy.full_masters(), output_dir=output_dir, stem="step-8")
    return losses, norms, load_file(path), record


@pytest.mark.usefixtures("quirky_gelu")
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_losses_are_the_recorded_ones(mode, tmp_path):
    losses, norms, _, record = replay(mode, tmp_path)
    assert losses == pytest.approx([sample["loss"] for sample in record["records"]], rel=0, abs=1e-6)
    assert norms == pytest.approx([update["grad_norm"] for update in record["optimizer"]], rel=1e-5)


@pytest.mark.usefixtures("quirky_gelu")
def test_exported_lora_is_the_recorded_one(tmp_path):
    _, _, exported, _ = replay("lora", tmp_path)
    recorded = load_file(ASSETS / "records" / "lora_float32" / "step-8.safetensors")
    assert exported.keys() == recorded.keys()
    for key, tensor in recorded.items():
        assert (exported[key] - tensor).abs().max() <= 1e-6, key


@pytest.mark.usefixtures("quirky_gelu")
def test_full_training_exports_the_recorded_keys(tmp_path):
    _, _, exported, record = replay("full", tmp_path)
    checkpoint = record["checkpoints"]["step-8.safetensors"]
    assert len(exported) == checkpoint["n"]
    for key, shape in checkpoint["keys"].items():
        assert list(exported[key].shape) == shape


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_losses_without_the_gelu_quirk_are_close(mode, tmp_path):
    losses, _, _, record = replay(mode, tmp_path)
    recorded = [sample["loss"] for sample in record["records"]]
    assert losses == pytest.approx(recorded, rel=0, abs=1e-3)
    assert losses != pytest.approx(recorded, rel=0, abs=1e-6)
