"""What `dsray doctor` looks at on one node, good and bad, without Ray."""

from collections import namedtuple
from pathlib import Path

import pytest

from diffsynth_ray.launch import node_checks
from diffsynth_ray.launch.node_checks import CHECKS, MUST_BE_EQUAL, Request, check_node, compare_versions, versions, write_probe

Usage = namedtuple("Usage", "total used free")
GPU = {"index": "0", "name": "NVIDIA H100", "memory.total": "81559", "memory.used": "4", "compute_cap": "9.0"}


def found(request=None, **options):
    findings = check_node(request or Request(), where="n1", ray_gpus=options.pop("ray_gpus", 0.0), **options)
    assert {finding.where for finding in findings} == {"n1"}
    assert {finding.check for finding in findings} <= CHECKS.keys()
    assert all(finding.cure for finding in findings if finding.state == "failed")
    return {finding.check: finding for finding in findings}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(node_checks, "_nvidia_smi", list)


@pytest.fixture
def gpus(monkeypatch):
    def have(*gpus, torch_says=("13.0", True, 1, True)):
        monkeypatch.setattr(node_checks, "_nvidia_smi", lambda: list(gpus))
        monkeypatch.setattr(node_checks, "_torch_cuda", lambda: torch_says)

    return have


def test_without_a_job_what_every_cluster_needs_is_looked_at():
    states = {name: finding.state for name, finding in found().items()}
    assert states == {
        "output": "skipped", "data": "skipped", "weights": "skipped", "decoding": "ok", "disk": states["disk"],
        "shm": states["shm"], "gpu": "skipped", "fp8": "skipped",
    }  # fmt: skip


def test_a_request_travels_as_json():
    request = Request(output_path="/a", weights=["/b"], resources_per_worker={"GPU": 0.5}, fp8=True)
    assert Request.from_json(request.to_json()) == request


def test_the_output_path_is_written_to_where_it_or_a_folder_above_exists(tmp_path):
    finding = found(Request(output_path=str(tmp_path / "new" / "run")))["output"]
    assert (finding.state, str(tmp_path) in finding.detail) == ("ok", True)
    assert list(tmp_path.iterdir()) == []


def test_an_output_path_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(self, text):
        raise PermissionError(13, "no")

    monkeypatch.setattr(Path, "write_text", refuse)
    finding = found(Request(output_path=str(tmp_path)))["output"]
    assert finding.state == "failed"
    assert "cannot be written" in finding.detail


def test_what_the_head_wrote_is_seen_or_the_path_is_not_shared(tmp_path):
    probe = write_probe(str(tmp_path / "run"))
    request = Request(output_path=str(tmp_path / "run"))
    assert "shared with the head" in found(request, probe=probe)["output"].detail
    Path(probe).write_text("something else of that name")
    assert found(request, probe=probe)["output"].state == "failed"
    Path(probe).unlink()
    finding = found(request, probe=probe)["output"]
    assert (finding.state, "every node mounts" in finding.cure) == ("failed", True)


def apart(**places):
    """What is found of the places beside the output path."""
    return [finding for finding in check_node(Request(**places), where="n1", ray_gpus=0.0) if finding.check == "output"][1:]


def test_cache_and_checkpoints_are_written_to_wherever_they_are(tmp_path):
    assert apart(output_path=str(tmp_path)) == []
    for path in (tmp_path / "cache", (tmp_path / "cache").as_uri()):
        [finding] = apart(cache_path=str(path))
        assert (finding.state, finding.detail) == ("ok", f"{path} is writable (split.cache_path)")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    for path in ("/proc/nowhere", "s3://key:secret@bucket?unknown=1", "nothing://key:secret@bucket"):
        [finding] = apart(checkpoint_path=path)
        assert finding.state == "failed"
        assert "(output.checkpoint_path): " in finding.detail
        assert "choose another output.checkpoint_path" in finding.cure
        assert "secret" not in finding.detail


def test_media_behind_an_address_are_asked_for(photos, tmp_path, hub):
    hub.add("a/b", "cat.jpg", (photos / "cat.jpg").read_bytes())
    address = f"{hub.url}/a/b/resolve/main"
    for name, state in (("cat.jpg", "ok"), ("dog.jpg", "failed")):
        (tmp_path / "m.csv").write_text(f"image,prompt\n{address}/{name},x\n")
        request = Request(base_path=str(tmp_path), metadata_path=str(tmp_path / "m.csv"), data_file_keys=["image"])
        finding = found(request)["data"]
        assert finding.state == state, finding
    assert "dog.jpg" in finding.detail


