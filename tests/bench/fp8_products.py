"""Products with frozen FP8 weights at Qwen-Image's shapes: dequantised and multiplied in bf16, as the project does it, beside
multiplied in FP8 with a scale a row.

The second rounds the activations to FP8 too, forward and backward (there the gradient times the weight's scale). Prints one
JSON line a shape: seconds of forward and input gradient, compiled, and the relative errors of both ways against float32
products with the wide weight. Activations are normal, with a few channels twenty times as large, as transformers have them.

usage: python tests/bench/fp8_products.py [--tokens N] [--repeats N]
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from diffsynth_ray.memory.fp8 import FP8, FP8_MAX, dequantize, quantize

SHAPES = {"attention": (3072, 3072), "mlp, first": (3072, 12288), "mlp, second": (12288, 3072)}
"""Inputs and outputs of the three kinds of Linear that meet every token."""


def narrow_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 values and float32 scales [rows, 1]."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / FP8_MAX).clamp(min=1e-12)
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def wide_way(x: Tensor, grad: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    wide = dequantize(weight, scale)
    return x @ wide.T, grad @ wide


def narrow_way(x: Tensor, grad: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    rows, row_scale = narrow_rows(x)
    out = torch._scaled_mm(rows, weight.T, row_scale, scale.float().T, out_dtype=x.dtype, use_fast_accum=True)
    # The weight's scale lies along the sum here: it goes into the gradient before that is rounded.
    rows, row_scale = narrow_rows(grad * scale.T)
    ones = torch.ones(1, weight.shape[1], device=x.device)
    turned = weight.T.contiguous().T  # the product wants its columns one behind the other
    return out, torch._scaled_mm(rows, turned, row_scale, ones, out_dtype=x.dtype, use_fast_accum=True)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of some calls, after three to warm up."""
    times = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[3:])[repeats // 2]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4352)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    ways = {"wide": torch.compile(wide_way), "narrow": torch.compile(narrow_way)}
    for name, (num_in, num_out) in SHAPES.items():
        wide = torch.randn(num_out, num_in, device="cuda") * 0.02
        x = torch.randn(options.tokens, num_in, device="cuda")
        x[:, :: num_in // 8] *= 20
        grad = torch.randn(options.tokens, num_out, device="cuda") * 1e-4
        expected = (x @ wide.T, grad @ wide)
        weight, scale = quantize(wide.bfloat16())
        given = (x.bfloat16(), grad.bfloat16(), weight, scale)
        record: dict[str, object] = {"shape": name, "in": num_in, "out": num_out, "tokens": options.tokens}
        for way, call in ways.items():
            found = call(*given)
            record[way] = {
                "s": round(seconds(lambda call=call: call(*given), options.repeats), 6),
                "forward_error": round(error(found[0], expected[0]), 4),
                "gradient_error": round(error(found[1], expected[1]), 4),
            }
        plain = (wide.bfloat16() @ given[0].T, given[1] @ wide.bfloat16())
        record["bf16_errors"] = [round(error(plain[0].T, expected[0]), 4), round(error(plain[1], expected[1]), 4)]
        record |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
