from pathlib import Path
from typing import Any

import pytest

from diffsynth_ray.config import resolve as resolving
from diffsynth_ray.config import schema
from diffsynth_ray.config.resolve import ResolvedJob, Resources, resolve, resolve_model
from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import JobFileError

LAPTOP = Resources(cpus=8, gpus=0)
BOX = Resources(cpus=64, gpus=8)


def build_job(**changes: dict[str, Any] | object) -> Job:
    """A small valid job; `section={key: value}` is merged in."""
    raw: dict[str, Any] = {
        "name": "job",
        "dataset": {"base_path": "/data"},
        "model": {"family": "qwen_image", "tiny": True},
        "lora": {"base_model": "dit"},
    }
    for name, value in changes.items():
        raw[name] = raw.get(name, {}) | value if isinstance(value, dict) else value
    return Job.model_validate(raw)


def problems_of(job: Job, resources: Resources = LAPTOP, *, remote: bool = False) -> dict[str, str]:
    with pytest.raises(JobFileError) as caught:
        resolve(job, resources, remote=remote)
    return {problem.key: problem.message for problem in caught.value.problems}


# The run's name

STEADY = {"dataset": {"global_batch_size": 8}}


@pytest.mark.parametrize(
    "change",
    [
        {"distributed": {"num_workers": 2}},
        {"distributed": {"max_failures": 0}},
        {"distributed": {"resources_per_worker": {"CPU": 2.0}}},
        {"distributed": {"timeout_s": 60.0}},
        {"training": {"num_epochs": 7}},
        {"training": {"max_steps": 100}},
        {"training": {"find_unused_parameters": True}},
        {"output": {"save_steps": 10}},
        {"output": {"path": "/elsewhere"}},
        {"output": {"formats": ["diffsynth", "kohya"]}},
        {"output": {"checkpoint_minutes": 1.0}},
        {"offload": {"cpu_offload": True}},
        {"gradient": {"checkpointing": False}},
        {"gradient": {"accumulation_steps": 4}},
        {"dataset": {"base_path": "/other"}},
        {"dataset": {"num_workers": 1}},
        {"split": {"cache_path": "/cache"}},
        {"logging": {"every_steps": 5}},
    ],
)
def test_what_does_not_change_the_run(change: dict[str, Any]) -> None:
    merged = STEADY | {name: STEADY.get(name, {}) | value for name, value in change.items()}
    assert resolve(build_job(**merged), LAPTOP).run == resolve(build_job(**STEADY), LAPTOP).run


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"training": {"learning_rate": 2e-4}},
        {"training": {"precision": "fp32"}},
        {"training": {"max_grad_norm": 0.0}},
        {"training": {"warmup_steps": 10}},
        {"training": {"optimizer": "torch.optim.Adam"}},
        {"training": {"max_timestep_boundary": 0.5}},
        {"model": {"tokenizer_path": "/other"}},
        {"model": {"tokenizer_1_path": "/other"}},
        {"model": {"tokenizer_2_path": "/other"}},
        {"model": {"processor_path": "/other"}},
        {"lora": {"rank": 16}},
        {"lora": {"target_modules": ["to_q"]}},
        {"dataset": {"max_pixels": 65536}},
        {"dataset": {"global_batch_size": 16}},
        {"dataset": {"repeat": 2}},
        {"dataset": {"metadata_path": "/data/other.csv"}},
    ],
)
def test_what_changes_the_run(change: dict[str, Any]) -> None:
    merged = STEADY | {
        name: STEADY.get(name, {}) | value if isinstance(value, dict) else value for name, value in change.items()
    }
    changed, steady = resolve(build_job(**merged), LAPTOP), resolve(build_job(**STEADY), LAPTOP)
    assert changed.run != steady.run
    differing = {key for key in changed.given if changed.given[key] != steady.given.get(key)}
    (section, value), *_ = change.items()
    assert differing == ({f"{section}.{key}" for key in value} if isinstance(value, dict) else {section})


def test_the_same_global_batch_is_the_same_run_however_it_is_made_up() -> None:
    by_workers = resolve(build_job(distributed={"num_workers": 4}), LAPTOP)
    by_accumulation = resolve(build_job(gradient={"accumulation_steps": 4}), LAPTOP)
    given = resolve(build_job(dataset={"global_batch_size": 4}), LAPTOP)
    assert by_workers.run == by_accumulation.run == given.run
    assert resolve(build_job(), BOX).run != by_workers.run  # eight GPUs: a global batch of eight


