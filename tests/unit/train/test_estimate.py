"""Predictions beside what was measured, and the fake pass beside a real one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map_only

from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import JobFileError, ModelError
from diffsynth_ray.memory.devices import DEVICES, H100, find_device
from diffsynth_ray.memory.fake_pass import kept_by_autograd, tensors_of
from diffsynth_ray.memory.graph_cost import storages
from diffsynth_ray.models.family import BatchShape, get_family
from diffsynth_ray.train import fit
from diffsynth_ray.train.estimate import GIB, Spread, estimate
from diffsynth_ray.train.model_cost import Weights, find_configs, measure_model
from diffsynth_ray.train.trainer import select_trained

torch.set_num_threads(1)

QWEN_IMAGE = "Qwen/Qwen-Image"
FULL = {"training": {"trainable_models": ["dit"]}, "lora": {"base_model": None}}
ON_HOST = {
    "training": {"trainable_models": ["dit"], "max_grad_norm": 0.0},
    "lora": {"base_model": None},
    "offload": {"cpu_offload": True, "optimize_on_cpu": True},
}
SQUARE = BatchShape(1, 1024, 1024, text_tokens=256)
SMALL = BatchShape(4, 512, 512, text_tokens=256)

WAN = BatchShape(1, 480, 832, 81, text_tokens=256)
FP8 = {"model": {"fp8_models": ["dit"]}}
RECOMPUTES_NOTHING = {"gradient": {"checkpointing": False}}
ACTIVATIONS_ON_HOST = {"gradient": {"checkpointing_offload": True}}
OFFLOAD = {"offload": {"cpu_offload": True}}

# Models at their real sizes, LoRA of rank 32 unless told: tests/bench/results/memory_table.json, gpu_step.json, families.json.
# Fastest and slowest run in seconds, GiB. Qwen-Image on an H100 is what the H100's speeds in memory.devices stem from, too; the
# H200's were scaled by its data sheet before there was one, and the other families were measured later.
MEASURED = {
    "h100 lora": (QWEN_IMAGE, {}, SQUARE, 60, (0.546, 0.58), 43.38),
    "h100 lora without checkpointing": (QWEN_IMAGE, RECOMPUTES_NOTHING, SQUARE, 60, (0.403, 0.448), 68.5),
    "h100 lora 512 batch 4 without checkpointing": (QWEN_IMAGE, RECOMPUTES_NOTHING, SMALL, 60, (0.39, 0.42), 75.0),
    "h100 lora offload": (QWEN_IMAGE, OFFLOAD, SQUARE, 60, (1.467, 1.6), 7.84),
    "h100 lora offload, activations too": (QWEN_IMAGE, OFFLOAD | ACTIVATIONS_ON_HOST, SQUARE, 60, (1.467, 1.901), 6.82),
    "h100 lora offload, budget 22": (
        QWEN_IMAGE, {"offload": {"cpu_offload": True, "vram_budget_gib": 22.0}}, SQUARE, 60, (0.783, 0.79), 26.83
    ),
    "h100 fp8": (QWEN_IMAGE, FP8, SQUARE, 60, (0.61, 0.625), 24.73),
    "h100 fp8 offload": (QWEN_IMAGE, FP8 | OFFLOAD, SQUARE, 60, (0.81, 0.92), 6.91),
    "h100 full, 12 blocks": (QWEN_IMAGE, FULL, SQUARE, 12, (0.257, 0.267), 68.24),
    "h100 full, 12 blocks, on the host": (QWEN_IMAGE, ON_HOST, SQUARE, 12, (1.02, 1.19), 3.69),
    "h100 Wan2.1-14B": ("Wan-AI/Wan2.1-T2V-14B", OFFLOAD | ACTIVATIONS_ON_HOST, WAN, 40, (11.32, 11.32), 13.82),
    "h100 FLUX.1-dev": ("black-forest-labs/FLUX.1-dev", {}, SQUARE, None, (0.542, 0.549), 26.6),
    "h100 Z-Image": ("Tongyi-MAI/Z-Image", {}, SQUARE, None, (0.404, 0.411), 14.5),
    "h200 lora": (QWEN_IMAGE, {}, SQUARE, 60, (0.503, 0.519), 43.9),
    "h200 lora without checkpointing": (QWEN_IMAGE, RECOMPUTES_NOTHING, SQUARE, 60, (0.371, 0.374), 69.04),
    "h200 lora, what fits is kept": (QWEN_IMAGE, {"gradient": {"checkpointing": "auto"}}, SQUARE, 60, (0.36, 0.364), 69.04),
    "h200 lora 512 batch 4 without checkpointing": (QWEN_IMAGE, RECOMPUTES_NOTHING, SMALL, 60, (0.334, 0.341), 75.49),
    "h200 fp8": (QWEN_IMAGE, FP8, SQUARE, 60, (0.521, 0.528), 25.2),
    "h200 fp8, activations on the host": (QWEN_IMAGE, FP8 | ACTIVATIONS_ON_HOST, SQUARE, 60, (0.558, 0.581), 23.75),
    "h200 fp8 offload": (QWEN_IMAGE, FP8 | OFFLOAD, SQUARE, 60, (0.74, 0.765), 6.91),
    "h200 Wan2.1-1.3B": ("Wan-AI/Wan2.1-T2V-1.3B", {}, WAN, 30, (2.272, 2.284), 9.61),
}  # fmt: skip
# Each needs another trace, which takes seconds.
SLOW = {row for row in MEASURED if "lora" not in row or "512" in row}
_TRACED = {}


def silent(line):
    pass


def build_job(origin=QWEN_IMAGE, **sections):
    model = {"id_with_origin_paths": [f"{origin}:transformer/*.safetensors"], "base_path": "/nowhere"}
    raw = {"name": "job", "model": model, "lora": {"base_model": "dit", "rank": 32}}
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return Job.model_validate(raw)


def traced(job, shape):
    """Traces do not depend on where weights live: made once for several rows."""
    key = (
        shape,
        *job.model.id_with_origin_paths,
        tuple(job.model.fp8_models),
        tuple(job.training.trainable_models),
        job.offload.optimize_on_cpu,
    )
    if key not in _TRACED:
        _TRACED[key] = measure_model(job, shape, is_compiled=True, say=silent)
    return _TRACED[key]


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.slow if row in SLOW else ()) for row in MEASURED])
def test_predictions_agree_with_what_was_measured(row):
    origin, sections, shape, layers, (fastest_s, slowest_s), peak_gib = MEASURED[row]
    job = build_job(origin, **sections)
    cost = traced(job, shape)
    cost = replace(cost, blocks=tuple(replace(kind, count=layers or kind.count) for kind in cost.blocks))
    found = estimate(job, cost, DEVICES[row.partition(" ")[0]], spread=Spread(), is_compiled=True)
    seconds = (fastest_s + slowest_s) / 2
    print(f"{row}: {found.peak_bytes / GIB:.2f} GiB of {peak_gib}, {found.step_s:.3f} s of {fastest_s}-{slowest_s}")
    assert found.peak_bytes / GIB == pytest.approx(peak_gib, rel=0.10)
    assert found.step_s == pytest.approx(seconds, rel=0.25)


def test_a_compiled_block_keeps_what_was_measured():
    (kind,) = traced(build_job(), SQUARE).blocks
    assert kind.count == 60
    assert (kind.cost.kept_bytes + kind.input_bytes) / 2**20 == pytest.approx(459, rel=0.02)
    # 4 x (4096 + 256)^2 x 3072 of attention, and five products instead of two in its backward.
    assert kind.cost.forward.attention_flops == 4 * 4352**2 * 3072
    assert kind.cost.backward.attention_flops == 10 * 4352**2 * 3072


TINY = {
    "qwen_image": ([], 64, 1),
    "qwen_image with a picture": (["edit_image"], 64, 1),
    "wan": ([], 64, 5),
    "wan with a picture": (["input_image"], 64, 5),
    "wan with vace": (["vace_video", "vace_reference_image"], 64, 5),
    "flux": ([], 64, 1),
    "z_image": ([], 64, 1),
    "flux2": ([], 64, 1),
}


def tiny_job(row):
    extra, _, _ = TINY[row]
    model = {"family": row.split(" ")[0], "tiny": True, "extra_inputs": extra}
    return Job.model_validate(
        {
            "name": "job",
            "model": model,
            "lora": {"base_model": "vace" if "vace" in row else "dit", "rank": 4},
            "training": {"precision": "fp32"},
        }
    )


def kept_bytes(block, args, kwargs):
    """What a block's real call keeps, without its inputs and weights."""
    tensors = tensors_of((args, kwargs))
    passed_on = {(tensor.shape, tensor.dtype) for tensor in tensors_of(block.plain(*args, **kwargs))}
    inputs = [t.detach().requires_grad_(t.requires_grad or (t.shape, t.dtype) in passed_on) for t in tensors]
    given = iter(inputs)
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: next(given), (args, kwargs))
    known = storages([*inputs, *block.parameters()])
    saved = kept_by_autograd(lambda: block.plain(*args, **kwargs))
    return sum(size for storage, size in saved.items() if storage not in known)


