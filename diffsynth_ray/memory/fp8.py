"""Frozen Linear weights in scaled FP8: half the bytes of bf16 for a rounding error of about 2.6 % a weight.

float8_e4m3fn has 3 bits of mantissa and ends at 448. A plain cast of weights of std 0.002 flushes a third of them to zero; a
scale per output channel puts each row's largest weight just under 448. Scales are powers of two: dividing and multiplying by them
is exact, so that fp8 x scale is exactly a bf16 number and the only error is FP8's own rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] -> float8 [out, in] and its scale [out, 1] in the weight's dtype, a power of two a row."""
    wide = weight.float()
    # |w| / 448 = mantissa * 2^exponent with the mantissa in [0.5, 1): 2^exponent is the smallest scale that never overflows.
    mantissa, exponent = torch.frexp(wide.abs().amax(dim=1, keepdim=True) / FP8_MAX)
    scale = torch.exp2(torch.where(mantissa == 0.5, exponent - 1, exponent).float())
    scale = torch.where(mantissa == 0, torch.ones_like(scale), scale)
    return (wide / scale).to(FP8), scale.to(weight.dtype)


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight [out, in] in the scale's dtype; exact."""
    return weight.to(scale.dtype) * scale


class _DequantizedLinear(torch.autograd.Function):
    """x W^T + bias with W kept in FP8: backward dequantises again instead of saving the wide weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantize(weight, scale), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return grads[0] @ dequantize(weight, scale), None, None, None


class Fp8Linear(nn.Linear):
    """A frozen Linear whose weight is float8 [out, in] with `weight_scale` [out, 1]; computes in the scale's dtype."""

    weight_scale: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return cast(Tensor, _DequantizedLinear.apply(input, self.weight, self.weight_scale, self.bias))


def convert_to_fp8(blocks: Iterable[nn.Module]) -> list[Fp8Linear]:
    """Turn every frozen Linear inside the blocks into an Fp8Linear, in place; returns them.

    What is outside of the blocks (embeddings, the first and last projection) is small and the most sensitive: it stays wide, as
    norms, biases and adapters do. Weights on the meta device stay there, to be filled by `placement`.
    """
    converted = []
    for block in blocks:
        for module in block.modules():
            if type(module) is not nn.Linear or module.weight.requires_grad:
                continue
            weight = module.weight
            if weight.is_meta:
                narrow, scale = torch.empty_like(weight, dtype=FP8), weight.new_empty(weight.shape[0], 1)
            else:
                narrow, scale = quantize(weight.detach())
            # The module keeps its identity, so that adapters and parents that hold it need no change.
            module.__class__ = Fp8Linear
            module.weight = nn.Parameter(narrow, requires_grad=False)
            module.weight_scale = nn.Parameter(scale, requires_grad=False)
            converted.append(cast(Fp8Linear, module))
    return converted
