"""`dsray export`: from any tool's key names to any other's, for every family."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_ray.cli import app

LAYERS = {
    "wan": ["blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.17.cross_attn.o"],
    "flux": ["blocks.0.attn.a_to_qkv", "single_blocks.37.to_qkv_mlp", "single_blocks.0.norm.linear", "blocks.12.ff_b.2"],
    "z_image": ["layers.0.attention.to_q", "noise_refiner.1.feed_forward.w2", "layers.29.attention.to_out.0"],
    "qwen_image": ["transformer_blocks.0.img_mod.1", "transformer_blocks.59.attn.to_out.0"],
    "flux2": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj", "transformer_blocks.7.ff.linear_in"],
}
FIRST = {
    "wan": "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    "flux": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "z_image": "lora_unet_layers_0_attention_to_q.lora_down.weight",
    "qwen_image": "lora_unet_transformer_blocks_0_img_mod_1.lora_down.weight",
    "flux2": "lora_unet_single_blocks_0_linear1.lora_down.weight",
}
# Of B, by those of A; other layers have three times as many.
ROWS = {"to_qkv_mlp": 7, "to_qkv_mlp_proj": 9, "ff.linear_in": 6}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))

    def command(*arguments):
        code = app.main(["export", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def write_lora(path, layers, *, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in layers:
        rows = next((count for name, count in ROWS.items() if layer.endswith(name)), 3) * 32
        state[f"{layer}.lora_A.default.weight"] = torch.randn(4, 32, generator=generator).to(dtype)
        state[f"{layer}.lora_B.default.weight"] = torch.randn(rows, 4, generator=generator).to(dtype)
    save_file(state, path)
    return state


@pytest.mark.parametrize("family", LAYERS)
def test_every_format_and_back(family, tmp_path, run):
    state = write_lora(tmp_path / "lora.safetensors", LAYERS[family])
    for target in ("diffusers", "comfyui", "kohya", "diffsynth"):
        code, out, err = run(tmp_path / "lora.safetensors", "--format", target)
        assert code == 0, err
        path = tmp_path / f"lora.{target}.safetensors"
        assert out.strip() == str(path)
        assert family in err
        code, _, err = run(path, "--format", "diffsynth", "-o", tmp_path / "back.safetensors", "--force")
        assert code == 0, err
        back = load_file(tmp_path / "back.safetensors")
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)
    kohya = load_file(tmp_path / "lora.kohya.safetensors")
    assert FIRST[family] in kohya
    assert kohya[FIRST[family].replace("lora_down.weight", "alpha")] == 4


def test_as_json(tmp_path, run):
    write_lora(tmp_path / "lora.safetensors", LAYERS["wan"])
    code, out, _ = run(tmp_path / "lora.safetensors", "--format", "kohya", "--json")
    assert code == 0
    assert json.loads(out) == {
        "path": str(tmp_path / "lora.kohya.safetensors"), "family": "wan", "format": "kohya", "num_tensors": 9,
    }  # fmt: skip


def test_names_of_several_families(tmp_path, run):
    write_lora(tmp_path / "lora.safetensors", ["transformer_blocks.0.attn.to_out.0"])
    code, _, err = run(tmp_path / "lora.safetensors", "--format", "kohya")
    assert code == 2
    assert "flux, flux2, qwen_image" in err
    assert "--family" in err
    assert run(tmp_path / "lora.safetensors", "--format", "kohya", "--family", "flux")[0] == 0
    assert "lora_unet_double_blocks_0_img_attn_proj.alpha" in load_file(tmp_path / "lora.kohya.safetensors")


@pytest.mark.parametrize(("rows", "family"), [(4, "flux"), (6, "flux2"), (3, None)])
def test_names_of_two_families_with_the_shapes_of_one(tmp_path, run, rows, family):
    state = {"double_blocks.0.img_mlp.0.lora_A.weight": torch.ones(4, 32)}
    state["double_blocks.0.img_mlp.0.lora_B.weight"] = torch.ones(rows * 32, 4)
    save_file(state, tmp_path / "lora.safetensors")
    code, out, _ = run(tmp_path / "lora.safetensors", "--format", "diffsynth", "--json")
    assert code == (2 if family is None else 0)
    assert "several families (flux, flux2)" in out if family is None else json.loads(out)["family"] == family


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (None, [], ["lora.safetensors", "no such file"]),
        (b"an error page", [], ["lora.safetensors", "not a complete safetensors file"]),
        ({"img_in.weight": torch.zeros(2)}, [], ["lora.safetensors", "'img_in.weight' is no LoRA key"]),
        ({"unet.x.lora_A.weight": torch.zeros(2)}, [], ["no family known here", "unet.x"]),
        ({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, [], ["only A"]),
        ({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, ["--family", "wann"], ["wann", "known:"]),
        (None, ["--format", "onnx"], ["onnx"]),
    ],
)
def test_bad_input(content, arguments, expected, tmp_path, run):
    path = tmp_path / "lora.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path)
    code, _, err = run(path, "--format", "kohya", *arguments)
    assert code == 2, err
    for text in expected:
        assert text in err
    assert not (tmp_path / "lora.kohya.safetensors").exists()


def test_nothing_is_overwritten_unasked(tmp_path, run):
    write_lora(tmp_path / "lora.safetensors", LAYERS["wan"])
    (tmp_path / "lora.kohya.safetensors").write_text("mine")
    code, _, err = run(tmp_path / "lora.safetensors", "--format", "kohya")
    assert code == 2
    assert "--force" in err
    assert (tmp_path / "lora.kohya.safetensors").read_text() == "mine"


def test_a_folder_in_place_of_a_file(tmp_path, run):
    write_lora(tmp_path / "lora.safetensors", LAYERS["wan"])
    code, _, err = run(tmp_path, "--format", "kohya")
    assert (code, f"{tmp_path} is a folder; give the file" in err) == (2, True)
    code, _, err = run(tmp_path / "lora.safetensors", "--format", "kohya", "-o", tmp_path, "--force")
    assert (code, f"{tmp_path} is a folder\nhint: give a file's name" in err) == (2, True)


@pytest.mark.parametrize("place", ["lora.safetensors/x", "/proc/x"])
def test_a_place_that_cannot_be_written_is_told_without_a_traceback(tmp_path, run, place):
    write_lora(tmp_path / "lora.safetensors", LAYERS["wan"])
    code, _, err = run(tmp_path / "lora.safetensors", "--format", "kohya", "-o", tmp_path / place)
    told, hint = err.splitlines()[-2:]
    assert (code, hint) == (2, "hint: give another place with -o")
    assert told.startswith(f"error: {tmp_path / place} cannot be written: ")
