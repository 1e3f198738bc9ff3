from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models.family import EncodedBatch
from diffsynth_ray.models.lora import MergedWeights, add_lora, load_lora, lora_state_dict, merge_lora
from diffsynth_ray.models.names import LORA_FORMATS, lora_from_memory, lora_to_memory, rename_lora
from diffsynth_ray.models.qwen_image import QwenImage

torch.set_num_threads(1)
RECORDS = Path(__file__).parents[2] / "assets" / "records"
DEFAULTS = QwenImage.default_lora_targets["dit"]
INPUT = EncodedBatch(
    torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)),
    {"prompt_embeds": torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))},
)


def tiny():
    return QwenImage.build_tiny(0, components=["dit"])


def output(family):
    with torch.no_grad():
        return family.predict(INPUT, INPUT.latents, torch.tensor([500.0]))


def trained_lora(*, rank=4, alpha=None):
    """A tiny DiT with a LoRA whose B is not zero."""
    family = tiny()
    add_lora(family.components["dit"], target_modules=None, rank=rank, alpha=alpha, seed=0, default_targets=DEFAULTS)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in family.components["dit"].named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return family


def test_names_are_diffsynth_s_and_only_the_adapters_train():
    dit = tiny().components["dit"]
    add_lora(dit, target_modules=None, rank=4, seed=0, default_targets=DEFAULTS)
    recorded = load_file(RECORDS / "lora_float32" / "lora_init.safetensors")
    state = lora_state_dict(dit)
    assert {key: tensor.shape for key, tensor in state.items()} == {key: t.shape for key, t in recorded.items()}
    trainable = {name for name, parameter in dit.named_parameters() if parameter.requires_grad}
    assert trainable == set(recorded)


def test_a_new_lora_changes_nothing():
    family = tiny()
    before = output(family)
    add_lora(family.components["dit"], target_modules=["to_q"], rank=4, seed=0)
    assert torch.equal(output(family), before)


def test_init_depends_on_seed_and_name_only():
    torch.manual_seed(1)
    first, second, other = (tiny().components["dit"] for _ in range(3))
    state_of_generator = torch.get_rng_state()
    add_lora(first, target_modules=["to_q", "to_k"], rank=4, seed=7)
    assert torch.equal(torch.get_rng_state(), state_of_generator)
    add_lora(second, target_modules=["img_mod.1", "to_k", "to_q"], rank=4, seed=7)
    add_lora(other, target_modules=["to_q", "to_k"], rank=4, seed=8)
    states = [lora_state_dict(dit) for dit in (first, second, other)]
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key])
        if ".lora_A." in key:
            assert not torch.equal(tensor, states[2][key])
            # kaiming uniform with a = sqrt(5): bound 1 / sqrt(in)
            assert 0.1 < tensor.abs().max() <= 1 / 8
        else:
            assert not tensor.any()
    keys = [key for key in states[0] if ".lora_A." in key]
    assert not torch.equal(states[0][keys[0]], states[0][keys[1]])


def test_adapters_may_have_another_dtype_than_the_base():
    dit = QwenImage.build_tiny(0, components=["dit"], dtype=torch.bfloat16)
    add_lora(dit.components["dit"], target_modules=["to_q"], rank=2, seed=0, dtype=torch.float32)
    assert {tensor.dtype for tensor in lora_state_dict(dit.components["dit"]).values()} == {torch.float32}
    assert output(dit).dtype == torch.bfloat16


def test_targets_that_match_nothing():
    dit = tiny().components["dit"]
    with pytest.raises(ModelError, match=r"'toq' match no Linear.*did you mean.*to_q"):
        add_lora(dit, target_modules=["toq", "to_k"], rank=4, seed=0)
    with pytest.raises(ModelError, match=r"'xyz'.*attn\.to_out\.0"):
        add_lora(dit, target_modules=["xyz"], rank=4, seed=0)
    with pytest.raises(ModelError, match="no default LoRA targets"):
        add_lora(dit, target_modules=None, rank=4, seed=0)
    with pytest.raises(ModelError, match=r"automatic search.*512"):
        add_lora(dit, target_modules=[], rank=4, seed=0)
    assert not lora_state_dict(dit)


def test_automatic_targets():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.outside = nn.Linear(512, 512)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(512, 600), nn.Linear(600, 100))])

    net = Net()
    assert add_lora(net, target_modules=[], rank=2, seed=0) == ["blocks.0.0"]
    assert set(lora_state_dict(net)) == {f"blocks.0.0.lora_{part}.default.weight" for part in "AB"}


def test_a_target_reaches_no_other_layer_with_the_same_ending():
    net = nn.ModuleDict(
        {"a": nn.ModuleDict({"q": nn.Linear(4, 4)}), "b": nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 4)})})}
    )
    assert add_lora(net, target_modules=["b.a.q"], rank=2, seed=0) == ["b.a.q"]
    assert len(lora_state_dict(net)) == 2


@pytest.mark.parametrize("target", LORA_FORMATS)
def test_key_names_round_trip(target):
    dit = trained_lora().components["dit"]
    state = lora_state_dict(dit)
    modules = [name for name, child in tiny().components["dit"].named_modules() if isinstance(child, nn.Linear)]
    there = lora_from_memory(state, target=target)
    back = lora_to_memory(there, modules=modules)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    again = rename_lora(there, target=target, modules=modules)
    assert list(again) == list(there)


