"""model.fp8_models by entries of paths and ids."""

from pathlib import Path
from typing import Any

import pytest

from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import JobFileError
from diffsynth_ray.models.weights import find_fp8_components

TINY = Path(__file__).parents[2] / "assets" / "qwen_image_tiny"
DIT = [str(TINY / f"transformer/diffusion_pytorch_model-0000{number}-of-00002.safetensors") for number in (1, 2)]
VAE = str(TINY / "vae/diffusion_pytorch_model.safetensors")


def build(*fp8_models: str, **sections: Any) -> Job:
    job = {
        "name": "job",
        "dataset": {"base_path": "data"},
        "model": {"paths": [DIT, VAE], "fp8_models": list(fp8_models)},
        "lora": {"base_model": "dit"},
    }
    return resolve(Job.model_validate(job | sections), Resources(cpus=4, gpus=0)).job


@pytest.mark.parametrize(
    ("given", "components"),
    [
        ([DIT[0]], ["dit"]),
        ([*DIT, "dit"], ["dit"]),
        (["vae", DIT[1]], ["vae", "dit"]),
        (["dit"], ["dit"]),
        ([], []),
    ],
)
def test_the_files_tell_the_component(given: list[str], components: list[str]) -> None:
    assert find_fp8_components(build(*given)) == components


def test_relative_entries_are_those_of_relative_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY)
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert find_fp8_components(build(model={"paths": [vae], "fp8_models": [vae]})) == ["vae"]


def test_an_entry_of_a_trained_component_is_refused() -> None:
    job = build(DIT[0], training={"trainable_models": ["dit"]}, lora={})
    with pytest.raises(JobFileError, match=r"model\.fp8_models: dit is trained"):
        find_fp8_components(job)
