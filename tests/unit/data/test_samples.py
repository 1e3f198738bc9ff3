"""A dataset as a whole: sizes and lengths of images and clips, extra inputs, and bad samples replaced."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.data import samples as samples_module
from diffsynth_ray.data.bad_samples import BadSample, BadSampleList
from diffsynth_ray.data.batches import MicroBatch
from diffsynth_ray.data.media import decode, read_info
from diffsynth_ray.data.samples import SampleIndex, SampleRule, build_sample_index
from diffsynth_ray.data.stream import _pack_extra, _unpack_extra
from diffsynth_ray.errors import DataError, DsrayError, JobFileError

VIDEOS = Path(__file__).parents[2] / "assets" / "dataset" / "videos"
CLIPS = SampleRule(clip_step=4)


class Dataset:
    """A folder with metadata, made by the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, object]] = []
        self.said: list[str] = []

    def add(self, name: str, size: tuple[int, int] = (64, 48), **cells: object) -> None:
        number = len(self.rows)
        if name.endswith(".png") and not (self.folder / name).exists():
            Image.fromarray(np.full((size[1], size[0], 3), number, dtype=np.uint8)).save(self.folder / name)
        self.rows.append({"image": name, "prompt": f"prompt {number}", **cells})

    def build(self, *overrides: str, rule: SampleRule | None = None, column: str = "image") -> SampleIndex:
        rows = [{column if key == "image" else key: value for key, value in row.items()} for row in self.rows]
        (self.folder / "m.json").write_text(json.dumps(rows))
        job = self.folder / "job.toml"
        job.write_text(
            f'[dataset]\nbase_path = "{self.folder}"\nmetadata_path = "{self.folder}/m.json"\n'
            '[model]\nfamily = "qwen_image"\ntiny = true\n[lora]\nbase_model = "dit"\n'
            f'[output]\npath = "{self.folder}/out"\n'
        )
        resolved = resolve(load_job(str(job), list(overrides)), Resources(cpus=2, gpus=0))
        # Keys that wait for the families that use them.
        given = {"num_frames": 81, "frame_rate": None} | getattr(self, "dataset_keys", {})
        dataset = resolved.job.dataset.model_copy(update=given)
        model = resolved.job.model.model_copy(update={"extra_inputs": getattr(self, "extra_inputs", [])})
        changed = resolved.job.model_copy(update={"dataset": dataset, "model": model})
        return build_sample_index(resolved.model_copy(update={"job": changed}), self.said.append, rule=rule)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path)


def sizes_of(index: SampleIndex) -> dict[tuple[int, int, int], list[int]]:
    return {(b.height, b.width, b.num_frames): b.rows.tolist() for b in index.order.buckets}


def micro_of(index: SampleIndex, row: int, place: int = 0) -> MicroBatch:
    number = next(i for i, bucket in enumerate(index.order.buckets) if row in bucket.rows)
    bucket = index.order.buckets[number]
    return MicroBatch(number, bucket.height, bucket.width, bucket.num_frames, (row,), (place,))


def test_clips_take_the_frames_that_the_family_wants(dataset: Dataset) -> None:
    dataset.add(str(VIDEOS / "v.mp4"))
    dataset.add(str(VIDEOS / "g.gif"))
    dataset.add("a.png")
    index = dataset.build(rule=CLIPS, column="video")
    assert sizes_of(index) == {(48, 64, 1): [2], (48, 64, 21): [0, 1]}
    decoded = index.decode(micro_of(index, 0), step=0)
    assert np.array_equal(decoded.pixels[0], decode(VIDEOS / "v.mp4", height=48, width=64, num_frames=21))
    assert index.decode(micro_of(index, 2), step=0).pixels.shape == (1, 1, 48, 64, 3)
    assert index.largest_micro_batch().num_frames == 21

    dataset.dataset_keys = {"num_frames": 9, "frame_rate": 8.0}
    index = dataset.build(rule=CLIPS, column="video")
    assert sizes_of(index) == {(48, 64, 1): [2], (48, 64, 9): [0, 1]}
    expected = decode(VIDEOS / "v.mp4", height=48, width=64, num_frames=9, frame_rate=8.0)
    assert np.array_equal(index.decode(micro_of(index, 0), step=0).pixels[0], expected)


def test_a_lower_frame_rate_makes_a_clip_shorter(dataset: Dataset) -> None:
    dataset.add(str(VIDEOS / "v.mp4"))
    rate = read_info(VIDEOS / "v.mp4").fps
    dataset.dataset_keys = {"frame_rate": rate / 2}
    ((_, _, num_frames),) = sizes_of(dataset.build(rule=CLIPS, column="video"))
    assert num_frames == 9  # of 21 at its own rate every other one, in fours and one