@pytest.mark.parametrize("row", [pytest.param(row, marks=() if row == "qwen_image" else pytest.mark.slow) for row in TINY])
def test_the_fake_pass_keeps_what_a_real_one_keeps(row):
    job, (extra, side, num_frames) = tiny_job(row), TINY[row]
    cost = measure_model(job, BatchShape(2, side, side, num_frames, text_tokens=12), is_compiled=False, say=silent)
    family = get_family(job.model.family).build_tiny(0, components=cost.traced, extra_inputs=extra)
    assert cost.traced == (("dit", "vace") if "vace" in row else ("dit",))
    select_trained(family, job)
    blocks, calls = [block for name in cost.traced for block in family.repeated_blocks(name)], {}
    for block in blocks:
        block.plain = block.forward
        block.forward = partial(record, block, calls)
    batch = family.blank_batch(BatchShape(2, side, side, num_frames, text_tokens=12), extra_inputs=extra).with_reference()
    with torch.no_grad():
        family.predict(batch, batch.latents, torch.zeros(2))
    assert len(calls) == len(blocks) == sum(kind.count for kind in cost.blocks)
    real = [kept_bytes(block, *call) for block, call in calls.items()]
    counted = [kind.cost.kept_bytes for kind in cost.blocks for _ in range(kind.count)]
    parameters = [param for name in cost.traced for param in family.component(name).parameters()]
    frozen_bytes = cost.weights.frozen_bytes
    if "vace" in row:  # the second block of its two is counted as the first one, which has a layer more
        assert 0 < counted[1] - real[1] < 0.02 * real[1]
        del counted[1], real[1]
        frozen_bytes -= 4 * sum(param.numel() for param in family.component("vace").vace_blocks[0].proj_in.parameters())
    assert counted == real
    assert frozen_bytes == sum(4 * param.numel() for param in parameters if not param.requires_grad)
    trained = [param for param in parameters if param.requires_grad]
    assert cost.weights.num_trained == sum(param.numel() for param in trained)


