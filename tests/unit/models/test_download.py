"""Both hubs' clients against a local server that speaks their interfaces, and what can go wrong on the way."""

import json
import multiprocessing
import threading
import time
import types
from pathlib import Path

import pytest
from waiting import wait_until

from diffsynth_ray.config.origins import CONVERTED_REPO, Origin, parse_origin
from diffsynth_ray.config.schema import ModelSection
from diffsynth_ray.errors import ExitCode, HubError, ModelError
from diffsynth_ray.models import download, hubs, sources
from diffsynth_ray.models.download import Downloader, download_dataset, download_model

TINY = Path(__file__).parents[2] / "assets" / "qwen_image_tiny"
REPO = "Qwen/Qwen-Image"
DIT = Origin(REPO, "transformer/diffusion_pytorch_model*.safetensors")
BOTH = pytest.mark.parametrize("source", ["modelscope", "huggingface"])
PAYLOAD = b"".join(number.to_bytes(4, "big") for number in range(1 << 16))  # 256 KiB, no two parts alike


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(hubs, "_RETRY_S", 0.01)
    import modelscope_hub._download as library
    import modelscope_hub._legacy_api as listing

    monkeypatch.setattr(library, "DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.01)
    monkeypatch.setattr(library, "DOWNLOAD_RETRY_MAX_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(listing, "REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS", 0.01)


@pytest.fixture
def said():
    return []


@pytest.fixture
def bring(hub, tmp_path, said):
    """Bring an origin to tmp_path/models."""

    def bring(origin, source="modelscope"):
        downloader = Downloader(hubs.build_hub(source), base_path=tmp_path / "models", say=said.append)
        return downloader.bring(parse_origin(origin) if isinstance(origin, str) else origin)

    return bring


def section(tmp_path, **keys):
    """[model] as resolve leaves it."""
    values = {"source": "modelscope", "base_path": str(tmp_path / "models"), "skip_download": False}
    return ModelSection.model_validate(values | keys)


def qwen_ids():
    return [
        f"{REPO}:transformer/diffusion_pytorch_model*.safetensors",
        f"{REPO}:text_encoder/model*.safetensors",
        f"{REPO}:vae/diffusion_pytorch_model.safetensors",
    ]


@BOTH
def test_files_land_in_diffsynths_layout_with_their_configuration(hub, bring, tmp_path, said, source):
    hub.add_folder(REPO, TINY)
    found = bring(DIT, source)
    folder = tmp_path / "models" / "Qwen" / "Qwen-Image" / "transformer"
    assert list(found.files) == [folder / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert found.files[0].read_bytes() == (TINY / "transformer" / found.files[0].name).read_bytes()
    assert (folder / "config.json").read_bytes() == (TINY / "transformer" / "config.json").read_bytes()
    assert sorted(hub.fetched()) == sorted(["transformer/config.json", *(f"transformer/{p.name}" for p in found.files)])
    assert not list((tmp_path / "models").rglob("*.incomplete"))
    assert any("downloading 3 file(s)" in line for line in said)
    assert any("checksums right" in line for line in said)


@BOTH
def test_complete_files_are_used_without_a_request(hub, bring, source):
    hub.add_folder(REPO, TINY)
    before = bring(DIT, source)
    hub.requests.clear()
    assert bring(DIT, source).files == before.files
    assert hub.requests == []


def test_what_another_tool_has_downloaded_is_used_without_a_request(hub, bring, tmp_path):
    folder = tmp_path / "models" / "Qwen" / "Qwen-Image" / "transformer"
    folder.mkdir(parents=True)
    for path in (TINY / "transformer").glob("*.safetensors"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert len(bring(DIT).files) == 2
    assert hub.requests == []


@BOTH
def test_a_missing_shard_alone_is_fetched(hub, bring, tmp_path, source):
    hub.add_folder(REPO, TINY)
    folder = tmp_path / "models" / "Qwen" / "Qwen-Image" / "transformer"
    folder.mkdir(parents=True)
    first, second = sorted((TINY / "transformer").glob("*.safetensors"))
    (folder / first.name).write_bytes(first.read_bytes())
    (folder / "config.json").write_text('{"edited": "by hand"}')
    bring(DIT, source)
    assert hub.fetched() == [f"transformer/{second.name}"]
    assert json.loads((folder / "config.json").read_text()) == {"edited": "by hand"}


@BOTH
def test_a_cut_connection_goes_on_from_where_it_was(hub, bring, source):
    hub.add("a/b", "x.safetensors", PAYLOAD)
    hub.cuts["x.safetensors"] = [100_000, 100_000]
    (path,) = bring("a/b:x.safetensors", source).files
    assert path.read_bytes() == PAYLOAD
    ranges = [asked for target, asked in hub.requests if "x.safetensors" in target]
    starts = [int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0 for asked in ranges]
    assert len(starts) == 3
    assert starts[0] == 0 < starts[1] < starts[2]


@BOTH
def test_a_download_that_was_killed_is_resumed_by_the_next(hub, bring, tmp_path, source):
    """What has come stays under another name; the file itself is not there before it is whole."""
    hub.add("a/b", "x.safetensors", PAYLOAD)
    hub.cuts["x.safetensors"] = [100_000] + [0] * 30
    with pytest.raises(HubError, match="the connection fails") as caught:
        bring("a/b:x.safetensors", source)
    assert "a/b" in caught.value.message
    assert caught.value.exit_code == ExitCode.CLUSTER
    assert not (tmp_path / "models/a/b/x.safetensors").exists()
    assert sources.find(Origin("a/b", "x.safetensors"), tmp_path / "models").missing is not None
    hub.cuts.clear()
    hub.requests.clear()
    (path,) = bring("a/b:x.safetensors", source).files
    assert path.read_bytes() == PAYLOAD
    (asked,) = [asked for target, asked in hub.requests if "x.safetensors" in target]
    assert 0 < int(asked.removeprefix("bytes=").split("-")[0]) <= 100_000


@BOTH
def test_a_wrong_checksum_is_refused_and_nothing_kept(hub, bring, tmp_path, source):
    hub.add("a/b", "x.safetensors", PAYLOAD)
    hub.add("a/b", "y.safetensors", PAYLOAD)
    hub.broken.add("x.safetensors")
    with pytest.raises(ModelError, match=r"a/b on .*: x\.safetensors came with another checksum") as caught:
        bring("a/b:*.safetensors", source)
    assert "model.source" in caught.value.hint
    assert not list((tmp_path / "models").rglob("x.safetensors*"))
    # The other file may have come before the download ended, or not.
    missing = sources.find(Origin("a/b", "*.safetensors"), tmp_path / "models").missing
    assert missing in ("1 of 2 files, first x.safetensors", "2 of 2 files, first x.safetensors")


@BOTH
@pytest.mark.parametrize("knows_ranges", [True, False])
@pytest.mark.parametrize("served", [PAYLOAD[:-5000], PAYLOAD + b"more", b""])
def test_an_outdated_mirror_is_refused(hub, bring, tmp_path, source, served, knows_ranges):
    """Its file has another size than the listing; it must neither be taken nor be asked for without end."""
    hub.add("a/b", "x.safetensors", PAYLOAD)
    hub.served["x.safetensors"], hub.knows_ranges = served, knows_ranges
    with pytest.raises((ModelError, HubError), match=r"x\.safetensors"):
        bring("a/b:x.safetensors", source)
    assert not (tmp_path / "models/a/b/x.safetensors").exists()
    assert len(hub.fetched()) < 10


@BOTH
def test_a_server_without_ranges_starts_again(hub, bring, source):
    hub.add("a/b", "x.safetensors", PAYLOAD)
    hub.cuts["x.safetensors"], hub.knows_ranges = [100_000], False
    (path,) = bring("a/b:x.safetensors", source).files
    assert path.read_bytes() == PAYLOAD


@BOTH
def test_empty_files_are_fetched(hub, bring, source):
    hub.add("a/b", "tokenizer/vocab.json", b"")
    hub.add("a/b", "tokenizer/tokenizer_config.json", b"{}")
    assert [path.stat().st_size for path in bring("a/b:tokenizer/", source).files] == [2, 0]


@BOTH
def test_a_full_disk_is_told(hub, bring, tmp_path, source):
    """/dev/full takes nothing."""
    hub.add("a/b", "x.safetensors", PAYLOAD)
    part = tmp_path / "models/a/b/x.safetensors.incomplete"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(ModelError, match=r"cannot be written: No space left") as caught:
        bring("a/b:x.safetensors", source)
    assert "model.base_path" in caught.value.hint


# Hugging Face's client tries an address that is none again for 20 s.
@pytest.mark.parametrize("source", ["modelscope", pytest.param("huggingface", marks=pytest.mark.slow)])
def test_an_address_that_is_none_is_told(hub, bring, monkeypatch, source):
    import modelscope_hub
    from huggingface_hub import constants

    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://[")
    monkeypatch.setattr(constants, "ENDPOINT", "http://[")
    modelscope_hub.set_default_config(None)
    with pytest.raises(HubError, match=r"a/b on .*\(http://\["):
        bring("a/b:x.safetensors", source)


@BOTH
def test_a_listed_file_that_is_not_there_is_told(hub, bring, source, monkeypatch):
    hub.add("a/b", "x.safetensors", PAYLOAD)
    client = hubs.build_hub(source)
    listed = hubs.RemoteFile("gone.safetensors", 5)
    monkeypatch.setattr(type(client), "list_files", lambda *_: [listed])
    with pytest.raises(ModelError, match=r"gone\.safetensors: listed, but not there"):
        bring("a/b:gone.safetensors", source)


def test_small_files_of_hugging_face_are_checked_by_their_git_hash(hub, bring, tmp_path):
    hub.add("a/b", "tokenizer/vocab.json", PAYLOAD)
    hub.broken.add("tokenizer/vocab.json")
    with pytest.raises(ModelError, match="another checksum"):
        bring("a/b:tokenizer/", "huggingface")


@BOTH
def test_an_older_beginning_of_a_file_is_thrown_away(hub, bring, tmp_path, source):
    hub.add("a/b", "x.safetensors", PAYLOAD)
    part = tmp_path / "models/a/b/x.safetensors.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"of an earlier version" * 100)
    (path,) = bring("a/b:x.safetensors", source).files
    assert path.read_bytes() == PAYLOAD


@BOTH
def test_no_such_repository(hub, bring, source):
    with pytest.raises(ModelError, match=r"a/nothing on .*no such repository") as caught:
        bring("a/nothing:x.safetensors", source)
    assert "owner and name" in caught.value.hint
    assert hub.url in caught.value.message


@BOTH
def test_a_token_is_wanted(hub, bring, monkeypatch, said, tmp_path, source):
    hub.add("a/b", "x.safetensors", PAYLOAD)
    hub.token = "ms-secret"
    with pytest.raises(HubError, match="refused") as caught:
        bring("a/b:x.safetensors", source)
    variable = {"modelscope": "MODELSCOPE_API_TOKEN", "huggingface": "HF_TOKEN"}[source]
    assert variable in caught.value.hint
    assert "a secret of the server" not in caught.value.message
    monkeypatch.setenv(variable, "ms-secret")
    assert bring("a/b:x.safetensors", source).missing is None
    kept = [path.read_text() for path in (tmp_path / "models").rglob("*.json")]
    assert "ms-secret" not in "".join([*said, *kept])


@BOTH
def test_a_hub_that_does_not_answer(hub, bring, source, monkeypatch):
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda _: None, time=time.time))
    hub.close()
    with pytest.raises(HubError, match="a/b on ") as caught:
        bring("a/b:x.safetensors", source)
    assert "skip_download" in caught.value.hint


@BOTH
def test_a_pattern_that_matches_nothing_is_told_with_what_is_near(hub, bring, source):
    hub.add_folder(REPO, TINY)
    with pytest.raises(ModelError, match=r"did you mean .*vae/diffusion_pytorch_model\.safetensors"):
        bring(f"{REPO}:vae/diffusion_pytorch_modell.safetensors", source)
    with pytest.raises(ModelError, match=r"it holds .*model_index\.json"):
        bring(f"{REPO}:zzz", source)


def test_a_listing_cannot_reach_outside(hub, bring, tmp_path):
    hub.add("a/b", "sub/../../../../evil.safetensors", PAYLOAD)
    with pytest.raises(ModelError, match="outside of itself"):
        bring("a/b:")
    assert not list(tmp_path.rglob("evil*"))


def test_a_disk_that_is_too_small_is_told_before_the_download(hub, bring, monkeypatch):
    hub.add("a/b", "x.safetensors", PAYLOAD)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ModelError, match=r"256\.0 KiB .* 1000 B are free"):
        bring("a/b:x.safetensors")
    assert hub.fetched() == []


def test_a_folder_that_cannot_be_written_is_told(hub, tmp_path):
    (tmp_path / "models").write_text("a file")
    downloader = Downloader(hubs.build_hub("modelscope"), base_path=tmp_path / "models", say=print)
    with pytest.raises(ModelError, match="cannot be written") as caught:
        downloader.bring(DIT)
    assert "model.base_path" in caught.value.hint


def test_wans_pickles_are_fetched_as_safetensors(hub, bring, tmp_path):
    hub.add(CONVERTED_REPO, "Wan2.1_VAE.safetensors", PAYLOAD)
    hub.add("Wan-AI/Wan2.1-T2V-1.3B", "Wan2.1_VAE.pth", b"a pickle")
    found = bring("Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth")
    assert found.files == (tmp_path / "models" / CONVERTED_REPO / "Wan2.1_VAE.safetensors",)
    hub.requests.clear()
    assert bring("Wan-AI/Wan2.1-T2V-14B:Wan2.1_VAE.pth").files == found.files
    assert hub.requests == []


def test_wans_pickles_are_taken_where_there_is_nothing_else(hub, bring, tmp_path):
    hub.add("Wan-AI/Wan2.1-T2V-1.3B", "Wan2.1_VAE.pth", b"a pickle")
    own = tmp_path / "models/Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"
    assert bring("Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth").files == (own,)
    hub.requests.clear()
    assert bring("Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth").files == (own,)
    assert hub.requests == []


@BOTH
def test_a_model_from_ids_alone(hub, tmp_path, said, source):
    """Components, their configuration and the family's tokenizer, from nothing but three ids."""
    hub.add_folder(REPO, TINY)
    model = section(tmp_path, source=source, id_with_origin_paths=qwen_ids())
    family, files, tokenizers = download_model(model, said.append)
    assert (family, set(files)) == ("qwen_image", {"dit", "text_encoder", "vae"})
    assert files["dit"].config["num_layers"] == 2
    assert tokenizers == {"tokenizer_path": tmp_path / "models/Qwen/Qwen-Image/tokenizer"}
    assert (tokenizers["tokenizer_path"] / "merges.txt").is_file()
    assert len([target for target, _ in hub.requests if "repo/files" in target or "/tree/" in target]) == 1
    hub.requests.clear()
    assert download_model(model, said.append)[2] == tokenizers
    assert hub.requests == []


@BOTH
def test_a_tokenizer_of_another_repository(hub, tmp_path, said, source):
    hub.add_folder(REPO, TINY)
    hub.add_folder("somebody/else", TINY)
    model = section(tmp_path, source=source, id_with_origin_paths=qwen_ids(), tokenizer_path="somebody/else:tokenizer/")
    folder = tmp_path / "models/somebody/else/tokenizer"
    assert download_model(model, said.append)[2] == {"tokenizer_path": folder}
    assert (folder / "merges.txt").is_file()


def test_ids_and_paths_together_and_components_of_several_repositories(hub, tmp_path, said):
    hub.add_folder("somebody/finetune", TINY / "transformer")
    hub.add_folder(REPO, TINY)
    model = section(
        tmp_path,
        paths=[str(TINY / "vae/diffusion_pytorch_model.safetensors")],
        id_with_origin_paths=["somebody/finetune:*.safetensors", f"{REPO}:text_encoder/*.safetensors"],
        tokenizer_path=str(TINY / "tokenizer"),
    )
    family, files, tokenizers = download_model(model, said.append)
    assert family == "qwen_image"
    assert files["dit"].paths[0].parent == tmp_path / "models/somebody/finetune"
    assert files["dit"].config["num_layers"] == 2
    assert files["vae"].paths[0].parent == TINY / "vae"
    assert tokenizers == {"tokenizer_path": TINY / "tokenizer"}
    assert not any("tokenizer" in path for path in hub.fetched())


def test_files_of_ones_own_take_the_tokenizer_beside_them(hub, tmp_path, said):
    text = [str(path) for path in sorted((TINY / "text_encoder").glob("*.safetensors"))]
    *_, tokenizers = download_model(section(tmp_path, paths=[text]), said.append)
    assert tokenizers == {"tokenizer_path": TINY / "tokenizer"}
    assert hub.requests == []


def test_without_downloads_what_lacks_is_named(hub, tmp_path, said):
    model = section(tmp_path, skip_download=True, id_with_origin_paths=qwen_ids())
    with pytest.raises(ModelError, match=r"transformer.* is not complete in .*: no file") as caught:
        download_model(model, said.append)
    assert "DIFFSYNTH_SKIP_DOWNLOAD" in caught.value.hint
    assert hub.requests == []


def test_a_default_tokenizer_that_was_cut_is_not_taken_for_whole(hub, tmp_path, said):
    hub.add_folder(REPO, TINY)
    hub.broken.add("tokenizer/merges.txt")
    model = section(tmp_path, id_with_origin_paths=qwen_ids())
    with pytest.raises(ModelError, match=r"merges\.txt came with another checksum"):
        download_model(model, said.append)
    assert (tmp_path / "models/Qwen/Qwen-Image/tokenizer/tokenizer_config.json").is_file()
    hub.broken.clear()
    *_, tokenizers = download_model(model, said.append)
    assert (tokenizers["tokenizer_path"] / "merges.txt").is_file()


def test_progress_is_told_while_a_hub_is_slow(hub, bring, monkeypatch, said):
    monkeypatch.setattr(download, "_SAY_EVERY_S", 0.05)
    hub.add("a/b", "x.safetensors", PAYLOAD)
    hub.hold.clear()

    def answer_when_it_was_told():
        wait_until(lambda: any("0 B of 256.0 KiB" in line and "waiting for the hub" in line for line in list(said)), 20)
        hub.hold.set()

    answer = threading.Thread(target=answer_when_it_was_told)
    answer.start()
    bring("a/b:x.safetensors")
    answer.join()
    assert any("waiting for the hub" in line for line in said)
    assert any("0 B of 256.0 KiB" in line for line in said)


def _bring_in_a_process(source, base_path, said_path):
    def say(line):
        with said_path.open("a") as file:
            file.write(f"{line}\n")

    Downloader(hubs.build_hub(source), base_path=base_path, say=say).bring(Origin("a/b", "x.safetensors"))


@BOTH
def test_several_processes_download_once(hub, tmp_path, source):
    hub.add("a/b", "x.safetensors", PAYLOAD)
    hub.hold.clear()
    context = multiprocessing.get_context("fork")
    said_path = tmp_path / "said"
    said_path.touch()
    arguments = (source, str(tmp_path / "models"), said_path)
    processes = [context.Process(target=_bring_in_a_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    wait_until(lambda: said_path.read_text().count("another process is downloading to it") == 2, 25)
    hub.hold.set()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert hub.fetched() == ["x.safetensors"]


@BOTH
def test_a_data_set_by_patterns(hub, tmp_path, said, source):
    repo = "DiffSynth-Studio/diffsynth_example_dataset"
    for path in ("qwen_image/a/metadata.csv", "qwen_image/a/1.png", "wan/2.mp4", "README.md"):
        hub.add(repo, path, path.encode(), kind="dataset")
    output = tmp_path / "data"

    def fetch(*include):
        return download_dataset(repo, include, source=source, output=output, say=said.append)

    assert fetch("qwen_image/*") == [output / "qwen_image/a/metadata.csv", output / "qwen_image/a/1.png"]
    assert (output / "qwen_image/a/1.png").read_bytes() == b"qwen_image/a/1.png"
    hub.requests.clear()
    fetch("qwen_image/*", "README.md")
    assert hub.fetched() == ["README.md"]
    with pytest.raises(ModelError, match="did you mean wan/"):
        fetch("wam/*")
    assert len(fetch()) == 4
