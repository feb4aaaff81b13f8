"""Which scale granularities fit the tiles of our Triton kernels, whose sides are powers of two."""

from __future__ import annotations

from ...formats.scheme import Granularity, Scheme

# Columns per tile that tl.dot wants at least: 16 of 16-bit operands, 32 of 8-bit ones.
LEAST_16_BIT, LEAST_8_BIT = 16, 32


def columns(granularity: Granularity, most: int) -> int:
    """Columns per tile such that a tile has one scale: the largest power of two up to `most` that divides a block's."""
    return most if granularity.cols == -1 else min(most, granularity.cols & -granularity.cols)


def why_not_weight_only(scheme: Scheme) -> str | None:
    """Why the weight-only kernel cannot take `scheme`'s weights; None if it can."""
    if columns(scheme.weight.granularity, 128) < LEAST_16_BIT:
        return _odd(scheme.weight.granularity)
    return None


def why_not_scaled_mm(scheme: Scheme) -> str | None:
    """Why the scaled matmul cannot take `scheme`; None if it can."""
    if scheme.input is None:
        return "the scheme does not quantize inputs"
    if scheme.weight.dtype != scheme.input.dtype:
        return "it takes codes of one type on both sides"
    if scheme.input.granularity.rows not in (1, -1):
        return "it takes inputs with scales per tensor, row, or group of columns"
    for granularity in (scheme.weight.granularity, scheme.input.granularity):
        if columns(granularity, 128) < LEAST_8_BIT:
            return _odd(granularity)
    return None


def _odd(granularity: Granularity) -> str:
    return f"no tile of enough columns has one scale where every {granularity.cols} columns have another"