def test_data_are_read(photos, tmp_path):
    request = Request(base_path=str(photos), metadata_path=str(photos / "metadata.csv"), data_file_keys=["image", "video"])
    assert found(request)["data"].detail.startswith("5 rows; 3 files")
    (tmp_path / "m.csv").write_text("image,prompt\na.png,x\n")
    (tmp_path / "a.png").write_bytes(b"no picture")
    for base, metadata in ((tmp_path, tmp_path / "m.csv"), (tmp_path / "gone", None), (tmp_path, tmp_path / "gone.csv")):
        finding = found(Request(base_path=str(base), metadata_path=metadata and str(metadata), data_file_keys=["image"]))[
            "data"
        ]
        assert finding.state == "failed", finding
        assert str(tmp_path) in finding.detail


def test_weights_are_opened_and_all_missing_ones_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "tokenizer").mkdir()
    paths = [str(tmp_path / "a.safetensors"), str(tmp_path / "tokenizer")]
    assert found(Request(weights=paths))["weights"].state == "ok"
    finding = found(Request(weights=[*paths, "/gone/1", "/gone/2"]))["weights"]
    assert finding.state == "failed"
    assert "/gone/1" in finding.detail
    assert "/gone/2" in finding.detail


def test_a_decoder_that_does_not_load(monkeypatch):
    def missing(name):
        raise OSError(f"lib of {name} not found")

    monkeypatch.setattr(node_checks.importlib, "import_module", missing)
    assert found()["decoding"].state == "failed"


@pytest.mark.parametrize(("gib", "state"), [(100, "ok"), (5, "warning"), (0.5, "warning")])
def test_little_room(monkeypatch, gib, state, tmp_path):
    monkeypatch.setattr(node_checks.shutil, "disk_usage", lambda path: Usage(gib * 2**30, 0, gib * 2**30))
    both = found(Request(output_path=str(tmp_path), cache_path=str(tmp_path)))
    assert both["disk"].state == state
    assert both["shm"].state == ("warning" if gib < 1 else "ok")
    assert bool(both["disk"].cure) == (state == "warning")


def test_no_shared_memory(monkeypatch):
    def missing(path):
        if path == "/dev/shm":
            raise FileNotFoundError(path)
        return Usage(2**40, 0, 2**40)

    monkeypatch.setattr(node_checks.shutil, "disk_usage", missing)
    assert found()["shm"].state == "warning"


def test_a_gpu_that_everybody_sees(gpus):
    gpus(GPU)
    both = found(ray_gpus=1.0)
    assert (both["gpu"].state, both["fp8"].state) == ("ok", "ok")
    assert "1 x NVIDIA H100 80 GiB" in both["gpu"].detail


@pytest.mark.parametrize(
    ("torch_says", "ray_gpus", "used", "state", "told"),
    [
        ((None, False, 0, True), 1.0, "4", "failed", "no CUDA"),
        (("13.0", False, 0, True), 1.0, "4", "failed", "CUDA 13.0"),
        (None, 1.0, "4", "failed", "PyTorch"),
        (("13.0", True, 1, True), 0.0, "4", "warning", "Ray counts 0"),
        (("13.0", True, 1, True), 1.0, "40000", "warning", "39 GiB are in use"),
    ],
)
def test_a_gpu_with_something_wrong(gpus, torch_says, ray_gpus, used, state, told):
    gpus(GPU | {"memory.used": used}, torch_says=torch_says)
    finding = found(ray_gpus=ray_gpus)["gpu"]
    assert (finding.state, bool(finding.cure)) == (state, True)
    assert told in finding.detail


def test_gpus_that_only_ray_believes_in():
    assert found(ray_gpus=8.0)["gpu"].state == "failed"


@pytest.mark.parametrize(
    ("capability", "wanted", "state"), [("8.9", True, "ok"), ("8.0", True, "warning"), ("8.0", False, "ok")]
)
def test_fp8_needs_a_capability_only_where_it_is_asked_for(gpus, capability, wanted, state):
    gpus(GPU | {"compute_cap": capability}, GPU)
    assert found(Request(fp8=wanted), ray_gpus=2.0)["fp8"].state == state


def test_versions_are_held_against_the_heads():
    head = versions()
    assert all(head[name] not in ("", "missing") for name in MUST_BE_EQUAL)
    findings = compare_versions({"h": head, "a": dict(head), "b": head | {"torch": "1.0"}, "c": head | {"numpy": "1.0"}})
    assert [finding.state for finding in findings] == ["ok", "ok", "failed", "warning"]
    assert findings[2].detail == f"torch 1.0 (head: {head['torch']})"
    assert compare_versions({"h": head | {"peft": "missing"}})[0].state == "failed"


def test_nvidia_smi_is_read(monkeypatch, tmp_path):
    monkeypatch.undo()
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, NVIDIA H100, 81559, 4, 9.0'\necho 'a broken line'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert node_checks._nvidia_smi() == [GPU]
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert node_checks._nvidia_smi() == []
