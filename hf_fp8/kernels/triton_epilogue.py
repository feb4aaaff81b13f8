"""Triton: what is left to do after an int8 matmul, in one pass: both scales, the bias, the cast."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_support import on_device


@triton.jit
def _scale_sums(sums, x_scales, w_scales, bias, out, N, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(sums + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    v = v * tl.load(w_scales + n, mask=n < N, other=0.0).to(tl.float32) * tl.load(x_scales + row)
    if HAS_BIAS:
        v += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, v.to(out.dtype.element_ty), mask=n < N)


def scale_sums(
    sums: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """sums (M, N) in int32 times x_scale (M, 1) and weight_scale (N, 1), plus bias (N,); rounded once to `dtype`."""
    m, n = sums.shape
    out = torch.empty((m, n), dtype=dtype, device=sums.device)
    with on_device(sums):
        _scale_sums[(m, triton.cdiv(n, 1024))](
            sums, x_scale, weight_scale, out if bias is None else bias, out, n, HAS_BIAS=bias is not None, BLOCK=1024
        )
    return out
