"""Quantization of an input: in one pass with Triton where it is available, else with the reference code."""

from __future__ import annotations

import torch

from ..formats import numerics
from ..formats.scheme import TensorScheme
from .triton import support as triton_support


def quantize_input(
    x: torch.Tensor,
    scheme: TensorScheme,
    input_scale: torch.Tensor | None,
    per_row: bool = False,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) of x (M, K), any strides, as `numerics.quantize_input` defines them.

    per_row: a scale for the whole of x is repeated for each row, (M, 1). kept, for scales per row: (K,) float32, 0
    for columns that are treated as zeros. Raises CalibrationError for a static scheme without a scale.
    """
    numerics.require_static(scheme, input_scale)
    in_float32 = x.dtype != torch.float64  # as the scales of Triton's kernel are
    if in_float32 and triton_support.why_not(x.device) is None and scheme.granularity.rows in (1, -1):
        from .triton import quantize as triton_quantize

        return triton_quantize.quantize(x, scheme, input_scale, per_row, kept)
    q, scale = numerics.quantize_input(x if kept is None else x * kept, scheme, input_scale)
    return q, (scale.reshape(-1, 1).expand(x.shape[0], 1).contiguous() if per_row else scale)
