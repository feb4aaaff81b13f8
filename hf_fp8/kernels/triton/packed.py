"""Triton: codes of 4 or 8 bits in int32 (`formats.packing`), read as they are stored and unpacked in registers.

In these functions PACKED is the number of bits of a code, or 0 for codes with an element of their own (E4M3, int8).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...formats.scheme import TensorScheme


def bits_in_words(weight: TensorScheme) -> int:
    """PACKED for the codes of a weight."""
    return weight.code.bits if weight.packed else 0


@triton.jit
def load_codes(w_rows, below, step, width, PACKED: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes of the columns of a step, (N, BLOCK_K), or the words that hold them, (N, BLOCK_K * PACKED / 32) int32.

    w_rows: (N, 1) pointers to rows of `width` elements. below: (N,), which rows there are.
    """
    STEP: tl.constexpr = BLOCK_K * PACKED // 32 if PACKED > 0 else BLOCK_K
    at = step * STEP + tl.arange(0, STEP)
    return tl.load(w_rows + at[None, :], mask=below[:, None] & (at < width)[None, :], other=0.0)


@triton.jit
def zero_rows_of(zeros, n, stride_zn, PACKED: tl.constexpr):
    """(N,) pointers to the words with the zero points of rows n of a matrix, which are packed along rows: (words, groups)."""
    PER: tl.constexpr = 32 // PACKED if PACKED > 0 else 1
    return zeros + n // PER * stride_zn


@triton.jit
def zero_points(zero_rows, n, below, PACKED: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """(N,) int32: the number that is stored for the code 0 of a group, in each row n. zero_rows: pointers to their words."""
    if HAS_ZEROS:
        PER: tl.constexpr = 32 // PACKED
        return (tl.load(zero_rows, mask=below, other=0) >> (n % PER * PACKED)) & ((1 << PACKED) - 1)
    else:
        HALF: tl.constexpr = 1 << (PACKED - 1) if PACKED > 0 else 0
        return tl.full(n.shape, HALF, tl.int32)


@triton.jit
def unpacked(words, zero, power, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """Codes minus zero points, times `power`, in DTYPE, exactly: (N, W * 32 / PACKED) of words (N, W).

    zero: (N,), `zero_points`. power: (N,), of `scales.power_of`. Codes beyond K are those of zero bits, a finite number.
    """
    # Each number is followed by its upper half, until one code is the lowest of each. Both halves stay in the thread that has
    # the word; a dimension of shifts would be spread over threads, each of which reads the word again.
    stored = tl.interleave(words, words >> 16)
    stored = tl.interleave(stored, stored >> 8)
    if PACKED == 4:
        stored = tl.interleave(stored, stored >> 4)
    stored &= (1 << PACKED) - 1
    # In float32 the last bit of 2**23 * power is worth `power`. So the bits of this number with a code in its lowest are
    # (2**23 + code) * power: an or and a difference, where converting integers would take several times as long.
    base = (power * 8388608.0).to(tl.int32, bitcast=True)
    value = (stored | base[:, None]).to(tl.float32, bitcast=True)
    return (value - (zero | base).to(tl.float32, bitcast=True)[:, None]).to(DTYPE)
