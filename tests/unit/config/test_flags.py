import pytest

from diffsynth_ray.config import schema
from diffsynth_ray.config.flags import FAMILY_OPTIONS, KEY_OF_FLAG, WITHOUT_COUNTERPART

# Where a flag's words are not the key's last word, nor section and key joined: a decision each.
RENAMED = {
    "customized_optimizer": "training.optimizer",
    "preset_lora_path": "lora.preset_path",
    "preset_lora_model": "lora.preset_model",
    "use_gradient_checkpointing": "gradient.checkpointing",
    "use_gradient_checkpointing_offload": "gradient.checkpointing_offload",
    "enable_model_cpu_offload": "offload.cpu_offload",
    "enable_optimizer_cpu_offload": "offload.optimize_on_cpu",
    "cpu_offload_split_threshold": "offload.param_size_threshold",
    "enable_csv_log": "logging.csv",
    "enable_tensorboard_log": "logging.tensorboard",
}


def test_every_key_of_the_table_exists() -> None:
    assert set(KEY_OF_FLAG.values()) <= schema.keys().keys()


def test_no_flag_is_in_both_tables_and_every_missing_one_has_a_reason() -> None:
    assert not KEY_OF_FLAG.keys() & WITHOUT_COUNTERPART.keys()
    assert all(len(reason) > 10 for reason in WITHOUT_COUNTERPART.values())


def test_flags_keep_their_words() -> None:
    """DESIGN: one key with the same words, the prefix dropped where it is the section's name."""
    for flag, key in KEY_OF_FLAG.items():
        if key == FAMILY_OPTIONS:
            continue
        same_words = flag in (key, key.split(".")[-1], key.replace(".", "_"))
        assert same_words or RENAMED.get(flag) == key, f"--{flag} -> {key}"


@pytest.mark.parametrize(
    ("in_parser", "in_documentation"),
    [
        ("enable_model_cpu_offload", "cpu_offload"),
        ("enable_optimizer_cpu_offload", "optimize_on_cpu"),
        ("cpu_offload_split_threshold", "param_size_threshold"),
    ],
)
def test_both_spellings_of_the_offload_flags(in_parser: str, in_documentation: str) -> None:
    assert KEY_OF_FLAG[in_parser] == KEY_OF_FLAG[in_documentation]


def test_keys_that_a_reason_names_exist() -> None:
    known = schema.keys()
    sections = {key.split(".")[0] for key in known if "." in key}
    for reason in WITHOUT_COUNTERPART.values():
        for word in reason.replace(";", " ").replace(",", " ").split():
            if word.split(".")[0] in sections and "." in word:
                assert word in known, word


def test_every_flag_of_diffsynth_studio_is_known() -> None:
    """The recipes' most used flags and those of its parser's groups; a spot check against a table that shrinks."""
    used = [
        "remove_prefix_in_ckpt", "output_path", "model_id_with_origin_paths", "dataset_repeat", "dataset_base_path",
        "num_epochs", "learning_rate", "dataset_metadata_path", "use_gradient_checkpointing", "extra_inputs",
        "data_file_keys", "lora_target_modules", "lora_rank", "lora_base_model", "width", "height",
        "trainable_models", "max_pixels", "num_frames", "find_unused_parameters", "task", "dataset_num_workers",
        "tokenizer_path", "min_timestep_boundary", "max_timestep_boundary", "processor_path", "save_steps",
        "use_gradient_checkpointing_offload", "align_to_opensource_format", "template_model_id_or_path",
        "initialize_model_on_cpu", "quant_options", "offload_models", "fp8_models", "lora_checkpoint", "zero_cond_t",
        "preset_lora_path", "preset_lora_model",
    ]  # fmt: skip
    assert [flag for flag in used if flag not in KEY_OF_FLAG and flag not in WITHOUT_COUNTERPART] == []