def record(block, calls, *args, **kwargs):
    calls[block] = (args, kwargs)
    return block.plain(*args, **kwargs)


def test_configurations_follow_from_the_ids_alone():
    for family, origin in (
        ("qwen_image", "Qwen/Qwen-Image-Edit-2509:transformer/*"),
        ("wan", "Wan-AI/Wan2.1-T2V-1.3B:diffusion_pytorch_model*"),
        ("wan", "PAI/Wan2.2-VACE-Fun-A14B:high_noise_model/diffusion_pytorch_model*"),
        ("flux", "black-forest-labs/FLUX.1-dev:flux1-dev.safetensors"),
        ("z_image", "Tongyi-MAI/Z-Image-Turbo:transformer/*"),
        ("flux2", "black-forest-labs/FLUX.2-klein-base-9B:transformer/*"),
    ):
        name, configs, notes = find_configs(build_job(model={"id_with_origin_paths": [origin]}))
        assert (name, list(configs)) == (family, ["dit", "vace"] if "VACE" in origin else ["dit"])
        assert "its files are not here yet" in notes[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("origin", "billions", "counts", "extra"),
    [
        ("Qwen/Qwen-Image-Edit-2509:transformer/*", 20.43, [60], []),
        ("Wan-AI/Wan2.1-T2V-1.3B:diffusion_pytorch_model*", 1.42, [30], []),
        ("Wan-AI/Wan2.1-VACE-1.3B:diffusion_pytorch_model*", 2.187, [15, 30], ["vace_video"]),
        ("black-forest-labs/FLUX.1-dev:flux1-dev.safetensors", 11.9, [19, 38], []),
        ("Tongyi-MAI/Z-Image-Turbo:transformer/*", 6.15, [2, 2, 30], []),
        ("black-forest-labs/FLUX.2-klein-4B:transformer/*", 3.88, [5, 20], []),
        ("black-forest-labs/FLUX.2-dev:transformer/*", 32.2, [8, 48], []),
    ],
)
def test_every_family_has_its_real_size(origin, billions, counts, extra):
    job = build_job(model={"id_with_origin_paths": [origin], "extra_inputs": extra})
    cost = measure_model(job, BatchShape(1, 256, 256, text_tokens=32), is_compiled=False, say=silent)
    assert cost.weights.frozen_bytes / 2e9 == pytest.approx(billions, rel=0.01)
    assert [kind.count for kind in cost.blocks] == counts


