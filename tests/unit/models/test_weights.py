import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.qwen_image import QwenImage
from diffsynth_ray.models.weight_source import seeded_generator
from diffsynth_ray.models.weights import load_components, load_tensors

torch.set_num_threads(1)
TINY = Path(__file__).parents[2] / "assets" / "qwen_image_tiny"
DIT = [TINY / f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
TEXT = [TINY / f"text_encoder/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
VAE = TINY / "vae/diffusion_pytorch_model.safetensors"


def names(paths):
    return [str(path) for path in paths]


def load(entries, **kwargs):
    _, files = load_components(entries)
    return QwenImage.load(files, **kwargs)


def test_entries_are_recognised_whatever_their_order():
    family, files = load_components([str(VAE), names(reversed(TEXT)), names(reversed(DIT))])
    assert family == "qwen_image"
    assert set(files) == {"dit", "text_encoder", "vae"}
    assert files["dit"].config["num_layers"] == 2


def test_shards_of_two_components():
    with pytest.raises(ModelError) as caught:
        load_components([[str(DIT[0]), str(TEXT[0])]])
    assert str(DIT[0]) in str(caught.value)
    assert str(TEXT[0]) in str(caught.value)


def test_shards_of_two_models(tmp_path):
    other = tmp_path / "other.safetensors"
    shutil.copy(DIT[0], other)
    with pytest.raises(ModelError, match="both hold") as caught:
        load_components([[*names(DIT), str(other)]])
    assert str(DIT[0]) in str(caught.value)
    assert str(other) in str(caught.value)
    with pytest.raises(ModelError, match="dit is given twice"):
        load_components([names(DIT), str(other)])


@pytest.mark.parametrize(("shards", "first"), [(DIT[:1], "transformer_blocks.1"), (DIT[1:], "time_text_embed")])
def test_missing_shard(shards, first):
    _, files = load_components([names(shards)], family="qwen_image")
    with pytest.raises(ModelError, match=r"of 77 tensors are missing.*is a shard missing\?") as caught:
        QwenImage.load(files, components=["dit"])
    assert first in str(caught.value)
    assert shards[0].name in str(caught.value)


def test_missing_shard_without_a_config(tmp_path):
    shutil.copy(DIT[1], tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match=r"part of flux dit or flux2 dit or qwen_image dit; set model\.family"):
        load_components([str(tmp_path / "b.safetensors")])
    with pytest.raises(ModelError, match="shard missing"):
        load_components([str(tmp_path / "b.safetensors")], family="qwen_image")


def test_wrong_files(tmp_path):
    lora = tmp_path / "unet.safetensors"
    save_file({"down_blocks.0.weight": torch.zeros(2)}, lora)
    with pytest.raises(ModelError, match=r"unet\.safetensors.*belong to no component"):
        load_components([str(lora)])
    with pytest.raises(ModelError, match="no such file"):
        load_components([str(tmp_path / "nothing.safetensors")])
    text = tmp_path / "text.safetensors"
    text.write_text("an error page, not weights")
    with pytest.raises(ModelError, match=r"text\.safetensors: not a complete"):
        load_components([str(text)])


def test_truncated_files(tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(VAE.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"cut\.safetensors: not a complete safetensors file"):
        load_components([str(cut)])
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.zeros(1000)}, whole)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"cut\.pth: not a readable"):
        load_tensors(cut)


def test_pth_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="evil"):
        load_tensors(tmp_path / "evil.pth")
    assert not (tmp_path / "touched").exists()


def test_pth_is_read(tmp_path):
    torch.save({"state_dict": load_file(VAE)}, tmp_path / "vae.pth")
    family = load([str(tmp_path / "vae.pth")], dtype=torch.float32)
    assert torch.equal(family.components["vae"].quant_conv.bias, load_file(VAE)["quant_conv.bias"].float())


def test_other_shapes_and_unexpected_keys_are_named(tmp_path):
    state = load_file(VAE)
    state["quant_conv.bias"] = torch.zeros(3)
    state["encoder.extra"] = torch.zeros(3)
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(ModelError, match=r"encoder\.extra.*quant_conv\.bias \(file \[3\], model \[32\]\)"):
        load([str(tmp_path / "vae.safetensors")])


def test_config_is_inferred_without_config_json_and_next_to_a_foreign_one(tmp_path):
    for path in [*DIT, VAE]:
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLQwenImage", "base_dim": 8}))
    _, files = load_components([names(tmp_path / path.name for path in DIT), str(tmp_path / VAE.name)])
    assert files["dit"].config["attention_head_dim"] == 32
    assert files["vae"].config == {"base_dim": 8}
    reference = load([names(DIT), str(VAE)], dtype=torch.float32)
    for name, module in QwenImage.load(files, dtype=torch.float32).components.items():
        state = reference.components[name].state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())


def test_weights_are_converted_and_independent_of_the_file():
    family = load([str(VAE)], dtype=torch.bfloat16)
    state, file = family.components["vae"].state_dict(), load_file(VAE)
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())
    family.components["vae"].quant_conv.bias.data.zero_()
    assert file["quant_conv.bias"].abs().max() > 0
    assert load_file(VAE)["quant_conv.bias"].abs().max() > 0


def test_exported_text_encoder_names_load_too(tmp_path):
    state = load([names(TEXT)], dtype=torch.float32).components["text_encoder"].state_dict()
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(TEXT[0].parent / "config.json", tmp_path)
    family, files = load_components([str(tmp_path / "model.safetensors")])
    tokenizer = {"tokenizer_path": TINY / "tokenizer"}
    again = QwenImage.load(files, dtype=torch.float32, tokenizer_paths=tokenizer).components["text_encoder"].state_dict()
    assert family == "qwen_image"
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_seeded_generators_differ_by_name():
    draws = [torch.rand(1, generator=seeded_generator(seed, name)) for seed, name in [(0, "a"), (0, "b"), (1, "a")]]
    assert len(set(map(float, draws))) == 3
