"""FP8 kernels that torch itself ships, `torch.nn.functional.scaled_mm`, and dequantize-then-matmul.

Every ``multiply`` takes weight (N, K) and the scales as the checkpoint stores them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import numerics
from ..scheme import FP8, ROW, TENSOR, Granularity, Scheme
from .kernel import add_bias
from .quantize import quantize_input

BLOCK_INPUT = Granularity(1, 128)
BLOCK_WEIGHT = Granularity(128, 128)


def _scaled_mm(
    q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    recipes: tuple[str, str],
    dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    types = torch.nn.functional.ScalingType
    # Hopper accumulates FP8 products in 14 bits; without fast accumulation they go to float32 registers
    # every few steps, which costs up to a third of the speed. The error stays well below that of the E4M3
    # rounding of the inputs (the gpu tests hold it against the scheme's threshold), so inference takes it,
    # as torchao's does. CPUs have no such choice.
    fast = q.device.type == "cuda"
    out: torch.Tensor = F.scaled_mm(
        q,
        weight.t(),
        x_scale,
        getattr(types, recipes[0]),
        w_scale,
        getattr(types, recipes[1]),
        output_dtype=dtype,
        use_fast_accum=fast,
    )
    return add_bias(out, bias)


def quantize_rowwise(x: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and one scale per row, (M, 1), whatever the scheme's input is: scaled_mm takes no mix of row and tensor."""
    assert scheme.input is not None
    return quantize_input(x, scheme.input, input_scale, per_row=True)


def rowwise(
    q: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Scales of x as (M, 1) and of the weight as (1, N), both float32: channel or tensor weights, any row input."""
    assert x_scale is not None
    w_scale = weight_scale.float().reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    return _scaled_mm(q, x_scale, weight, w_scale, ("RowWise", "RowWise"), dtype, bias)


def quantize_tensorwise(x: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and one scale, (1,)."""
    assert scheme.input is not None
    q, scale = quantize_input(x, scheme.input, input_scale)
    return q, scale.reshape(1)


def tensorwise(
    q: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One scale for x and one for the weight."""
    assert x_scale is not None
    w_scale = weight_scale.float().reshape(1)
    return _scaled_mm(q, x_scale, weight, w_scale, ("TensorWise", "TensorWise"), dtype, bias)


def quantize_blockwise(x: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and a scale per 128 columns, (M, ceil(K / 128)) with the outer dimension contiguous, as cuBLAS wants it."""
    assert scheme.input is not None
    q, scale = quantize_input(x, scheme.input, input_scale)
    return q, scale.t().contiguous().t()  # Triton's is in that order already


def blockwise(
    q: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
) -> torch.Tensor:
    """1x128 inputs by 128x128 weights."""
    assert x_scale is not None
    recipes = ("BlockWise1x128", "BlockWise128x128")
    return _scaled_mm(q, x_scale, weight, weight_scale.float().t(), recipes, dtype, bias)


def fake_quantize(x: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """x rounded to what its codes stand for, in its own dtype, and a scale of nothing."""
    if scheme.input is None:
        return x, x.new_empty(0)
    scale = numerics.input_scale_for(x, scheme.input, input_scale)
    return numerics.fake_quantize(x, scale, scheme.input.granularity, scheme.input.dtype), scale


def dequantize(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Weights multiplied out for the length of the call, then a matmul in the dtype of x."""
    dense = numerics.dequantize(weight, weight_scale, scheme.weight.granularity, x.dtype)
    return add_bias(F.linear(x, dense), bias)


def row_scheme(scheme: Scheme) -> str | None:
    """Why the row-wise kernel cannot take `scheme`; None if it can."""
    if reason := _quantized_fp8(scheme):
        return reason
    assert scheme.input is not None
    if scheme.weight.granularity not in (ROW, TENSOR) or scheme.input.granularity not in (ROW, TENSOR):
        return "row-wise scaled_mm takes one scale per row or per tensor, not per group or block"
    return None


def tensor_scheme(scheme: Scheme) -> str | None:
    """Why the tensor-wise kernel cannot take `scheme`; None if it can."""
    if reason := _quantized_fp8(scheme):
        return reason
    assert scheme.input is not None
    if not (scheme.weight.granularity.is_tensor and scheme.input.granularity.is_tensor):
        return "tensor-wise scaled_mm takes one scale per tensor on both sides"
    return None


def block_scheme(scheme: Scheme) -> str | None:
    """Why the block-wise kernel cannot take `scheme`; None if it can."""
    if reason := _quantized_fp8(scheme):
        return reason
    assert scheme.input is not None
    if scheme.weight.granularity != BLOCK_WEIGHT or scheme.input.granularity != BLOCK_INPUT:
        return "block-wise scaled_mm takes 1x128 inputs by 128x128 weights"
    return None


def _quantized_fp8(scheme: Scheme) -> str | None:
    if scheme.input is None:
        return "the scheme does not quantize inputs"
    if scheme.weight.dtype != FP8 or scheme.input.dtype != FP8:
        return "scaled_mm takes E4M3 codes on both sides"
    return None