def test_what_cannot_be_reckoned_is_said():
    with pytest.raises(ModelError, match="its size is not known by its name") as unknown:
        find_configs(build_job(model={"id_with_origin_paths": ["Somebody/Some-Model:dit.safetensors"]}))
    assert "dsray download" in unknown.value.hint
    job = build_job(training={"trainable_models": ["text_encoder"]})
    with pytest.raises(JobFileError, match=r"training\.trainable_models: estimates cover training of dit; text_encoder"):
        measure_model(job, SQUARE, is_compiled=True, say=silent)
    vae = build_job(model={"id_with_origin_paths": ["Qwen/Qwen-Image:vae/x.safetensors"]})
    with pytest.raises(ModelError, match="has no dit, which is to be trained"):
        measure_model(vae, SQUARE, is_compiled=True, say=silent)


def test_what_does_not_fit_is_told_with_the_keys_that_help():
    job = build_job(gradient={"checkpointing": False})
    cost, device = traced(build_job(), SQUARE), DEVICES["4090"]
    found = estimate(job, cost, device, spread=Spread(), is_compiled=True)
    assert found.fits is False
    assert fit.cannot_fit(found)
    advice = fit.advise(job, cost, device, Spread(), found)
    assert [size for size, _ in advice] == sorted((size for size, _ in advice), reverse=True)
    by_key = {setting.split(" ")[0]: size / GIB for size, setting in advice}
    assert by_key["gradient.checkpointing"] == pytest.approx(68.5 - 43.4, abs=1)
    assert by_key["offload.cpu_offload"] == pytest.approx(68.5 - 7.8, abs=1)
    assert by_key["model.fp8_models"] == pytest.approx(43.4 - 24.7, abs=1)
    text = fit.warning(replace(found, advice=tuple(advice)))
    assert "does not fit: 68.3 GiB and 1.2 beside of 23.5 GiB on 4090" in text
    assert "GiB less with offload.cpu_offload = true" in text
    on_h100 = estimate(job, cost, H100, spread=Spread(), is_compiled=True)
    assert on_h100.fits
    assert fit.warning(on_h100) is None
    assert estimate(job, cost, None, spread=Spread(), is_compiled=True).fits is None


def test_auto_keeps_what_fits_the_device():
    cost = traced(build_job(), SQUARE)
    auto = build_job(gradient={"checkpointing": "auto"})
    found = {
        name: estimate(job, cost, device, spread=Spread(), is_compiled=True)
        for name, job, device in (
            ("all", build_job(), H100), ("none", build_job(gradient={"checkpointing": False}), H100),
            ("h100", auto, H100), ("h200", auto, DEVICES["h200"]), ("a100-40", auto, DEVICES["a100-40"]),
        )
    }  # fmt: skip
    assert found["h100"].step_s == pytest.approx(found["none"].step_s)
    assert found["h100"].peak_bytes == pytest.approx(found["none"].peak_bytes, rel=0.01)
    assert found["h200"].times["recomputation"] == 0
    assert found["a100-40"].peak_bytes == found["all"].peak_bytes  # nothing is left there
    assert "about 100% of the blocks" in found["h200"].notes[-2]


