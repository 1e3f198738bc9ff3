"""Split training without Ray: stage one's parts in this process, stage two's input, and the trainer that sees no difference."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from stage_in_process import Stage
from training_in_process import train_in_process

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.data.cache import Cache
from diffsynth_ray.data.cached import open_cached_samples, read_batches
from diffsynth_ray.data.manifest import manifest_ids, read_manifest
from diffsynth_ray.data.samples import SampleRule, build_sample_index
from diffsynth_ray.errors import DataError, JobFileError, ModelError
from diffsynth_ray.models.family import EncodedBatch
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.models.weights import find_model
from diffsynth_ray.plan import build_plan
from diffsynth_ray.train import encode, units
from diffsynth_ray.train.cached_input import CachedInput
from diffsynth_ray.train.feed import DeviceFeed
from diffsynth_ray.train.initial import preset_loras
from diffsynth_ray.train.split import (
    SampleEncoder,
    bytes_tensor,
    encoder_digests,
    job_of_stage,
    split_parts,
    tensor_bytes,
    text_key,
)

torch.set_num_threads(1)
LORA = {"lora": {"base_model": "dit", "rank": 4}}
FULL = {"training": {"trainable_models": ["dit"]}}
TEXT_TRAINED = LORA | {"training": {"trainable_models": ["text_encoder"]}}
MEMORY = LORA | {"model": {"fp8_models": ["dit", "text_encoder"]}, "offload": {"cpu_offload": True}}
ON_HOST = LORA | {"offload": {"cpu_offload": True, "optimize_on_cpu": True}, "gradient": {"checkpointing_offload": True}}
TRAINED_VAE = LORA | {"model": {"options": {"trained_vae": True}}}  # not by this job: the tiny one of the project
VAE_TRAINED = LORA | {"training": {"trainable_models": ["vae"]}}


@pytest.fixture
def stage(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, photos, monkeypatch)


@pytest.mark.parametrize(
    ("trained", "batch_size"),
    [
        (LORA, 1),
        (FULL, 2),
        (TEXT_TRAINED, 2),
        pytest.param(VAE_TRAINED, 1, marks=pytest.mark.slow),
        (MEMORY, 1),
        pytest.param(ON_HOST, 1, marks=pytest.mark.slow),
    ],
    ids=["lora", "full", "text_encoder", "vae", "fp8 and offload", "optimizer on the host"],
)
def test_split_and_combined_are_bit_identical(stage: Stage, trained: dict[str, Any], batch_size: int) -> None:
    size = {"height": 32, "width": 32} if batch_size == 2 else {}  # one bucket: texts of different lengths are padded
    trained = {name: dict(values) for name, values in trained.items()}
    trained["training"] = {"precision": "fp32", "learning_rate": 1e-3} | trained.get("training", {})
    resolved = stage.job(**trained, dataset=stage.job(**LORA).job.dataset.model_dump() | size | {"batch_size": batch_size})
    combined = train_in_process(resolved)
    split = train_in_process(resolved, manifest_id=stage.run(resolved))
    assert split[0] == combined[0]
    assert all(torch.equal(split[1][name], combined[1][name]) for name in combined[1])


def validated(resolved: ResolvedJob, manifest_id: str | None = None) -> list[Any]:
    """Losses of two steps, causes of samples left out, and the validations before and after (loss, by quantile, samples)."""
    seen: list[Any] = []
    losses, _ = train_in_process(resolved, manifest_id=manifest_id, validated=seen)
    return [losses, *seen[:1], *((entry.loss, entry.quantiles, entry.num_samples) for entry in seen[1:])]


@pytest.mark.parametrize(
    "trained",
    [LORA, TEXT_TRAINED, pytest.param(VAE_TRAINED, marks=pytest.mark.slow)],
    ids=["lora", "text_encoder", "vae"],
)
@pytest.mark.parametrize("of_its_own", [False, True], ids=["share", "metadata of its own"])
def test_the_validation_loss_of_split_training_is_that_of_combined(
    stage: Stage, trained: dict[str, Any], of_its_own: bool
) -> None:
    holdout: object = 0.4
    if of_its_own:
        held = stage.photos / "held.csv"
        rows = (stage.photos / "metadata.csv").read_text().splitlines()
        held.write_text("\n".join([rows[0], rows[2], rows[4]]))
        holdout = str(held)
    resolved = stage.job(**trained, validation={"holdout": holdout})
    combined = validated(resolved)
    assert combined[2][2] == 2
    assert combined[2][0] != combined[3][0]
    manifest_id = stage.run(resolved)
    assert validated(resolved, manifest_id) == combined
    if trained is LORA:  # nothing but the cache is needed, and it knows which of its data sets is the one to train on
        shutil.rmtree(stage.photos)
        alone = stage.job(**trained, validation={"holdout": holdout}, dataset={"base_path": None, "metadata_path": None})
        assert stage.run(alone) == manifest_id
        assert validated(alone, manifest_id) == combined
        planned = build_plan(alone)
        assert (planned.num_rows, planned.num_held_out) == (5 if of_its_own else 3, 2)


def test_validation_samples_that_were_not_cached_are_asked_for(stage: Stage) -> None:
    manifest_id = stage.run(stage.job(**LORA))
    held = {"holdout": str(stage.photos / "metadata.csv")}
    alone = stage.job(**LORA, validation=held, dataset={"base_path": None, "metadata_path": None})
    with pytest.raises(DataError, match=r"validation\.holdout: .*was cached without"):
        train_in_process(alone, manifest_id=manifest_id, validated=[])


def test_a_validation_sample_that_cannot_be_encoded_is_left_out(stage: Stage) -> None:
    sections = LORA | {"validation": {"holdout": 0.4}}
    skip = {"bad_sample": "skip", "bad_sample_limit": 1.0}
    held = build_sample_index(stage.job(**sections), lambda line: None, rule=SampleRule(16, None)).holdout
    assert held is not None
    broken = Path(held.path(held.singles()[0].rows[0]))
    broken.write_bytes(broken.read_bytes()[:-3000])
    resolved = stage.job(**sections, dataset=stage.job(**LORA).job.dataset.model_dump() | skip)
    combined = validated(resolved)
    split = validated(resolved, stage.run(resolved))
    assert [len(found[1]) for found in (combined, split)] == [1, 1]
    assert "validation sample 1" in split[1][0]
    assert split[2:] == combined[2:]
    assert combined[2][2] == 1


def test_what_each_stage_loads_follows_from_what_is_trained(stage: Stage) -> None:
    def parts(**trained: Any):
        return split_parts(QwenImage, stage.job(**trained).job)

    assert (parts(**LORA).components(["text", "image"]), parts(**LORA).train) == (("text_encoder", "vae"), ("dit",))
    text = parts(**TEXT_TRAINED)
    assert (text.kinds, text.components(["image"]), text.train) == (("image",), ("vae",), ("dit", "text_encoder"))
    vae = parts(**VAE_TRAINED)
    assert (vae.kinds, vae.components(["text"]), vae.train) == (("text",), ("text_encoder",), ("dit", "vae"))
    with pytest.raises(JobFileError, match="every encoder is trained"):
        parts(training={"trainable_models": ["text_encoder", "vae"]})


def test_fp8_and_preset_loras_belong_to_the_encoder(stage: Stage, tmp_path: Path) -> None:
    store = Cache(str(stage.cache_path)).store
    (tmp_path / "a.safetensors").write_bytes(b"a")

    def digests(**sections: Any) -> dict[str, str]:
        job = stage.job(**LORA | sections).job
        return encoder_digests(
            QwenImage, job, {}, tokenizers={}, parts=split_parts(QwenImage, job), store=store, say=lambda line: None
        )

    plain = digests()
    of_text = digests(model={"fp8_models": ["text_encoder"]})
    assert of_text["text"] != plain["text"]
    assert of_text["image"] == plain["image"]
    assert digests(model={"fp8_models": ["dit"]}) == plain
    preset = {"base_model": "dit", "rank": 4, "preset_path": str(tmp_path / "a.safetensors")}
    assert digests(lora=preset | {"preset_model": "dit"}) == plain
    merged = digests(lora=preset | {"preset_model": "vae"})
    assert merged["image"] != plain["image"]
    assert merged["text"] == plain["text"]
    job = stage.job(**LORA | {"lora": preset | {"preset_model": "vae"}, "model": {"fp8_models": ["dit", "vae"]}}).job
    assert preset_loras(job_of_stage(job, ["vae"])) == [(str(tmp_path / "a.safetensors"), "vae")]
    assert preset_loras(job_of_stage(job, ["dit"])) == []
    assert job_of_stage(job, ["dit"]).model.fp8_models == ["dit"]
    with pytest.raises(JobFileError, match="no component 'unet'"):
        split_parts(QwenImage, stage.job(**LORA, model={"fp8_models": ["unet"]}).job)


def test_each_text_and_image_is_encoded_once(stage: Stage) -> None:
    lines = (stage.photos / "metadata.csv").read_text().splitlines()
    again = [lines[1], lines[2].split(",")[0] + "," + lines[1].split(",", 1)[1]]  # a repeated row; photo 2 with caption 1
    (stage.photos / "metadata.csv").write_text("\n".join([*lines, *again]) + "\n")
    shutil.copy(stage.photos / lines[3].split(",")[0], stage.photos / "copy.jpg")
    with (stage.photos / "metadata.csv").open("a") as file:
        file.write("copy.jpg,another caption\n")
    stage.run(stage.job(**LORA))
    assert stage.counts == "encoded 6 texts and 5 images, reused 0 texts and 0 images"
    assert len(Cache(str(stage.cache_path)).index()) == 11


def test_a_changed_caption_encodes_that_text_alone(stage: Stage) -> None:
    first = stage.run(stage.job(**LORA))
    stage.run(stage.job(**LORA))
    assert stage.counts == "encoded 0 texts and 0 images, reused 5 texts and 5 images"
    assert len(manifest_ids(Cache(str(stage.cache_path)))) == 1
    text = (stage.photos / "metadata.csv").read_text()
    (stage.photos / "metadata.csv").write_text(text.replace("cat.jpg,", "cat.jpg,New: "))
    assert stage.run(stage.job(**LORA)) != first
    assert stage.counts == "encoded 1 texts and 0 images, reused 4 texts and 5 images"


def test_other_pictures_sizes_and_seeds_encode_what_they_change(stage: Stage) -> None:
    stage.run(stage.job(**LORA))
    shutil.copy(stage.photos / "coffee.jpg", stage.photos / "cat.jpg")  # same name, other content
    stage.run(stage.job(**LORA))
    assert stage.counts == "encoded 0 texts and 0 images, reused 5 texts and 4 images"
    dataset = stage.job(**LORA).job.dataset.model_dump()
    stage.run(stage.job(**LORA, dataset=dataset | {"height": 32, "width": 16}))
    assert stage.counts == "encoded 0 texts and 4 images, reused 5 texts and 0 images"
    stage.run(stage.job(**LORA, seed=1))  # tiny weights follow from the seed
    assert stage.counts == "encoded 5 texts and 4 images, reused 0 texts and 0 images"
    stage.run(stage.job(**TRAINED_VAE, seed=0))
    assert stage.counts == "encoded 5 texts and 4 images, reused 0 texts and 0 images"
    stage.run(stage.job(**TRAINED_VAE, seed=1))  # all but those that are trained
    assert stage.counts == "encoded 5 texts and 0 images, reused 0 texts and 4 images"
    stage.run(stage.job(**LORA, training={"precision": "bf16"}))
    assert stage.counts == "encoded 5 texts and 4 images, reused 0 texts and 0 images"


def test_other_weights_of_one_encoder_encode_its_half_alone(stage: Stage, tmp_path: Path, repository: Path) -> None:
    tiny = tmp_path / "model"
    shutil.copytree(repository / "tests/assets/qwen_image_tiny", tiny)
    vae = tiny / "vae/diffusion_pytorch_model.safetensors"
    entries = [
        [str(path) for path in sorted((tiny / "transformer").glob("*.safetensors"))],
        [str(path) for path in sorted((tiny / "text_encoder").glob("*.safetensors"))],
        str(vae),
    ]
    model = {"tiny": False, "paths": entries, "tokenizer_path": str(tiny / "tokenizer")}
    resolved = stage.job(**LORA, model=model)

    def run() -> str:
        stage.run(resolved, *find_model(resolved.job.model)[1:])
        return stage.counts

    assert run() == "encoded 5 texts and 5 images, reused 0 texts and 0 images"
    assert run() == "encoded 0 texts and 0 images, reused 5 texts and 5 images"
    content = bytearray(vae.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    vae.write_bytes(content)
    assert run() == "encoded 0 texts and 5 images, reused 5 texts and 0 images"
    (tiny / "tokenizer" / "added_tokens.json").open("a").write("\n")
    assert run() == "encoded 5 texts and 0 images, reused 0 texts and 5 images"
    dit = Path(entries[0][0])
    content = bytearray(dit.read_bytes())
    content[-1] ^= 1
    dit.write_bytes(content)
    assert run() == "encoded 0 texts and 0 images, reused 5 texts and 5 images"


def test_training_where_the_media_are_not(stage: Stage) -> None:
    resolved = stage.job(**LORA)
    combined = train_in_process(resolved)
    stage.run(resolved)
    shutil.rmtree(stage.photos)
    alone = stage.job(**LORA, dataset=resolved.job.dataset.model_dump() | {"base_path": None, "metadata_path": None})
    split = train_in_process(alone, manifest_id=stage.run(alone))
    assert split[0] == combined[0]
    with pytest.raises(DataError, match="other encoder weights") as caught:
        stage.run(alone.model_copy(update={"job": alone.job.model_copy(update={"seed": 1})}))
    assert "texts and images" in caught.value.message
    bf16 = alone.job.model_copy(update={"training": alone.job.training.model_copy(update={"precision": "bf16"})})
    with pytest.raises(DataError, match="in fp32, the job trains qwen_image in bf16"):
        stage.run(alone.model_copy(update={"job": bf16}))
    with pytest.raises(JobFileError, match=r"dataset\.base_path"):
        build_sample_index(alone, lambda line: None)  # as `dsray data check` does
    for shard in (stage.cache_path / "shards").iterdir():
        shard.unlink()
    with pytest.raises(DataError, match=r"10 of 10 entries .* are missing"):
        stage.run(alone)


def test_the_feed_gives_what_is_cached_as_steps(stage: Stage) -> None:
    resolved = stage.job(**LORA)
    rule = SampleRule(QwenImage.size_multiple, QwenImage.clip_step)
    index, rows = open_cached_samples(resolved, stage.run(resolved), kinds=("text", "image"), rule=rule, say=lambda line: None)
    given = CachedInput(index, rows, device=torch.device("cpu"))
    bounds = {"start_step": 1, "num_steps": 3, "rank": 0, "world_size": 2}
    feed = DeviceFeed(read_batches(index, rows, **bounds), torch.device("cpu"), cached=given)
    wanted = list(index.micro_batches(**bounds))
    fed = list(feed)
    assert len(fed) == 2
    assert [step.num_samples for step in fed] == [4, 2]
    inputs = [micro for step in fed for micro in step.micro_inputs]
    assert [micro.indices for micro in inputs] == [micro.indices for *_, micro in wanted]
    assert [micro.batch.sample_ids for micro in inputs] == [micro.rows for *_, micro in wanted]
    assert [row for step in fed for row in step.rows] == [row for *_, micro in wanted for row in micro.rows]
    assert all(isinstance(micro.batch, EncodedBatch) for micro in inputs)
    assert "from the cache, metadata rows" in inputs[0].describe()


def test_damage_is_told_with_row_and_cure_and_encoded_anew(stage: Stage) -> None:
    resolved = stage.job(**LORA)
    manifest_id = stage.run(resolved)
    combined = train_in_process(resolved, manifest_id=manifest_id)
    for shard in (stage.cache_path / "shards").iterdir():
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    with pytest.raises(DataError, match=r"row \d: .*shards/\w+\.safetensors: the shard is damaged") as caught:
        train_in_process(resolved, manifest_id=manifest_id)
    assert "submit the job again" in str(caught.value.hint)
    while True:  # a run finds one at a time, `dsray cache verify` all
        stage.run(resolved)
        assert not stage.counts.startswith("encoded 0 texts and 0 images")
        try:
            again = train_in_process(resolved, manifest_id=manifest_id)
            break
        except DataError:
            continue
    assert again[0] == combined[0]


def test_files_that_cannot_be_read_are_all_told_and_the_others_are_kept(stage: Stage) -> None:
    damage(stage, "cat.jpg", "rocket.jpg")
    with pytest.raises(DataError, match="2 files cannot be encoded") as caught:
        stage.run(stage.job(**LORA))
    assert "cat.jpg" in caught.value.message
    assert "rocket.jpg" in caught.value.message
    assert len(Cache(str(stage.cache_path)).index()) == 8
    assert manifest_ids(Cache(str(stage.cache_path))) == []


def damage(stage: Stage, *names: str) -> None:
    for name in names:
        content = (stage.photos / name).read_bytes()
        (stage.photos / name).write_bytes(content[: len(content) // 2])


def test_under_skip_bad_files_are_replaced_as_in_combined_training(stage: Stage) -> None:
    base = stage.job(**LORA).job.dataset.model_dump()
    skipping = {"bad_sample": "skip", "bad_sample_limit": 0.6, "height": 32, "width": 32, "batch_size": 2}
    resolved = stage.job(**LORA, dataset=base | skipping)
    damage(stage, "cat.jpg", "rocket.jpg")
    (stage.photos / "coffee.jpg").unlink()
    manifest_id = stage.run(resolved)
    assert stage.counts == "encoded 5 texts and 2 images, reused 0 texts and 0 images"
    assert "3 of 5 rows cannot be used; others are trained on in their place" in stage.said
    split = train_in_process(resolved, manifest_id=manifest_id)
    combined = train_in_process(resolved)
    assert split[0] == combined[0]
    assert all(torch.equal(split[1][name], combined[1][name]) for name in combined[1])
    bad = [row.bad for row in read_manifest(Cache(str(stage.cache_path)), manifest_id).rows if row.bad is not None]
    assert {Path(path).name for path, _ in bad} == {"cat.jpg", "rocket.jpg", "coffee.jpg"}
    assert sorted("damaged" in cause for _, cause in bad) == [False, True, True]

    strict = stage.job(**LORA, dataset=base | skipping | {"bad_sample_limit": 0.5})
    with pytest.raises(DataError, match=r"3 of 5 rows are bad, above dataset\.bad_sample_limit"):
        stage.run(strict)
    alone = stage.job(**LORA, dataset=base | skipping | {"base_path": None, "metadata_path": None})
    assert train_in_process(alone, manifest_id=stage.run(alone))[0] == split[0]
    with pytest.raises(DataError, match="has 3 rows that could not be encoded"):
        stage.run(stage.job(**LORA, dataset=base | {"base_path": None, "metadata_path": None}))


def test_a_bad_file_that_alone_has_its_size_gets_another_one(stage: Stage) -> None:
    base = stage.job(**LORA).job.dataset.model_dump()
    resolved = stage.job(**LORA, dataset=base | {"bad_sample": "skip", "bad_sample_limit": 0.5, "batch_size": 1})
    Image.effect_noise((96, 16), 40).convert("RGB").save(stage.photos / "cat.jpg")
    damage(stage, "cat.jpg")
    manifest_id = stage.run(resolved)
    rows = read_manifest(Cache(str(stage.cache_path)), manifest_id).rows
    (bad,) = [row for row in rows if row.bad is not None]
    assert (bad.height, bad.width) in {(row.height, row.width) for row in rows if row.bad is None}
    assert len(train_in_process(resolved, manifest_id=manifest_id)[0]) == 2


def test_a_file_that_changes_under_stage_one_is_not_encoded_under_its_old_name(stage: Stage, monkeypatch) -> None:
    decode = units.decode

    def decode_and_change(path, **size):
        frames = decode(path, **size)
        if path.endswith("cat.jpg"):
            shutil.copy(stage.photos / "coffee.jpg", path)
        return frames

    monkeypatch.setattr(units, "decode", decode_and_change)
    with pytest.raises(DataError, match=r"cat\.jpg: the file changed while"):
        stage.run(stage.job(**LORA))


def test_missing_encoders_are_told_before_anything_starts(stage: Stage, repository: Path) -> None:
    tiny = repository / "tests/assets/qwen_image_tiny"
    vae = str(tiny / "vae/diffusion_pytorch_model.safetensors")
    resolved = stage.job(**LORA, model={"tiny": False, "paths": [vae], "tokenizer_path": str(tiny / "tokenizer")})
    with pytest.raises(DataError, match=r"stage encode needs text_encoder, and model\.paths has none"):
        stage.run(resolved, *find_model(resolved.job.model)[1:])


def test_keys_tell_apart_what_encodes(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Cache(str(stage.cache_path)).store

    def digests(resolved: ResolvedJob):
        parts = split_parts(QwenImage, resolved.job)
        return encoder_digests(QwenImage, resolved.job, {}, tokenizers={}, parts=parts, store=store, say=lambda line: None)

    first = digests(stage.job(**LORA))
    assert first == digests(stage.job(**FULL | {"training": {"precision": "fp32", "trainable_models": ["dit"]}}))
    assert set(digests(stage.job(**TEXT_TRAINED))) == {"image"}
    with_vae = digests(stage.job(**TRAINED_VAE))
    trained = stage.cache_path.with_name("vae")
    shutil.copytree(QwenImage.tiny_weights["vae"], trained)
    with (trained / "config.json").open("a") as file:
        file.write("\n")
    with monkeypatch.context() as patched:
        patched.setitem(QwenImage.tiny_weights, "vae", trained)
        assert digests(stage.job(**LORA)) == first
        other = digests(stage.job(**TRAINED_VAE))
    assert other["text"] == with_vae["text"]
    assert other["image"] != with_vae["image"]
    monkeypatch.setattr(QwenImage, "encode_version", 2)
    second = digests(stage.job(**LORA))
    assert all(first[kind] != second[kind] for kind in ("text", "image"))
    assert text_key("a", "x") != text_key("b", "x") != text_key("b", "y")


def test_the_time_left_counts_from_the_first_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 60.0, 60.5, 62.0, 62.5, 64.0])
    monkeypatch.setattr(encode, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    said: list[str] = []
    progress = encode._Progress(40, lambda each: said.append(each.line()))
    for done in (8, 16, 24, 32, 40):  # the first encoder took a minute to start
        progress.show(done)
    assert said == [
        "encode 16/40 samples | 16.00 samples/s | 2 s left",
        "encode 24/40 samples | 8.00 samples/s | 2 s left",
        "encode 40/40 samples | 8.00 samples/s | 0 s left",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_tensors_keep_their_bits(dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 5) * 100).to(dtype)
    if dtype.is_floating_point:
        tensor[0, 0], tensor[0, 1] = float("nan"), float("-inf")
    back = bytes_tensor(tensor_bytes(tensor.T))
    assert back.dtype == dtype
    assert tensor_bytes(back) == tensor_bytes(tensor.T)


def test_a_batch_too_large_for_the_device_is_halved() -> None:
    class Small(QwenImage):
        def encode_image(self, pixels):
            if len(pixels) > self.limit:
                raise torch.OutOfMemoryError("full")
            return super().encode_image(pixels)

    family = QwenImage.build_tiny(0, components=["vae"])
    family.__class__ = Small
    pixels = torch.randint(0, 256, (5, 1, 32, 32, 3), dtype=torch.uint8).numpy()
    family.limit = 8
    whole = SampleEncoder(family).encode_images(pixels)
    family.limit = 2
    assert SampleEncoder(family).encode_images(pixels) == whole
    family.limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        SampleEncoder(family).encode_images(pixels)


def test_a_component_that_is_not_loaded_is_not_computed_with() -> None:
    family = QwenImage.build_tiny(0, components=["dit"])
    with pytest.raises(ModelError, match="'vae' is needed but not loaded"):
        SampleEncoder(family).encode_images(torch.zeros(1, 1, 32, 32, 3, dtype=torch.uint8).numpy())
