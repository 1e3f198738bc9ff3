import pytest

from diffsynth_ray.migrate.accelerate import read_setup


def read(tmp_path, text="", **arguments):
    path = None
    if text:
        path = tmp_path / "accelerate.yaml"
        path.write_text(text)

    def find(name):
        return tmp_path / name if (tmp_path / name).is_file() else None

    return read_setup(arguments, path, find)


def test_several_gpus(tmp_path):
    setup = read(tmp_path, "distributed_type: MULTI_GPU\nnum_processes: 8\nmixed_precision: bf16\n")
    assert setup.values == {"distributed.num_workers": 8}
    assert (setup.notes, setup.without_counterpart, setup.problems) == ([], [], [])


@pytest.mark.parametrize(
    ("stage", "param", "expected", "noted"),
    [
        (2, "none", {"zero_stage": 2, "offload_optimizer_device": "cpu"}, False),
        (2, "cpu", {"zero_stage": 2, "offload_optimizer_device": "cpu"}, True),
        (3, "cpu", {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"}, False),
        (3, "nvme", {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"}, True),
    ],
)
def test_deepspeed(tmp_path, stage, param, expected, noted):
    nested = f"{{zero_stage: {stage}, offload_optimizer_device: cpu, offload_param_device: {param}}}"
    setup = read(tmp_path, f"distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {nested}\n")
    expected = {f"distributed.{name}": value for name, value in expected.items()}
    assert setup.values == expected | {"distributed.num_workers": 2, "distributed.strategy": "deepspeed"}
    assert any("offload_param_device" in note for note in setup.notes) == noted


def test_a_deepspeed_file_says_stage_offload_and_accumulation(tmp_path):
    (tmp_path / "ds.json").write_text(
        '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},'
        ' "gradient_accumulation_steps": 4, "gradient_clipping": 0.3}'
    )
    setup = read(tmp_path, "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}\n")
    assert setup.values == {
        "distributed.deepspeed_config": str(tmp_path / "ds.json"),
        "distributed.strategy": "deepspeed",
        "distributed.zero_stage": 3,
        "distributed.offload_param_device": "cpu",
        "training.max_grad_norm": 0.3,
    }
    assert setup.accumulation_steps == 4


def test_a_deepspeed_file_that_is_not_there_is_noted(tmp_path):
    setup = read(tmp_path, "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}\n")
    assert setup.values["distributed.deepspeed_config"] == "ds.json"
    assert any("ds.json is not there" in note for note in setup.notes)


def test_arguments_of_the_command_win_over_the_file(tmp_path):
    setup = read(
        tmp_path, "distributed_type: MULTI_GPU\nnum_processes: 8\n", num_processes="2", use_deepspeed="", zero_stage="3"
    )
    assert setup.values["distributed.num_workers"] == 2
    assert setup.values["distributed.zero_stage"] == 3


@pytest.mark.parametrize(
    ("arguments", "workers"),
    [
        ({"nproc_per_node": "4", "nnodes": "2"}, 8),
        ({"gpu_ids": "0,3"}, 2),
        ({"gpu_ids": "all"}, None),
        ({"multi_gpu": ""}, None),
    ],
)
def test_workers(tmp_path, arguments, workers):
    assert read(tmp_path, **arguments).values.get("distributed.num_workers") == workers


def test_nothing_is_dropped_silently(tmp_path):
    setup = read(
        tmp_path,
        "distributed_type: MULTI_XPU\nnum_machines: 2\nnum_processes: 4\nmixed_precision: fp16\nrdzv_backend: static\n"
        "dynamo_config: {dynamo_backend: INDUCTOR}\n",
        zero_stage="2",
    )
    told = "\n".join(setup.notes + setup.without_counterpart)
    for word in ("MULTI_XPU", "2 machines", "fp16", "rdzv_backend", "dynamo_config", "zero_stage"):
        assert word in told, word


def test_fsdp_becomes_zero_3(tmp_path):
    setup = read(tmp_path, "distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {fsdp_version: 2}\n")
    assert setup.values["distributed.strategy"] == "deepspeed"
    assert setup.values["distributed.zero_stage"] == 3
    assert "FSDP" in setup.notes[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "accelerate's YAML"),
        ("- a\n- b", "holds no settings"),
        ("num_processes: many", "a whole number is needed"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {gradient_clipping: much}", "a number is needed"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: accelerate.yaml}", "DeepSpeed's JSON"),
    ],
)
def test_a_broken_configuration_is_a_problem(tmp_path, text, told):
    assert told in str(read(tmp_path, text).problems[0])