def test_an_image_family_takes_the_first_frame(dataset: Dataset) -> None:
    dataset.add(str(VIDEOS / "v.mp4"))
    assert sizes_of(dataset.build(column="video")) == {(48, 64, 1): [0]}
    assert sizes_of(dataset.build("dataset.height=32", "dataset.width=32", column="video")) == {(32, 32, 1): [0]}


def test_with_a_fixed_size_only_lengths_are_read(dataset: Dataset) -> None:
    dataset.add(str(VIDEOS / "v.mp4"))
    dataset.add("a.png")
    fixed = ("dataset.height=32", "dataset.width=48")
    assert sizes_of(dataset.build(*fixed, rule=CLIPS, column="video")) == {(32, 48, 1): [1], (32, 48, 21): [0]}
    dataset.said.clear()
    dataset.rows.pop(0)
    dataset.build(*fixed, rule=CLIPS)
    assert not any("reading" in line for line in dataset.said)


def test_a_family_with_other_multiples(dataset: Dataset) -> None:
    dataset.add(str(VIDEOS / "v.mp4"))
    dataset.dataset_keys = {"num_frames": 17}
    assert sizes_of(dataset.build(rule=SampleRule(32, 8), column="video")) == {(32, 64, 17): [0]}
    dataset.dataset_keys = {"num_frames": 21}
    with pytest.raises(JobFileError, match=r"dataset.num_frames: got 21; .* as in 17 or 25"):
        dataset.build(rule=SampleRule(32, 8), column="video")


def test_rows_with_an_image_or_a_video(dataset: Dataset) -> None:
    dataset.add("a.png", video="")
    dataset.add("", video=str(VIDEOS / "v.mp4"))
    assert sizes_of(dataset.build(rule=CLIPS)) == {(48, 64, 1): [0], (48, 64, 21): [1]}


