"""Launch scripts that we wrote in DiffSynth-Studio's dialects (tests/assets/scripts) -> job files, clause by clause."""

import tomllib
from pathlib import Path

import pytest

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.schema import lookup
from diffsynth_ray.errors import DsrayError, JobFileError
from diffsynth_ray.migrate.job_file import toml_value, write_job_file
from diffsynth_ray.migrate.read import read_migration

SCRIPTS = Path(__file__).parents[2] / "assets" / "scripts"
UNUSABLE = {"bad_values", "z_image_imitation"}


@pytest.fixture
def jobs(tmp_path):
    """Script name -> its jobs as `load_job` reads them."""

    def read(script, **options):
        migration = read_migration(SCRIPTS / f"{script}.sh", environment={}, **options)
        loaded = []
        for number, draft in enumerate(migration.drafts):
            path = tmp_path / f"{script}-{number}.toml"
            path.write_text(write_job_file(draft, name=None, source=script, script_notes=migration.notes))
            loaded.append(load_job(str(path)))
        return loaded

    return read


def said(script, **options):
    migration = read_migration(SCRIPTS / f"{script}.sh", environment={}, **options)
    return "\n".join([*migration.notes, *(text for d in migration.drafts for text in [*d.notes, *d.without_counterpart])])


def values(job, *keys):
    return tuple(lookup(job, key) for key in keys)


@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.glob("*.sh")))
def test_every_script_loads_or_says_why_not(jobs, script):
    if script in UNUSABLE:
        with pytest.raises(JobFileError, match="line 1"):
            jobs(script)
    else:
        assert jobs(script) or read_migration(SCRIPTS / f"{script}.sh").refused


