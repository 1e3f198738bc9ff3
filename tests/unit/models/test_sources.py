import json
import shutil
from pathlib import Path

import pytest

from diffsynth_ray.config.origins import CONVERTED_REPO, Origin
from diffsynth_ray.config.schema import ModelSection
from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.sources import Found, find, find_tokenizers, list_path, model_entries, tokenizer_folders

TINY = Path(__file__).parents[2] / "assets" / "qwen_image_tiny"
DIT = Origin("Qwen/Qwen-Image", "transformer/diffusion_pytorch_model*.safetensors")
TOKENIZER = {"tokenizer_path": "Qwen/Qwen-Image:tokenizer/"}


@pytest.fixture
def repo(tmp_path):
    """{base_path}/Qwen/Qwen-Image as another tool has left it."""
    shutil.copytree(TINY, tmp_path / "Qwen" / "Qwen-Image")
    return tmp_path / "Qwen" / "Qwen-Image"


def test_files_of_another_tool_are_found(repo, tmp_path):
    found = find(DIT, tmp_path)
    assert found.missing is None
    assert [path.name for path in found.files] == [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert find(Origin("Qwen/Qwen-Image", "tokenizer/"), tmp_path).missing is None
    assert find(Origin("Qwen/Qwen-Image", "nothing/"), tmp_path).missing == "no file"
    assert find(Origin("No/Where", ""), tmp_path).missing == "no file"


def test_a_missing_shard_is_seen_from_the_numbers(repo, tmp_path):
    (repo / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    assert find(DIT, tmp_path).missing == "shard diffusion_pytorch_model-00001-of-00002.safetensors"


def test_a_truncated_file_is_seen_from_its_header(repo, tmp_path):
    path = repo / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "not a complete safetensors file" in str(find(DIT, tmp_path).missing)


@pytest.mark.parametrize(
    "leftover",
    [
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors.incomplete",
        "._____temp/transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    ],
)
def test_leftovers_of_a_download_are_seen(repo, tmp_path, leftover):
    (repo / leftover).parent.mkdir(parents=True, exist_ok=True)
    (repo / leftover).touch()
    assert "an unfinished download" in str(find(DIT, tmp_path).missing)


def test_leftovers_in_a_folder_are_seen_and_not_taken_for_files(repo, tmp_path):
    (repo / "tokenizer" / "vocab.json.incomplete").touch()
    found = find(Origin("Qwen/Qwen-Image", "tokenizer/"), tmp_path)
    assert "vocab.json.incomplete" in str(found.missing)
    assert not any(path.suffix == ".incomplete" for path in found.files)


def test_our_own_list_says_what_belongs_to_a_download(repo, tmp_path):
    size = {path.name: path.stat().st_size for path in (repo / "transformer").glob("*.safetensors")}
    names = {f"transformer/{name}": number for name, number in size.items()}
    listed = list_path(tmp_path, DIT)
    listed.parent.mkdir()
    listed.write_text(json.dumps({"files": names | {"transformer/config.json": 1}}))
    found = find(DIT, tmp_path)
    assert found.missing is None  # a configuration may have been edited
    assert len(found.files) == 2
    assert found.num_bytes == sum(size.values())
    listed.write_text(json.dumps({"files": names | {"transformer/diffusion_pytorch_model_x.safetensors": 7}}))
    assert find(DIT, tmp_path).missing == "1 of 3 files, first transformer/diffusion_pytorch_model_x.safetensors"
    listed.write_text(json.dumps({"files": dict.fromkeys(names, 7)}))
    assert "2 of 2 files" in str(find(DIT, tmp_path).missing)
    listed.write_text("{")
    with pytest.raises(ModelError, match="remove it"):
        find(DIT, tmp_path)


def test_wans_converted_files_come_first_then_its_own(tmp_path):
    own = tmp_path / "Wan-AI/Wan2.1-T2V-14B/Wan2.1_VAE.pth"
    origin = Origin("Wan-AI/Wan2.1-T2V-14B", "Wan2.1_VAE.pth")
    assert find(origin, tmp_path).origin.repo == CONVERTED_REPO  # that is what would be downloaded
    own.parent.mkdir(parents=True)
    own.touch()
    assert find(origin, tmp_path).files == (own,)
    converted = tmp_path / CONVERTED_REPO / "Wan2.1_VAE.safetensors"
    converted.parent.mkdir(parents=True)
    shutil.copy(TINY / "vae/diffusion_pytorch_model.safetensors", converted)
    assert find(origin, tmp_path).files == (converted,)


def section(tmp_path, **keys):
    return ModelSection.model_validate({"base_path": str(tmp_path), "source": "modelscope", "skip_download": False} | keys)


def test_entries_are_paths_then_ids_with_their_weights_only(repo, tmp_path):
    model = section(tmp_path, paths=["/x.safetensors", ["/a", "/b"]], id_with_origin_paths=["Qwen/Qwen-Image:vae/"])
    assert model_entries(model) == [
        [Path("/x.safetensors")],
        [Path("/a"), Path("/b")],
        [repo / "vae/diffusion_pytorch_model.safetensors"],
    ]
    with pytest.raises(ModelError, match="has no weights"):
        model_entries(section(tmp_path, id_with_origin_paths=["Qwen/Qwen-Image:tokenizer/"]))
    with pytest.raises(ModelError, match=r"a/b:c is not complete in .*: no file") as caught:
        model_entries(section(tmp_path, id_with_origin_paths=["a/b:c"]))
    assert "dsray download" in caught.value.hint


def test_the_tokenizer_of_the_job_then_beside_the_weights_then_the_familys(repo, tmp_path):
    entry = [repo / "vae/diffusion_pytorch_model.safetensors"]
    given = section(tmp_path, tokenizer_path="/mine")
    assert find_tokenizers(given, TOKENIZER, [entry]) == {"tokenizer_path": Path("/mine")}
    copied = tmp_path / "elsewhere"
    shutil.copytree(TINY, copied)
    beside = find_tokenizers(section(tmp_path), TOKENIZER, [[copied / "vae" / entry[0].name]])
    assert beside == {"tokenizer_path": copied / "tokenizer"}
    shutil.rmtree(copied / "tokenizer")
    default = find_tokenizers(section(tmp_path), TOKENIZER, [[copied / "vae" / entry[0].name]])
    assert isinstance(default["tokenizer_path"], Found)
    assert tokenizer_folders(section(tmp_path), default) == {"tokenizer_path": repo / "tokenizer"}
    shutil.rmtree(repo / "tokenizer")
    default = find_tokenizers(section(tmp_path), TOKENIZER, [entry])
    with pytest.raises(ModelError, match=r"model\.tokenizer_path is not set, and the default Qwen/Qwen-Image:tokenizer/"):
        tokenizer_folders(section(tmp_path), default)


@pytest.mark.parametrize("text", ["Qwen/Qwen-Image:tokenizer/", "Qwen/Qwen-Image:tokenizer", "Qwen/Qwen-Image:./tokenizer/"])
def test_a_tokenizer_of_a_hub(repo, tmp_path, text):
    given = section(tmp_path, tokenizer_path=text)
    chosen = find_tokenizers(given, {"tokenizer_path": "a/b:c/"}, [])
    assert isinstance(chosen["tokenizer_path"], Found)
    assert tokenizer_folders(given, chosen) == {"tokenizer_path": repo / "tokenizer"}
    shutil.rmtree(repo / "tokenizer")
    with pytest.raises(ModelError, match=r"^model\.tokenizer_path: Qwen/Qwen-Image:tokenizer/ is not complete") as caught:
        tokenizer_folders(given, find_tokenizers(given, {}, []))
    assert "dsray download" in caught.value.hint


@pytest.mark.parametrize("folder", ["wan/google/umt5-xxl", "google/umt5-xxl", "wan/tokenizer", "tokenizer"])
def test_a_tokenizer_lies_beside_the_weights_in_several_ways(tmp_path, folder):
    default = {"tokenizer_path": "Wan-AI/Wan2.1-T2V-1.3B:google/umt5-xxl/"}
    weights = tmp_path / "wan" / "Wan2.1_VAE.safetensors"
    (tmp_path / folder).mkdir(parents=True)
    model = ModelSection()
    assert find_tokenizers(model, default, [[weights]]) == {}  # an empty folder is none
    (tmp_path / folder / "spiece.model").touch()
    assert find_tokenizers(model, default, [[weights]]) == {"tokenizer_path": tmp_path / folder}


def test_every_key_of_the_familys_defaults_is_looked_for(tmp_path):
    defaults = {"tokenizer_1_path": "a/b:tokenizer/", "tokenizer_2_path": "a/b:tokenizer_2/"}
    assert set(find_tokenizers(section(tmp_path), defaults, [])) == set(defaults)
    assert find_tokenizers(ModelSection(), defaults, []) == {}
