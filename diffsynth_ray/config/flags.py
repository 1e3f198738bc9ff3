"""DiffSynth-Studio's training flags and the keys of the job file that stand for them.

Every flag of its parsers and training scripts (version 2.1.12) is either in `KEY_OF_FLAG` or, with the reason, in
`WITHOUT_COUNTERPART`. Names are without the leading dashes. Two conversions hold everywhere: comma lists and JSON
strings become TOML arrays, and switches (`--enable_csv_log`) become true.
"""

from __future__ import annotations

FAMILY_OPTIONS = "model.options"
"""A flag with this key is an entry of that table, under the flag's own name."""

KEY_OF_FLAG: dict[str, str] = {
    "dataset_base_path": "dataset.base_path",
    "dataset_metadata_path": "dataset.metadata_path",
    "dataset_repeat": "dataset.repeat",
    "dataset_num_workers": "dataset.num_workers",
    "data_file_keys": "dataset.data_file_keys",
    "height": "dataset.height",
    "width": "dataset.width",
    "max_pixels": "dataset.max_pixels",
    "num_frames": "dataset.num_frames",
    "frame_rate": "dataset.frame_rate",
    "model_paths": "model.paths",
    "model_id_with_origin_paths": "model.id_with_origin_paths",
    "tokenizer_path": "model.tokenizer_path",
    "tokenizer_1_path": "model.tokenizer_1_path",
    "tokenizer_2_path": "model.tokenizer_2_path",
    "processor_path": "model.processor_path",
    "extra_inputs": "model.extra_inputs",
    "fp8_models": "model.fp8_models",
    "zero_cond_t": FAMILY_OPTIONS,
    "embedded_guidance": FAMILY_OPTIONS,
    "first_frame_as_condition": FAMILY_OPTIONS,
    "framewise_decoding": FAMILY_OPTIONS,
    "noise_scale": FAMILY_OPTIONS,
    "task": "task",
    "learning_rate": "training.learning_rate",
    "num_epochs": "training.num_epochs",
    "trainable_models": "training.trainable_models",
    "find_unused_parameters": "training.find_unused_parameters",
    "weight_decay": "training.weight_decay",
    "customized_optimizer": "training.optimizer",
    "resume_from_checkpoint": "training.resume_from_checkpoint",
    "min_timestep_boundary": "training.min_timestep_boundary",
    "max_timestep_boundary": "training.max_timestep_boundary",
    "output_path": "output.path",
    "remove_prefix_in_ckpt": "output.remove_prefix_in_ckpt",
    "save_steps": "output.save_steps",
    "lora_base_model": "lora.base_model",
    "lora_target_modules": "lora.target_modules",
    "lora_rank": "lora.rank",
    "lora_checkpoint": "lora.checkpoint",
    "preset_lora_path": "lora.preset_path",
    "preset_lora_model": "lora.preset_model",
    "use_gradient_checkpointing": "gradient.checkpointing",
    "use_gradient_checkpointing_offload": "gradient.checkpointing_offload",
    "gradient_accumulation_steps": "gradient.accumulation_steps",
    # The offload flags as its parser spells them ...
    "enable_model_cpu_offload": "offload.cpu_offload",
    "enable_optimizer_cpu_offload": "offload.optimize_on_cpu",
    "cpu_offload_split_threshold": "offload.param_size_threshold",
    # ... and as its documentation does.
    "cpu_offload": "offload.cpu_offload",
    "optimize_on_cpu": "offload.optimize_on_cpu",
    "param_size_threshold": "offload.param_size_threshold",
    "enable_csv_log": "logging.csv",
    "enable_tensorboard_log": "logging.tensorboard",
    "wandb_project": "logging.wandb_project",
    "swanlab_project": "logging.swanlab_project",
}
"""Flag -> dotted key."""

_DMD2 = "DMD2 distillation is not a task of dsray"
_TEMPLATES = "template models are not trained by dsray"
_OTHER_FAMILY = "belongs to a family that dsray does not train"

WITHOUT_COUNTERPART: dict[str, str] = {
    "enable_wandb_log": "logging.wandb_project turns it on",
    "enable_swanlab_log": "logging.swanlab_project turns it on",
    "initialize_model_on_cpu": "weights are loaded where they are needed; offload.cpu_offload keeps them on the host",
    "offload_models": "split training loads in each stage only what that stage needs",
    "align_to_opensource_format": "output.formats writes the key names of other tools beside its own",
    "quant_options": "other quantisations are not offered; model.fp8_models stores frozen weights in FP8",
    "enable_npu_patch": "dsray runs on CUDA GPUs and CPUs",
    "template_model_id_or_path": _TEMPLATES,
    "enable_lora_hot_loading": _TEMPLATES,
    "tokenizer_t5xxl_path": _OTHER_FAMILY,
    "audio_processor_path": _OTHER_FAMILY,
    "processor_config": _OTHER_FAMILY,
    "silence_latent_path": _OTHER_FAMILY,
    "silent_on_missing_audio": _OTHER_FAMILY,
    "max_audio_duration": _OTHER_FAMILY,
    "dmd2_student_update_freq": _DMD2,
    "dmd2_student_sample_steps": _DMD2,
    "dmd2_student_sample_type": _DMD2,
    "dmd2_student_schedule": _DMD2,
    "dmd2_student_t_list": _DMD2,
    "dmd2_student_grad_clip_norm": _DMD2,
    "dmd2_matching_t_min": _DMD2,
    "dmd2_matching_t_max": _DMD2,
    "dmd2_matching_t_sampling": _DMD2,
    "dmd2_matching_t_mean": _DMD2,
    "dmd2_matching_t_std": _DMD2,
    "dmd2_gan_loss_weight": _DMD2,
    "dmd2_gan_r1_reg_weight": _DMD2,
    "dmd2_gan_r1_reg_alpha": _DMD2,
    "dmd2_fake_score_learning_rate": _DMD2,
    "dmd2_discriminator_learning_rate": _DMD2,
    "dmd2_feature_indices": _DMD2,
    "dmd2_teacher_cfg_scale": _DMD2,
}
"""Flag -> why no key stands for it, and what does its work."""
