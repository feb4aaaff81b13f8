"""Triton kernel for experts: each row times the weight of its expert, inputs quantized or in float.

One kernel for prefill and decode. If rows are sorted, a program finds its expert from the counts on the device, so the CPU
does not need to read them. If rows are not sorted, there is one program for each row, which saves sorting for few tokens. In
both cases only codes (8- or 4-bit values) of experts with rows are read, and the kernel gathers and scatters the rows itself.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...formats.code_types import FP8
from ...formats.exponents import scale_values
from ..base import ExpertWeights, Input, Routing
from ..torch_grouped import floats_of
from . import scaled_mm as triton_mm
from . import weight_only as triton_weight_only
from .granularity import columns
from .packed import bits_in_words, load_codes, zero_points, zero_rows_of
from .scales import dot_dtype, power_of, times_scales
from .support import native_e4m3, on_device
from .weight_only import add_step

# Tiles are sized for this many times the average number of rows per expert: with 16 random rows on average, two in five
# experts have more, and would otherwise read their weights twice. Not measured.
SLACK = 1.5


@triton.jit
def _rows_of_tile(
    tile, experts, offsets, S, E, SORTED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """(expert, indices of its rows in this tile, mask of the valid ones). Sorted rows: each expert has a whole number of
    tiles; expert E means the last rows, which have no expert. Else each tile is one row."""
    if SORTED:
        each = tl.arange(0, BLOCK_E)
        end = tl.where(each < E, tl.load(offsets + each, mask=each < E, other=0), S)
        start = tl.load(offsets + each - 1, mask=(each > 0) & (each <= E), other=0)
        start = tl.where(each <= E, start, S)
        tiles = (end - start + BLOCK_M - 1) // BLOCK_M
        upto = tl.cumsum(tiles, 0)
        expert = tl.sum((upto <= tile).to(tl.int32), 0)
        mine = each == expert
        within = tile - tl.sum(tl.where(mine, upto - tiles, 0), 0)
        m = tl.sum(tl.where(mine, start, 0), 0) + within * BLOCK_M + tl.arange(0, BLOCK_M)
        here = m < tl.sum(tl.where(mine, end, 0), 0)  # all False for a tile after the last one
    else:
        expert = tl.load(experts + tile).to(tl.int32)
        m = tile + tl.arange(0, BLOCK_M)
        here = tl.arange(0, BLOCK_M) < 1
    return expert, m, here


@triton.jit
def _block_of(step, BLOCK_K: tl.constexpr, COLS: tl.constexpr):
    """Index of the block of COLS columns (one scale each) that contains this step along K; 0 if there is only one scale."""
    return step * BLOCK_K // COLS if COLS > 0 else 0


@triton.jit
def _add_codes(acc, xt, wt, x_scales, w_scales, x_scale, w_scale, here, below, X_COLS: tl.constexpr, W_COLS: tl.constexpr):
    """acc plus the product of the codes of one step, times the scales of the step if it has any, the weight's first as in
    scaled_mm."""
    if X_COLS == 0 and W_COLS == 0:
        return tl.dot(xt, tl.trans(wt), acc)
    else:
        product = tl.dot(xt, tl.trans(wt)).to(tl.float32)
        if W_COLS > 0:
            w_scale = tl.load(w_scales, mask=below, other=0.0).to(tl.float32)
        product *= w_scale[None, :]
        if X_COLS > 0:
            product *= tl.load(x_scales, mask=here, other=0.0).to(tl.float32)[:, None]
        return acc + product


@triton.jit
def _scaled(acc, x_scale, w_scale, rest, QUANTIZED: tl.constexpr, X_COLS: tl.constexpr, W_COLS: tl.constexpr):
    """The sums times the scales that were not applied to each step."""
    if QUANTIZED and X_COLS == 0 and W_COLS == 0:
        return times_scales(acc, x_scale[:, None], w_scale[None, :])
    elif QUANTIZED and X_COLS == 0:
        return acc * x_scale[:, None]
    elif not QUANTIZED and W_COLS == 0:
        return acc * rest[None, :]
    else:
        return acc


@triton.jit
def _grouped(
    x, w, x_scales, w_scales, zeros, out, rows, slots, experts, offsets, S, N, K, width, E, grid_m, share,
    part, part_scales, scale_rows, part_zeros,
    stride_xm, stride_xk, stride_we, stride_wn, stride_sm, stride_sk, stride_ce, stride_cn, stride_ck,
    stride_ze, stride_zn, stride_zk,
    QUANTIZED: tl.constexpr, X_COLS: tl.constexpr, W_COLS: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr,
    HAS_ZEROS: tl.constexpr, DTYPE: tl.constexpr, SORTED: tl.constexpr, HAS_ROWS: tl.constexpr,
    HAS_SLOTS: tl.constexpr, GROUP: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    grid_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP * grid_n) * GROUP
    height = min(grid_m - first_m, GROUP)
    tile = first_m + pid % (GROUP * grid_n) % height
    n = pid % (GROUP * grid_n) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, m, here = _rows_of_tile(tile, experts, offsets, S, E, SORTED, BLOCK_E, BLOCK_M)
    taken = (expert >= 0) & (expert < E)
    k_tiles = tl.where(taken, tl.cdiv(K, BLOCK_K), 0)
    e = tl.where(taken, expert, 0).to(tl.int64)
    r = tl.load(rows + m, mask=here, other=0) if HAS_ROWS else m
    r = tl.where(here, r // share, 0).to(tl.int64)
    x_rows = x + r[:, None] * stride_xm
    w_rows = w + e * stride_we + n[:, None].to(tl.int64) * stride_wn
    of_n = n // part * part_scales + n % part // scale_rows
    below = n < N
    w_scale_rows = w_scales + e * stride_ce + of_n * stride_cn
    x_scale_rows = x_scales + r * stride_sm
    zero_rows = zero_rows_of(zeros + e * stride_ze + n // part * part_zeros * stride_zn, n % part, stride_zn, PACKED)
    w_scale = tl.load(w_scale_rows, mask=below, other=0.0).to(tl.float32)
    x_scale = tl.load(x_scale_rows, mask=here, other=0.0).to(tl.float32) if QUANTIZED else 0.0
    power, rest = power_of(w_scale, DTYPE)
    zero = zero_points(zero_rows, n % part, below, PACKED, HAS_ZEROS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, k_tiles):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        xt = tl.load(x_rows + k[None, :] * stride_xk, mask=here[:, None] & (k[None, :] < K), other=0.0)
        wt = load_codes(w_rows, below, step, width, PACKED, BLOCK_K)
        w_group = _block_of(step, BLOCK_K, W_COLS)
        w_at = w_scale_rows + w_group * stride_ck
        if QUANTIZED:
            x_at = x_scale_rows + _block_of(step, BLOCK_K, X_COLS) * stride_sk
            acc = _add_codes(acc, xt, wt, x_at, w_at, x_scale, w_scale, here, below, X_COLS, W_COLS)
        else:
            acc = add_step(
                acc, xt, wt, w_at, zero_rows + w_group * stride_zk, n % part, below, power, rest, zero,
                W_COLS > 0, DTYPE, BITS, PACKED, HAS_ZEROS,
            )  # fmt: skip
    acc = _scaled(acc, x_scale, w_scale, rest, QUANTIZED, X_COLS, W_COLS)
    acc = tl.where(taken, acc, 0.0)  # rows without an expert and their scales may be garbage
    at_m = tl.load(slots + m, mask=here, other=0) if HAS_SLOTS else m
    at = at_m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=here[:, None] & below[None, :])


def multiply(x: Input, w: ExpertWeights, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
    """x (R, K), floats or codes with scales (R, 1) or (R, groups), times weights (E, N, K): (S, N) in `dtype`."""
    values, codes = x.x, w.codes
    s, k = routing.experts.shape[0], values.shape[1]
    n_experts, n, width = codes.shape
    quantized, is_sorted = x.scale is not None, routing.offsets is not None
    of_w = w.scheme.weight.granularity
    of_x = w.scheme.input.granularity if quantized and w.scheme.input is not None else None
    x_cols = 0 if of_x is None else max(of_x.cols, 0)
    each = math.ceil(routing.rows_each(n_experts) * SLACK) if is_sorted else 1
    if of_x is None:
        block_m, block_n, block_k, warps, stages = triton_weight_only.tile_for(each, values.dtype, w.scheme.weight)
    else:
        _, block_m, block_n, block_k, warps, stages = triton_mm.tile(each)
        block_k = columns(of_w, columns(of_x, block_k))
    # Each expert with rows may have a last tile that is not full, and so may the rows without an expert.
    grid_m = s // block_m + min(n_experts + 1, s) if is_sorted else s
    bits = not quantized and codes.dtype == FP8 and not native_e4m3(values.device)
    kind = tl.float32 if quantized else dot_dtype(values.dtype, values.device)
    part = n // w.parts
    scales = scale_values(w.scale).reshape(n_experts, w.parts * of_w.grid(part, k)[0], -1)
    out = torch.empty((s, n), dtype=dtype, device=values.device)
    x_scale = scales if x.scale is None else x.scale
    zeros = scales if w.zero_point is None else w.zero_point
    with on_device(values):
        _grouped[(grid_m * triton.cdiv(n, block_n),)](
            values, codes.view(torch.int8) if bits else codes, x_scale, scales, zeros, out,
            *(routing.experts if t is None else t for t in (routing.rows, routing.slots, routing.experts, routing.offsets)),
            s, n, k, width, n_experts, grid_m, routing.share,
            part, scales.shape[1] // w.parts, part if of_w.rows == -1 else of_w.rows, zeros.shape[1] // w.parts,
            *values.stride(), *codes.stride()[:2], *x_scale.stride()[-2:], *scales.stride(), *zeros.stride(),
            QUANTIZED=quantized, X_COLS=x_cols, W_COLS=max(of_w.cols, 0), BITS=bits, PACKED=bits_in_words(w.scheme.weight),
            HAS_ZEROS=w.zero_point is not None, DTYPE=kind, SORTED=is_sorted,
            HAS_ROWS=routing.rows is not None, HAS_SLOTS=routing.slots is not None,
            GROUP=triton_mm.GROUP_M, BLOCK_E=triton.next_power_of_2(n_experts + 1),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def multiply_dequantized(x: Input, w: ExpertWeights, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
    """`multiply` with inputs in `dtype`, whose codes are multiplied with their scales first."""
    return multiply(Input(floats_of(x, w.scheme, dtype)), w, routing, dtype)
