"""Every family in two stages, with extra inputs too: the numbers of combined training, and what is encoded anew."""

import csv

import pytest
import torch
from PIL import Image
from stage_in_process import Stage
from training_in_process import train_in_process

from diffsynth_ray.data.cache import Cache
from diffsynth_ray.data.cached import open_cached_samples
from diffsynth_ray.data.samples import SampleRule
from diffsynth_ray.data.upkeep import find_garbage
from diffsynth_ray.errors import DataError, JobFileError
from diffsynth_ray.models import edit_pictures
from diffsynth_ray.models.family import get_family
from diffsynth_ray.models.sampling import SampleRequest
from diffsynth_ray.train.cached_input import CachedInput
from diffsynth_ray.train.loading import load_for_training
from diffsynth_ray.train.split import job_of_stage, sample_prompts, split_parts

torch.set_num_threads(1)
PLAIN, EXTRA = ("text", "image"), ("text", "image", "extra")
CASES = {
    "flux": ("flux", [], PLAIN, "encoded 2 texts and 2 images, "),
    "z_image": ("z_image", [], PLAIN, "encoded 2 texts and 2 images, "),
    "wan": ("wan", [], PLAIN, "encoded 2 texts and 2 images, "),
    "wan, own first frame": ("wan", ["input_image"], EXTRA, "encoded 2 texts, 2 images and 2 extra inputs, "),
    "wan, a column's frame": ("wan", ["input_image"], EXTRA, "encoded 2 texts, 2 images and 2 extra inputs, "),
    "vace": (
        "wan",
        ["vace_video", "vace_reference_image"],
        EXTRA,
        "encoded 2 texts, 2 images and 2 extra inputs, ",
    ),
    "edit": ("qwen_image", ["edit_image"], ("image", "extra"), "encoded 0 texts, 2 images and 2 extra inputs, "),
    "kontext": ("flux", ["kontext_images"], EXTRA, "encoded 2 texts, 2 images and 2 extra inputs, "),
    "flux2": ("flux2", [], PLAIN, "encoded 2 texts and 2 images, "),
    "flux2, edit": ("flux2", ["edit_image"], EXTRA, "encoded 2 texts, 2 images and 2 extra inputs, "),
}
COLUMNS = {
    "wan, a column's frame": {"input_image": ("coffee.jpg", "cat.jpg")},
    "vace": {"vace_video": ("rocket.gif", "cat.gif"), "vace_reference_image": ("coffee.jpg", "cat.jpg")},
    "edit": {"edit_image": ("coffee.jpg", "cat.jpg")},
    "kontext": {"kontext_images": ("coffee.jpg", "cat.jpg")},
    "flux2, edit": {"edit_image": ("coffee.jpg", "cat.jpg")},
}
"""By case: column -> its files."""


