"""int4 weights as FBGEMM's kernels have them (today MSLK's: quantize/shuffle.py and quantize/triton/fp8_quantize.py).

For inputs in FP8 (f8i4bf16), weights are rounded to E4M3 with a scale per row first, as if their scales of groups were applied
to FP8 numbers, and then to int4 with a scale per group. For inputs in bfloat16 (bf16i4bf16), the range of a group, from its
least to its largest value, is mapped to 0..15. The codes are stored 8 less, and instead of a zero point the value of code 0.
"""

from __future__ import annotations

import torch

from ..errors import ScaleError, UnsupportedError
from .code_types import FP8
from .numerics import quantize as rounded
from .scheme import CODE_MAX, ROW, TensorScheme
from .weights import refuse_non_finite, scale_dtype_of

# The least amax of a row, before it is divided by 448, and the least scale and range of a group.
LEAST_AMAX, LEAST = 1e-12, 1e-6


def quantize(weight: torch.Tensor, scheme: TensorScheme, checked: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) in int8 and scales (N, groups) of a float weight (N, K), for inputs in FP8.

    Scales are in the dtype of the weight, and exact, as they are an eighth of an amax. Raises UnsupportedError for the kernel
    with inputs in bfloat16, which `with_minimum` computes; ScaleError for NaN or infinity, if `checked`.
    """
    if scheme.has_zero_points:
        raise UnsupportedError(
            "FBGEMM's int4 weights for inputs in bfloat16 have a float where compressed-tensors stores an integer zero point: "
            "use W4A16_ASYM, whose zero points are integers"
        )
    compute = scale_dtype_of(weight.dtype)
    amax = weight.abs().amax(1, keepdim=True)
    if weight.dtype == torch.float16:
        amax = amax.float()  # in float16 the least amax is 0, and so are scales of small rows
    row = (amax.clamp(min=LEAST_AMAX) / CODE_MAX[FP8]).float()
    if checked:
        refuse_non_finite(row, weight)
    in_fp8 = (rounded(weight.float(), row, ROW, FP8).float() * row).to(compute)
    grouped = in_fp8.view(len(weight), -1, _width(weight, scheme))
    scale = (grouped.abs().amax(2) / -scheme.code.least).clamp(min=LEAST)
    codes = (grouped / scale.unsqueeze(2)).round_().clamp_(scheme.code.least, scheme.code.largest)
    return codes.flatten(1).to(torch.int8), scale


def with_minimum(weight: torch.Tensor, scheme: TensorScheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (N, groups, columns) of -8 to 7, scales and offsets (N, groups, 1) of a float weight (N, K), all in float32, for
    inputs in bfloat16: its values are codes x scale + offset."""
    grouped = weight.float().view(len(weight), -1, _width(weight, scheme))
    least, largest = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    levels = scheme.code.largest - scheme.code.least
    scale = (largest - least).clamp(min=LEAST) / levels
    codes = ((grouped - least) / scale).round_().clamp_(0, levels) + scheme.code.least
    return codes, scale, least - scale * scheme.code.least


def _width(weight: torch.Tensor, scheme: TensorScheme) -> int:
    cols = weight.shape[1]
    width = cols if scheme.granularity.cols == -1 else scheme.granularity.cols
    if cols % width:
        raise ScaleError(f"K = {cols} of a weight is not a multiple of the group size {width}")
    return width
