import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import family as families
from diffsynth_ray.models.layouts import (
    CALLS,
    KEY_LAYOUTS,
    FamilyCalls,
    KeyLayout,
    common_family,
    detect_component,
    join_shards,
    read_header,
    unmatched_targets,
)

TINY = Path(__file__).parents[2] / "assets" / "qwen_image_tiny"
DIT = [TINY / f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
VAE = TINY / "vae/diffusion_pytorch_model.safetensors"
OTHER = {"other": {"dit": KeyLayout(("blocks.", "head."), (("blocks.0.weight", "head.weight"),))}}


def shapes_of(*paths):
    return join_shards(((path, read_header(path)) for path in paths), KEY_LAYOUTS)


@pytest.mark.parametrize("path", [*DIT, VAE])
def test_headers_say_what_safetensors_says(path):
    with safe_open(path, framework="pt") as file:
        assert read_header(path) == {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("length", [0, 4, 8, 500, -1])
def test_a_cut_file_is_told(tmp_path, length):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(VAE.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"cut\.safetensors: not a complete safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]}}', b"\xff\xfe"],
)
def test_a_header_that_is_none_is_told(tmp_path, header):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModelError, match=r"odd\.safetensors: not a complete"):
        read_header(path)


def test_a_longer_file_is_told(tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes(VAE.read_bytes() + b"x")
    with pytest.raises(ModelError, match=r"its header says"):
        read_header(path)


def test_empty_files_are_files(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    assert read_header(tmp_path / "empty.safetensors") == {}
    with pytest.raises(ModelError, match="0 keys"):
        detect_component({}, KEY_LAYOUTS)


def test_the_family_of_another_is_named():
    shapes = {"blocks.0.weight": (4, 4), "head.weight": (4, 4)}
    with pytest.raises(ModelError, match="this is a dit of family other, the job says qwen_image"):
        detect_component(shapes, KEY_LAYOUTS | OTHER, family="qwen_image")
    assert detect_component(shapes, KEY_LAYOUTS | OTHER) == ("other", "dit")
    with pytest.raises(ModelError, match=r"this looks like a part of other dit or .*, the job says qwen_image"):
        detect_component({"blocks.7.weight": (4, 4)}, KEY_LAYOUTS | OTHER, family="qwen_image")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["blocks.0.self_attn.q.weight", "blocks.0.cross_attn.q.weight", "head.modulation"], "a dit of family wan"),
        (
            ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "vector_in.in_layer.weight"],
            "a dit of family flux,",
        ),
        (["double_blocks.0.img_attn.qkv.weight", "single_stream_modulation.lin.weight"], "a dit of family flux2"),
        (["cap_embedder.0.weight", "context_refiner.0.attention.to_q.weight"], "a part of z_image dit"),
        (["down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight"], "a Stable Diffusion UNet"),
        (["transformer_blocks.0.attn.to_q.lora_A.default.weight"], r"a LoRA \(give it as lora\.checkpoint"),
        (["something.else"], "belong to no component known here"),
    ],
)
def test_what_is_not_trained_is_named_too(keys, expected):
    with pytest.raises(ModelError, match=expected):
        detect_component(dict.fromkeys(keys, (1,)), KEY_LAYOUTS, family="qwen_image")


def test_shapes_count_too():
    shapes = shapes_of(*DIT) | {"img_in.weight": (64, 16)}
    with pytest.raises(ModelError, match=r"key names of qwen_image's dit.*img_in\.weight is \[64, 16\], not \[any, 64\]"):
        detect_component(shapes, KEY_LAYOUTS)
    twin = {"twin": {"dit": KeyLayout(KEY_LAYOUTS["qwen_image"]["dit"].prefixes, KEY_LAYOUTS["qwen_image"]["dit"].markers)}}
    assert detect_component(shapes, KEY_LAYOUTS | twin) == ("twin", "dit")
    assert detect_component(shapes_of(*DIT), KEY_LAYOUTS | twin) == ("qwen_image", "dit")


def test_an_ambiguous_part_is_not_guessed():
    both = {"a": {"dit": KeyLayout(("x.",), (("x.a",),))}, "b": {"dit": KeyLayout(("x.",), (("x.b",),))}}
    with pytest.raises(ModelError, match=r"part of a dit or b dit; set model\.family"):
        detect_component({"x.c": (1,)}, both)
    assert detect_component({"x.c": (1,)}, both, family="b") == ("b", "dit")


def test_the_family_follows_from_all_entries_together():
    """Qwen-Image's VAE has Wan's key names: alone it says nothing, in whatever order it comes."""
    wan = {"a_wan": {"vae": KEY_LAYOUTS["qwen_image"]["vae"], "dit": OTHER["other"]["dit"]}}
    vae, qwen, other = shapes_of(VAE), shapes_of(*DIT), {"blocks.0.weight": (4, 4), "head.weight": (4, 4)}
    both = KEY_LAYOUTS | wan
    assert common_family([vae, qwen], both) == common_family([qwen, vae], both) == "qwen_image"
    assert common_family([vae, other], both) == "a_wan"
    assert common_family([vae], both) is None
    assert common_family([qwen, other], both) is None
    assert common_family([], both) is None


def test_the_layouts_here_are_those_of_the_families():
    assert set(KEY_LAYOUTS) <= set(families.family_names())
    for name, layouts in KEY_LAYOUTS.items():
        assert families.get_family(name).key_layouts is layouts
        assert set(layouts) == set(families.get_family(name).component_names)


def test_the_calls_here_are_those_of_the_families():
    assert set(CALLS) == set(KEY_LAYOUTS)
    for name, calls in CALLS.items():
        family = families.get_family(name)
        assert calls == FamilyCalls(
            family.predict_components, family.image_components, family.size_multiple, family.clip_step
        ), name


def test_lora_targets_are_found_in_the_files():
    shapes = shapes_of(*DIT)
    assert unmatched_targets(shapes, ["to_q", "to_out.0", "img_mlp.net.2", "transformer_blocks.0.attn.to_k"]) == {}
    missed = unmatched_targets(shapes, ["to_q", "to_qq", "q", "norm_q"])
    assert set(missed) == {"to_qq", "q", "norm_q"}  # an ending is whole names; norms are no matrices
    assert "to_q" in missed["to_qq"]


def test_what_the_files_say_of_lora_targets_is_what_the_model_says():
    """Every family whose files have the modules' names: the recipe is found in the files, as in the model."""
    from diffsynth_ray.models.lora import resolve_lora_targets
    from diffsynth_ray.models.qwen_image import QwenImage

    family = QwenImage.build_tiny(0)
    for component, targets in QwenImage.default_lora_targets.items():
        assert KEY_LAYOUTS["qwen_image"][component].has_module_names
        folder = {"dit": "transformer", "text_encoder": "text_encoder"}[component]
        shapes = shapes_of(*sorted((TINY / folder).glob("*.safetensors")))
        assert unmatched_targets(shapes, targets) == {}
        assert resolve_lora_targets(family.components[component], targets)


def test_metadata_is_no_tensor(tmp_path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert read_header(tmp_path / "a.safetensors") == {"a": (2, 3)}
    assert read_header(VAE).keys() == load_file(VAE).keys()
