"""Weights and inputs at the ends of the range, and what must come out."""

from __future__ import annotations

import torch
from support.kernels import IN_BFLOAT16

from hf_fp8.formats import numerics
from hf_fp8.formats.code_types import INT8
from hf_fp8.formats.scheme import Scheme
from hf_fp8.kernels import WEIGHT_ONLY

LEFT_ALONE = {kernel.name for kernel in WEIGHT_ONLY} | {"grouped_weight_only", "triton_grouped_weight_only"}
# Sizes of rows of inputs, and of weights. Matmuls in bfloat16 take subnormal numbers for 0 on some CPUs, dense ones, too.
ROWS = {torch.float32: [1e36, 1.0, 1e-38, 3e37], torch.bfloat16: [1e36, 1.0, 1e-36, 3e37], torch.float16: [2e4, 1.0, 1e-6, 1e4]}
WEIGHTS = {
    torch.float32: [1.0, 1e-3, 1e-36, 1e4, 1e33],
    torch.bfloat16: [1.0, 1e-3, 1e-30, 1e4, 1e33],
    torch.float16: [1.0, 1e-3, 1e-9, 1e9],
}


def rounding(kernel: str, scheme: Scheme, dtype: torch.dtype) -> tuple[float, float]:
    """How far an input may be off: relative to itself, to the largest of its row."""
    own = 2 * torch.finfo(torch.bfloat16 if kernel == IN_BFLOAT16 else dtype).eps
    if kernel in LEFT_ALONE or scheme.input is None:
        return own, 0.0
    if scheme.input.dtype == INT8:
        return own, 0.51 / 127
    return own + 2.0 ** (-3 if kernel.startswith("triton") else -4), 1e-5  # the interpreter cuts digits off


def check(found: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, kernel: str, scheme: Scheme) -> int:
    """Every element against the product in float64. Returns how many were in the range of the dtype and looked at."""
    relative, of_largest = rounding(kernel, scheme, found.dtype)
    size = x.abs().double()
    largest = size.amax() if scheme.input is not None and scheme.input.granularity.is_tensor else size.amax(1, keepdim=True)
    info = torch.finfo(found.dtype)
    sums = size @ dense.abs().t()
    inside = (sums < info.max) & (sums > 64 * info.tiny)
    allowed = (size * relative + largest * of_largest) @ dense.abs().t() + sums * 4 * info.eps + info.tiny
    off = (found.double() - x.double() @ dense.t()).abs()
    assert bool((off[inside] <= allowed[inside]).all()), (kernel, float((off / allowed)[inside].nan_to_num(torch.inf).amax()))
    return int(inside.sum())


def weights(scheme: Scheme, n: int, k: int, size: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scale, what they stand for in float64)."""
    granularity = scheme.weight.granularity
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    scale = numerics.compute_scale(w, granularity, scheme.weight.dtype)
    codes, scale = numerics.quantize(w, scale, granularity, scheme.weight.dtype), (scale.double() * size).float()
    return codes, scale, codes.double() * numerics.expand_scale(scale, granularity, n, k).double()


def inputs(m: int, k: int, sizes: list[float], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(m + k)).clamp(-3, 3)[:, ::2].double()  # not contiguous
    return (x * torch.tensor(sizes, dtype=torch.float64).repeat(m)[:m].unsqueeze(1)).to(dtype)
