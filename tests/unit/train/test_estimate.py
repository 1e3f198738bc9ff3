"""Predictions beside what was measured, and the fake pass beside a real one."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import JobFileError, ModelError
from diffsynth_ray.memory.activations import ActivationStore
from diffsynth_ray.memory.devices import DEVICES, H100, find_device
from diffsynth_ray.memory.fake_pass import fake_weights, kept_by_autograd, tensors_of
from diffsynth_ray.memory.graph_cost import nbytes, storages
from diffsynth_ray.memory.peak import PeakBytes
from diffsynth_ray.models import wan_configs
from diffsynth_ray.models.family import BatchShape, get_family
from diffsynth_ray.train import fit, model_cost, residency
from diffsynth_ray.train.estimate import GIB, Spread, activation_bytes, backward_moments, estimate
from diffsynth_ray.train.model_cost import Weights, _Traced, find_configs, measure_model
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import load_family, select_trained

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
    "h200 FLUX.1-dev": ("black-forest-labs/FLUX.1-dev", {}, SQUARE, None, (0.511, 0.525), 26.91),
    "h200 FLUX.2-klein-base-4B": ("black-forest-labs/FLUX.2-klein-base-4B", {}, SQUARE, None, (0.243, 0.248), 9.6),
    "h200 FLUX.2-klein-base-9B": ("black-forest-labs/FLUX.2-klein-base-9B", {}, SQUARE, None, (0.468, 0.479), 20.64),
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
        _TRACED[key] = measure_model(job, shape, capability=None, say=silent)
    return _TRACED[key]


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.slow if row in SLOW else ()) for row in MEASURED])
def test_predictions_agree_with_what_was_measured(row):
    origin, sections, shape, layers, (fastest_s, slowest_s), peak_gib = MEASURED[row]
    job = build_job(origin, **sections)
    cost = traced(job, shape)
    cost = replace(cost, blocks=tuple(replace(kind, count=layers or kind.count) for kind in cost.blocks))
    found = estimate(job, cost, DEVICES[row.partition(" ")[0]], spread=Spread())
    seconds = (fastest_s + slowest_s) / 2
    print(f"{row}: {found.peak_bytes / GIB:.2f} GiB of {peak_gib}, {found.step_s:.3f} s of {fastest_s}-{slowest_s}")
    assert found.peak_bytes / GIB == pytest.approx(peak_gib, rel=0.10)
    assert found.step_s == pytest.approx(seconds, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "gpus", "layers", "peak_gib", "host_gib", "step_s"),
    [  # of H200s, tests/bench/results/scaling.json; a step's time is without the network, which counts little on the host
        ({"zero_stage": 2}, 2, 24, 80.3, 9.0, None),
        ({"zero_stage": 3}, 2, 36, 109.0, None, None),
        ({"zero_stage": 3, "offload_optimizer_device": "cpu"}, 1, 12, 12.1, 86.3, 3.82),
        ({"zero_stage": 3, "offload_optimizer_device": "cpu"}, 2, 12, 9.3, 90.6, 2.58),
    ],
)
def test_full_training_under_zero_takes_what_was_measured(keys, gpus, layers, peak_gib, host_gib, step_s):
    distributed = {"strategy": "deepspeed", **keys}
    job = build_job(training={"trainable_models": ["dit"]}, lora={"base_model": None}, distributed=distributed)
    cost = traced(job, SQUARE)
    cost = replace(cost, blocks=tuple(replace(kind, count=layers) for kind in cost.blocks))
    found = estimate(job, cost, DEVICES["h200"], spread=Spread(num_workers=gpus, workers_on_node=gpus))
    host = sum(found.host.values()) / GIB
    print(f"{found.peak_bytes / GIB:.1f} GiB of {peak_gib}, host {host:.1f} of {host_gib}, {found.step_s:.2f} s of {step_s}")
    assert found.peak_bytes / GIB == pytest.approx(peak_gib, rel=0.10)
    assert host_gib is None or host == pytest.approx(host_gib, rel=0.25)
    assert step_s is None or found.step_s == pytest.approx(step_s, rel=0.10)


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
            "training": {"precision": "fp32", "compile": False},
        }
    )


def kept_bytes(block, args, kwargs, *, stands_for_others):
    """What a block's real call keeps, without its inputs and weights; for others: its input has a gradient as theirs have."""
    tensors = tensors_of((args, kwargs))
    passed_on = {(tensor.shape, tensor.dtype) for tensor in tensors_of(block.plain(*args, **kwargs))}
    inputs = [
        t.detach().requires_grad_(t.requires_grad or (stands_for_others and (t.shape, t.dtype) in passed_on)) for t in tensors
    ]
    given = iter(inputs)
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: next(given), (args, kwargs))
    known = storages([*inputs, *block.parameters()])
    saved = kept_by_autograd(lambda: block.plain(*args, **kwargs))
    return sum(size for storage, size in saved.items() if storage not in known)


