"""Triton: float inputs times 8-bit weights; codes (8-bit values) are read once and converted in registers.

For few rows, where reading weights takes most of the time, and for GPUs without FP8 units. Sums are float32 in
a fixed order: if K is split, a second kernel adds the parts, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...formats.code_types import FP8
from ..base import Input, Weight
from .granularity import columns
from .scales import dot_dtype, power_of, widened
from .support import native_e4m3, on_device, processors

# Tiles by rows of input: (M up to, BLOCK_M, BLOCK_N, BLOCK_K, warps, stages). Not measured: sized so that a program
# has 24 to 32 KB of weights in flight, which a Hopper SM needs to keep its share of the memory busy (3.35 TB/s x
# about 1 us / 132 = 25 KB); 16 is the minimum of tl.dot.
TILES = (
    (16, 16, 32, 256, 4, 4),
    (32, 32, 32, 256, 4, 4),
    (64, 64, 64, 128, 4, 4),
    (128, 128, 64, 64, 4, 4),
    (1 << 62, 128, 128, 64, 8, 4),
)


@triton.jit
def _weight_only(
    x, w, scales, bias, out, M, N, K, tiles_per_split,
    stride_xm, stride_xk, stride_wn, stride_sn, stride_sk,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    split = tl.program_id(2)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x + m[:, None].to(tl.int64) * stride_xm
    w_rows = w + n[:, None].to(tl.int64) * stride_wn
    scale_rows = scales + (n // SCALE_N) * stride_sn if SCALE_N > 0 else scales + n * 0
    power, rest = power_of(tl.load(scale_rows, mask=n < N, other=0.0).to(tl.float32), DTYPE)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * tiles_per_split
    for tile in range(first, min(first + tiles_per_split, tl.cdiv(K, BLOCK_K))):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        xt = tl.load(x_rows + k[None, :] * stride_xk, mask=(m[:, None] < M) & (k[None, :] < K), other=0.0).to(DTYPE)
        codes = tl.load(w_rows + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
        if SCALE_K > 0:
            scale = tl.load(scale_rows + (tile * BLOCK_K // SCALE_K) * stride_sk, mask=n < N, other=0.0).to(tl.float32)
            power, rest = power_of(scale, DTYPE)
            acc += tl.dot(xt, tl.trans(widened(codes, power, DTYPE, BITS)), input_precision="ieee") * rest[None, :]
        else:
            acc = tl.dot(xt, tl.trans(widened(codes, power, DTYPE, BITS)), acc, input_precision="ieee")
    if SCALE_K == 0:
        acc *= rest[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    at = m[:, None].to(tl.int64) * N + n[None, :]
    if SPLIT:
        tl.store(out + split.to(tl.int64) * M * N + at, acc, mask=mask)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_up(parts, bias, out, size, N, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        acc += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + at % N, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < size)


def tile(m: int, dtype: torch.dtype) -> tuple[int, int, int, int, int, int]:
    """The entry of `TILES` for `m` rows of inputs in `dtype`."""
    up_to, block_m, block_n, block_k, warps, stages = next(entry for entry in TILES if m <= entry[0])
    # float32 needs twice the shared memory, of which GPUs of compute capability 8.6, 8.9 and 12 have 99 KB per program.
    return up_to, block_m, block_n, block_k // 2 if dtype.itemsize == 4 else block_k, warps, stages


def multiply(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """x (M, K) in bf16, fp16 or float32, any strides, times weight (N, K), E4M3 or int8: (M, N) in `dtype`."""
    values, codes = x.x, w.codes
    m, k = values.shape
    n = codes.shape[0]
    granularity = w.scheme.weight.granularity
    _, block_m, block_n, block_k, warps, stages = tile(m, values.dtype)
    block_k = columns(granularity, block_k)
    grid_n, grid_m, tiles = triton.cdiv(n, block_n), triton.cdiv(m, block_m), triton.cdiv(k, block_k)
    # Two programs per multiprocessor hide latency; a split of fewer than four tiles cannot be pipelined.
    splits = max(1, min(2 * processors(values.device) // (grid_n * grid_m), tiles // 4, 16))
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    out = torch.empty((m, n), dtype=dtype, device=values.device)
    target = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=values.device)
    bits = codes.dtype == FP8 and not native_e4m3(values.device)
    scales = w.scale.reshape(granularity.grid(n, k))
    bias = out if w.bias is None else w.bias
    with on_device(values):
        _weight_only[(grid_n, grid_m, splits)](
            values, codes.view(torch.int8) if bits else codes, scales, bias, target,
            m, n, k, per_split,
            *values.stride(), codes.stride(0), *scales.stride(),
            SCALE_N=max(granularity.rows, 0), SCALE_K=max(granularity.cols, 0), BITS=bits,
            DTYPE=dot_dtype(values.dtype, values.device), HAS_BIAS=w.bias is not None, SPLIT=splits > 1,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if splits > 1:
            _add_up[(triton.cdiv(m * n, 1024),)](
                target, bias, out, m * n, n, SPLITS=splits, HAS_BIAS=w.bias is not None, BLOCK=1024
            )
    return out
