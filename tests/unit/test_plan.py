import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from diffsynth_ray.config import packages
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import DataError, JobFileError
from diffsynth_ray.plan import Plan, build_plan

TINY = Path(__file__).parents[1] / "assets" / "qwen_image_tiny"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with five rows."""
    names = [f"{index}.png" for index in range(5)]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "metadata.csv").write_text("image,prompt\n" + "".join(f"{name},a picture\n" for name in names))
    return tmp_path


def plan(
    folder: Path,
    *,
    cpus: float = 4,
    gpus: float = 0,
    check_files: bool = True,
    runs_here: bool = False,
    **sections: dict[str, Any],
) -> Plan:
    raw: dict[str, Any] = {
        "name": "job",
        "dataset": {"base_path": str(folder), "metadata_path": str(folder / "metadata.csv"), "repeat": 2},
        "model": {"family": "qwen_image", "tiny": True},
        "lora": {"base_model": "dit"},
        "output": {"path": "/out/{name}"},
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section
    resolved = resolve(Job.model_validate(raw), Resources(cpus=cpus, gpus=gpus))
    return build_plan(resolved, check_files=check_files, runs_here=runs_here)


def test_the_arithmetic(photos: Path) -> None:
    built = plan(photos, dataset={"batch_size": 1, "global_batch_size": 4}, training={"num_epochs": 3})
    assert (built.num_rows, built.repeat, built.num_samples) == (5, 2, 10)
    assert (built.steps_per_epoch, built.num_steps) == (3, 9)
    assert (built.micro_steps, built.global_batch_size) == (4, 4)
    assert (built.num_exports, built.files) == (
        3,
        ["epoch-0.safetensors", "epoch-1.safetensors", "epoch-2.safetensors"],
    )
    assert built.output_path == "/out/job"
    assert built.trained == ["dit"]


def test_the_arithmetic_is_written_out(photos: Path) -> None:
    text = "\n".join(plan(photos, dataset={"global_batch_size": 4}, training={"num_epochs": 3}).lines())
    assert "5 rows x repeat 2 = 10 an epoch" in text
    assert "1 x 4 micro steps x 1 workers = 4 samples a step" in text
    assert "ceil(10 / 4) = 3 an epoch, 9 in all (3 epochs)" in text


def test_dummies_are_told(photos: Path) -> None:
    built = plan(photos, dataset={"global_batch_size": 5}, distributed={"num_workers": 2})
    assert built.micro_steps == 3
    assert "1 x 3 micro steps x 2 workers = 6, of which 5 are used samples a step" in "\n".join(built.lines())


def test_many_exports_are_shortened(photos: Path) -> None:
    built = plan(photos, output={"save_steps": 1}, training={"max_steps": 250})
    assert built.num_exports == 250
    assert built.files == [f"step-{step}.safetensors" for step in (1, 2, 3, 4, 250)]
    assert any("step-3.safetensors ... step-250.safetensors (250 exports)" in line for line in built.lines())


@pytest.mark.parametrize(("save_steps", "max_steps"), [(3, 10), (5, 10), (100, 10), (1, 1), (4, 16), (4, 17)])
def test_the_number_of_exports(photos: Path, save_steps: int, max_steps: int) -> None:
    built = plan(photos, output={"save_steps": save_steps}, training={"max_steps": max_steps})
    written = [step for step in range(1, max_steps + 1) if step % save_steps == 0 or step == max_steps]
    assert built.num_exports == len(written)
    assert built.files[-1] == f"step-{max_steps}.safetensors"
    assert len(set(built.files)) == len(built.files)


def test_several_components_have_several_files(photos: Path) -> None:
    built = plan(photos, training={"trainable_models": ["text_encoder"], "num_epochs": 1})
    assert built.trained == ["dit", "text_encoder"]
    assert built.files == ["epoch-0.safetensors", "epoch-0.text_encoder.safetensors"]


def test_gpus_are_planned_for(photos: Path) -> None:
    built = plan(photos, cpus=32, gpus=4)
    assert (built.device, built.num_workers, built.global_batch_size) == ("cuda", 4, 4)
    assert "4 x (1 GPU, 1 CPU)" in "\n".join(built.lines())


def test_a_missing_file_is_found_before_the_run(photos: Path) -> None:
    (photos / "3.png").unlink()
    with pytest.raises(DataError, match=r"3\.png"):
        plan(photos)
    assert plan(photos, check_files=False).num_rows == 5


def test_missing_model_files_are_named_all_at_once(photos: Path) -> None:
    shutil.copy(TINY / "vae" / "diffusion_pytorch_model.safetensors", photos / "there.safetensors")
    there, gone = str(photos / "there.safetensors"), [str(photos / "a.safetensors"), str(photos / "b.safetensors")]
    model = {"tiny": False, "paths": [gone, there], "tokenizer_path": str(photos / "tokenizer")}
    with pytest.raises(JobFileError) as caught:
        plan(photos, model=model)
    assert [problem.key for problem in caught.value.problems] == ["model.paths", "model.paths", "model.tokenizer_path"]
    assert plan(photos, model=model, check_files=False).num_rows == 5


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.base_path"):
        plan(tmp_path / "nowhere")


def test_the_folder_alone_is_planned_with_a_note(photos: Path) -> None:
    (photos / "metadata.csv").unlink()
    (photos / "0.txt").write_text("a caption")
    built = plan(photos, dataset={"metadata_path": None})
    assert built.num_rows == 5
    assert any(line.startswith("note") and "1 with a caption" in line for line in built.lines())


def test_json_has_everything(photos: Path) -> None:
    built = plan(photos)
    content = json.loads(json.dumps(built.as_dict()))
    assert content["num_samples"] == 10
    assert content["run"] == built.run


def test_a_missing_prompt_column_is_found_before_the_run(photos: Path) -> None:
    """The training workers need it: a plan that looks well must not fail on the cluster."""
    (photos / "metadata.csv").write_text("image,caption\n0.png,a picture\n")
    with pytest.raises(DataError, match="prompt"):
        plan(photos)


def test_both_stages_of_split_training_are_shown(photos: Path) -> None:
    split = {"enabled": True, "cache_path": "/cache", "resources_per_worker": {"GPU": 0.5, "CPU": 1.0}}
    built = plan(photos, cpus=32, gpus=2, split=split)
    text = "\n".join(built.lines())
    assert "stages    encode -> train on cuda" in text
    assert "encode    2 x (0.5 GPU, 1 CPU) on cuda, loads the encoders that are not trained" in text
    assert "cache     /cache" in text
    assert built.as_dict()["encode"]["num_workers"] == 2
    assert plan(photos).encode is None


def test_a_data_set_of_a_cache_is_planned(photos: Path, tmp_path: Path) -> None:
    from diffsynth_ray.data.cache import Cache
    from diffsynth_ray.data.manifest import Manifest, ManifestRow, write_manifest

    split = {"enabled": True, "cache_path": str(tmp_path / "cache")}
    alone = {"base_path": None, "metadata_path": None}
    with pytest.raises(DataError, match="holds no data set"):
        plan(photos, split=split, dataset=alone)
    rows = tuple(ManifestRow(f"{n}", f"{n}", f"{n}", 64, 64, 1) for n in range(7))
    write_manifest(Cache(str(tmp_path / "cache")), Manifest(rows))
    built = plan(photos, split=split, dataset=alone)
    assert built.num_rows == 7
    assert any("in the cache" in note for note in built.notes)


# What the model's files say

DIT = [str(TINY / f"transformer/diffusion_pytorch_model-0000{number}-of-00002.safetensors") for number in (1, 2)]
VAE = str(TINY / "vae/diffusion_pytorch_model.safetensors")


def files(**keys: Any) -> dict[str, Any]:
    return {"tiny": False, "paths": [DIT, VAE], "tokenizer_path": str(TINY / "tokenizer")} | keys


def problems(photos: Path, **sections: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(JobFileError) as caught:
        plan(photos, **sections)
    return {problem.key: problem.message for problem in caught.value.problems}


def write_header(path: Path, shapes: dict[str, list[int]]) -> str:
    """A safetensors file of zeros."""
    entries, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(end))
    return str(path)


def test_the_plan_says_what_the_files_are(photos: Path) -> None:
    built = plan(photos, model=files())
    assert [(entry.component, entry.num_files, entry.missing) for entry in built.models] == [("dit", 2, None), ("vae", 1, None)]
    assert any(line.startswith("model     dit: diffusion_pytorch_model-00001") for line in built.lines())
    assert plan(photos, model=files(family=None)).models == built.models


def test_the_plan_says_what_would_be_downloaded(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "models" / "Qwen" / "Qwen-Image")
    ids = ["Qwen/Qwen-Image:transformer/*.safetensors", "somebody/vae:*.safetensors"]
    model = files(paths=[], id_with_origin_paths=ids, base_path=str(tmp_path / "models"), source="huggingface")
    here, missing = plan(photos, model=model).models
    assert (here.component, here.num_files, here.missing, here.source) == ("dit", 2, None, None)
    assert here.num_bytes == sum(Path(path).stat().st_size for path in DIT)
    assert (missing.component, missing.num_files, missing.source) == (None, 0, "huggingface")
    text = "\n".join(plan(photos, model=model).lines())
    assert f"somebody/vae:*.safetensors, to be downloaded from huggingface to {tmp_path}/models/somebody/vae" in text
    assert json.loads(json.dumps(plan(photos, model=model).as_dict()))["models"][1]["source"] == "huggingface"


def test_the_default_tokenizer_is_part_of_the_plan(photos: Path, tmp_path: Path) -> None:
    ids = ["Qwen/Qwen-Image:text_encoder/*.safetensors"]
    model = {"tiny": False, "id_with_origin_paths": ids, "base_path": str(tmp_path / "models")}
    lora = {"base_model": "text_encoder"}
    encoder, tokenizer = plan(photos, model=model, lora=lora).models
    assert (encoder.component, tokenizer.component, tokenizer.entry) == (None, "tokenizer", "Qwen/Qwen-Image:tokenizer/")
    assert tokenizer.missing == "no file"
    lacking = problems(photos, model=model | {"skip_download": True})
    assert set(lacking) == {"model.id_with_origin_paths", "model.tokenizer_path"}
    shutil.copytree(TINY, tmp_path / "models" / "Qwen" / "Qwen-Image")
    assert [entry.missing for entry in plan(photos, model=model, lora=lora).models] == [None, None]
    assert len(plan(photos, model=model | {"tokenizer_path": str(TINY / "tokenizer")}, lora=lora).models) == 1


def test_a_tokenizer_of_a_hub_is_part_of_the_plan(photos: Path, tmp_path: Path) -> None:
    text = [str(TINY / f"text_encoder/model-0000{number}-of-00002.safetensors") for number in (1, 2)]
    model = files(paths=[DIT, text], base_path=str(tmp_path / "models"), tokenizer_path="somebody/else:tokenizer")
    tokenizer = plan(photos, model=model).models[-1]
    assert (tokenizer.component, tokenizer.entry, tokenizer.missing) == ("tokenizer", "somebody/else:tokenizer/", "no file")
    message = problems(photos, model=model | {"skip_download": True})["model.tokenizer_path"]
    assert message == "of somebody/else:tokenizer/ no file is here; model.skip_download is set"


def test_what_may_not_be_downloaded_is_a_problem(photos: Path, tmp_path: Path) -> None:
    ids = ["Qwen/Qwen-Image:transformer/*.safetensors"]
    model = files(paths=[], id_with_origin_paths=ids, base_path=str(tmp_path / "models"), skip_download=True)
    assert "model.skip_download is set" in problems(photos, model=model)["model.id_with_origin_paths"]


def test_a_file_of_another_family_is_named(photos: Path, tmp_path: Path) -> None:
    wan = write_header(
        tmp_path / "wan.safetensors",
        {"blocks.0.self_attn.q.weight": [4, 4], "blocks.0.cross_attn.q.weight": [4, 4], "head.modulation": [4, 4]},
    )
    message = problems(photos, model=files(paths=[wan]))["model.paths"]
    assert "this is a dit of family wan, the job says qwen_image" in message
    assert "wan.safetensors" in message


def test_shards_of_two_models_are_told(photos: Path, tmp_path: Path) -> None:
    other = write_header(tmp_path / "other.safetensors", {"img_in.weight": [4, 64]})
    assert "both hold 'img_in.weight'" in problems(photos, model=files(paths=[[*DIT, other]]))["model.paths"]
    assert "not shards of one component" in problems(photos, model=files(paths=[[*DIT, VAE]]))["model.paths"]


def test_a_missing_shard_and_a_cut_file_are_told(photos: Path, tmp_path: Path) -> None:
    missing = problems(photos, model=files(paths=[DIT[:1]]))["model.paths"]
    assert "shard diffusion_pytorch_model-00002-of-00002.safetensors is missing" in missing
    (tmp_path / "cut.safetensors").write_bytes(Path(VAE).read_bytes()[:-10])
    cut = problems(photos, model=files(paths=[str(tmp_path / "cut.safetensors")]))["model.paths"]
    assert "not a complete safetensors file" in cut


def test_a_lora_target_that_matches_nothing_is_told_with_what_is_near(photos: Path) -> None:
    lora = {"base_model": "dit", "target_modules": ["to_q", "to_qq"]}
    message = problems(photos, model=files(), lora=lora)["lora.target_modules"]
    assert "'to_qq' matches nothing in qwen_image's dit; did you mean to_q" in message
    assert plan(photos, model=files(), lora={"base_model": "dit", "target_modules": ["to_q", "img_mlp.net.2"]})
    assert plan(photos, model=files(), lora={"base_model": "dit", "target_modules": []})


def test_all_problems_of_the_files_come_at_once(photos: Path, tmp_path: Path) -> None:
    lora = {"base_model": "dit", "target_modules": ["nothing"]}
    model = files(paths=[DIT, "/gone.safetensors"], tokenizer_path="/gone")
    assert set(problems(photos, model=model, lora=lora)) == {"lora.target_modules", "model.paths", "model.tokenizer_path"}


def test_what_only_the_cluster_can_tell_is_left_to_it(photos: Path, tmp_path: Path) -> None:
    pickle = tmp_path / "model.pth"
    pickle.write_bytes(b"read on the cluster, with weights_only")
    (entry,) = plan(photos, model=files(paths=[str(pickle)])).models
    assert (entry.component, entry.missing) == (None, None)
    unknown = write_header(tmp_path / "unknown.safetensors", {"a": [4]})
    assert plan(photos, model=files(paths=[unknown], family="of_another_package")).models[0].component is None
    assert plan(photos, model=files(paths=[unknown], family=None)).models[0].component is None


def test_problems_of_the_validations_own_metadata_name_its_key(photos: Path) -> None:
    with pytest.raises(DataError, match=r"^validation\.holdout: no such file .*nowhere\.csv; it is relative to"):
        plan(photos, validation={"holdout": "nowhere.csv"})


def test_problems_of_the_model_and_of_the_data_are_told_together(photos: Path) -> None:
    (photos / "3.png").unlink()
    with pytest.raises(JobFileError) as caught:
        plan(photos, model={"tiny": False, "paths": ["/nowhere/dit.safetensors"]})
    assert "job: 2 problems" in str(caught.value)
    assert "model.paths: /nowhere/dit.safetensors does not exist" in str(caught.value)
    assert f"no such file: {photos / '3.png'}" in str(caught.value)


ZERO_3 = {"strategy": "deepspeed", "zero_stage": 3}
WAN = {"family": "wan", "tiny": True}


@pytest.mark.parametrize("check_files", [True, False])
@pytest.mark.parametrize(
    ("sections", "key", "message"),
    [
        (
            {"distributed": ZERO_3, "dataset": {"batch_size": 2}, "training": {"trainable_models": ["text_encoder"]}},
            "distributed.zero_stage",
            "3 trains text_encoder with dataset.batch_size = 1 or distributed.num_workers = 1 only",
        ),
        (
            {"distributed": ZERO_3, "model": WAN, "training": {"trainable_models": ["vae"]}},
            "distributed.zero_stage",
            "3 cannot share vae out, whose calls depend on a clip's length; use zero_stage = 2",
        ),
        (
            {"model": WAN, "dataset": {"num_frames": 80}},
            "dataset.num_frames",
            "got 80; this family takes a multiple of 4 frames",
        ),
        ({"validation": {"prompts": ["a"], "size": [100, 96]}}, "validation.size", "multiples of 16, as in [256, 256]"),
        ({"model": {"fp8_models": ["unet"]}}, "model.fp8_models", "the family qwen_image has no component 'unet'"),
        (
            {"model": {"options": {"edit_prompt": "numberd"}}},
            "model.options",
            "edit_prompt is one of auto, numbered, got 'numberd'",
        ),
        ({"model": {"options": {"zero_cond_t": 1}}}, "model.options", "zero_cond_t is true or false, got 1"),
        (
            {"model": {"family": "flux", "options": {"embedded_guidance": True}}},
            "model.options",
            "embedded_guidance is a number, got True",
        ),
        (
            {"lora": {"preset_path": str(DIT[0]), "preset_model": "dti"}},
            "lora.preset_model",
            "the family qwen_image has no component 'dti'; it has dit, text_encoder, vae; did you mean 'dit'?",
        ),
    ],
)
def test_what_the_family_cannot_do_is_told_before_anything_starts(photos: Path, sections, key, message, check_files) -> None:
    """Also where the files are on a cluster: the job file says it all."""
    assert message in problems(photos, check_files=check_files, **sections)[key]


def test_more_samples_than_there_are_positions_are_refused(photos: Path) -> None:
    assert plan(photos, dataset={"repeat": 10**15}).num_samples == 5 * 10**15
    assert (
        problems(photos, dataset={"repeat": 2**62})["dataset.repeat"]
        == f"got {2**62} for 5 rows; at most {2**62 // 5} for so many"
    )
    assert (
        "at most 4611686018427387904" in problems(photos, dataset={"global_batch_size": 2**62 + 1})["dataset.global_batch_size"]
    )


def test_the_arithmetic_is_exact(photos: Path) -> None:
    """Floats have 53 bits."""
    built = plan(photos, dataset={"repeat": 10**17, "global_batch_size": 10**17 - 1, "batch_size": 3})
    assert (built.steps_per_epoch, built.micro_steps) == (6, (10**17 + 1) // 3)


def test_a_micro_batch_larger_than_any_device_is_refused(photos: Path) -> None:
    dataset = {"height": 16384, "width": 16384, "batch_size": 64}
    plan(photos, dataset=dataset)
    message = problems(photos, dataset=dataset | {"batch_size": 65})["dataset.batch_size"]
    assert "a micro batch of 65 samples has 1.74e+10 pixels" in message
    assert "2 samples x 81 frames" in problems(photos, model=WAN, dataset=dataset | {"batch_size": 2})["dataset.batch_size"]


def test_what_one_worker_can_do_at_stage_3_is_planned(photos: Path) -> None:
    training = {"trainable_models": ["text_encoder"]}
    plan(photos, distributed=ZERO_3 | {"num_workers": 1}, dataset={"batch_size": 2}, training=training)
    plan(photos, distributed=ZERO_3, training=training)
    plan(photos, model=WAN, dataset={"num_frames": 77})
    plan(photos, model={"options": {"edit_prompt": "auto", "zero_cond_t": True}})
    plan(photos, model={"family": "flux", "options": {"embedded_guidance": 1}})


@pytest.mark.parametrize(
    ("sections", "key", "message"),
    [
        (
            {"model": {"family": "qwen_imag"}},
            "model.family",
            "no package here has the family 'qwen_imag'; did you mean 'qwen_image'?",
        ),
        ({"training": {"optimizer": "prodigyopd.Prodigy"}}, "training.optimizer", "no package 'prodigyopd' is installed here"),
        ({"logging": {"wandb_project": "mine"}}, "logging.wandb_project", "the package no_such_package is not installed here"),
    ],
)
def test_what_only_this_machine_lacks_is_noted_and_where_it_is_to_run_a_problem(photos, monkeypatch, sections, key, message):
    monkeypatch.setattr(packages, "TRACKERS", {"wandb_project": "no_such_package"})
    assert [note for note in plan(photos, **sections).notes if note.startswith(f"{key}: {message}")]
    assert message in problems(photos, runs_here=True, **sections)[key]
    assert plan(photos, check_files=False, **sections).notes == []


ON_HOST = {"offload": {"cpu_offload": True, "optimize_on_cpu": True}, "training": {"max_grad_norm": 0}}
ZERO = {"distributed": {"strategy": "deepspeed"}}


@pytest.mark.parametrize(
    ("optimizer", "sections", "told"),
    [
        ("prodigyopt.Prodigy", ON_HOST, "Prodigy estimates its step size: with offload.optimize_on_cpu every block"),
        ("dadaptation.DAdaptAdam", ZERO, "DAdaptAdam estimates its step size: under DeepSpeed every worker"),
        ("dog.LDoG", ZERO, "LDoG estimates its step size"),
        ("prodigyopt.Prodigy", {}, None),
        ("torch.optim.SGD", ON_HOST, None),
        ("my_dogs.Optimizer", ZERO, None),
    ],
)
def test_who_estimates_its_step_size_in_parts_is_told(photos, optimizer, sections, told):
    training = sections.get("training", {}) | {"optimizer": optimizer, "trainable_models": ["dit"]}
    sections = sections | {"training": training, "lora": {"base_model": None}}
    notes = [note for note in plan(photos, **sections).notes if "estimates" in note]
    assert [note.partition("training.optimizer: ")[2][: len(told or "")] for note in notes] == ([told] if told else [])


@pytest.mark.parametrize("optimizer", ["torch.optim.Adamw", "transformers.optimization.Adafactr"])
def test_a_typing_error_in_the_optimizer_is_told_before_anything_starts(photos: Path, optimizer: str) -> None:
    assert "did you mean" in problems(photos, training={"optimizer": optimizer})["training.optimizer"]


def test_fp8_models_may_be_entries_of_the_model(photos: Path) -> None:
    """As in DiffSynth-Studio's `--fp8_models`: the files tell which components they are."""
    for entry in (VAE, DIT[1]):
        assert plan(photos, model=files(fp8_models=[entry])).models
    origin = "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"
    ids = {"tiny": False, "id_with_origin_paths": [origin], "base_path": "/nowhere"}
    assert plan(photos, model=ids | {"fp8_models": [origin]}).models
    full = {"lora": {"base_model": None}, "training": {"trainable_models": ["dit"]}}
    assert "dit is trained" in problems(photos, model=files(fp8_models=[DIT[0]]), **full)["model.fp8_models"]
    assert "no component" in problems(photos, model=files(fp8_models=["/gone.safetensors"]))["model.fp8_models"]


def test_a_trained_component_must_be_in_the_files(photos: Path) -> None:
    told = problems(photos, model=files(paths=[VAE]), training={"trainable_models": ["text_encoder", "vae"]})
    assert told == {
        "lora.base_model": "dit is in none of the model's files, which hold vae",
        "training.trainable_models": "text_encoder is in none of the model's files, which hold vae",
    }
