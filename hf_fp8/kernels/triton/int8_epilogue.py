"""Triton: the epilogue of an int8 matmul in one pass: both scales, outliers, the bias, the cast."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..base import Input, Weight
from .scales import dot_dtype, power_of, times_scales
from .support import on_device

# Not measured: 16 KB of sums per program, plus the tile of outliers (at most 64 columns).
BLOCK_M, BLOCK_N = 32, 128
# Minimum number of columns for tl.dot.
LEAST = 16


@triton.jit
def _scale_sums(
    sums, x_scales, w_scales, bias, outliers, beside, out, M, N, R, stride_om, stride_or,
    HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m[:, None] < M) & (n[None, :] < N)
    at = m[:, None].to(tl.int64) * N + n[None, :]
    w_scale = tl.load(w_scales + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    x_scale = tl.load(x_scales + m, mask=m < M, other=0.0)[:, None]
    v = times_scales(tl.load(sums + at, mask=mask, other=0).to(tl.float32), x_scale, w_scale)
    if BLOCK_R > 0:
        r = tl.arange(0, BLOCK_R)
        at_left = m[:, None] * stride_om + r[None, :] * stride_or
        left = tl.load(outliers + at_left, mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)
        right = tl.load(beside + r[:, None] * N + n[None, :], mask=(r[:, None] < R) & (n[None, :] < N), other=0.0)
        # Both casts are exact: outliers come from a tensor of this dtype, and int8 codes fit into any of them.
        power, rest = power_of(w_scale, DTYPE)
        v += tl.dot(left.to(DTYPE), (right * power).to(DTYPE), input_precision="ieee") * rest
    if HAS_BIAS:
        v += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=mask)


def scale_sums(sums: torch.Tensor, x: Input, w: Weight, beside: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """(sums (M, N) in int32 * x.scale + x.outliers @ beside) * w.scale + w.bias, in float32, rounded once to `dtype`.

    beside: (R, N) float32, codes of the weight in the outlier columns. Outliers were in `dtype` before.
    """
    m, n = sums.shape
    out = torch.empty((m, n), dtype=dtype, device=sums.device)
    count = 0 if beside is None else beside.shape[0]
    outliers = out if x.outliers is None else x.outliers
    with on_device(sums):
        _scale_sums[(triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N))](
            sums, x.scale, w.scale, out if w.bias is None else w.bias,
            outliers, out if beside is None else beside, out, m, n, count, *outliers.stride(),
            HAS_BIAS=w.bias is not None, BLOCK_R=max(LEAST, triton.next_power_of_2(count)) if count else 0,
            DTYPE=dot_dtype(dtype, sums.device), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )  # fmt: skip
    return out
