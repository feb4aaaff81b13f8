"""Triton: multiplication by scales of any magnitude without intermediate overflow, if the result does not overflow."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .packed import unpacked

_DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def dot_dtype(dtype: torch.dtype, device: torch.device) -> tl.dtype:
    """The dtype of a dot product of inputs of `dtype` with codes: the same on GPUs."""
    # float32 on a CPU: the interpreter multiplies the bits of bfloat16 as integers (Triton 3.9).
    return tl.float32 if device.type == "cpu" else _DOT_DTYPES[dtype]


@triton.jit
def times_scales(v, a, b):
    """v * a * b, the smaller scale first, so that no product exceeds both v and the result. NaN in a or b is kept."""
    low = tl.where(a < b, a, b)
    high = tl.where(a < b, b, a)
    return v * low * high


@triton.jit
def power_of(scale, DTYPE: tl.constexpr):
    """(power, rest): power * rest is `scale` (float32), and power the largest power of two in it.

    For codes that are converted to DTYPE: codes times `power` are exact, and sums of products with an input have the magnitude
    of the result. Sums of bare codes would overflow float32 for inputs above 1e33. Float16 inputs are never that large, and
    codes times a power may exceed float16; there power is 1. It is limited to the range in which all codes times power, and
    2**23 times power (`unpacked`), are normal numbers: where a scale is larger, so is `rest`, and sums are smaller.
    """
    bits = scale.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 17 << 23), 231 << 23)
    if tl.float16 == DTYPE:
        bits = tl.full(bits.shape, 127 << 23, tl.int32)
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    return bits.to(tl.float32, bitcast=True), scale * inverse


@triton.jit
def widened(codes, zero, power, DTYPE: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr):
    """Codes (N, K) times `power` (N,) in DTYPE, exactly. BITS: codes are int8 tensors with the bits of E4M3. PACKED: the bits
    of each code in words (N, K * PACKED / 32), `zero` (N,) being that of the code 0 (`packed.unpacked`); else 0."""
    # No `return` but in branches of one `if`: the compiler also looks at what follows one.
    if PACKED > 0:
        return unpacked(codes, zero, power, DTYPE, PACKED)
    elif BITS:
        # The bits of E4M3, shifted, are a float16 number of 1/256 of the value (see formats/cpu.py).
        half = ((codes.to(tl.int16) << 7) & -0x4080).to(tl.float16, bitcast=True)
        value = half.to(tl.float32) * (power * 256.0)[:, None]
        return tl.where((codes & 0x7F) == 0x7F, float("nan"), value).to(DTYPE)
    elif tl.float16 == DTYPE:
        return codes.to(DTYPE)
    else:
        return codes.to(DTYPE) * power.to(DTYPE)[:, None]