def test_the_run_bears_the_jobs_name() -> None:
    one, two = resolve(build_job(), LAPTOP).run, resolve(build_job(name="other"), LAPTOP).run
    assert one.startswith("job-")
    assert len(one) == len("job-") + 8
    assert two.removeprefix("other") == one.removeprefix("job")


def test_the_name_is_made_of_the_marked_keys_only() -> None:
    every = {"tokenizer_1_path": "/clip", "tokenizer_2_path": "/t5", "processor_path": "/processor"}
    assert sorted(resolve(build_job(model=every), LAPTOP).given) == sorted(
        {key for key, field in schema.keys().items() if schema.mark(field, "identity")} | {"dataset.global_batch_size"}
    )
    # Where these are unset, a run has the name that it had before they counted.
    assert not resolve(build_job(), LAPTOP).given.keys() & {f"model.{key}" for key in every}
    assert resolve(build_job(), LAPTOP).run == resolve(build_job(), Resources(cpus=2, gpus=0)).run


# Paths


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = build_job(
        dataset={"base_path": "photos", "metadata_path": "../rows.csv"},
        model={
            "tiny": False,
            "paths": ["vae.safetensors", ["a.safetensors", "/b.safetensors"]],
            "tokenizer_path": "tok",
        },
    )
    resolved = resolve(job, LAPTOP)
    assert resolved.job.dataset.base_path == str(tmp_path / "photos")
    assert resolved.job.dataset.metadata_path == str(tmp_path.parent / "rows.csv")
    assert resolved.job.model.paths == [
        str(tmp_path / "vae.safetensors"),
        [str(tmp_path / "a.safetensors"), "/b.safetensors"],
    ]
    assert resolved.output_path == tmp_path / "outputs" / "job"


def test_home_and_urls_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    job = build_job(dataset={"base_path": "~/photos", "metadata_path": "file:///data/rows.csv"})
    resolved = resolve(job, LAPTOP, remote=False)
    assert resolved.job.dataset.base_path == "/home/someone/photos"
    assert resolved.job.dataset.metadata_path == "file:///data/rows.csv"


def test_remote_relative_paths_are_refused() -> None:
    job = build_job(
        dataset={"base_path": "photos"},
        model={"tiny": False, "paths": [["/a.safetensors", "b.safetensors"]], "tokenizer_path": "/tok"},
    )
    problems = problems_of(job, remote=True)
    assert set(problems) == {"dataset.base_path", "model.paths", "output.path"}
    assert "'b.safetensors'" in problems["model.paths"]


def test_a_tokenizer_of_a_hub_is_no_path() -> None:
    name = "black-forest-labs/FLUX.2-klein-4B:tokenizer/"
    model = {"tiny": False, "paths": ["/a.safetensors"], "tokenizer_path": name, "processor_path": "a/b:"}
    model["base_path"] = "/models"
    for remote in (False, True):
        job = build_job(output={"path": "/shared/out"}, model=model)
        resolved = resolve(job, LAPTOP, remote=remote)
        assert (resolved.job.model.tokenizer_path, resolved.job.model.processor_path) == (name, "a/b:")
    assert "must be absolute" in problems_of(build_job(model=model | {"base_path": None}), remote=True)["model.base_path"]
    wrong = build_job(model=model | {"tokenizer_path": "a/b:../tokenizer"})
    assert "must be a path inside the repository" in problems_of(wrong)["model.tokenizer_path"]
    assert resolve(build_job(model=model | {"tokenizer_path": "./a/b:c"}), LAPTOP).job.model.tokenizer_path.startswith("/")


def test_remote_absolute_paths_are_taken() -> None:
    job = build_job(output={"path": "/shared/outputs/{name}"})
    assert str(resolve(job, LAPTOP, remote=True).output_path) == "/shared/outputs/job"


# Where models come from