def test_strategies_share_out_what_they_share_out():
    cost = traced(build_job(), SQUARE)
    sizes = {}
    for stage in (1, 2, 3):
        job = build_job(distributed={"strategy": "deepspeed", "zero_stage": stage})
        sizes[stage] = estimate(job, cost, H100, spread=Spread(num_workers=8), is_compiled=stage < 3).memory
    ddp = estimate(build_job(), cost, H100, spread=Spread(num_workers=8), is_compiled=True).memory
    assert sizes[1]["float32 masters"] == ddp["float32 masters"] // 8
    assert sizes[2]["optimizer state"] == pytest.approx(ddp["optimizer state"] / 8, rel=0.01)
    assert sizes[2]["gradients"] < sizes[1]["gradients"]
    assert sizes[3]["frozen weights"] == pytest.approx(ddp["frozen weights"] / 8, rel=0.01)
    # An encoder is not partitioned: every worker has it whole.
    encoder = replace(cost.around, weights=Weights(frozen_bytes=16 * GIB))
    third = build_job(distributed={"strategy": "deepspeed", "zero_stage": 3})
    beside = estimate(
        third, replace(cost, others={"text_encoder": encoder}), H100, spread=Spread(num_workers=8), is_compiled=False
    )
    assert beside.memory["frozen weights"] == sizes[3]["frozen weights"] + 16 * GIB
    away = build_job(distributed={"strategy": "deepspeed", "offload_optimizer_device": "cpu"})
    found = estimate(away, cost, H100, spread=Spread(num_workers=8, workers_on_node=8), is_compiled=True)
    assert "optimizer state" not in found.memory
    assert found.host["masters, optimizer state and gradients"] == 16 * cost.weights.num_trained


def test_host_memory_is_refused_with_the_cure():
    job = build_job(offload={"cpu_offload": True})
    found = estimate(job, traced(build_job(), SQUARE), H100, spread=Spread(), is_compiled=True)
    assert found.host["pinned weights, once a node"] / GIB == pytest.approx(38.1, abs=0.1)
    fit.check_host(job, found, host_bytes=64 * GIB)
    with pytest.raises(JobFileError, match=r"offload\.cpu_offload: a node needs 4.*has 24\.0.*model\.fp8_models halves"):
        fit.check_host(job, found, host_bytes=24 * GIB)


def test_the_largest_micro_batch_follows_from_the_keys():
    wan, qwen = get_family("wan"), get_family("qwen_image")
    assert fit.largest_shape(build_job(dataset={"height": 480, "width": 832, "num_frames": 80}), wan) == BatchShape(
        1, 480, 832, 77, text_tokens=256
    )
    assert fit.largest_shape(build_job(dataset={"batch_size": 3}), qwen) == BatchShape(3, 1024, 1024, text_tokens=256)


def test_an_estimate_reads_the_longest_prompt(tmp_path):
    (tmp_path / "metadata.csv").write_text(f"image,prompt\na.png,short\nb.png,{'x' * 600}\n")
    job = build_job(dataset={"base_path": str(tmp_path), "metadata_path": str(tmp_path / "metadata.csv")})
    assert fit.largest_shape(job, get_family("qwen_image")).text_tokens == 200


def test_devices_are_known_by_the_names_that_drivers_and_ray_give_them():
    names = ("NVIDIA H100 80GB HBM3", "H100", "NVIDIA GeForce RTX 4090", "A100-40G", "A100-80G", "NVIDIA A100-SXM4-80GB")
    assert [find_device(name).name for name in names] == ["h100", "h100", "4090", "a100-40", "a100", "a100"]
    assert find_device("TPU-V4") is None
    assert not DEVICES["a100"].is_measured
    fp8 = build_job(model={"fp8_models": ["dit"]})
    assert not fit.compiles(fp8, DEVICES["a100"])  # as residency decides it
    assert fit.compiles(fp8, H100)


@pytest.mark.slow  # tests/unit/cli/test_estimating.py makes one too
def test_a_whole_estimate_of_a_resolved_job(tmp_path):
    raw = {
        "name": "job", "dataset": {"base_path": str(tmp_path), "max_pixels": 4096, "num_frames": 5},
        "model": {"family": "wan", "tiny": True}, "lora": {"base_model": "dit", "rank": 4},
    }  # fmt: skip
    resolved = resolve(Job.model_validate(raw), Resources(cpus=4, gpus=0))
    said = []
    found = fit.estimate_job(resolved, device=H100, is_remote=False, say=said.append)
    assert said == ["tracing a block of wan's dit at 1 x 64x64 x 5 frames, 256 text tokens"]
    assert found.fits
    text = "\n".join(found.lines())
    assert "it fits" in text
    assert "Ray's object store" in text
    assert found.as_dict()["peak_bytes"] == found.peak_bytes