@pytest.mark.parametrize("row", [pytest.param(row, marks=() if row == "qwen_image" else pytest.mark.slow) for row in TINY])
def test_the_fake_pass_keeps_what_a_real_one_keeps(row):
    job, (extra, side, num_frames) = tiny_job(row), TINY[row]
    cost = measure_model(job, BatchShape(2, side, side, num_frames, text_tokens=12), capability=None, say=silent)
    family = get_family(job.model.family).build_tiny(0, components=cost.traced, extra_inputs=extra)
    assert cost.traced == (("dit", "vace") if "vace" in row else ("dit",))
    select_trained(family, job)
    blocks, calls = [block for name in cost.traced for block in family.repeated_blocks(name)], {}
    for block in blocks:
        block.plain = block.forward
        block.forward = partial(record, block, calls)
    batch = family.blank_batch(BatchShape(2, side, side, num_frames, text_tokens=12), extra_inputs=extra).with_reference()
    family.predict(batch, batch.latents, torch.zeros(2))
    assert len(calls) == len(blocks) == sum(kind.count for kind in cost.blocks)
    kinds = [kind for kind in cost.blocks for _ in range(kind.count)]
    real = [
        kept_bytes(block, *call, stands_for_others=kind.count > 1)
        for kind, (block, call) in zip(kinds, calls.items(), strict=True)
    ]
    parameters = [param for name in cost.traced for param in family.component(name).parameters()]
    assert [kind.cost.kept_bytes for kind in kinds] == real
    assert all(kind.handed_bytes == 0 for kind in cost.blocks if kind.component == "dit")
    assert cost.weights.frozen_bytes == sum(4 * param.numel() for param in parameters if not param.requires_grad)
    trained = [param for param in parameters if param.requires_grad]
    assert cost.weights.num_trained == sum(param.numel() for param in trained)


@pytest.mark.parametrize("row", [pytest.param(row, marks=() if row == "z_image" else pytest.mark.slow) for row in TINY])
def test_a_large_batch_is_told_from_two_small_ones(monkeypatch, row):
    """Z-Image works sample by sample around its blocks: 190 operators a sample."""
    job, (_, side, num_frames) = tiny_job(row), TINY[row]
    runs, run = [], _Traced._run
    monkeypatch.setattr(_Traced, "_run", lambda self, shape: (runs.append(shape.num_samples), run(self, shape))[1])

    def measure(num_samples):
        return measure_model(job, BatchShape(num_samples, side, side, num_frames, text_tokens=12), capability=None, say=silent)

    found = measure(17)
    assert runs == [2, 3], "whatever the batch"
    monkeypatch.setattr(model_cost, "_MOST_SAMPLES", 17)
    assert found == measure(17)
    assert runs == [2, 3, 17]


def record(block, calls, *args, **kwargs):
    calls[block] = (args, kwargs)
    return block.plain(*args, **kwargs)


VACE = "Wan-AI/Wan2.1-VACE-1.3B"
VACE_PARAMETERS = {"dit": 1_418_996_800, "vace": 734_975_232}
VACE_COLUMNS = ["vace_video", "vace_reference_image"]
VACE_TRAINED = {
    "vace lora": {"lora": {"base_model": "vace", "rank": 4}},
    "dit lora": {"lora": {"base_model": "dit", "rank": 4}},
    "vace": {"lora": {"base_model": None}, "training": {"trainable_models": ["vace"]}},
    "both": {"lora": {"base_model": "dit", "rank": 4}, "training": {"trainable_models": ["vace"]}},
}
VACE_ON_EVERY_RUN = {("vace lora", True), ("both", False)}


