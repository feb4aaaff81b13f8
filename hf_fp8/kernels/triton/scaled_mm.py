"""Triton: 8-bit inputs times 8-bit weights, any scale granularity and any size; scales and bias in the epilogue.

For problems that torch's matmuls do not support: sizes that are not multiples of 16, block scales where cuBLAS has no
kernel for them, mixed granularities. Codes (8-bit values) are read as stored, with masks at the edges, without padding or
copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...formats.code_types import INT8
from ...formats.exponents import scale_values
from ..base import Input, Weight
from .granularity import columns
from .scales import times_scales
from .support import on_device

# Tiles by rows of input: (M up to, BLOCK_M, BLOCK_N, BLOCK_K, warps, stages). Not measured; these are the usual sizes for
# 8-bit operands on Hopper: an instruction computes 64 rows, and block schemes have one scale for 128 columns of K.
TILES = ((16, 16, 64, 128, 4, 4), (64, 64, 64, 128, 4, 4), (1 << 62, 128, 128, 128, 8, 3))
# Tiles of M that share a sweep over N, so that the weights are read from L2.
GROUP_M = 8


@triton.jit
def _scaled_mm(
    q, w, x_scales, w_scales, bias, out, M, N, K,
    stride_qm, stride_wn, stride_xm, stride_xk, stride_sn, stride_sk,
    X_COLS: tl.constexpr, W_ROWS: tl.constexpr, W_COLS: tl.constexpr, IS_INT8: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP * grid_n) * GROUP
    height = min(grid_m - first_m, GROUP)
    m = (first_m + pid % (GROUP * grid_n) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % (GROUP * grid_n) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    q_rows = q + m[:, None].to(tl.int64) * stride_qm
    w_rows = w + n[:, None].to(tl.int64) * stride_wn
    x_scale_rows = x_scales + m * stride_xm
    w_scale_rows = w_scales + (n // W_ROWS) * stride_sn if W_ROWS > 0 else w_scales + n * 0
    x_scale = tl.load(x_scale_rows, mask=m < M, other=0.0).to(tl.float32)[:, None]
    w_scale = tl.load(w_scale_rows, mask=n < N, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if IS_INT8 and X_COLS == 0 and W_COLS == 0 else tl.float32)
    for tile in range(0, tl.cdiv(K, BLOCK_K)):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        qt = tl.load(q_rows + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        wt = tl.trans(tl.load(w_rows + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0.0))
        if X_COLS == 0 and W_COLS == 0:
            acc = tl.dot(qt, wt, acc)
        else:
            # The weight's scale first: the input's scale may be as large as the input, and alone could overflow.
            part = tl.dot(qt, wt).to(tl.float32)
            if W_COLS > 0:
                at = tile * BLOCK_K // W_COLS * stride_sk
                w_scale = tl.load(w_scale_rows + at, mask=n < N, other=0.0).to(tl.float32)[None, :]
            part *= w_scale
            if X_COLS > 0:
                at = tile * BLOCK_K // X_COLS * stride_xk
                x_scale = tl.load(x_scale_rows + at, mask=m < M, other=0.0).to(tl.float32)[:, None]
                part *= x_scale
            acc += part
    total = acc.to(tl.float32)
    if X_COLS == 0 and W_COLS == 0:
        total = times_scales(total, x_scale, w_scale)
    elif X_COLS == 0:
        total *= x_scale
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def tile(m: int) -> tuple[int, int, int, int, int, int]:
    """The entry of `TILES` for `m` rows."""
    return next(entry for entry in TILES if m <= entry[0])


def multiply(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Codes (M, K) times codes (N, K), both E4M3 or both int8: (M, N) in `dtype`."""
    assert x.scale is not None and w.scheme.input is not None
    q, of_x, of_w = x.x, w.scheme.input.granularity, w.scheme.weight.granularity
    m, k = q.shape
    n = w.codes.shape[0]
    _, block_m, block_n, block_k, warps, stages = tile(m)
    block_k = columns(of_x, columns(of_w, block_k))
    scales = scale_values(w.scale).reshape(of_w.grid(n, k))
    out = torch.empty((m, n), dtype=dtype, device=q.device)
    with on_device(q):
        _scaled_mm[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
            q, w.codes, x.scale, scales, out if w.bias is None else w.bias, out, m, n, k,
            q.stride(0), w.codes.stride(0), *x.scale.stride(), *scales.stride(),
            X_COLS=max(of_x.cols, 0), W_ROWS=max(of_w.rows, 0), W_COLS=max(of_w.cols, 0),
            IS_INT8=w.codes.dtype == INT8, HAS_BIAS=w.bias is not None,
            GROUP=GROUP_M, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