def test_a_lora_script_key_by_key(jobs):
    (job,) = jobs("qwen_lora")
    assert job.model_dump(exclude_defaults=True) == {
        "name": "qwen_lora-0",
        "dataset": {
            "base_path": "./data/cats/portraits",
            "metadata_path": "./data/cats/portraits/metadata.csv",
            "max_pixels": 786432,
            "repeat": 20,
            "num_workers": 4,
        },
        "model": {
            "family": "qwen_image",
            "id_with_origin_paths": [
                "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors",
                "Qwen/Qwen-Image:text_encoder/model*.safetensors",
                "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors",
            ],
        },
        "training": {"learning_rate": 2e-4, "num_epochs": 3, "find_unused_parameters": True},
        "output": {"path": "./models/train/cats", "remove_prefix_in_ckpt": "pipe.dit."},
        "lora": {"base_model": "dit", "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "rank": 16},
    }


def test_downloads_become_a_comment():
    migration = read_migration(SCRIPTS / "qwen_lora.sh")
    text = write_job_file(migration.drafts[0], name=None, source="x", downloads=migration.downloads)
    assert "#   modelscope download --dataset acme/cats --include 'portraits/*' --local_dir ./data/cats\n" in text


def test_zero_2_with_offloaded_parameters_is_accepted_and_noted(jobs):
    (job,) = jobs("qwen_full_zero2")
    keys = ("strategy", "zero_stage", "offload_optimizer_device", "offload_param_device", "num_workers")
    assert values(job, *(f"distributed.{key}" for key in keys)) == ("deepspeed", 2, "cpu", "none", 4)
    assert values(job, "training.max_grad_norm", "output.path") == (0.5, "./models/train/cats full")
    assert "offload_param_device cpu is left out" in said("qwen_full_zero2")
    assert "--initialize_model_on_cpu" in said("qwen_full_zero2")
    assert "float32 masters" not in said("qwen_full_zero2")  # DeepSpeed shares them out
    assert job.training.find_unused_parameters == "auto", "true is refused with DeepSpeed"
    assert "find_unused_parameters is left out" in said("qwen_full_zero2")


def test_two_stages_become_one_split_job(jobs):
    (job,) = jobs("qwen_split_zero3")
    assert values(job, "split.enabled", "task", "dataset.base_path", "dataset.repeat", "output.path") == (
        True, "sft", "data/cats", 40, "./models/train/cats",
    )  # fmt: skip
    assert [each.split(":")[1].split("/")[0] for each in job.model.id_with_origin_paths] == [
        "transformer",
        "text_encoder",
        "vae",
    ]
    assert values(job, "distributed.strategy", "distributed.zero_stage", "distributed.offload_param_device") == (
        "deepspeed", 3, "cpu",
    )  # fmt: skip
    assert str(job.distributed.deepspeed_config).endswith("configs/zero3.json")
    assert "taken for the same" not in said("qwen_split_zero3")
    assert "./cache/cats" in said("qwen_split_zero3")


def test_a_path_that_does_not_match_is_noted(jobs):
    (job,) = jobs("qwen_split_other_path")
    text = said("qwen_split_other_path")
    assert "'./cache/cats-old' and the second reads './cache/cats-new'; taken for the same" in text
    assert "dataset.repeat: the first command's 3 is left out" in text
    assert "dataset.max_pixels: the first command says 262144, the second 1048576" in text
    assert values(job, "dataset.repeat", "dataset.max_pixels") == (40, 262144)
    assert job.model.paths == [
        "/models/dit.safetensors", ["/models/te-1.safetensors", "/models/te-2.safetensors"], "/models/vae.safetensors",
    ]  # fmt: skip
    assert job.model.fp8_models == ["/models/dit.safetensors", "/models/vae.safetensors"]
    assert job.model.tokenizer_path == "/models/tokenizer"


def test_fp8_models_of_both_stages(jobs):
    (job,) = jobs("wan_split_fp8")
    assert [each.split(":")[1] for each in job.model.fp8_models] == ["diffusion_pytorch_model*.safetensors", "Wan2.1_VAE.pth"]
    assert len(job.model.id_with_origin_paths) == 2
    assert values(job, "dataset.num_frames", "dataset.repeat", "gradient.checkpointing_offload") == (49, 100, True)
    assert said("wan_split_fp8").count("--offload_models") == 2


def test_pairs_are_told_apart_by_their_folders():
    migration = read_migration(SCRIPTS / "two_pairs.sh")
    assert [(each.values["dataset.base_path"], each.values["output.path"]) for each in migration.drafts] == [
        ("data/b", "./out/b"), ("data/a", "./out/a"),
    ]  # fmt: skip
    assert migration.refused == []


def test_halves_without_their_other_half_are_refused():
    migration = read_migration(SCRIPTS / "orphans.sh")
    assert migration.drafts == []
    assert [problem.key for problem in migration.refused] == ["line 1", "line 3"]
    assert "dsray import-cache" in migration.refused[0].message


def test_several_trainings_are_several_jobs(jobs):
    plain, sharp = jobs("qwen_differential")
    assert plain.lora.target_modules == sharp.lora.target_modules == []
    assert plain.lora.preset_path is None
    assert sharp.lora.preset_path == "./models/train/plain/epoch-0.safetensors"
    names = read_migration(SCRIPTS / "qwen_differential.sh").names()
    assert names == ["1-plain", "2-sharp"]
    high, low = jobs("wan_two_experts")
    assert values(high, "training.min_timestep_boundary", "training.max_timestep_boundary") == (0.0, 0.358)
    assert values(low, "training.min_timestep_boundary", "training.max_timestep_boundary") == (0.358, 1.0)
    assert (high.dataset.num_frames, high.distributed.num_workers) == (49, 16)
    assert "2 machines" in said("wan_two_experts")


def test_one_line_of_python(jobs):
    (job,) = jobs("wan_one_line")
    assert values(job, "model.family", "lora.rank", "dataset.height", "dataset.width") == ("wan", 64, 480, 832)
    assert values(job, "training.learning_rate", "lora.target_modules") == (1e-4, None)


def test_variables_arrays_and_redirections(jobs):
    (job,) = jobs("wan_variables")
    assert values(job, "dataset.base_path", "dataset.metadata_path", "output.path") == (
        "data/clips", "data/clips/meta data.csv", "data/clips/out",
    )  # fmt: skip
    assert values(job, "dataset.num_frames", "dataset.num_workers", "distributed.num_workers") == (33, 2, 2)
    text = said("wan_variables")
    for part in ("cd /opt/studio", "mkdir -p data/clips/out is left out", "`nohup`", "TOKENIZERS_PARALLELISM=false"):
        assert part in text, part


def test_json_paths_and_two_tokenizers(jobs):
    (job,) = jobs("flux_paths")
    assert [len(each) if isinstance(each, list) else 1 for each in job.model.paths] == [1, 1, 2, 1]
    assert values(job, "model.tokenizer_1_path", "model.tokenizer_2_path", "distributed.num_workers") == (
        "models/FLUX.1-dev/tokenizer", "models/FLUX.1-dev/tokenizer_2", 8,
    )  # fmt: skip
    assert job.model.options == {"embedded_guidance": 3.5}
    assert "--align_to_opensource_format" in said("flux_paths")


def test_both_spellings_of_the_offload_flags(jobs):
    (parser,), (docs,) = jobs("offload_of_the_parser"), jobs("offload_of_the_docs")
    assert parser.offload == docs.offload
    assert values(docs, "offload.cpu_offload", "offload.optimize_on_cpu", "offload.param_size_threshold") == (True, True, 500.0)
    assert "250 x 2 bytes (bf16) = 500 MB" in said("offload_of_the_docs")


def test_save_steps_count_optimizer_steps(jobs):
    (job,) = jobs("qwen_accumulation")
    assert values(job, "output.save_steps", "gradient.accumulation_steps", "distributed.num_workers") == (250, 4, 4)
    assert values(job, "training.optimizer", "training.weight_decay", "training.trainable_models") == (
        "torch.optim.Adam", 0.0, ["dit", "text_encoder"],
    )  # fmt: skip
    text = said("qwen_accumulation")
    assert "1000 / 4 = 250" in text
    assert "12 bytes a trained parameter" in text
    assert "master_weights = false" in text


def test_accelerates_accumulation_wins_over_the_scripts(jobs, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2, gradient_accumulation_steps: 2}\n")
    (job,) = jobs("qwen_accumulation", config_file=config)
    assert values(job, "gradient.accumulation_steps", "output.save_steps") == (2, 500)
    assert "accelerate takes the configuration's" in said("qwen_accumulation", config_file=config)


def test_environment_secrets_loggers_and_unknown_flags(jobs):
    (job,) = jobs("qwen_environment")
    assert values(job, "model.base_path", "model.skip_download", "distributed.num_workers") == ("/mnt/models", True, 2)
    assert values(job, "model.family", "logging.wandb_project", "logging.swanlab_project") == ("qwen_image", "cats", None)
    migration = read_migration(SCRIPTS / "qwen_environment.sh", environment={})
    text = write_job_file(migration.drafts[0], name=None, source="x", script_notes=migration.notes)
    assert "0123456789abcdef" not in text
    for part in (
        "WANDB_API_KEY is not copied",
        "--my_own_flag 3",
        "did you mean --lora_rank?",
        "--swanlab_project cats without",
    ):
        assert part in text.replace("\n#  ", ""), part


def test_lines_of_windows_and_comments_inside_a_command(jobs):
    (job,) = jobs("windows_lines")
    assert (job.lora.rank, job.output.path) == (32, "./out")
    text = said("windows_lines")
    for part in ("blanks follow the backslash", "continues nothing", "--lora_rank 16 belongs to no command"):
        assert part in text, part


def test_trailing_comment_and_command_behind_a_hash(jobs):
    (job,) = jobs("qwen_edit")
    assert job.model.options == {"zero_cond_t": True}
    assert job.model.extra_inputs == ["edit_image"]
    assert "line 9: a command behind a '#' is left out" in said("qwen_edit")


def test_what_cannot_be_translated_is_told_all_at_once():
    with pytest.raises(JobFileError) as failure:
        read_migration(SCRIPTS / "bad_values.sh")
    flags = [problem.key.split("--")[1] for problem in failure.value.problems]
    assert flags == ["learning_rate", "num_epochs", "model_paths", "use_gradient_checkpointing", "lora_rank", "output_path"]
    with pytest.raises(JobFileError, match="trajectory_imitation"):
        read_migration(SCRIPTS / "z_image_imitation.sh")


def test_quantisation_and_loops_and_substitutions_are_listed(jobs):
    (job,) = jobs("torchrun_fsdp")
    assert (job.distributed.num_workers, job.dataset.base_path) == (4, "data/$(hostname)")
    text = said("torchrun_fsdp") + said("z_image_lora")
    for part in (
        "`for` is not followed",
        "$(hostname) is not run",
        "$RUN has no value",
        "--quant_options",
        "no --dataset_metadata_path",
    ):
        assert part in text, part


def test_a_configuration_that_is_not_there_is_noted(tmp_path):
    script = tmp_path / "a.sh"
    script.write_text("accelerate launch --config_file gone.yaml train.py --dataset_base_path d --lora_base_model dit\n")
    (draft,) = read_migration(script).drafts
    assert "gone.yaml was not found" in draft.notes[0]
    with pytest.raises(JobFileError, match="no such file"):
        read_migration(script, config_file=tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    "text", ["", "echo hello\n", "python make_data.py --out d\n", "accelerate launch\n", "accelerate config\n"]
)
def test_a_file_without_a_training_command(tmp_path, text):
    script = tmp_path / "a.sh"
    script.write_text(text)
    with pytest.raises(DsrayError, match="no training command"):
        read_migration(script)


@pytest.mark.parametrize(
    "value",
    ['a"b\\c\n\t\x7fé', True, 3, 1e-05, 8.0, [], ["a"], [["x" * 80, "y"], "z" * 80], {"a b": 1, "c": [1.5]}, ""],
)
def test_values_survive_toml(value):
    assert tomllib.loads(f"v = {toml_value(value)}")["v"] == value


def test_a_hostile_name_cannot_break_out_of_a_comment(tmp_path):
    script = tmp_path / "a.sh"
    script.write_text(
        "accelerate launch t.py --dataset_base_path d --lora_base_model dit --evil 'x\n[training]\nlearning_rate = 1'\n"
    )
    (draft,) = read_migration(script).drafts
    written = tomllib.loads(write_job_file(draft, name=None, source="x\nseed = 3", downloads=["a\nseed = 4"]))
    assert (written.get("training"), written.get("seed")) == ({}, None)


def test_an_empty_path_is_left_out(tmp_path):
    script = tmp_path / "train.sh"
    script.write_text(
        "CKPT=\naccelerate launch examples/qwen_image/model_training/train.py --dataset_base_path '' --lora_base_model dit "
        """--model_paths '["a.safetensors"]' --output_path out --lora_checkpoint "$CKPT"\n"""
    )
    (draft,) = read_migration(script, environment={}).drafts
    assert "lora.checkpoint" not in draft.values
    assert draft.values["dataset.base_path"] == ""
    assert "--lora_checkpoint is empty and left out" in draft.notes