def test_key_names_of_each_format():
    state = {f"transformer_blocks.0.attn.to_out.0.lora_{part}.default.weight": torch.zeros(2, 2) for part in "AB"}
    first = {target: next(iter(lora_from_memory(state, target=target))) for target in LORA_FORMATS}
    assert first == {
        "diffsynth": "transformer_blocks.0.attn.to_out.0.lora_A.default.weight",
        "diffusers": "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight",
        "comfyui": "diffusion_model.transformer_blocks.0.attn.to_out.0.lora_A.weight",
        "kohya": "lora_unet_transformer_blocks_0_attn_to_out_0.lora_down.weight",
    }


def test_alpha_of_a_file_is_kept():
    state = {"lora_unet_a_q.lora_down.weight": torch.ones(4, 2), "lora_unet_a_q.lora_up.weight": torch.ones(2, 4)}
    state["lora_unet_a_q.alpha"] = torch.tensor(2.0)
    assert lora_to_memory(state, modules=["a.q"])["a.q.lora_B.default.weight"].unique() == 0.5


def test_bad_lora_keys():
    with pytest.raises(ModelError, match="no LoRA key"):
        lora_to_memory({"img_in.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match="only A"):
        lora_to_memory({"img_in.lora_A.weight": torch.zeros(1)})


def test_diffusers_loads_the_export():
    trained = trained_lora()
    plain = tiny()
    before = output(plain)
    state = lora_from_memory(lora_state_dict(trained.components["dit"]), target="diffusers")
    plain.components["dit"].load_lora_adapter(state)
    after = output(plain)
    assert (after - before).abs().max() > 1e-2
    assert (after - output(trained)).abs().max() < 1e-5


def test_diffusers_pipeline_loads_the_export():
    from diffusers import QwenImagePipeline

    state = lora_from_memory(lora_state_dict(trained_lora().components["dit"]), target="diffusers")
    plain = tiny()
    before = output(plain)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    QwenImagePipeline(transformer=plain.components["dit"], **parts).load_lora_weights(state)
    assert (output(plain) - before).abs().max() > 1e-2


def test_peft_loads_the_export():
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    trained = trained_lora()
    plain = tiny()
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=list(DEFAULTS)), plain.components["dit"])
    state = lora_from_memory(lora_state_dict(trained.components["dit"]), target="diffusers")
    result = set_peft_model_state_dict(
        plain.components["dit"], {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    )
    assert not result.unexpected_keys
    assert (output(plain) - output(trained)).abs().max() < 1e-5


@pytest.mark.parametrize("target", LORA_FORMATS)
def test_load_lora_reads_every_format(target, tmp_path):
    trained = trained_lora()
    state = lora_state_dict(trained.components["dit"])
    save_file(lora_from_memory(state, target=target), tmp_path / "lora.safetensors")
    family = tiny()
    add_lora(family.components["dit"], target_modules=None, rank=4, seed=1, default_targets=DEFAULTS)
    load_lora(family.components["dit"], tmp_path / "lora.safetensors")
    loaded = lora_state_dict(family.components["dit"])
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert torch.equal(output(family), output(trained))


def test_load_lora_that_does_not_fit():
    state = lora_state_dict(trained_lora().components["dit"])
    dit = tiny().components["dit"]
    add_lora(dit, target_modules=None, rank=8, seed=1, default_targets=DEFAULTS)
    with pytest.raises(ModelError, match=r"\[lora\] rank"):
        load_lora(dit, state)
    dit = tiny().components["dit"]
    add_lora(dit, target_modules=["to_q"], rank=4, seed=1)
    with pytest.raises(ModelError, match="target_modules"):
        load_lora(dit, state)


def test_alpha_is_folded_into_the_export():
    trained = trained_lora(alpha=2)
    state = lora_state_dict(trained.components["dit"])
    plain = tiny()
    add_lora(plain.components["dit"], target_modules=None, rank=4, seed=1, default_targets=DEFAULTS)
    load_lora(plain.components["dit"], state)
    assert (output(plain) - output(trained)).abs().max() < 1e-5
    other = tiny()
    add_lora(other.components["dit"], target_modules=None, rank=4, alpha=2, seed=1, default_targets=DEFAULTS)
    load_lora(other.components["dit"], state)
    assert torch.equal(output(other), output(trained))


def read_weights(family):
    for module in family.components.values():
        state = {name: module.weight_source.read(name) for name, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True)


def test_merged_preset_is_the_adapter():
    trained = trained_lora()
    plain = QwenImage.build_tiny(0, components=["dit"], device="meta")
    plain.device = torch.device("cpu")
    assert merge_lora(plain.components["dit"], lora_state_dict(trained.components["dit"])) == 24
    read_weights(plain)
    assert (output(plain) - output(trained)).abs().max() < 1e-5


def test_a_preset_is_added_in_float32_and_rounded_once():
    draw = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(shape, generator=draw).bfloat16() for shape in ((16, 16), (4, 16), (16, 4)))
    source = SimpleNamespace(read=lambda name, into=None: weight)
    merged = MergedWeights(source, {"layer": (down, up)})
    assert torch.equal(merged.read("layer.weight"), (weight.double() + up.double() @ down.double()).bfloat16())
    assert merged.read("layer.bias") is weight, "other weights are as they were"
