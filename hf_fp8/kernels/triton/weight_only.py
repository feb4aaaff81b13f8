"""Triton: float inputs times weights of 8 or 4 bits; codes, packed or not, are read once and converted in registers.

For few rows, where reading weights takes most of the time, and for GPUs without FP8 units. Sums are float32 in
a fixed order: if K is split, a second kernel adds the parts, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...formats.code_types import FP8
from ...formats.exponents import scale_values
from ...formats.scheme import TensorScheme
from ..base import Input, Weight
from .granularity import columns
from .packed import bits_in_words, load_codes, zero_points, zero_rows_of
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
# BLOCK_M x BLOCK_N x BLOCK_K up to which tiles of packed codes are made higher, for inputs of 16 bits. Larger ones, and some in
# float32, have no room in 99 KB of shared memory or in registers, as compiled.
PRODUCTS = 2**18


@triton.jit
def add_step(
    acc, xt, codes, scales, zero_rows, n, below, power, rest, zero,
    GROUPS: tl.constexpr, DTYPE: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """acc (M, N) plus the product of xt (M, K) with the codes (N, K) of one step, or words that hold them.

    GROUPS: the step has scales and zero points of its own, at these pointers (N,), which are applied to the product. Else the
    codes are multiplied with `power` alone.
    """
    if GROUPS:
        power, rest = power_of(tl.load(scales, mask=below, other=0.0).to(tl.float32), DTYPE)
        zero = zero_points(zero_rows, n, below, PACKED, HAS_ZEROS)
        wide = tl.trans(widened(codes, zero, power, DTYPE, BITS, PACKED))
        return acc + tl.dot(xt.to(DTYPE), wide, input_precision="ieee") * rest[None, :]
    else:
        wide = tl.trans(widened(codes, zero, power, DTYPE, BITS, PACKED))
        return tl.dot(xt.to(DTYPE), wide, acc, input_precision="ieee")


@triton.jit
def _weight_only(
    x, w, scales, zeros, bias, out, M, N, K, width, tiles_per_split,
    stride_xm, stride_xk, stride_wn, stride_sn, stride_sk, stride_zn, stride_zk,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr, HAS_ZEROS: tl.constexpr,
    DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    split = tl.program_id(2)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    below = n < N
    x_rows = x + m[:, None].to(tl.int64) * stride_xm
    w_rows = w + n[:, None].to(tl.int64) * stride_wn
    scale_rows = scales + (n // SCALE_N) * stride_sn if SCALE_N > 0 else scales + n * 0
    zero_rows = zero_rows_of(zeros, n, stride_zn, PACKED)
    power, rest = power_of(tl.load(scale_rows, mask=below, other=0.0).to(tl.float32), DTYPE)
    zero = zero_points(zero_rows, n, below, PACKED, HAS_ZEROS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * tiles_per_split
    for tile in range(first, min(first + tiles_per_split, tl.cdiv(K, BLOCK_K))):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        xt = tl.load(x_rows + k[None, :] * stride_xk, mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        codes = load_codes(w_rows, below, tile, width, PACKED, BLOCK_K)
        group = tile * BLOCK_K // SCALE_K if SCALE_K > 0 else 0
        acc = add_step(
            acc, xt, codes, scale_rows + group * stride_sk, zero_rows + group * stride_zk, n, below, power, rest, zero,
            SCALE_K > 0, DTYPE, BITS, PACKED, HAS_ZEROS,
        )  # fmt: skip
    if SCALE_K == 0:
        acc *= rest[None, :]
    mask = (m[:, None] < M) & below[None, :]
    at = m[:, None].to(tl.int64) * N + n[None, :]
    if SPLIT:
        tl.store(out + split.to(tl.int64) * M * N + at, acc, mask=mask)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=below, other=0.0).to(tl.float32)[None, :]
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


def tile_for(m: int, dtype: torch.dtype, weight: TensorScheme) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) for `m` rows of inputs in `dtype`, so that a tile has one scale."""
    _, block_m, block_n, most, warps, stages = tile(m, dtype)
    block_k = columns(weight.granularity, most)
    if weight.packed and dtype.itemsize == 2:
        # As many bytes in flight as with wide tiles of whole bytes. Not measured.
        wanted = block_n * (most // block_k) * (8 // weight.code.bits)
        block_n = max(block_n, min(wanted, 128, PRODUCTS // (block_m * block_k)))
    return block_m, block_n, block_k, warps, stages


def multiply(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """x (M, K) in bf16, fp16 or float32, any strides, times weight (N, K), E4M3, int8 or packed: (M, N) in `dtype`."""
    values, codes = x.x, w.codes
    m, k = values.shape
    n = codes.shape[0]
    granularity = w.scheme.weight.granularity
    block_m, block_n, block_k, warps, stages = tile_for(m, values.dtype, w.scheme.weight)
    grid_n, grid_m, tiles = triton.cdiv(n, block_n), triton.cdiv(m, block_m), triton.cdiv(k, block_k)
    # Two programs per multiprocessor hide latency; a split of fewer than four tiles cannot be pipelined.
    splits = max(1, min(2 * processors(values.device) // (grid_n * grid_m), tiles // 4, 16))
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    out = torch.empty((m, n), dtype=dtype, device=values.device)
    target = out if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=values.device)
    bits = codes.dtype == FP8 and not native_e4m3(values.device)
    scales = scale_values(w.scale).reshape(granularity.grid(n, k))
    bias = out if w.bias is None else w.bias
    zeros = scales if w.zero_point is None else w.zero_point
    with on_device(values):
        _weight_only[(grid_n, grid_m, splits)](
            values, codes.view(torch.int8) if bits else codes, scales, zeros, bias, target,
            m, n, k, codes.shape[1], per_split,
            *values.stride(), codes.stride(0), *scales.stride(), *zeros.stride(),
            SCALE_N=max(granularity.rows, 0), SCALE_K=max(granularity.cols, 0), BITS=bits,
            PACKED=bits_in_words(w.scheme.weight), HAS_ZEROS=w.zero_point is not None,
            DTYPE=dot_dtype(values.dtype, values.device), HAS_BIAS=w.bias is not None, SPLIT=splits > 1,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if splits > 1:
            _add_up[(triton.cdiv(m * n, 1024),)](
                target, bias, out, m * n, n, SPLITS=splits, HAS_BIAS=w.bias is not None, BLOCK=1024
            )
    return out