def allocated(family, job, shape, *, mode=nullcontext()):
    """Bytes that a whole forward pass keeps for backward, and the most that both take at once."""
    with mode, PeakBytes() as counter:

        def forward():
            batch = family.blank_batch(shape, extra_inputs=job.model.extra_inputs).with_reference()
            return family.predict(batch, batch.latents, torch.zeros(shape.num_samples))

        pred = forward()
        kept = counter.alive - nbytes(pred)
        pred.sum().backward()
    return kept, counter.peak


@pytest.mark.parametrize(
    ("trained", "recompute"),
    [
        pytest.param(trained, recompute, marks=() if (trained, recompute) in VACE_ON_EVERY_RUN else pytest.mark.slow)
        for trained in VACE_TRAINED
        for recompute in (True, False)
    ],
)
def test_vace_takes_what_a_training_allocates(trained, recompute):
    sections, shape = VACE_TRAINED[trained], BatchShape(1, 256, 256, 17, text_tokens=12)
    job = Job.model_validate(
        {
            "name": "job",
            "model": {"family": "wan", "tiny": True, "extra_inputs": VACE_COLUMNS},
            "lora": sections["lora"],
            "training": {"precision": "fp32", "compile": False} | sections.get("training", {}),
            "gradient": {"checkpointing": recompute},
        }
    )
    cost = measure_model(job, shape, capability=None, say=silent)
    family = load_family(job, device=torch.device("cpu"), components=cost.traced)
    select_trained(family, job)
    settle(family, job, say=silent)
    kept, peak = allocated(family, job, shape)
    moments = backward_moments(job, cost)
    if recompute:  # the DiT's first input is VACE's too, and counted for both
        assert moments[-1].kept == kept + (cost.blocks[-1].input_bytes if trained == "both" else 0)
    else:  # what blocks share is counted, needed or not, and in float32 the result that a block keeps again as the next one's
        assert kept <= moments[-1].kept <= 1.025 * kept
    assert activation_bytes(job, cost) == pytest.approx(peak, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("goes", [False, True], ids=["kept on the device", "on the host"])
@pytest.mark.parametrize("trained", VACE_TRAINED)
def test_vace_at_its_real_size_takes_what_all_of_its_blocks_take(trained, goes):
    job = build_job(
        VACE, **VACE_TRAINED[trained], model={"extra_inputs": VACE_COLUMNS}, gradient={"checkpointing_offload": goes}
    )
    job = job.model_copy(update={"training": job.training.model_copy(update={"compile": False})})
    _, configs, _ = find_configs(job)
    wan, mode = get_family("wan"), FakeTensorMode(allow_non_fake_inputs=True)
    modules = {name: nn.Module.to(wan.build_component(name, config), torch.bfloat16) for name, config in configs.items()}
    family = wan(modules, dtype=torch.bfloat16, device="cpu")
    select_trained(family, job)
    fake_weights(nn.ModuleDict(modules), mode)
    store = ActivationStore(family.device) if goes else None
    residency._install(family, job, {name: family.repeated_blocks(name) for name in modules}, {}, None, store, sizes_vary=False)
    _, peak = allocated(family, job, WAN, mode=mode)
    # Powers of two that the store keeps for the next step: here, without a device, they are allocated like all else.
    on_host = sum(size * len(pool) for size, pool in store._free.items()) if goes else 0
    cost = measure_model(job, WAN, capability=None, say=silent)
    found = activation_bytes(job, cost)
    print(f"{trained}: {found / GIB:.2f} GiB of {(peak - on_host) / GIB:.2f}")
    assert found == pytest.approx(peak - on_host, rel=0.02)
    assert "blocks of dit and vace are not compiled" in estimate(job, cost, H100, spread=Spread()).notes


def test_a_frozen_dit_beside_a_trained_vace_is_whole_on_every_worker():
    job = build_job(
        VACE, **VACE_TRAINED["vace"], model={"extra_inputs": VACE_COLUMNS},
        distributed={"strategy": "deepspeed", "zero_stage": 3, "offload_param_device": "cpu"},
    )  # fmt: skip
    cost = measure_model(job, BatchShape(1, 64, 64, 5, text_tokens=32), capability=None, say=silent)
    found = estimate(job, cost, H100, spread=Spread(num_workers=8, workers_on_node=4))
    bf16 = {name: 2 * count for name, count in VACE_PARAMETERS.items()}
    assert found.memory["frozen weights"] == bf16["dit"]
    assert found.host["pinned parameters"] == bf16["vace"] * 4 // 8
    on_device = job.model_copy(update={"distributed": job.distributed.model_copy(update={"offload_param_device": "none"})})
    found = estimate(on_device, cost, H100, spread=Spread(num_workers=8))
    assert (found.memory["frozen weights"], found.memory["trained weights"]) == (bf16["dit"], bf16["vace"] // 8)
    assert found.memory["gathered parameters"] == 2 * largest_block_bytes("vace")
    assert {(kind.component, kind.is_compiled) for kind in cost.blocks} == {("dit", True), ("vace", True)}
    both = build_job(VACE, **VACE_TRAINED["both"], distributed={"strategy": "deepspeed", "zero_stage": 3})
    shared = estimate(both, cost, H100, spread=Spread(num_workers=8)).memory
    assert shared["frozen weights"] == bf16["dit"] // 8
    dit = build_job(VACE, **VACE_TRAINED["dit lora"], distributed={"strategy": "deepspeed", "zero_stage": 3})
    shared = estimate(dit, cost, H100, spread=Spread(num_workers=8)).memory
    assert shared["gathered parameters"] == 2 * largest_block_bytes("dit") < 2 * largest_block_bytes("vace")


def largest_block_bytes(component):
    """Of VACE at its real size, in bf16."""
    config = find_configs(build_job(VACE))[1][component]
    with torch.device("meta"):
        module = get_family("wan").build_component(component, config)
    blocks = module.blocks if component == "dit" else module.vace_blocks
    return max(sum(2 * param.numel() for param in block.parameters()) for block in blocks)


@pytest.mark.slow
def test_places_of_vace_s_blocks_change_no_estimate():
    """diffusers' configuration names them; the two blocks that are traced have others."""
    placed = wan_configs.TINY_VACE | {"vace_layers": [0, 3]}
    job = tiny_job("wan with vace")
    shape = BatchShape(1, 64, 64, 5, text_tokens=12)
    plain = measure_model(job, shape, capability=None, say=silent)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(wan_configs, "TINY_VACE", placed)
        assert measure_model(job, shape, capability=None, say=silent) == plain


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
        ("Wan-AI/Wan2.1-VACE-1.3B:diffusion_pytorch_model*", 2.154, [1, 14, 30], ["vace_video"]),
        ("black-forest-labs/FLUX.1-dev:flux1-dev.safetensors", 11.9, [19, 38], []),
        ("Tongyi-MAI/Z-Image-Turbo:transformer/*", 6.15, [2, 2, 30], []),
        ("black-forest-labs/FLUX.2-klein-4B:transformer/*", 3.88, [5, 20], []),
        ("black-forest-labs/FLUX.2-dev:transformer/*", 32.2, [8, 48], []),
    ],
)
def test_every_family_has_its_real_size(origin, billions, counts, extra):
    job = build_job(model={"id_with_origin_paths": [origin], "extra_inputs": extra})
    cost = measure_model(job, BatchShape(1, 256, 256, text_tokens=32), capability=None, say=silent)
    name, configs, _ = find_configs(job)
    whole = [get_family(name).build_component(part, config) for part, config in configs.items() if part in cost.traced]
    num_parameters = sum(param.numel() for module in whole for param in module.parameters())
    assert cost.weights.frozen_bytes == 2 * num_parameters
    assert num_parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert [kind.count for kind in cost.blocks] == counts