IDS = {"tiny": False, "id_with_origin_paths": ["Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors"]}
VARIABLES = ("DIFFSYNTH_MODEL_BASE_PATH", "DIFFSYNTH_DOWNLOAD_SOURCE", "DIFFSYNTH_SKIP_DOWNLOAD")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_source_by_default(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.chdir(tmp_path)
    model = resolve(build_job(model=IDS), LAPTOP).job.model
    assert (model.source, model.base_path, model.skip_download) == ("modelscope", str(tmp_path / "models"), False)
    assert resolve(build_job(), LAPTOP).job.model.source is None


def test_the_source_by_the_environment_and_by_the_job(environment: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("/shared/models", "HuggingFace", "True"), strict=True):
        environment.setenv(name, value)
    model = resolve(build_job(model=IDS), LAPTOP).job.model
    assert (model.source, model.base_path, model.skip_download) == ("huggingface", "/shared/models", True)
    given = IDS | {"source": "modelscope", "base_path": "/mine", "skip_download": False}
    model = resolve(build_job(model=given), LAPTOP).job.model
    assert (model.source, model.base_path, model.skip_download) == ("modelscope", "/mine", False)
    assert resolve(build_job(model=given), LAPTOP).run == resolve(build_job(model=IDS), LAPTOP).run


def test_a_wrong_environment_is_named_where_it_counts(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "modelscape")
    environment.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "perhaps")
    assert set(problems_of(build_job(model=IDS))) == {"DIFFSYNTH_DOWNLOAD_SOURCE", "DIFFSYNTH_SKIP_DOWNLOAD"}
    assert resolve(build_job(model=IDS | {"source": "modelscope", "skip_download": True}), LAPTOP).run
    assert resolve(build_job(), LAPTOP).run  # a tiny model comes from nowhere


def test_a_remote_cluster_wants_to_know_where_models_are_kept(environment: pytest.MonkeyPatch) -> None:
    output = {"path": "/shared/{name}"}
    problems = problems_of(build_job(model=IDS, output=output), remote=True)
    assert set(problems) == {"model.base_path"}
    assert "absolute" in problems["model.base_path"]
    files = {"tiny": False, "paths": ["/a.safetensors"]}
    assert resolve(build_job(model=files, output=output), LAPTOP, remote=True).job.model.base_path is None
    environment.setenv("DIFFSYNTH_MODEL_BASE_PATH", "/shared/models")
    assert resolve(build_job(model=IDS, output=output), LAPTOP, remote=True).job.model.base_path == "/shared/models"


def test_the_model_alone_resolves_on_any_machine(environment: pytest.MonkeyPatch) -> None:
    job = build_job(model=IDS, dataset={"base_path": None}, distributed={"num_workers": 64})
    assert resolve_model(job).source == "modelscope"
    with pytest.raises(JobFileError, match=r"model\.id_with_origin_paths"):
        resolve_model(build_job(model=IDS | {"id_with_origin_paths": ["nowhere"]}))


# Workers and batches


@pytest.mark.parametrize(
    ("resources", "workers", "batch", "accumulation", "expected"),
    [
        (LAPTOP, None, 1, 1, (1, 1, 1)),
        (LAPTOP, 3, 2, 1, (3, 1, 6)),
        (LAPTOP, 2, 2, 4, (2, 4, 16)),
        (BOX, None, 1, 1, (8, 1, 8)),
        (BOX, 4, 2, 2, (4, 2, 16)),
    ],
)
def test_the_default_global_batch(
    resources: Resources, workers: int | None, batch: int, accumulation: int, expected: tuple[int, int, int]
) -> None:
    job = build_job(
        dataset={"batch_size": batch},
        gradient={"accumulation_steps": accumulation},
        distributed={"num_workers": workers},
    )
    resolved = resolve(job, resources)
    assert (resolved.num_workers, resolved.micro_steps, resolved.global_batch_size) == expected


@pytest.mark.parametrize(("workers", "micro_steps"), [(1, 5), (2, 3), (3, 2), (4, 2), (5, 1), (8, 1)])
def test_a_given_global_batch_sets_the_micro_steps(workers: int, micro_steps: int) -> None:
    job = build_job(
        dataset={"batch_size": 2, "global_batch_size": 10},
        distributed={"num_workers": workers},
        gradient={"accumulation_steps": 7},
    )
    resolved = resolve(job, LAPTOP)
    assert (resolved.micro_steps, resolved.global_batch_size) == (micro_steps, 10)


def test_gpus_are_used_where_they_are() -> None:
    assert resolve(build_job(), LAPTOP).device == "cpu"
    on_gpus = resolve(build_job(), BOX)
    assert (on_gpus.device, on_gpus.resources_per_worker) == ("cuda", {"GPU": 1.0, "CPU": 1.0})
    without = build_job(distributed={"num_workers": 1, "resources_per_worker": {"CPU": 4.0}})
    assert resolve(without, BOX).device == "cpu"


