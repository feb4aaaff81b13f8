"""Kernels that torch itself ships: `torch.nn.functional.scaled_mm`, and dequantize-then-matmul.

Every ``run`` takes x (M, K) in bf16, fp16 or float32, weight (N, K) in E4M3 and the scales as the
checkpoint stores them, and returns (M, N) in the dtype of x, bias not added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import numerics
from ..scheme import ROW, TENSOR, Granularity, Scheme

BLOCK_INPUT = Granularity(1, 128)
BLOCK_WEIGHT = Granularity(128, 128)


def _scaled_mm(
    q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    recipes: tuple[str, str],
    dtype: torch.dtype,
) -> torch.Tensor:
    types = torch.nn.functional.ScalingType
    out: torch.Tensor = F.scaled_mm(
        q, weight.t(), x_scale, getattr(types, recipes[0]), w_scale, getattr(types, recipes[1]), output_dtype=dtype
    )
    return out


def rowwise(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """Scales of x as (M, 1) and of the weight as (1, N), both float32: channel or tensor weights, any row input."""
    assert scheme.input is not None
    x_scale = numerics.input_scale_for(x, scheme.input.granularity, input_scale)
    q = numerics.quantize(x, x_scale, scheme.input.granularity)
    # scaled_mm refuses an expanded scalar and a mix of row-wise and tensor-wise scales.
    x_scale = x_scale.reshape(-1, 1).expand(x.shape[0], 1).contiguous()
    w_scale = weight_scale.float().reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    return _scaled_mm(q, x_scale, weight, w_scale, ("RowWise", "RowWise"), x.dtype)


def tensorwise(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """One scale for x and one for the weight."""
    assert scheme.input is not None
    x_scale = numerics.input_scale_for(x, TENSOR, input_scale)
    q = numerics.quantize(x, x_scale, TENSOR)
    return _scaled_mm(q, x_scale.reshape(1), weight, weight_scale.float().reshape(1), ("TensorWise", "TensorWise"), x.dtype)


def blockwise(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """1x128 inputs by 128x128 weights, in the layouts that cuBLAS wants (outer dimension contiguous)."""
    x_scale = numerics.compute_scale(x, BLOCK_INPUT)
    q = numerics.quantize(x, x_scale, BLOCK_INPUT)
    x_scale = x_scale.t().contiguous().t()
    return _scaled_mm(q, x_scale, weight, weight_scale.float().t(), ("BlockWise1x128", "BlockWise128x128"), x.dtype)


def dequantize(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """The checkpoint's arithmetic on any device: inputs rounded as the scheme says, weights multiplied out, matmul."""
    if scheme.input is not None:
        x_scale = numerics.input_scale_for(x, scheme.input.granularity, input_scale)
        x = numerics.fake_quantize(x, x_scale, scheme.input.granularity)
    return weight_only(x, weight, weight_scale, None, scheme)


def weight_only(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """Weights multiplied out for the length of the call, inputs as they are."""
    return F.linear(x, numerics.dequantize(weight, weight_scale, scheme.weight.granularity, x.dtype))


def row_scheme(scheme: Scheme) -> str | None:
    """Why the row-wise kernel cannot take `scheme`; None if it can."""
    if scheme.input is None:
        return "the scheme does not quantize inputs"
    if scheme.weight.granularity not in (ROW, TENSOR) or scheme.input.granularity not in (ROW, TENSOR):
        return "row-wise scaled_mm takes one scale per row or per tensor, not per group or block"
    return None


def tensor_scheme(scheme: Scheme) -> str | None:
    """Why the tensor-wise kernel cannot take `scheme`; None if it can."""
    if scheme.input is None:
        return "the scheme does not quantize inputs"
    if not (scheme.weight.granularity.is_tensor and scheme.input.granularity.is_tensor):
        return "tensor-wise scaled_mm takes one scale per tensor on both sides"
    return None


def block_scheme(scheme: Scheme) -> str | None:
    """Why the block-wise kernel cannot take `scheme`; None if it can."""
    if scheme.input is None:
        return "the scheme does not quantize inputs"
    if scheme.weight.granularity != BLOCK_WEIGHT or scheme.input.granularity != BLOCK_INPUT:
        return "block-wise scaled_mm takes 1x128 inputs by 128x128 weights"
    return None


def weight_only_scheme(scheme: Scheme) -> str | None:
    """Why the weight-only kernel would not compute what `scheme` says; None if it would."""
    return None if scheme.input is None else "the scheme quantizes inputs"
