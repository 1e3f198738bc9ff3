"""Every shipped recipe must load; they are the first thing that a newcomer runs and the first that he copies."""

import re
from pathlib import Path

import pytest

from diffsynth_ray.config import schema
from diffsynth_ray.config.load import load_job, recipe_names, recipes_dir
from diffsynth_ray.config.resolve import ResolvedJob, Resources, resolve
from diffsynth_ray.models.sources import model_origins
from diffsynth_ray.plan import build_plan
from diffsynth_ray.schedule import trained_components

ROOT = Path(__file__).parents[2]
NODE = Resources(cpus=64, gpus=8)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def resolved(name: str, resources: Resources) -> ResolvedJob:
    return resolve(load_job(f"jobs/{name}.toml"), resources)


def test_the_recipes_are_those_of_the_checkout() -> None:
    """Installed or not: what `dsray submit NAME` reads is what the repository shows."""
    for recipe in (ROOT / "jobs").glob("*.toml"):
        assert (recipes_dir() / recipe.name).read_text() == recipe.read_text()
    assert {"quickstart", "qwen_lora", "qwen_full"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_on_a_node_of_eight_gpus(name: str) -> None:
    job = resolved(name, NODE)
    assert job.run.startswith(f"{name}-")
    assert job.device == "cuda"
    assert job.output_path == ROOT / "outputs" / name


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_plans(name: str, tmp_path: Path) -> None:
    job = resolved(name, NODE)
    overrides = []
    if not Path(str(job.job.dataset.base_path)).is_dir():
        columns = ["prompt", "video" if job.job.model.family == "wan" else "image", *job.job.model.extra_inputs]
        (tmp_path / "metadata.csv").write_text(f"{','.join(columns)}\n{','.join(['a.png'] * len(columns))}\n")
        overrides = [f"dataset.base_path={tmp_path}", f"dataset.metadata_path={tmp_path / 'metadata.csv'}"]
    job = resolve(load_job(f"jobs/{name}.toml", overrides), NODE)
    assert build_plan(job, check_files=False).num_steps > 0


@pytest.mark.parametrize("resources", [Resources(cpus=1, gpus=0), Resources(cpus=2, gpus=0), NODE])
def test_the_quickstart_plans_on_any_machine(resources: Resources) -> None:
    plan = build_plan(resolved("quickstart", resources))
    assert (plan.num_rows, plan.num_workers, plan.num_steps) == (5, 1, 400)
    assert plan.files == ["step-200.safetensors", "step-400.safetensors"]
    assert plan.run == build_plan(resolved("quickstart", NODE)).run


def test_the_big_ones_train_what_they_say() -> None:
    lora, full = resolved("qwen_lora", NODE), resolved("qwen_full", NODE)
    assert (lora.job.lora.base_model, lora.job.lora.rank, lora.job.training.learning_rate) == ("dit", 32, 1e-4)
    assert (lora.job.dataset.repeat, lora.job.training.num_epochs, lora.job.dataset.max_pixels) == (50, 5, 1048576)
    assert trained_components(full.job) == ["dit"]
    assert full.job.lora.base_model is None
    for job in (lora, full):
        dit, text_encoder, vae = model_origins(job.job.model)
        assert {origin.repo for origin in (dit, text_encoder, vae)} == {"Qwen/Qwen-Image"}
        assert dit.matches("transformer/diffusion_pytorch_model-00009-of-00009.safetensors")
        assert text_encoder.matches("text_encoder/model-00004-of-00004.safetensors")
        assert vae.matches("vae/diffusion_pytorch_model.safetensors")


def test_the_lora_recipe_shows_every_key_of_this_version_with_its_default() -> None:
    """Keys behind a '#' show their default, or say that it is unset or derived."""
    text = (ROOT / "jobs" / "qwen_lora.toml").read_text()
    shown: dict[str, str] = {}
    section = ""
    for line in text.splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            section = f"{header[1]}."
        elif entry := re.match(r"(?:# )?(\w+) = (.+?)(?:\s+#.*)?$", line):
            shown[section + entry[1]] = entry[2]
    # What Qwen-Image has no use for stands in the recipes of the families that have.
    elsewhere = {
        "wan_lora": {"dataset.num_frames", "dataset.frame_rate", "model.extra_inputs"},
        "flux_lora": {"model.tokenizer_1_path", "model.tokenizer_2_path", "model.options"},
        "qwen_edit_lora": {"model.processor_path", "validation.inputs"},
    }

    for name, keys in elsewhere.items():
        other = (ROOT / "jobs" / f"{name}.toml").read_text()
        assert all(re.search(rf"^(# )?{key.partition('.')[2]} = ", other, re.MULTILINE) for key in keys), name
    assert shown.keys() | set().union(*elsewhere.values()) == schema.keys().keys()


def test_the_defaults_that_the_lora_recipe_shows_are_the_defaults(tmp_path: Path) -> None:
    text = (ROOT / "jobs" / "qwen_lora.toml").read_text()
    # A key without a fixed default has an example there; all others must not change anything when the '#' goes.
    examples = {
        "height", "width", "max_steps", "global_batch_size", "resume_from_checkpoint", "alpha", "target_modules",
        "checkpoint", "save_steps", "remove_prefix_in_ckpt", "checkpoint_steps", "num_workers = 8",
        "resources_per_worker", "wandb_project", "swanlab_project", "mlflow_tracking_uri",
        "preset_path", "preset_model", "checkpoint_path", "tokenizer_path", "source", "base_path", "skip_download",
        "fp8_models", "vram_budget_gib", "param_size_threshold", "deepspeed_config",
        "ema_decay", "prompts", "size", "holdout", "every_steps = 500", "early_stopping",
    }  # fmt: skip
    lines = []
    for line in text.splitlines():
        entry = re.match(r"# ((\w+) = .+)", line)
        is_example = entry and (entry[2] in examples or any(entry[1].startswith(f"{each} ") for each in examples))
        lines.append(entry[1] if entry and not is_example else line)
    path = tmp_path / "qwen_lora.toml"
    path.write_text("\n".join(lines))
    assert "\nseed = 0" in path.read_text()  # the '#' are gone
    assert load_job(str(path)) == load_job("jobs/qwen_lora.toml")
