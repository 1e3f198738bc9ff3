"""Weights from files to the GPU and to pinned host memory: every value arrives, FP8 or not, whatever is still on its way."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffsynth_ray.memory.fp8 import convert_to_fp8, quantize
from diffsynth_ray.memory.placement import LARGEST_PINNED_BYTES, place
from diffsynth_ray.models.weight_source import FileWeights

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
WIDTH, BLOCKS = 2048, 40


def build():
    with torch.device("meta"):
        model = nn.Module()
        model.large = nn.Parameter(torch.empty(LARGEST_PINNED_BYTES // 2 + 1, dtype=torch.bfloat16))
        model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(BLOCKS))
    return model.to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("on_host", [False, True])
def test_every_value_arrives(tmp_path, fp8, on_host):
    model, path = build(), tmp_path / "weights.safetensors"
    values = {name: torch.randn(param.shape).bfloat16() for name, param in model.named_parameters()}
    save_file(values, path)
    if fp8:
        convert_to_fp8(model.blocks)
    source = FileWeights({name: (path, name) for name in values}, {}, memory_tensors=lambda key, tensor: {key: tensor},
                         dtype=torch.bfloat16)  # fmt: skip
    units = {"model": {f"blocks.{number}": block for number, block in enumerate(model.blocks)}} if on_host else None
    built = place({"model": model}, {"model": source}, device=torch.device("cuda"), units=units, say=print)
    assert torch.equal(model.large.cpu(), values["large"])
    homes = {id(slot.param): slot.view(unit.host) for unit in built.values() for slot in unit.slots}
    assert len(homes) == ((3 if fp8 else 2) * BLOCKS if on_host else 0)
    for number, block in enumerate(model.blocks):
        expected = values[f"blocks.{number}.0.weight"]
        narrow, scale = quantize(expected.cuda()) if fp8 else (expected, None)
        found = homes.get(id(block[0].weight), block[0].weight)
        assert torch.equal(found.cpu().float(), narrow.cpu().float()), number
        if scale is not None:
            assert torch.equal(homes.get(id(block[0].weight_scale), block[0].weight_scale).cpu(), scale.cpu())
        assert torch.equal(homes.get(id(block[0].bias), block[0].bias).cpu(), values[f"blocks.{number}.0.bias"])
