"""Operands of a matmul, its exact result, and which kernels take it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hf_fp8.formats import numerics
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.scheme import (
    FP8_BLOCK,
    FP8_DYNAMIC,
    FP8_STATIC,
    FP8_WEIGHT_ONLY,
    INT8_DYNAMIC,
    ROW,
    TENSOR,
    Granularity,
    Scheme,
    TensorScheme,
)
from hf_fp8.kernels import KERNELS, Problem, prepared, probing, selection, thresholds, why_not

CPU = torch.device("cpu")
SCHEMES = {
    "dynamic": FP8_DYNAMIC,
    "static": FP8_STATIC,
    "block": FP8_BLOCK,
    "weight_only": FP8_WEIGHT_ONLY,
    "channel x static": Scheme(TensorScheme(ROW), TensorScheme(TENSOR)),
    "channel x dynamic tensor": Scheme(TensorScheme(ROW), TensorScheme(TENSOR, dynamic=True)),
    "tensor x token": Scheme(TensorScheme(TENSOR), TensorScheme(ROW, dynamic=True)),
    "group 40 x group 64": Scheme(TensorScheme(Granularity(1, 40)), TensorScheme(Granularity(1, 64), dynamic=True)),
    "block 48x32 x token": Scheme(TensorScheme(Granularity(48, 32)), TensorScheme(ROW, dynamic=True)),
    "int8": INT8_DYNAMIC,
}
BY_NAME = {kernel.name: kernel for kernel in KERNELS}
# It computes in bfloat16 whatever it is given.
IN_BFLOAT16 = "int8_weight_only"
# dB below which an output is too far from the product of the dequantized operands, by dtype: 20 log10(2) per bit
# of mantissa, less a few for the sum.
THRESHOLD = {torch.float32: 110.0, torch.bfloat16: 42.0, torch.float16: 58.0}


def operands(scheme: Scheme, m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(m + n + k)
    w = torch.randn(n, k, generator=generator)
    weight = scheme.weight
    w_scale = numerics.compute_scale(w, weight.granularity, weight.dtype)
    x = torch.randn(m, k, generator=generator).clamp(-4, 4).to(dtype)
    return {
        "x": x,
        "weight": numerics.quantize(w, w_scale, weight.granularity, weight.dtype),
        "weight_scale": w_scale,
        "input_scale": torch.tensor([4 / 448]) if scheme.has_static_input else None,
    }


def expected(scheme: Scheme, given: dict[str, torch.Tensor], quantized_input: bool = True) -> torch.Tensor:
    """The matmul of the dequantized operands, in float64."""
    x = given["x"].to(torch.promote_types(given["x"].dtype, torch.float32))
    if scheme.input is not None and quantized_input:
        q, scale = numerics.quantize_input(x, scheme.input, given["input_scale"])
        x = q.double() * numerics.expand_scale(scale, scheme.input.granularity, *q.shape).double()
    w = given["weight"].double() * numerics.expand_scale(
        given["weight_scale"], scheme.weight.granularity, *given["weight"].shape
    )
    return x.double() @ w.t()


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, granularity: Granularity, dtype: torch.dtype = FP8) -> torch.Tensor:
    """Quantize to codes of `dtype`, then dequantize to the dtype of x."""
    return numerics.dequantize_input(numerics.quantize(x, scale, granularity, dtype), scale, granularity, x.dtype)


def sqnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(20 * torch.log10(wanted.norm() / (found.double() - wanted).norm().clamp(min=1e-300)))


@contextmanager
def int_mm(is_slow: bool) -> Iterator[None]:
    """As on a CPU where `torch._int_mm` is, or is not, slower than a float32 matmul."""
    measured, has_vnni = probing._fastest, torch.cpu._is_vnni_supported
    caches = probing.int_mm_is_slow, selection._select, thresholds.weight_only_limit
    clears = [*(cached.cache_clear for cached in caches), prepared._calls.clear]
    times = iter([3.0, 1.0] if is_slow else [1.0, 1.0])
    try:
        probing._fastest = lambda call, calls: next(times)
        torch.cpu._is_vnni_supported = lambda: True
        for clear in clears:
            clear()
        assert probing.int_mm_is_slow() == is_slow
        yield
    finally:
        probing._fastest, torch.cpu._is_vnni_supported = measured, has_vnni
        for clear in clears:
            clear()


def limit_as_of_large_layers(cost: thresholds.Int8Cost, n: int, k: int) -> thresholds.Limit:
    """For `Int8Cost.limit`: small layers quantize their inputs to int8 from as few rows as large ones."""
    return thresholds.Limit(cost.least, cost.why)


def runs(scheme: Scheme, n: int, k: int, dtype: torch.dtype, device: torch.device = CPU) -> list[str]:
    """The kernels that take the problem."""
    problem = Problem(device, scheme, n, k, dtype)
    return [kernel.name for kernel in KERNELS if why_not(kernel, problem) is None]