def test_what_cannot_be_reckoned_is_said():
    with pytest.raises(ModelError, match="its size is not known by its name") as unknown:
        find_configs(build_job(model={"id_with_origin_paths": ["Somebody/Some-Model:dit.safetensors"]}))
    assert "dsray download" in unknown.value.hint
    job = build_job(training={"trainable_models": ["text_encoder"]})
    with pytest.raises(JobFileError, match=r"training\.trainable_models: estimates cover training of dit; text_encoder"):
        measure_model(job, SQUARE, capability=None, say=silent)
    vae = build_job(model={"id_with_origin_paths": ["Qwen/Qwen-Image:vae/x.safetensors"]})
    with pytest.raises(ModelError, match="has no dit, which is to be trained"):
        measure_model(vae, SQUARE, capability=None, say=silent)


def test_what_the_job_may_not_have_is_not_advised():
    job = build_job(**FULL, distributed={"num_workers": 2})
    cost = traced(job, SQUARE)

    def advised(job):
        found = estimate(job, cost, DEVICES["4090"], spread=Spread(2, 2, 1))
        return {setting.split(" ")[0] for _, setting in fit.advise(job, cost, DEVICES["4090"], Spread(2, 2, 1), found)}

    assert {"distributed.strategy", "offload.cpu_offload"} <= advised(job)
    training = FULL["training"] | {"ema_decay": 0.999}
    averaged = build_job(**(FULL | {"training": training}), distributed={"num_workers": 2})
    assert "distributed.strategy" not in advised(averaged)


