"""Scaled FP8 storage of frozen Linear weights."""

import pytest
import torch
from torch import nn

from diffsynth_ray.memory.fp8 import FP8, Fp8Linear, convert_to_fp8, dequantize, quantize

torch.set_num_threads(1)


def plain_cast_error(weight):
    return relative_error(weight.to(FP8).float(), weight)


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("std", [0.02, 0.002, 1e-6, 30.0])
def test_error_does_not_depend_on_the_size_of_the_weights(std):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * std
    narrow, scale = quantize(weight)
    # 3 bits of mantissa: at most 2^-4 a weight, uniformly spread about 2^-4 / sqrt(3) of it on average.
    assert relative_error(dequantize(narrow, scale), weight) < 0.03
    assert dequantize(narrow, scale).isfinite().all()
    if std == 0.002:
        assert plain_cast_error(weight) > 0.2


def test_rows_of_different_sizes_have_their_own_scale():
    weight = torch.randn(4, 64) * torch.tensor([[1e-4], [1.0], [100.0], [0.0]])
    narrow, scale = quantize(weight)
    wide = dequantize(narrow, scale)
    for row in range(3):
        assert relative_error(wide[row], weight[row]) < 0.04
    assert torch.equal(wide[3], torch.zeros(64))


@pytest.mark.parametrize("largest", [448.0, 449.0, 0.875, 1.0, 3.4e38])
def test_the_largest_weight_never_overflows(largest):
    narrow, scale = quantize(torch.tensor([[largest, -largest / 3]]))
    assert narrow.float().isfinite().all()
    assert narrow.float().abs().max() > 200  # the range is used
    assert torch.log2(scale.float()) % 1 == 0


@pytest.mark.parametrize("largest", [448.0, 0.875, 448.0 * 2**10])
def test_a_row_that_fits_the_range_exactly_uses_all_of_it(largest):
    narrow, scale = quantize(torch.tensor([[largest, largest / 4]]))
    assert narrow.float().tolist() == [[448.0, 112.0]]
    assert scale.item() == largest / 448


def test_dequantising_is_exact_in_bf16():
    weight = (torch.randn(64, 64) * 0.02).bfloat16()
    narrow, scale = quantize(weight)
    exact = narrow.double() * scale.double()
    assert torch.equal(dequantize(narrow, scale).double(), exact)


def test_what_is_already_fp8_is_kept():
    weight = (torch.randn(16, 64)).to(FP8).float() * 2**-6
    narrow, scale = quantize(weight)
    assert torch.equal(dequantize(narrow, scale), weight)


def test_a_converted_linear_computes_with_the_dequantised_weight():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 8, bias=False))
    block.requires_grad_(False)
    block[2].requires_grad_(True)
    assert convert_to_fp8([block]) == [block[0]]
    assert isinstance(block[0], Fp8Linear)
    assert block[0].weight.dtype == FP8
    assert block[0].bias.dtype == torch.float32
    wide = nn.Linear(32, 16)
    wide.weight.data, wide.bias.data = dequantize(block[0].weight, block[0].weight_scale), block[0].bias
    x, y = (torch.ones(3, 32, requires_grad=True) for _ in range(2))
    (got := block[0](x)).sum().backward()
    (expected := wide(y)).sum().backward()
    assert torch.equal(got, expected)
    assert torch.equal(x.grad, y.grad)
    assert block[0].weight.grad is None