@pytest.fixture
def stage(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(edit_pictures, "AREA", 64 * 64)
    return Stage(tmp_path, photos, monkeypatch)


def write_rows(stage, case, *, captions=("a cat", "a rocket on its launch pad")):
    """Two clips (or pictures) of one size, and what the case has columns for."""
    family = get_family(CASES[case][0])
    names = ["cat.gif", "rocket.gif"] if family.clip_step is not None else ["cat.jpg", "rocket.jpg"]
    for name in names:
        frames = [Image.effect_noise((32, 32), 10 * n + len(name)).convert("RGB") for n in range(5)]
        if not (stage.photos / name).exists() and name.endswith(".gif"):
            frames[0].save(stage.photos / name, save_all=True, append_images=frames[1:])
    columns = COLUMNS.get(case, {})
    with (stage.photos / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt", *columns])
        for number in range(2):
            writer.writerow([names[number], captions[number], *(files[number] for files in columns.values())])


def job_of(stage, case, **sections):
    family, extra_inputs, _, _ = CASES[case]
    columns = ["image", *COLUMNS.get(case, {})]
    given = {
        "lora": {"base_model": "vace" if case == "vace" else "dit", "rank": 4},
        "model": {"family": family, "tiny": True, "extra_inputs": extra_inputs},
        "dataset": {"height": 32, "width": 32, "batch_size": 2, "data_file_keys": columns, "num_frames": 5},
    }
    base = stage.job(lora=given["lora"]).job.dataset.model_dump()
    return stage.job(**(given | {"dataset": base | given["dataset"]} | sections))


# What one of the others shows too.
SLOW = ("flux", "z_image", "wan", "wan, a column's frame", "flux2")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_split_and_combined_are_bit_identical(stage, case):
    write_rows(stage, case)
    resolved = job_of(stage, case)
    manifest_id = stage.run(resolved)
    assert stage.counts.startswith(CASES[case][3])
    combined = train_in_process(resolved, steps=1)
    split = train_in_process(resolved, manifest_id=manifest_id, steps=1)
    assert split[0] == combined[0]
    assert all(torch.equal(split[1][name], combined[1][name]) for name in combined[1])
    assert split_parts(get_family(CASES[case][0]), resolved.job).kinds == CASES[case][2]


def test_what_changes_extra_inputs_encodes_them_anew(stage):
    write_rows(stage, "wan, a column's frame")
    resolved = job_of(stage, "wan, a column's frame")
    stage.run(resolved)
    stage.run(resolved)
    assert stage.counts == "encoded 0 texts, 0 images and 0 extra inputs, reused 2 texts, 2 images and 2 extra inputs"
    (stage.photos / "coffee.jpg").write_bytes((stage.photos / "rocket.jpg").read_bytes())
    stage.run(resolved)
    assert stage.counts == "encoded 0 texts, 0 images and 1 extra inputs, reused 2 texts, 2 images and 1 extra inputs"
    write_rows(stage, "wan, a column's frame", captions=("another cat", "a rocket on its launch pad"))
    stage.run(resolved)
    assert stage.counts == "encoded 1 texts, 0 images and 0 extra inputs, reused 1 texts, 2 images and 2 extra inputs"
    # Without a column the frames are the clips' own.
    write_rows(stage, "wan, own first frame")
    stage.run(job_of(stage, "wan, own first frame"))
    assert stage.counts == "encoded 0 texts, 0 images and 2 extra inputs, reused 2 texts, 2 images and 0 extra inputs"
    # And follow from the clips then.
    black, red = (Image.new("RGB", (32, 32), color) for color in ("black", "red"))
    black.save(stage.photos / "cat.gif", save_all=True, append_images=[red] * 4)
    stage.run(job_of(stage, "wan, own first frame"))
    assert stage.counts == "encoded 0 texts, 1 images and 1 extra inputs, reused 2 texts, 1 images and 1 extra inputs"


def test_other_rates_and_sizes_encode_what_they_change(stage):
    case = "wan, a column's frame"
    write_rows(stage, case)
    dataset = job_of(stage, case).job.dataset.model_dump()
    stage.run(job_of(stage, case))
    stage.run(job_of(stage, case, dataset=dataset | {"frame_rate": 8.0}))
    assert stage.counts == "encoded 0 texts, 2 images and 2 extra inputs, reused 2 texts, 0 images and 0 extra inputs"
    # The clips' size is fixed; that of an input picture follows from the bound.
    stage.run(job_of(stage, case, dataset=dataset | {"max_pixels": 512}))
    assert stage.counts == "encoded 0 texts, 0 images and 2 extra inputs, reused 2 texts, 2 images and 0 extra inputs"


def test_a_prompt_that_is_read_with_its_pictures_is_encoded_with_them(stage):
    write_rows(stage, "edit")
    resolved = job_of(stage, "edit")
    stage.run(resolved)
    write_rows(stage, "edit", captions=("another cat", "a rocket on its launch pad"))
    stage.run(resolved)
    assert stage.counts == "encoded 0 texts, 0 images and 1 extra inputs, reused 0 texts, 2 images and 1 extra inputs"
    alone = resolved.job.dataset.model_copy(update={"base_path": None, "metadata_path": None})
    split = train_in_process(resolved, manifest_id=stage.run(resolved), steps=1)
    resolved = resolved.model_copy(update={"job": resolved.job.model_copy(update={"dataset": alone})})
    for folder in (stage.cache_path / "datasets").iterdir():
        if folder.stem != stage.run(job_of(stage, "edit")):
            folder.unlink()
    assert train_in_process(resolved, manifest_id=stage.run(resolved), steps=1)[0] == split[0]
    assert {location.kind for location in map(Cache(str(stage.cache_path)).index().location, range(5))} == {"image", "extra"}


def test_an_extra_file_that_cannot_be_read_is_told_with_its_column(stage):
    write_rows(stage, "edit")
    content = (stage.photos / "coffee.jpg").read_bytes()
    (stage.photos / "coffee.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="1 files cannot be encoded") as caught:
        stage.run(job_of(stage, "edit"))
    assert "row 1, column edit_image: " in caught.value.message
    assert "coffee.jpg" in caught.value.message


def test_extra_inputs_need_frozen_encoders(stage):
    job = job_of(stage, "edit", training={"trainable_models": ["text_encoder"]}).job
    with pytest.raises(JobFileError, match=r"text_encoder is trained: with split\.enabled extra inputs need frozen encoders"):
        split_parts(get_family("qwen_image"), job)
    vace = job_of(stage, "vace", lora={"base_model": "dit", "rank": 4}).job
    assert split_parts(get_family("wan"), vace).train == ("dit", "vace")
    wan = job_of(stage, "wan, own first frame").job
    assert split_parts(get_family("wan"), wan).train == ("dit",)
    assert split_parts(get_family("wan"), wan).extra == ("vae",)
    assert split_parts(get_family("wan"), wan, present=["vae", "image_encoder"]).extra == ("vae", "image_encoder")


@pytest.mark.parametrize("case", ["flux", "flux2", "wan", "z_image", "qwen_image"])
def test_samples_of_stage_two_are_those_with_all_encoders(stage, case):
    if case != "qwen_image":
        write_rows(stage, case)
    prompts = {"prompts": ["a cat", "a dog that no row has"], "size": [32, 32], "num_inference_steps": 2}
    job = {"lora": {"base_model": "dit", "rank": 4}} if case == "qwen_image" else {}
    resolved = stage.job(**job, validation=prompts) if case == "qwen_image" else job_of(stage, case, validation=prompts)
    manifest_id, kind = stage.run(resolved), get_family(CASES.get(case, (case,))[0])
    parts = split_parts(kind, resolved.job)
    texts = sample_prompts(kind, resolved.job, parts)
    assert set(texts) == {*prompts["prompts"], kind.negative_prompt}
    assert set(parts.train) == {"dit", "vae"}
    index, rows = open_cached_samples(
        resolved, manifest_id, kinds=parts.kinds, rule=SampleRule(16, kind.clip_step), say=print, prompts=texts
    )
    found = []
    for components in (None, parts.train):
        cpu = torch.device("cpu")
        family, _ = load_for_training(job_of_stage(resolved.job, parts.train), device=cpu, say=print, components=components)
        if components is not None:
            family.known_texts = CachedInput(index, rows, device=cpu).sample_texts()
        frames = 1 if kind.clip_step is None else 5
        request = SampleRequest(
            texts[1], height=32, width=32, num_frames=frames, num_inference_steps=2, guidance_scale=4.0, seed=0
        )
        found.append(family.sample(request))
    assert (found[0] == found[1]).all()
    assert found[0].std() > 0

    garbage = find_garbage(Cache(str(stage.cache_path)), min_age_s=-1)
    assert garbage.num_entries == 0, "what samples need is kept"
    other = resolved.job.validation.model_copy(update={"prompts": ["a cat", "a third"]})
    alone = resolved.model_copy(update={"job": resolved.job.model_copy(update={"validation": other})})
    with pytest.raises(DataError, match=r"cached without 1 of the 3 texts of validation\.prompts .*a third"):
        open_cached_samples(
            alone, manifest_id, kinds=parts.kinds, rule=SampleRule(16, kind.clip_step), say=print,
            prompts=sample_prompts(kind, alone.job, parts),
        )  # fmt: skip
