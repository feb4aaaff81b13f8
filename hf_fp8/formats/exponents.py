"""Scales that are stored as exponents of two, one byte each (E8M0), and how they are computed for the MX formats.

Nothing is computed with such scales as they are stored: `scale_values` makes floats of them, which is exact.
"""

from __future__ import annotations

import torch

# Dtypes of scales that are exponents: a byte b stands for 2 ** (b - 127), 255 for NaN; there is no zero (E8M0, of the OCP
# Microscaling Formats specification 1.0). Files have them as `F8_E8M0` or, as compressed-tensors and ModelOpt, as plain bytes.
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
_BIAS, _NAN_EXPONENT = 127, 255


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Scales as they are stored, as floats: exponents in float32, which is exact; others unchanged."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float() if scale.dtype == torch.float8_e8m0fnu else scale


def exponents_of(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Positive scales, rounded up to powers of two so that nothing overflows, stored as exponents in `dtype` (`EXPONENTS`)."""
    fraction, exponent = torch.frexp(scale.double())
    exponent = exponent - (fraction == 0.5).to(exponent.dtype)  # frexp's fractions are less than 1
    return _stored_exponents(exponent, scale).view(dtype)


def mx_exponents(amax: torch.Tensor) -> torch.Tensor:
    """The exponents (uint8, `EXPONENTS`) of MX scales of E4M3 codes for the `amax` of each block.

    compressed-tensors' arithmetic (quantization/utils/mxfp_utils.py, generate_mx_scales), bit for bit: the largest power of two
    in the amax, divided by 2 ** 8, the largest in E4M3's 448; twice that if amax is at least 1.75 times the power, as its code
    would exceed 448. A block of zeros has the least scale, 2 ** -127. NaN and infinity give NaN. Where float16 cannot
    hold the scale of a float16 block, compressed-tensors loses the block (its scale is 1): it has that of float32 here.
    """
    fraction, exponent = torch.frexp(amax.double())
    exponent = exponent - 1 + (fraction >= 0.875).to(exponent.dtype) - 8
    return _stored_exponents(torch.where(amax == 0, -_BIAS, exponent), amax)


def _stored_exponents(exponent: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    stored = (exponent + _BIAS).clamp(0, _NAN_EXPONENT - 1)
    return torch.where(of.isfinite(), stored, _NAN_EXPONENT).to(torch.uint8)