def test_what_does_not_fit_is_told_with_the_keys_that_help():
    job = build_job(gradient={"checkpointing": False})
    cost, device = traced(build_job(), SQUARE), DEVICES["4090"]
    found = estimate(job, cost, device, spread=Spread())
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
    on_h100 = estimate(job, cost, H100, spread=Spread())
    assert on_h100.fits
    assert fit.warning(on_h100) is None
    assert estimate(job, cost, None, spread=Spread()).fits is None


def test_auto_keeps_what_fits_the_device():
    cost = traced(build_job(), SQUARE)
    auto = build_job(gradient={"checkpointing": "auto"})
    found = {
        name: estimate(job, cost, device, spread=Spread())
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
        sizes[stage] = estimate(job, cost, H100, spread=Spread(num_workers=8)).memory
    ddp = estimate(build_job(), cost, H100, spread=Spread(num_workers=8)).memory
    assert sizes[1]["float32 masters"] == ddp["float32 masters"] // 8
    assert sizes[2]["optimizer state"] == pytest.approx(ddp["optimizer state"] / 8, rel=0.01)
    assert sizes[2]["gradients"] < sizes[1]["gradients"]
    assert sizes[3]["frozen weights"] == pytest.approx(ddp["frozen weights"] / 8, rel=0.01)
    # An encoder is not partitioned: every worker has it whole.
    encoder = replace(cost.around["dit"], weights=Weights(frozen_bytes=16 * GIB))
    third = build_job(distributed={"strategy": "deepspeed", "zero_stage": 3})
    beside = estimate(third, replace(cost, others={"text_encoder": encoder}), H100, spread=Spread(num_workers=8))
    assert beside.memory["frozen weights"] == sizes[3]["frozen weights"] + 16 * GIB
    away = build_job(distributed={"strategy": "deepspeed", "offload_optimizer_device": "cpu"})
    found = estimate(away, cost, H100, spread=Spread(num_workers=8, workers_on_node=8))
    assert "optimizer state" not in found.memory
    assert found.host["masters, optimizer state and gradients"] == 16 * cost.weights.num_trained
    third = build_job(distributed={"strategy": "deepspeed", "zero_stage": 3, "offload_optimizer_device": "cpu"})
    found = estimate(third, cost, H100, spread=Spread(num_workers=8, workers_on_node=8))
    assert found.host["masters, optimizer state and gradients"] == 20 * cost.weights.num_trained


def test_host_memory_is_refused_with_the_cure():
    job = build_job(offload={"cpu_offload": True})
    found = estimate(job, traced(build_job(), SQUARE), H100, spread=Spread())
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


def test_what_is_larger_than_any_device_is_refused_and_not_traced(tmp_path):
    """A tensor of so many elements has no size in 64 bits."""
    dataset = {"base_path": str(tmp_path), "max_pixels": 16384**2, "batch_size": 65}
    resolved = resolve(build_job(dataset=dataset), Resources(cpus=4, gpus=0))
    with pytest.raises(JobFileError, match=r"dataset\.batch_size: a micro batch of 65 samples has 1\.74e\+10 pixels"):
        fit.estimate_job(resolved, device=None, is_remote=False, say=print)


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
    assert not residency.compiles(fp8, "dit", DEVICES["a100"].capability)
    assert residency.compiles(fp8, "dit", H100.capability)
    assert residency.compiles(fp8, "dit", None)
    assert residency.compiles(fp8, "vace", DEVICES["a100"].capability)


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
