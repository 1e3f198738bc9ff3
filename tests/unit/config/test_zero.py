"""The DeepSpeed keys: rules between them, and a DeepSpeed file merged in."""

import json

import pytest

from diffsynth_ray.config.schema import Job
from diffsynth_ray.config.zero import check_zero_keys, read_zero_config
from diffsynth_ray.errors import JobFileError


def build_job(tmp_path=None, file=None, **distributed):
    if file is not None:
        path = tmp_path / "ds.json"
        path.write_text(file if isinstance(file, str) else json.dumps(file))
        distributed["deepspeed_config"] = str(path)
    training = distributed.pop("training", {})
    return Job.model_validate({"name": "test", "distributed": {"strategy": "deepspeed"} | distributed, "training": training})


def problems(job):
    return {problem.key: problem.message for problem in check_zero_keys(job)}


@pytest.mark.parametrize(
    "keys",
    [
        {"zero_stage": 3},
        {"offload_optimizer_device": "cpu"},
        {"offload_param_device": "cpu"},
        {"deepspeed_config": "ds.json"},
    ],
)
def test_zero_keys_without_deepspeed_are_named(keys):
    [(key, message)] = problems(build_job(strategy="ddp", **keys)).items()
    assert key == f"distributed.{next(iter(keys))}"
    assert 'strategy = "deepspeed"' in message


def test_parameters_are_offloaded_at_stage_3_only():
    assert "zero_stage = 3 (it is 2)" in problems(build_job(offload_param_device="cpu"))["distributed.offload_param_device"]
    assert problems(build_job(zero_stage=3, offload_param_device="cpu")) == {}


@pytest.mark.parametrize(
    ("training", "key"),
    [
        ({"master_weights": False}, "training.master_weights"),
        ({"find_unused_parameters": True}, "training.find_unused_parameters"),
        ({"optimizer": "torch.optim.Muon"}, "training.optimizer"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(training, key):
    assert list(problems(build_job(training=training))) == [key]


def test_the_jobs_keys_become_the_configuration():
    job = build_job(zero_stage=3, offload_optimizer_device="cpu", training={"precision": "bf16", "max_grad_norm": 0.5})
    config = read_zero_config(job)
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["bf16"] == {"enabled": True}
    assert config["gradient_clipping"] == 0.5
    assert config["gradient_accumulation_steps"] == 1
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_a_file_is_merged_in(tmp_path):
    file = {
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 1000,
            "offload_optimizer": {"device": "auto", "pin_memory": False},
        },
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "fp16": {"enabled": False, "loss_scale": 0},
        "wall_clock_breakdown": True,
    }
    config = read_zero_config(build_job(tmp_path, file))
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "none", "pin_memory": False}
    assert config["gradient_clipping"] == 1.0
    assert config["wall_clock_breakdown"] is True
    assert "train_batch_size" not in config


def test_all_contradictions_are_named_with_both_keys(tmp_path):
    file = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "round_robin_gradients": True},
        "gradient_clipping": 2.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "train_batch_size": 8,
        "fp16": {"enabled": True},
        "pipeline": {"stages": 2},
    }
    with pytest.raises(JobFileError) as caught:
        read_zero_config(build_job(tmp_path, file))
    text = str(caught.value)
    for part in (
        "zero_optimization.stage = 3 contradicts distributed.zero_stage (2 there)",
        "zero_optimization.offload_optimizer.device = 'cpu' contradicts distributed.offload_optimizer_device ('none' there)",
        "zero_optimization.round_robin_gradients: checkpoints need",
        "gradient_clipping = 2.0 contradicts training.max_grad_norm (1.0 there)",
        "optimizer: training.optimizer and training.optimizer_args say it",
        "train_batch_size = 8 contradicts dataset.global_batch_size (None there)",
        "fp16.enabled = True contradicts training.precision",
        "pipeline.stages is not passed on",
    ):
        assert part in text, text
    assert text.count("optimizer: training.optimizer") == 1


@pytest.mark.parametrize("file", ["{broken", "[1, 2]"])
def test_a_file_that_is_no_json_object_is_named(tmp_path, file):
    with pytest.raises(JobFileError, match=r"distributed\.deepspeed_config: .*ds\.json"):
        read_zero_config(build_job(tmp_path, file))