def test_more_gpus_than_there_are() -> None:
    message = problems_of(build_job(distributed={"num_workers": 9}), BOX)["distributed.num_workers"]
    assert "9 workers need 9 GPUs, there are 8" in message


def test_cpu_starvation_is_refused_with_the_cure() -> None:
    job = build_job(distributed={"num_workers": 4, "resources_per_worker": {"CPU": 2.0}})
    message = problems_of(job, LAPTOP)["distributed.num_workers"]
    assert "would wait forever" in message
    assert "at most 3 workers" in message
    cured = build_job(distributed={"num_workers": 3, "resources_per_worker": {"CPU": 2.0}})
    assert resolve(cured, LAPTOP).num_workers == 3


def test_one_core_is_enough_for_one_worker() -> None:
    resolved = resolve(build_job(), Resources(cpus=1, gpus=0))
    assert resolved.decode_tasks == 1
    assert 0 < resolved.decode_cpus <= 0.4


@pytest.mark.parametrize("cpus", [1, 2, 3, 8, 63, 64])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_what_is_planned_fits_the_machine(cpus: int, workers: int) -> None:
    job = build_job(distributed={"num_workers": workers})
    try:
        resolved = resolve(job, Resources(cpus=cpus, gpus=0))
    except JobFileError:
        assert cpus < workers  # half a core a worker and a little for the data fit one core each
        return
    a_worker = resolved.resources_per_worker["CPU"] + 0.1 + resolved.decode_tasks * resolved.decode_cpus
    assert workers * a_worker <= cpus + 1e-6


def test_num_workers_of_the_dataset_is_an_upper_bound() -> None:
    assert resolve(build_job(dataset={"num_workers": 2}), BOX).decode_tasks == 2
    assert resolve(build_job(dataset={"num_workers": 1000}), BOX).decode_tasks == resolve(build_job(), BOX).decode_tasks


# Rules between keys


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"dataset": {"base_path": None}}, "dataset.base_path"),
        ({"dataset": {"height": 512}}, "dataset.height"),
        ({"training": {"min_timestep_boundary": 0.5, "max_timestep_boundary": 0.5}}, "training.min_timestep_boundary"),
        ({"lora": {"base_model": None}}, "training.trainable_models"),
        ({"training": {"trainable_models": ["dit"]}}, "lora.base_model"),
        ({"training": {"trainable_models": ["vae", "vae"]}}, "training.trainable_models"),
        ({"training": {"precision": "fp32", "master_weights": False}}, "training.master_weights"),
        ({"model": {"paths": ["/a.safetensors"]}}, "model.tiny"),
        ({"model": {"family": None}}, "model.family"),
        ({"model": {"tiny": False}}, "model.paths"),
        ({"model": {"tiny": False, "id_with_origin_paths": ["Qwen/Qwen-Image"]}}, "model.id_with_origin_paths"),
        ({"model": {"id_with_origin_paths": ["Qwen/Qwen-Image:vae/"]}}, "model.tiny"),
        ({"distributed": {"num_workers": 0}}, "distributed.num_workers"),
        ({"training": {"optimizer": "torch.optim.Adamw"}}, "training.optimizer"),
        ({"distributed": {"resources_per_worker": {"CPU": 0.1, "a": 1e-300}}}, "distributed.resources_per_worker"),
        (
            {"model": {"fp8_models": ["vae"]}, "training": {"trainable_models": ["vae"]}, "lora": {"base_model": None}},
            "model.fp8_models",
        ),
        ({"split": {"enabled": True, "cache_path": "s3://"}}, "split.cache_path"),
        ({"training": {"optimizer_args": {"lr": 1e-3}}}, "training.optimizer_args"),
        ({"output": {"checkpoint_path": "gs:///"}}, "output.checkpoint_path"),
    ],
)
def test_rules_between_keys(change: dict[str, Any], key: str) -> None:
    assert set(problems_of(build_job(**change))) == {key}


def test_all_problems_come_at_once() -> None:
    job = build_job(dataset={"base_path": None, "width": 512}, lora={"base_model": None}, distributed={"num_workers": 20})
    assert set(problems_of(job)) == {
        "dataset.base_path", "dataset.height", "training.trainable_models", "distributed.num_workers",
    }  # fmt: skip


def test_a_resolved_job_survives_the_way_between_processes() -> None:
    resolved = resolve(build_job(training={"optimizer_args": {"betas": [0.9, 0.99]}}), BOX)
    assert ResolvedJob.model_validate_json(resolved.model_dump_json()) == resolved