def test_extra_inputs_travel_as_they_are(dataset: Dataset) -> None:
    for name, size in (("x.png", (128, 64)), ("y.png", (32, 32))):
        Image.new("RGB", size, (7, 8, 9)).save(dataset.folder / name)
    dataset.add("a.png", edit_image=["x.png", "y.png"], speed=3)
    dataset.add("b.png", edit_image="y.png", speed="fast")
    dataset.extra_inputs = ["edit_image", "speed", "input_image"]
    index = dataset.build('dataset.data_file_keys=["image", "edit_image"]', "dataset.batch_size=2")
    decoded = index.decode(index.order.step(0).micro_batches[0], step=0)
    by_row = dict(zip(decoded.rows, zip(decoded.extra["edit_image"], decoded.extra["speed"]), strict=True))
    assert [frames.shape for frames in by_row[0][0]] == [(1, 64, 128, 3), (1, 32, 32, 3)]
    assert by_row[0][1] == 3
    assert [frames.shape for frames in by_row[1][0]] == [(1, 32, 32, 3)]
    assert by_row[1][1] == "fast"
    layout, content = _pack_extra(decoded.extra)
    packed = np.frombuffer(content + b"more", dtype=np.uint8)
    again, taken = _unpack_extra(json.loads(json.dumps(layout)), packed)
    assert taken == len(content)
    assert again["speed"] == decoded.extra["speed"]
    for one, other in zip(again["edit_image"], decoded.extra["edit_image"], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_row_is_trained_on_one_file(dataset: Dataset) -> None:
    dataset.add("a.png")
    dataset.add("b.png")
    dataset.rows[1]["image"] = ["a.png", "b.png"]
    with pytest.raises(DataError, match=r"a row is trained on one file:\n  row 2: 'image' has 2 files") as caught:
        dataset.build()
    assert "model.extra_inputs" in str(caught.value.hint)


SKIP = ('dataset.bad_sample="skip"', "dataset.bad_sample_limit=0.5")


@pytest.fixture
def damaged(dataset: Dataset) -> Dataset:
    """Twelve images of two sizes; 2 and 7 are cut, 5 is no image, 9 is not there, 11 is too thin."""
    for number in range(12):
        dataset.add(f"{number}.png", (64, 48) if number % 2 else (48, 64))
    for number in (2, 7):
        path = dataset.folder / f"{number}.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    (dataset.folder / "5.png").write_bytes(b"no image")
    (dataset.folder / "9.png").unlink()
    Image.new("RGB", (200, 9)).save(dataset.folder / "11.png")
    return dataset


def test_bad_samples_are_errors_by_default(damaged: Dataset) -> None:
    with pytest.raises(DataError, match=r"m.json, row 10: 'image' no such file: .*9.png"):
        damaged.build()
    Image.new("RGB", (64, 48)).save(damaged.folder / "9.png")
    with pytest.raises(DataError, match=r"2 of 12 files cannot be used:\n  row 6: .*5.png: .*\n  row 12: .*11.png: ") as caught:
        damaged.build()
    assert "dataset.bad_sample" in str(caught.value.hint)
    for number in (5, 11):
        Image.new("RGB", (64, 48)).save(damaged.folder / f"{number}.png")
    index = damaged.build()
    with pytest.raises(DataError, match=r"row 3, column image: .*2.png: .*truncated"):
        index.decode(micro_of(index, 2), step=0)


def test_bad_samples_are_replaced_with_their_prompts(damaged: Dataset) -> None:
    index = damaged.build(*SKIP)
    assert sorted(index.unusable) == [5, 9, 11]
    assert [bad.row for bad in index.bad_headers()] == [5, 9, 11]
    assert sorted(row for bucket in index.order.buckets for row in bucket.rows) == list(range(12))
    for row in range(12):
        micro = micro_of(index, row)
        decoded = index.decode(micro, step=3)
        used = decoded.rows[0]
        assert decoded.prompts == (f"prompt {used}",)
        assert (decoded.pixels == used).all()
        assert used not in (2, 5, 7, 9, 11)
        if row in (2, 5, 7, 9, 11):
            bad = decoded.bad[0]
            assert (bad.row, bad.replaced_by, bad.step, bad.num_rows) == (row, used, 3, 12)
            assert f"{row}.png" in bad.cause
        else:
            assert (used, decoded.bad) == (row, ())


def test_a_replacement_follows_from_seed_step_and_place(damaged: Dataset) -> None:
    def used(index: SampleIndex, step: int, place: int) -> int:
        return index.decode(micro_of(index, 2, place), step=step).rows[0]

    index = damaged.build(*SKIP)
    chosen = [used(index, step, place) for step in range(4) for place in range(3)]
    assert chosen == [used(damaged.build(*SKIP), step, place) for step in range(4) for place in range(3)]
    assert len(set(chosen)) > 1
    other = replace(index, order=replace(index.order, seed=1))
    assert chosen != [used(other, step, place) for step in range(4) for place in range(3)]
    assert all(index.path(row) != index.path(2) for row in chosen)


def test_a_bucket_of_bad_samples_borrows_from_the_others(dataset: Dataset) -> None:
    dataset.add("wide.png", (96, 32))
    path = dataset.folder / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 96, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    dataset.add("a.png")
    index = dataset.build(*SKIP)
    decoded = index.decode(micro_of(index, 0), step=0)
    assert decoded.rows == (1,)
    assert decoded.pixels.shape == (1, 1, 32, 96, 3)


def test_headers_above_the_limit_end_the_run_before_it_starts(damaged: Dataset) -> None:
    with pytest.raises(DataError, match=r"3 of 12 rows are bad, above dataset.bad_sample_limit = 0.1:\n  row 6") as caught:
        damaged.build(SKIP[0], "dataset.bad_sample_limit=0.1")
    assert "dsray data check" in str(caught.value.hint)


def test_nothing_that_can_be_read_is_always_an_error(dataset: Dataset) -> None:
    dataset.add("missing.jpg")
    with pytest.raises(DataError, match="1 of 1 files cannot be used"):
        dataset.build('dataset.bad_sample="skip"', "dataset.bad_sample_limit=1")


def test_the_list_has_a_row_once_and_goes_on_in_a_later_attempt(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"

    def bad(row: int, step: int = 0) -> BadSample:
        return BadSample(row, 100, f"{row}.png", f"{row}.png: damaged", step=step, replaced_by=50)

    first = BadSampleList(path, limit=0.03)
    told = first.add([bad(3), bad(4, step=2)])
    assert "row 4: 3.png: damaged and 1 more; 2 of 100 rows so far (2.00%, limit 3.00%)" in str(told)
    assert first.add([bad(3, step=9)]) is None
    later = BadSampleList(path, limit=0.03)
    assert later.add([bad(4), bad(5)]) is not None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == [4, 5, 6]
    assert lines[1].items() >= {"row": 5, "file": "4.png", "cause": "4.png: damaged", "step": 3, "replaced_by_row": 51}.items()
    with pytest.raises(DsrayError, match=r"4 of 100 rows are bad, above dataset.bad_sample_limit = 0.03"):
        later.add([bad(6)])
    assert len(path.read_text().splitlines()) == 4, "also the last one is listed"


def test_a_mended_file_is_taken_off_the_list(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    files = [tmp_path / f"{row}.png" for row in range(3)]
    for file in files[:2]:
        file.write_bytes(b"damaged")
    found = [BadSample(row, 100, str(file), "damaged") for row, file in enumerate(files)]
    BadSampleList(path, limit=0.03).add(found)
    assert BadSampleList(path, limit=0.03).add(found) is None
    files[1].write_bytes(b"mended, at last")
    assert BadSampleList(path, limit=0.03).add([BadSample(7, 100, "7.png", "damaged")]) is not None
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [1, 3, 8]


def test_a_share_of_the_files_is_held_out_and_never_trained_on(dataset: Dataset) -> None:
    for number in range(10):
        dataset.add(f"{number}.png", size=(64, 48) if number % 3 else (48, 64))
    for number in range(10):
        dataset.add(f"{number}.png", prompt="the same file once more")
    index = dataset.build("validation.holdout=0.2")
    assert index.holdout is not None
    held = {micro.rows[0] for micro in index.holdout.singles()}
    files = {index.path(row) for row in held}
    assert len(files) == 2
    assert held == {row for row in range(20) if index.path(row) in files}, "all rows of a file go together"
    steps = [index.order.step(step) for step in range(index.order.steps_per_epoch)]
    trained = {row for step in steps for micro in step.micro_batches for row in micro.rows}
    assert trained == set(range(20)) - held
    assert index.order.num_samples == 20 - len(held)
    again, *others = (
        {micro.rows[0] for micro in dataset.build("validation.holdout=0.2", f"seed={seed}").holdout.singles()}
        for seed in range(4)
    )
    assert held == again
    assert any(held != other for other in others), "the seed chooses"
    assert any("held out" in line for line in dataset.said)


def test_no_held_out_row_takes_the_place_of_a_bad_one(dataset: Dataset) -> None:
    for number in range(6):
        dataset.add(f"{number}.png")
    index = dataset.build("validation.holdout=0.4", "dataset.bad_sample=skip", "dataset.bad_sample_limit=1.0")
    held = {micro.rows[0] for micro in index.holdout.singles()}
    bad = min(set(range(6)) - held)
    micro = MicroBatch(0, 48, 64, 1, (bad,), (0,))
    assert not held & {row for step in range(20) for row in index.candidates(bad, micro, step=step, index=0)}


def test_which_rows_replace_a_bad_one_follows_from_seed_step_and_place(dataset: Dataset) -> None:
    for number in range(12):
        dataset.add(f"{number}.png")
    micro = MicroBatch(0, 48, 64, 1, (3,), (0,))

    def order(*, seed: int = 0, step: int = 0, index: int = 0) -> list[int]:
        found = list(dataset.build(f"seed={seed}").candidates(3, micro, step=step, index=index))
        assert set(found) == set(range(12)) - {3}
        return found

    assert order() == order()
    assert len({tuple(each) for each in (order(), order(seed=1), order(step=1), order(index=1))}) == 4


def test_a_holdout_of_its_own(dataset: Dataset, tmp_path: Path) -> None:
    for number in range(3):
        dataset.add(f"{number}.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "held.png")
    held = tmp_path / "held.csv"
    held.write_text("image,prompt\nheld.png,one\n2.png,two\n")
    index = dataset.build(f"validation.holdout={held}")
    assert [index.holdout.prompt(micro.rows[0]) for micro in index.holdout.singles()] == ["one", "two"]
    assert [(m.height, m.width) for m in index.holdout.singles()] == [(64, 64), (48, 64)]
    assert index.order.num_samples == 3
    assert "1 of the 2 validation samples" in dataset.said[-1]
    with pytest.raises(DataError, match=r"validation\.holdout: .*nowhere\.csv"):
        dataset.build("validation.holdout=nowhere.csv")


def test_one_file_cannot_be_shared_out(dataset: Dataset) -> None:
    dataset.add("0.png")
    with pytest.raises(DataError, match=r"validation\.holdout"):
        dataset.build("validation.holdout=0.5")


def test_a_small_data_set_is_decoded_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("0.png", "1.png"):
        dataset.add(name)
    read = []
    monkeypatch.setattr(samples_module, "decode", lambda path, **target: read.append(path) or decode(path, **target))
    index = dataset.build().keeping_decoded()
    first, again = (index.decode(micro_of(index, 1), step=step) for step in (0, 1))
    assert len(read) == 1
    assert again.pixels.tolist() == first.pixels.tolist() == np.full((1, 1, 48, 64, 3), 1).tolist()
    index.decode(micro_of(index, 0), step=2)
    assert len(read) == 2


def test_a_data_set_that_is_too_large_is_not_kept(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("0.png", "1.png"):
        dataset.add(name)
    index = dataset.build("dataset.repeat=50")
    one = 48 * 64 * 3
    monkeypatch.setattr(samples_module, "MAX_BYTES", 2 * one)
    assert index.keeping_decoded().kept is not None, "repeats are the same samples"
    monkeypatch.setattr(samples_module, "MAX_BYTES", 2 * one - 1)
    assert index.keeping_decoded().kept is None
