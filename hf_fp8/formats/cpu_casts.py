"""E4M3 codes to floats on a CPU, where torch's own cast is a loop over single elements.

An E4M3 code is, bit for bit, a float16 number that is 256 times too small: the sign at the top, four
exponent bits with a bias of 7 instead of 15, three mantissa bits; subnormals line up too. Two vector
operations on 16-bit integers put the bits there. Only the NaN code means something else (480 / 256).
"""

from __future__ import annotations

import torch

from .scratch import scratch

# What is kept of a sign-extended code shifted left by 7: the sign, not its copy below, then exponent and mantissa.
_SIGN_EXPONENT_MANTISSA = -0x4080  # 0xBF80 as int16
_NAN_CODE = 0x7F
# Below it, 256 times a scale is finite.
_LARGE = 2.0**119


def multiply_out(q: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out[...] = q * scale``, multiplied in float32 and rounded once to the dtype of `out`, exactly as torch does.

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