# Elastic


def test_elastic_keeps_the_batch_of_its_most_workers() -> None:
    job = build_job(distributed={"num_workers": [1, 4]}, dataset={"batch_size": 2})
    resolved = resolve(job, BOX)
    assert (resolved.min_workers, resolved.num_workers, resolved.is_elastic) == (1, 4, True)
    assert resolved.global_batch_size == 8
    assert resolve(build_job(distributed={"num_workers": 4}, dataset={"batch_size": 2}), BOX).run == resolved.run
    assert not resolve(build_job(distributed={"num_workers": 4}), BOX).is_elastic


def test_elastic_needs_room_for_its_fewest_workers_only() -> None:
    job = build_job(distributed={"num_workers": [1, 64], "resources_per_worker": {"GPU": 1.0, "CPU": 1.0}})
    resolved = resolve(job, BOX)
    assert resolved.num_workers == 64
    assert resolved.decode_cpus == 1.0
    assert (
        "9 workers need 9 GPUs"
        in problems_of(build_job(distributed={"num_workers": [9, 10], "resources_per_worker": {"GPU": 1.0, "CPU": 1.0}}), BOX)[
            "distributed.num_workers"
        ]
    )


@pytest.mark.parametrize("asked", [[0, 2], [3, 2], [-1, -1]])
def test_elastic_bounds_are_checked(asked: list[int]) -> None:
    assert "1 <= min <= max" in problems_of(build_job(distributed={"num_workers": asked}))["distributed.num_workers"]


@pytest.mark.parametrize(
    ("lora", "message"),
    [({"preset_model": "dit"}, "needs lora.preset_path"), ({"preset_path": ["a"], "preset_model": ["x", "y"]}, "2 components")],
)
def test_preset_loras_and_their_components(lora: dict[str, Any], message: str) -> None:
    assert message in problems_of(build_job(lora={"base_model": "dit"} | lora))["lora.preset_model"]


# Split training


def test_the_encode_stage_gets_what_the_training_workers_will_have() -> None:
    encode = resolve(build_job(split={"enabled": True}), BOX).encode
    assert encode is not None
    assert (encode.num_workers, encode.device, encode.resources_per_worker) == (8, "cuda", {"GPU": 1.0, "CPU": 1.0})
    on_cpu = resolve(build_job(split={"enabled": True}), Resources(cpus=2, gpus=0)).encode
    assert on_cpu is not None
    assert (on_cpu.num_workers, on_cpu.device, on_cpu.decode_tasks) == (1, "cpu", 1)
    assert resolve(build_job(), BOX).encode is None
    assert resolve(build_job(), BOX).stages == ["train"]
    assert resolve(build_job(split={"enabled": True}), BOX).stages == ["encode", "train"]


def test_the_encode_stage_may_have_other_resources() -> None:
    split = {"enabled": True, "num_workers": 16, "resources_per_worker": {"GPU": 0.5, "CPU": 2.0}}
    encode = resolve(build_job(split=split), BOX).encode
    assert encode is not None
    assert (encode.num_workers, encode.device) == (16, "cuda")
    without = {"enabled": True, "num_workers": 4, "resources_per_worker": {"CPU": 4.0}}
    encode = resolve(build_job(split=without), BOX).encode
    assert encode is not None
    assert encode.device == "cpu"


def test_an_encode_stage_that_would_wait_forever_is_refused() -> None:
    problems = problems_of(build_job(split={"enabled": True, "num_workers": 16}), BOX)
    assert "16 workers need 16 GPUs, there are 8" in problems["split.num_workers"]
    split = {"enabled": True, "num_workers": 8, "resources_per_worker": {"CPU": 1.0}}
    assert "split.resources_per_worker" in problems_of(build_job(split=split))["split.num_workers"]
    split = {"enabled": True, "resources_per_worker": {"CPU": -1.0}}
    assert "0 or more" in problems_of(build_job(split=split))["split.resources_per_worker"]


def test_split_training_is_the_same_run() -> None:
    assert resolve(build_job(split={"enabled": True}), LAPTOP).run == resolve(build_job(), LAPTOP).run


