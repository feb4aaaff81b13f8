"""Check which scale granularities fit the tiles of the Triton kernels, whose sides are powers of two."""

from __future__ import annotations

from ...formats.code_types import FP8, INT8
from ...formats.scheme import Granularity, Scheme

# Minimum number of columns per tile for tl.dot: 16 for 16-bit operands, 32 for 8-bit operands.
LEAST_16_BIT, LEAST_8_BIT = 16, 32


def columns(granularity: Granularity, most: int) -> int:
    """Columns per tile so that a tile has one scale: the largest power of two up to `most` that divides the block's columns."""
    return most if granularity.cols == -1 else min(most, granularity.cols & -granularity.cols)


def why_not_weight_only(scheme: Scheme) -> str | None:
    """The reason why the weight-only kernel does not support the weights of `scheme`; None if it does."""
    if scheme.weight.packed:
        return "it takes codes of one byte"
    if scheme.weight.dtype not in (FP8, INT8):
        return f"it takes E4M3 or int8 weights, not {scheme.weight.code.label}"
    return _why_narrow(scheme)


def why_not_packed(scheme: Scheme) -> str | None:
    """The same for weights with packed codes."""
    if not scheme.weight.packed:
        return "it takes packed codes"
    if scheme.weight.is_ordered:
        return "a tile has one scale, and the columns of a group need not lie next to each other"
    return _why_narrow(scheme)


def why_not_fake_quantized(scheme: Scheme) -> str | None:
    """The same for packed weights and inputs that are quantized and dequantized."""
    return "the scheme does not quantize inputs" if scheme.input is None else why_not_packed(scheme)


def why_not_scaled_mm(scheme: Scheme) -> str | None:
    """The reason why the scaled matmul does not support `scheme`; None if it does."""
    if scheme.input is None:
        return "the scheme does not quantize inputs"
    if scheme.weight.packed or scheme.weight.dtype != scheme.input.dtype:
        return "it takes codes of the same dtype on both sides"
    if scheme.input.granularity.rows not in (1, -1):
        return "it takes inputs with scales per tensor, row, or group of columns"
    for granularity in (scheme.weight.granularity, scheme.input.granularity):
        if columns(granularity, 128) < LEAST_8_BIT:
            return _odd(granularity)
    return None


def _why_narrow(scheme: Scheme) -> str | None:
    return _odd(scheme.weight.granularity) if columns(scheme.weight.granularity, 128) < LEAST_16_BIT else None


def _odd(granularity: Granularity) -> str:
    return f"blocks of {granularity.cols} columns do not fit its tiles: a tile with one scale would be too narrow"
