"""Triton kernel for experts: each row times the E4M3 weight of its expert, inputs quantized or in float.

One kernel for prefill and decode. If rows are sorted, a program finds its expert from the counts on the device, so the CPU
does not need to read them. If rows are not sorted, there is one program for each row, which saves sorting for few tokens. In
both cases only codes (8-bit values) of experts with rows are read, and the kernel gathers and scatters the rows itself.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..base import ExpertWeights, Input, Routing
from . import scaled_mm as triton_mm
from . import weight_only as triton_weight_only
from .granularity import columns
from .scales import dot_dtype, power_of, times_scales, widened
from .support import native_e4m3, on_device

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
def _product(xt, wt, x_scales, w_scales, x_scale, w_scale, here, below, X_COLS: tl.constexpr, W_COLS: tl.constexpr):
    """Product of the codes of one step times the scales of the step, the weight's scale first as in scaled_mm."""
    product = tl.dot(xt, tl.trans(wt)).to(tl.float32)
    if W_COLS > 0:
        w_scale = tl.load(w_scales, mask=below, other=0.0).to(tl.float32)
    product *= w_scale[None, :]
    if X_COLS > 0:
        product *= tl.load(x_scales, mask=here, other=0.0).to(tl.float32)[:, None]
    return product


@triton.jit
def _grouped(
    x, w, x_scales, w_scales, out, rows, slots, experts, offsets, S, N, K, E, grid_m, share, part, part_scales, scale_rows,
    stride_xm, stride_xk, stride_we, stride_wn, stride_sm, stride_sk, stride_ce, stride_cn, stride_ck,
    QUANTIZED: tl.constexpr, X_COLS: tl.constexpr, W_COLS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    SORTED: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_SLOTS: tl.constexpr, GROUP: tl.constexpr, BLOCK_E: tl.constexpr,
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
    w_scale_rows = w_scales + e * stride_ce + of_n * stride_cn
    x_scale_rows = x_scales + r * stride_sm
    w_scale = tl.load(w_scale_rows, mask=n < N, other=0.0).to(tl.float32)
    if QUANTIZED:
        x_scale = tl.load(x_scale_rows, mask=here, other=0.0).to(tl.float32)
    else:
        power, rest = power_of(w_scale, DTYPE)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, k_tiles):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        xt = tl.load(x_rows + k[None, :] * stride_xk, mask=here[:, None] & (k[None, :] < K), other=0.0)
        wt = tl.load(w_rows + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
        if QUANTIZED:
            if X_COLS == 0 and W_COLS == 0:
                acc = tl.dot(xt, tl.trans(wt), acc)
            else:
                x_at, w_at = _block_of(step, BLOCK_K, X_COLS) * stride_sk, _block_of(step, BLOCK_K, W_COLS) * stride_ck
                acc += _product(xt, wt, x_scale_rows + x_at, w_scale_rows + w_at, x_scale, w_scale, here, n < N, X_COLS, W_COLS)
        elif W_COLS > 0:
            at = _block_of(step, BLOCK_K, W_COLS) * stride_ck
            power, rest = power_of(tl.load(w_scale_rows + at, mask=n < N, other=0.0).to(tl.float32), DTYPE)
            wide = tl.trans(widened(wt, power, DTYPE, BITS))
            acc += tl.dot(xt.to(DTYPE), wide, input_precision="ieee") * rest[None, :]
        else:
            acc = tl.dot(xt.to(DTYPE), tl.trans(widened(wt, power, DTYPE, BITS)), acc, input_precision="ieee")
    if QUANTIZED:
        if X_COLS == 0 and W_COLS == 0:
            acc = times_scales(acc, x_scale[:, None], w_scale[None, :])
        elif X_COLS == 0:
            acc *= x_scale[:, None]
    elif W_COLS == 0:
        acc *= rest[None, :]
    acc = tl.where(taken, acc, 0.0)  # rows without an expert and their scales may be garbage
    at_m = tl.load(slots + m, mask=here, other=0) if HAS_SLOTS else m
    at = at_m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=here[:, None] & (n[None, :] < N))


def multiply(x: Input, w: ExpertWeights, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
    """x (R, K), floats or codes with scales (R, 1) or (R, groups), times E4M3 weights (E, N, K): (S, N) in `dtype`."""
    values, codes = x.x, w.codes
    s, k = routing.experts.shape[0], values.shape[1]
    n_experts, n, _ = codes.shape
    quantized, is_sorted = x.scale is not None, routing.offsets is not None
    of_w = w.scheme.weight.granularity
    of_x = w.scheme.input.granularity if quantized and w.scheme.input is not None else None
    x_cols = 0 if of_x is None else max(of_x.cols, 0)
    each = math.ceil(routing.rows_each(n_experts) * SLACK) if is_sorted else 1
    tile = triton_mm.tile(each) if quantized else triton_weight_only.tile(each, values.dtype)
    _, block_m, block_n, block_k, warps, stages = tile
    block_k = columns(of_w, block_k if of_x is None else columns(of_x, block_k))
    # Each expert with rows may have a last tile that is not full, and so may the rows without an expert.
    grid_m = s // block_m + min(n_experts + 1, s) if is_sorted else s
    bits = not quantized and not native_e4m3(values.device)
    kind = tl.float32 if quantized else dot_dtype(values.dtype, values.device)
    part = n // w.parts
    scales = w.scale.reshape(n_experts, w.parts * of_w.grid(part, k)[0], -1)
    out = torch.empty((s, n), dtype=dtype, device=values.device)
    x_scale = scales if x.scale is None else x.scale
    with on_device(values):
        _grouped[(grid_m * triton.cdiv(n, block_n),)](
            values, codes.view(torch.int8) if bits else codes, x_scale, scales, out,
            *(routing.experts if t is None else t for t in (routing.rows, routing.slots, routing.experts, routing.offsets)),
            s, n, k, n_experts, grid_m, routing.share,
            part, scales.shape[1] // w.parts, part if of_w.rows == -1 else of_w.rows,
            *values.stride(), *codes.stride()[:2], *x_scale.stride()[-2:], *scales.stride(),
            QUANTIZED=quantized, X_COLS=x_cols, W_COLS=max(of_w.cols, 0), BITS=bits, DTYPE=kind,
            SORTED=is_sorted, HAS_ROWS=routing.rows is not None, HAS_SLOTS=routing.slots is not None,
            GROUP=triton_mm.GROUP_M, BLOCK_E=triton.next_power_of_2(n_experts + 1),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
