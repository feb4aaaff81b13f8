"""Quantization of an input: in one pass with Triton where it is available, else with the reference code."""

from __future__ import annotations

import torch

from ..formats import numerics
from ..formats.scheme import Scheme, TensorScheme
from .base import Input, Reduce
from .triton import support as triton_support


def quantize(x: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme, reduce: Reduce | None = None) -> Input:
    """Codes and scales of x (M, K), for any input scheme: `quantize_input`."""
    assert scheme.input is not None
    return Input(*quantize_input(x, scheme.input, combined(x, scheme.input, input_scale, reduce)))


def combined(
    x: torch.Tensor, scheme: TensorScheme, input_scale: torch.Tensor | None, reduce: Reduce | None
) -> torch.Tensor | None:
    """The scales of x (M, K) if other processes hold its other columns: `granularity.grid`. `input_scale` if none do."""
    if reduce is None or not scheme.dynamic:
        return input_scale
    return numerics.scale_of(reduce(numerics.amax_of(x, scheme.granularity)), scheme.dtype, scheme.mx)


def quantize_input(
    x: torch.Tensor, scheme: TensorScheme, input_scale: torch.Tensor | None, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) of x (M, K), any strides, as `numerics.quantize_input` defines them, with scales for every row.

    The scale of a whole tensor is repeated for each row, (M, 1), as scaled_mm cannot mix row and tensor scales. Scales of
    groups are (M, ceil(K / size)) with the outer dimension contiguous, as block-wise matmuls need them. input_scale: of the
    whole tensor, or one for each row or group (`combined`). kept, for scales per row: (K,) float32, 0 for columns that are
    treated as zeros. Raises CalibrationError for a static scheme without a scale.
    """
    numerics.require_static(scheme, input_scale)
    in_float32 = x.dtype != torch.float64  # as the scales of Triton's kernel are
    in_float32 = in_float32 and (input_scale is None or input_scale.numel() == 1)
    if in_float32 and not scheme.mx and triton_support.why_not(x.device) is None and scheme.granularity.rows in (1, -1):
        from .triton import quantize as triton_quantize

        return triton_quantize.quantize(x, scheme, input_scale, kept)
    q, scale = numerics.quantize_input(x if kept is None else x * kept, scheme, input_scale)
    if scheme.granularity.is_tensor:
        return q, scale.reshape(1, 1).expand(x.shape[0], 1).contiguous()
    return q, scale.t().contiguous().t()
