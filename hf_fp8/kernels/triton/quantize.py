"""Triton: scales and codes (8-bit values) of an input in one pass, with the rounding of the reference.

Import only if `support.why_not` returns None. Kernels work with CUDA, ROCm and XPU builds of Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...formats import numerics
from ...formats.code_types import INT8
from ...formats.scheme import TensorScheme
from .support import on_device

# Maximum columns of a row that one program keeps in registers between computing the scale and using it. Longer rows
# are read twice, the second time from L2. Not measured: with 8 warps these are 64 registers per thread.
ONE_PASS = 16384


@triton.jit
def _scale_of(bits, code_max, min_scale):
    # `bits` is the amax as an integer: the bits of non-negative floats have the order of the values, with NaN as the
    # largest, while tl.max of floats would drop NaN. The comparison below keeps NaN, as it is False for it.
    amax = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, code_max)
    return tl.where(scale == 0.0, min_scale, scale)


@triton.jit
def _codes(v, scale, code_max, IS_INT8: tl.constexpr):
    y = tl.div_rn(v, scale)
    y = tl.where(y > code_max, code_max, y)
    y = tl.where(y < -code_max, -code_max, y)
    if IS_INT8:
        # After adding 1.5 * 2**23 there are no bits for a fraction: this rounds to nearest, ties to even.
        y = (y + 12582912.0) - 12582912.0
        codes = tl.where(y != y, 0.0, y).to(tl.int8)
    else:
        # NaN is written as bits, as the cast of NaN differs between devices.
        lost = (y != y) | (tl.abs(v) == float("inf"))
        bits = y.to(tl.float8e4nv).to(tl.int8, bitcast=True)
        codes = tl.where(lost, 0x7F, bits).to(tl.int8).to(tl.float8e4nv, bitcast=True)
    return codes


@triton.jit
def _load(x, kept, at, K, stride_k, HAS_KEPT: tl.constexpr):
    v = tl.load(x + at * stride_k, mask=at < K, other=0.0).to(tl.float32)
    if HAS_KEPT:
        v = tl.where(tl.load(kept + at, mask=at < K, other=0.0) != 0.0, v, 0.0)
    return v


@triton.jit
def _rows(
    x, q, scales, static, kept, K, stride_m, stride_k, code_max, min_scale,
    IS_INT8: tl.constexpr, IS_STATIC: tl.constexpr, HAS_KEPT: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x += row * stride_m
    q += row * K
    if ONE:
        v = _load(x, kept, cols, K, stride_k, HAS_KEPT)
        if IS_STATIC:
            scale = tl.load(static).to(tl.float32)
        else:
            scale = _scale_of(tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0), code_max, min_scale)
        tl.store(q + cols, _codes(v, scale, code_max, IS_INT8), mask=cols < K)
    else:
        if IS_STATIC:
            scale = tl.load(static).to(tl.float32)
        else:
            bits = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, K, BLOCK):
                at = start + cols
                v = _load(x, kept, at, K, stride_k, HAS_KEPT)
                bits = tl.maximum(bits, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            scale = _scale_of(tl.max(bits, axis=0), code_max, min_scale)
        for start in range(0, K, BLOCK):
            at = start + cols
            v = _load(x, kept, at, K, stride_k, HAS_KEPT)
            tl.store(q + at, _codes(v, scale, code_max, IS_INT8), mask=at < K)
    tl.store(scales + row, scale)


@triton.jit
def _groups(
    x, q, scales, K, stride_m, stride_k, stride_sm, stride_sg, code_max, min_scale,
    IS_INT8: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    within = tl.arange(0, WIDTH)  # WIDTH: SIZE rounded up to a power of two
    at = group[:, None] * SIZE + within[None, :]
    mask = (within < SIZE)[None, :] & (at < K)
    v = tl.load(x + row * stride_m + at * stride_k, mask=mask, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), code_max, min_scale)
    tl.store(q + row * K + at, _codes(v, scale[:, None], code_max, IS_INT8), mask=mask)
    tl.store(scales + row * stride_sm + group * stride_sg, scale, mask=group * SIZE < K)


def quantize(
    x: torch.Tensor, scheme: TensorScheme, input_scale: torch.Tensor | None, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `inputs.quantize_input`, bit for bit the same as the reference."""
    m, k = x.shape
    granularity = scheme.granularity
    q = torch.empty((m, k), dtype=scheme.dtype, device=x.device)
    common = (scheme.code.largest, numerics.MIN_SCALE)
    is_int8 = scheme.dtype == INT8
    if granularity.is_row or granularity.is_tensor:
        static = input_scale
        if granularity.is_tensor and static is None:
            static = numerics.compute_scale(x, granularity, scheme.dtype)
        one = k <= ONE_PASS
        block = triton.next_power_of_2(max(k, 16)) if one else 8192
        scales = torch.empty((m, 1), dtype=torch.float32, device=x.device)
        with on_device(x):
            _rows[(m,)](
                x, q, scales, scales if static is None else static, scales if kept is None else kept, k, *x.stride(), *common,
                IS_INT8=is_int8, IS_STATIC=static is not None, HAS_KEPT=kept is not None, ONE=one, BLOCK=block,
                num_warps=min(max(block // 512, 1), 8),
            )  # fmt: skip
        return q, scales
    size = granularity.cols
    n_groups = granularity.grid(m, k)[1]
    scales = torch.empty((n_groups, m), dtype=torch.float32, device=x.device).t()
    width = triton.next_power_of_2(size)
    groups = max(1, min(triton.next_power_of_2(n_groups), 2048 // width))
    with on_device(x):
        _groups[(m, triton.cdiv(n_groups, groups))](
            x, q, scales, k, *x.stride(), *scales.stride(), *common,
            IS_INT8=is_int8, SIZE=size, WIDTH=width, GROUPS=groups,
        )  # fmt: skip
    return q, scales
