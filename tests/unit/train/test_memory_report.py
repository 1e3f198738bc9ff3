"""The error of a full device."""

from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import ExitCode
from diffsynth_ray.train.memory_report import MemoryUse, out_of_memory, savings

GIB = 2**30
USE = MemoryUse(
    total=80 * GIB, peak=79 * GIB, frozen=20 * GIB, trained=2 * GIB, masters=4 * GIB, optimizer=8 * GIB, gradients=5 * GIB
)


def build_job(**sections):
    return Job.model_validate({"name": "t"} | sections)


def test_the_error_names_sample_sizes_categories_and_what_helps():
    job = build_job(dataset={"batch_size": 4}, gradient={"checkpointing": False})
    error = out_of_memory(job, USE, rank=3, world_size=2, computed="rows 4, 9 at 1024x768", cause="tried to allocate 2 GiB")
    assert error.exit_code == ExitCode.RUN_FAILED
    for text in (
        "rank 3",
        "80.0 GiB",
        "rows 4, 9 at 1024x768",
        "79.00 GiB",
        "frozen weights 20.00",
        "float32 masters 4.00",
        "optimizer state 8.00",
        "gradients 5.00",
        "activations and the like 40.00",
        "tried to allocate 2 GiB",
    ):
        assert text in error.message
    lines = error.hint.splitlines()
    assert lines[1].startswith("  30.00 GiB: gradient.checkpointing = true"), "the largest first"
    assert any("20.00 GiB: dataset.batch_size = 2" in line for line in lines)
    assert any("20.00 GiB: dataset.max_pixels = 524288" in line for line in lines)


def test_only_what_helps_is_named():
    job = build_job(dataset={"height": 64, "width": 64}, training={"trainable_models": ["dit"]})
    keys = {text.split()[0] for _, text in savings(job, USE, 2)}
    assert "dataset.batch_size" not in keys
    assert "gradient.checkpointing" not in keys
    assert "dataset.max_pixels" not in keys
    assert "lora.base_model" in keys
    assert (int(17 * GIB / 2), 'distributed.strategy = "deepspeed" (shares masters, optimizer and gradients)') in savings(
        job, USE, 2
    )


def test_layer_offload_and_deepspeed_are_not_advised_together():
    """A job with both is refused."""
    for sections in ({"distributed": {"strategy": "deepspeed"}}, {"offload": {"cpu_offload": True}}):
        keys = {text.split()[0] for _, text in savings(build_job(**sections), USE, 2)}
        assert not keys & {"offload.cpu_offload", "distributed.strategy"}
    keys = {text.split()[0] for _, text in savings(build_job(training={"ema_decay": 0.999}), USE, 2)}
    assert "distributed.strategy" not in keys


def test_nothing_helps():
    tiny = MemoryUse(total=GIB, peak=0, frozen=0, trained=0, masters=0, optimizer=0, gradients=0)
    error = out_of_memory(build_job(), tiny, rank=0, world_size=1, computed="x", cause="")
    assert error.hint == "use a device with more memory"
