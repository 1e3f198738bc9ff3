"""Files on s3:// (pyarrow's client against a server here), http(s):// and file://."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.data import storage
from diffsynth_ray.data.media import decode, read_info
from diffsynth_ray.data.metadata import read_metadata
from diffsynth_ray.data.samples import build_sample_index
from diffsynth_ray.errors import DataError
from diffsynth_ray.plan import build_plan
from tests.unit.data.s3_server import S3Handler, build_server

DATASET = Path(__file__).parents[2] / "assets" / "dataset"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder behind s3://bucket."""
    root = tmp_path / "bucket"
    shutil.copytree(DATASET, root)
    server = build_server(root)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    storage._s3_of_bucket.cache_clear()
    S3Handler.requests.clear()
    S3Handler.cuts.clear()
    yield root
    server.shutdown()
    thread.join()
    server.server_close()
    storage._s3_of_bucket.cache_clear()


def write_job(tmp_path: Path, dataset: str) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(
        f'[dataset]\n{dataset}\nmax_pixels = 6144\n[model]\nfamily = "qwen_image"\ntiny = true\n'
        f'[lora]\nbase_model = "dit"\n[output]\npath = "{tmp_path}/out"\n'
    )
    return path


def test_metadata_and_media_on_s3_are_those_of_the_folder(bucket: Path) -> None:
    local = read_metadata(DATASET, DATASET / "metadata.csv")
    for name in ("metadata.csv", "metadata.json", "metadata.jsonl"):
        metadata = read_metadata("s3://bucket", f"s3://bucket/{name}")
        assert metadata.rows == local.rows
        assert metadata.digest == local.digest
    assert metadata.files(0, "image") == ["s3://bucket/images/0.png"]
    for name in ("images/0.png", "videos/v.mp4", "videos/g.gif"):
        assert read_info(f"s3://bucket/{name}") == read_info(DATASET / name)
        expected = decode(DATASET / name, height=32, width=48, num_frames=5)
        assert np.array_equal(decode(f"s3://bucket/{name}", height=32, width=48, num_frames=5), expected)


def test_parquet_metadata_on_s3(bucket: Path, tmp_path: Path) -> None:
    pq.write_table(pyarrow.csv.read_csv(DATASET / "metadata.csv"), tmp_path / "metadata.parquet")
    shutil.copy(tmp_path / "metadata.parquet", bucket)
    metadata = read_metadata("s3://bucket", "s3://bucket/metadata.parquet")
    local = read_metadata(DATASET, tmp_path / "metadata.parquet")
    assert (metadata.rows, metadata.digest) == (local.rows, local.digest)
    assert metadata.files(0, "image") == ["s3://bucket/images/0.png"]


@pytest.mark.parametrize("name", ["metadata.csv", "images/0.png", "videos/v.mp4"])
def test_a_connection_to_s3_that_is_cut_is_made_again(bucket: Path, name: str) -> None:
    S3Handler.cuts[:] = [0, 10]
    assert storage.read_bytes(f"s3://bucket/{name}") == (DATASET / name).read_bytes()
    assert S3Handler.cuts == [], "twice it broke off"


def test_a_folder_on_s3_without_metadata(bucket: Path) -> None:
    (bucket / "images" / "0.txt").write_text("a red square")
    metadata = read_metadata("s3://bucket/images/", None, ("image",))
    assert [row["image"] for row in metadata.rows] == ["0.png", "1.png", "2.png", "3.png"]
    assert [row["prompt"] for row in metadata.rows] == ["a red square", "", "", ""]


@pytest.mark.parametrize("most_single_questions", [64, 0], ids=["one by one", "by listing"])
def test_missing_files_on_s3_are_named(bucket: Path, monkeypatch: pytest.MonkeyPatch, most_single_questions: int) -> None:
    monkeypatch.setattr(storage, "_MOST_SINGLE_QUESTIONS", most_single_questions)
    (bucket / "images" / "2.png").unlink()
    with pytest.raises(DataError, match=r"1 problem.*\n.*metadata.csv:4: 'image' no such file: s3://bucket/images/2.png"):
        read_metadata("s3://bucket", "s3://bucket/metadata.csv")
    with pytest.raises(DataError, match=r"no such file s3://bucket/other.csv"):
        read_metadata("s3://bucket", "s3://bucket/other.csv")
    with pytest.raises(DataError, match=r"s3://bucket/nowhere is not a directory"):
        read_metadata("s3://bucket/nowhere", "s3://bucket/metadata.csv")


def test_a_listing_is_one_question(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_MOST_SINGLE_QUESTIONS", 3)
    read_metadata("s3://bucket", "s3://bucket/metadata.csv")
    assert not [request for request in S3Handler.requests if request.startswith("HEAD") and "/images/" in request]


def test_a_storage_that_refuses_says_what_to_set(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S3Handler, "refuses", True)
    with pytest.raises(DataError, match=r"s3://bucket/data: the storage does not answer: .*ACCESS_DENIED") as caught:
        storage.is_folder("s3://bucket/data")
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.hint)


def test_a_job_on_s3_is_planned_and_indexed(bucket: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, 'base_path = "s3://bucket"\nmetadata_path = "s3://bucket/metadata.csv"')
    resolved = resolve(load_job(str(job)), Resources(cpus=2, gpus=0), remote=True)
    assert build_plan(resolved).num_rows == 4
    said: list[str] = []
    index = build_sample_index(resolved, said.append)
    assert [(b.height, b.width, len(b.rows)) for b in index.order.buckets] == [(64, 80, 2), (64, 96, 1), (96, 64, 1)]
    assert (tmp_path / "out" / "dsray.sizes").is_file()


def test_a_job_with_file_urls(tmp_path: Path) -> None:
    dataset = tmp_path / "data"
    shutil.copytree(DATASET, dataset)
    job = write_job(tmp_path, f'base_path = "{dataset.as_uri()}"\nmetadata_path = "{dataset.as_uri()}/metadata.csv"')
    resolved = resolve(load_job(str(job)), Resources(cpus=2, gpus=0), remote=True)
    assert build_plan(resolved).num_rows == 4
    assert len(build_sample_index(resolved, lambda line: None).metadata) == 4
    assert (dataset / "metadata.csv.sizes").is_file()


def test_the_common_folder_of_each_bucket() -> None:
    assert storage._common_folders(["s3://a/x/y/1.png", "s3://a/x/z/2.png", "s3://b/3.png"]) == ["s3://a/x", "s3://b"]