def test_the_data_may_be_left_out_where_a_cache_has_them() -> None:
    job = build_job(dataset={"base_path": None}, split={"enabled": True})
    assert resolve(job, LAPTOP).job.dataset.base_path is None
    assert "dataset.base_path" in problems_of(build_job(dataset={"base_path": None}))
    half = build_job(dataset={"base_path": None, "metadata_path": "/data/rows.csv"}, split={"enabled": True})
    assert "dataset.base_path" in problems_of(half)
    paths = {"tiny": False, "paths": ["/dit.safetensors"]}
    assert resolve(build_job(dataset={"base_path": None}, split={"enabled": True}, model=paths), LAPTOP)


def test_a_remote_cache_must_be_named_in_full() -> None:
    output = {"path": "/out"}
    problems = problems_of(build_job(split={"enabled": True}, output=output), BOX, remote=True)
    assert "must be absolute" in problems["split.cache_path"]
    in_a_bucket = {"enabled": True, "cache_path": "s3://bucket/cache"}
    resolved = resolve(build_job(split=in_a_bucket, output=output), BOX, remote=True)
    assert resolved.job.split.cache_path == "s3://bucket/cache"
    assert resolve(build_job(output=output), BOX, remote=True)


# Validation


def test_only_a_share_that_is_held_out_is_part_of_the_name() -> None:
    names = {
        holdout: resolve(build_job(validation={} if holdout is None else {"holdout": holdout}), BOX).run
        for holdout in (None, "held.csv", 0.1, 0.2)
    }
    assert names["held.csv"] == names[None]
    assert len(set(names.values())) == 3


@pytest.mark.parametrize(
    ("validation", "key"),
    [
        ({"holdout": 1.5}, "validation.holdout"),
        ({"early_stopping": 3}, "validation.early_stopping"),
        ({"keep_best": True}, "validation.keep_best"),
        ({"every_steps": 10}, "validation.every_steps"),
        ({"inputs": ["a.png"], "prompts": ["one"]}, "validation.inputs"),
    ],
)
def test_rules_of_validation(validation: dict[str, object], key: str) -> None:
    assert list(problems_of(build_job(validation=validation))) == [key]


def test_split_training_has_no_encoders_for_inputs_of_samples() -> None:
    validation = {"prompts": ["a"], "holdout": 0.1}
    resolve(build_job(validation=validation, split={"enabled": True}), LAPTOP)
    edit = {"validation": validation | {"inputs": ["a.png"]}, "model": {"extra_inputs": ["edit_image"]}}
    problems = problems_of(build_job(**edit, split={"enabled": True}))
    assert list(problems) == ["validation.prompts"]
    assert "split.enabled = false, or validation.holdout alone" in problems["validation.prompts"]


def test_samples_and_what_the_model_takes() -> None:
    edit = {"model": {"extra_inputs": ["edit_image"]}}
    assert "required with prompts" in problems_of(build_job(validation={"prompts": ["a", "b"]}, **edit))["validation.inputs"]
    two = {"prompts": ["a", "b", "c"], "inputs": ["a.png", "b.png"]}
    assert "2 files for 3 prompts" in problems_of(build_job(validation=two, **edit))["validation.inputs"]
    job = build_job(validation={"prompts": ["a", "b"], "inputs": ["a.png"]}, **edit)
    assert resolve(job, BOX).job.validation.inputs == [str(Path.cwd() / "a.png")]
    clip = build_job(validation={"prompts": ["a"], "inputs": ["a.png"]}, model={"extra_inputs": ["vace_video"]})
    assert "vace_video takes a clip" in problems_of(clip)["validation.prompts"]
    reference = build_job(validation={"prompts": ["a"], "inputs": ["a.png"]}, model={"extra_inputs": ["vace_reference_image"]})
    assert resolve(reference, BOX).job.validation.prompts == ["a"]
    zero = {"distributed": {"strategy": "deepspeed", "zero_stage": 3}}
    assert "zero_stage = 2" in problems_of(build_job(validation={"prompts": ["a"]}, **zero))["validation.prompts"]


def test_moving_averages_need_whole_weights() -> None:
    assert resolve(build_job(training={"ema_decay": 0.999}), BOX).job.training.ema_decay == 0.999
    zero = {"distributed": {"strategy": "deepspeed"}}
    assert "ddp" in problems_of(build_job(training={"ema_decay": 0.999}, **zero))["training.ema_decay"]


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_the_cpus_of_a_container_are_those_that_it_may_use(tmp_path, monkeypatch, files, cpus):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(resolving, "_CGROUPS", tmp_path)
    monkeypatch.setattr(resolving.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert resolving.local_resources().cpus == cpus
