"""DiffSynth-Studio's caches, in the form that its data_process writes."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffsynth_ray.cli import app
from diffsynth_ray.data.cache import Cache
from diffsynth_ray.data.cached import CacheReader, locate_rows
from diffsynth_ray.data.manifest import only_manifest
from diffsynth_ray.errors import DataError, ExitCode
from diffsynth_ray.train.foreign_cache import import_cache
from diffsynth_ray.train.split import bytes_tensor


def sample(number: int, **shared: object) -> tuple[dict, dict, dict]:
    tokens = 3 + number
    embeds = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(number)).bfloat16()
    latents = torch.randn(1, 16, 8, 6, generator=torch.Generator().manual_seed(100 + number)).bfloat16()
    mask = (torch.arange(8) < tokens).long()[None]
    first = {"input_latents": latents, "latents": torch.randn_like(latents), "noise": None, "cfg_scale": 1, "height": 64}
    return first | shared, {"prompt": f"prompt {number}", "prompt_emb": embeds, "prompt_emb_mask": mask}, {}


def save(folder: Path, content: object, *, rank: int = 0, number: int = 0) -> None:
    (folder / str(rank)).mkdir(exist_ok=True)
    torch.save(content, folder / str(rank) / f"{number}.pth")


def take(folder: Path, cache: Cache, *, trust_pickles: bool = True):
    return import_cache(folder, cache, family="qwen_image", trust_pickles=trust_pickles, say=lambda line: None)


class Evil:
    """Would leave a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_samples_come_bit_by_bit_and_in_order(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "cache"))
    for number in range(12):
        picture = Image.new("RGB", (48, 64), (number, 0, 0))
        save(tmp_path, sample(number % 11 % 5, input_image=picture), rank=number // 11, number=number % 11)
    done = take(tmp_path, cache)
    assert (done.num_rows, done.refused) == (12, [])
    manifest = only_manifest(cache)
    assert manifest.id == done.manifest_id
    assert [row.prompt for row in manifest.rows] == [f"prompt {number % 11 % 5}" for number in range(12)]
    assert (manifest.dtype, manifest.family, manifest.encoders) == ("bf16", "qwen_image", {})
    assert {(row.height, row.width) for row in manifest.rows} == {(64, 48)}
    assert len(cache.index()) == 10  # five samples, each once
    reader = CacheReader(locate_rows(cache, manifest, kinds=("text", "image")))
    shared, positive, _ = sample(2)
    (text,), (image,) = reader.entries("text", [2]), reader.entries("image", [2])
    assert torch.equal(bytes_tensor(image["latents"]), shared["input_latents"][0])
    assert torch.equal(bytes_tensor(text["prompt_embeds"]), positive["prompt_emb"][0, :5])
    assert take(tmp_path, cache).manifest_id == done.manifest_id
    assert len(cache.index()) == 10


def test_a_picture_needs_trust(tmp_path: Path) -> None:
    save(tmp_path, sample(0, input_image=Image.new("RGB", (8, 8))))
    with pytest.raises(DataError, match="holds more than tensors") as caught:
        take(tmp_path, Cache(str(tmp_path / "cache")), trust_pickles=False)
    assert "--trust-pickles" in str(caught.value.hint)
    save(tmp_path, sample(1), number=1)
    assert take(tmp_path, Cache(str(tmp_path / "cache")), trust_pickles=False).num_rows == 1


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    save(tmp_path, sample(0, evil=Evil(tmp_path / "done")))
    with pytest.raises(DataError, match="holds more than tensors"):
        take(tmp_path, Cache(str(tmp_path / "cache")))
    assert not (tmp_path / "done").exists()


def test_what_cannot_be_taken_is_told(tmp_path: Path) -> None:
    save(tmp_path, sample(0))
    save(tmp_path, sample(1, edit_latents=torch.zeros(1, 16, 8, 6)), number=1)
    save(tmp_path, {"weights": torch.zeros(3)}, number=2)
    save(tmp_path, ({"input_latents": torch.zeros(1, 16, 8, 6)}, {}, {}), number=3)
    (tmp_path / "0" / "4.pth").write_bytes((tmp_path / "0" / "0.pth").read_bytes()[:500])
    save(tmp_path, sample(5, controlnet={"inputs": [torch.zeros(2)]}), number=5)
    done = take(tmp_path, Cache(str(tmp_path / "cache")))
    assert done.num_rows == 1
    reasons = "\n".join(done.refused)
    assert len(done.refused) == 5
    assert "1.pth: it is conditioned on edit_latents" in reasons
    assert "2.pth: expected three dictionaries" in reasons
    assert "3.pth: no prompt_emb in it" in reasons
    assert "4.pth: cannot be read" in reasons
    assert "5.pth: it is conditioned on controlnet" in reasons


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, sample(0))
    cache = str(tmp_path / "cache")
    assert app.main(["import-cache", str(tmp_path), "--trust-pickles", "-o", cache]) == ExitCode.DONE
    assert "1 rows imported" in capsys.readouterr().out
    assert app.main(["import-cache", str(tmp_path / "0"), "-o", cache]) == ExitCode.USAGE
    assert "no {rank}/{i}.pth files" in capsys.readouterr().err
    assert app.main(["import-cache", str(tmp_path), "-o", cache, "--family", "wan"]) == ExitCode.USAGE
    assert "known: qwen_image" in capsys.readouterr().err
