"""Fast conversion of E4M3 codes to floats on a CPU, and scratch memory that is reused between calls.

The bits of an E4M3 code, shifted, are those of a float16 number that is 256 times too small: sign, four exponent bits with a
bias of 7 instead of 15, three mantissa bits; subnormals match, too. Two vector operations on 16-bit integers shift the bits,
while torch's own cast loops over single elements. Only the NaN code differs (it would become 480 / 256).

Memory is reused between calls, as new memory can cost more time than the computation: the C allocator returns large blocks
to the system and gets new pages, zeroed one by one, at the next call. A 512-token forward of a small model in int8: 0.85 s
with new temporaries, 0.68 s with an allocator that keeps them (two cores, glibc).
"""

from __future__ import annotations

import threading

import torch

# Bit mask for a sign-extended code shifted left by 7: keeps sign, exponent and mantissa, drops the copied sign bit.
_SIGN_EXPONENT_MANTISSA = -0x4080  # 0xBF80 as int16
_NAN_CODE = 0x7F
# For scales below this, 256 * scale is finite.
_LARGE = 2.0**119
# Maximum number of bytes kept per thread and name; larger problems are processed in pieces of this size. An int8 matmul of
# 512 x 1536 (3 MB of sums) loses 30% in pieces of 1 MB, nothing measurable in pieces of 16.
SIZE = 16 * 2**20

_kept = threading.local()


def multiply_out(q: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Dequantize, ``out[...] = q * scale``: multiplied in float32, rounded once to the dtype of `out`, exactly as torch does.

    q: (rows, cols) in E4M3 on the CPU. scale: float32, broadcastable to it. out: (rows, cols), any float dtype.
    """
    codes = q.view(torch.int8)
    if q.numel() == 0 or (codes & _NAN_CODE).amax() == _NAN_CODE or not bool(scale.abs().amax() < _LARGE):
        return out.copy_(q.float().mul_(scale))
    rows, cols = q.shape
    half = scratch("half", (rows, cols), torch.int16).copy_(codes)
    half.bitwise_left_shift_(7).bitwise_and_(_SIGN_EXPONENT_MANTISSA)
    floats = out if out.dtype == torch.float32 else scratch("floats", (rows, cols), torch.float32)
    floats.copy_(half.view(torch.float16)).mul_(scale * 256.0)
    return floats if floats is out else out.copy_(floats)


def scratch(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor (rows, cols); the next call for the same name in this thread overwrites it."""
    needed = shape[0] * shape[1] * dtype.itemsize
    held: torch.Tensor | None = getattr(_kept, name, None)
    if held is None or held.numel() < needed:
        with torch.inference_mode(False):
            held = torch.empty(needed, dtype=torch.uint8, device="cpu")
        if needed <= SIZE:
            setattr(_kept, name, held)
    return held[:needed].view(dtype).view(shape)
