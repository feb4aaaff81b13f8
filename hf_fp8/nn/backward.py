"""Input gradient of a quantized linear: output gradient times weight, (M, N) @ (N, K), as one custom op.

The op is opaque to `torch.compile`, so a graph never stores a dequantized weight. Its derivative is the same op with the
weight transposed, so second-order gradients are correct. Codes are the stored 8-bit values, E4M3 or int8.
"""

from __future__ import annotations

from typing import Any

import torch

from ..formats import numerics
from ..formats.code_types import FP8, INT8
from ..formats.exponents import scale_values
from ..formats.scheme import FP8_DYNAMIC, INT8_DYNAMIC, ROW, Granularity, Scheme, TensorScheme
from ..kernels import Input, Weight, kernel_for, native
from ..kernels import torch_fp8 as torch_mm
from ..kernels.base import product_dtype
from . import custom_op

# "exact": gradient times the dequantized weight. "quantized": gradient rounded to 8 bits, times the codes.
BACKWARDS = ("exact", "quantized")


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    scheme: str,
    transposed: bool,
    how: str,
    columns: int = 0,
    zero_point: torch.Tensor | None = None,
    column_groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (M, N) @ (N, K), or x (M, K) @ (K, N) if `transposed`, in the dtype of x. columns: K, if codes are packed."""
    w = Weight(weight, weight_scale, None, Scheme.parse(scheme), zero_point, column_groups)
    if transposed:
        return torch_mm.dequantize(Input(x), w, x.dtype)
    if x.shape[0] and how == "quantized" and (turned := _turned(w.scheme)) is not None:
        return _quantized(x, w, turned)
    return _exact(x, w, columns or weight.shape[1])


def _exact(x: torch.Tensor, w: Weight, k: int) -> torch.Tensor:
    """x @ dequantized weight, a piece at a time: the same sums, without a float copy of the whole weight."""
    if (found := native.times_weight(x, w)) is not None:
        return found
    elements = torch_mm.elements_at_once(w.codes.device)
    values = x.to(product_dtype(x.dtype, x.device))
    if 0 < w.codes.shape[0] * k <= elements:
        return (values @ next(w.pieces(k, values.dtype, elements))[0]).to(x.dtype)
    if w.scheme.weight.packed:  # in pieces of rows, whose products are added
        sums = x.new_zeros((x.shape[0], k), dtype=numerics.wide(x.dtype))
        for dense, start in w.pieces(k, values.dtype, elements):
            sums += values[:, start : start + len(dense)] @ dense
        return sums.to(x.dtype)
    out, granularity = x.new_empty((x.shape[0], k)), w.scheme.weight.granularity
    for codes, scale, start in numerics.pieces_of_columns(w.codes, w.scale, granularity, elements):
        out[:, start : start + codes.shape[1]] = values @ numerics.dequantize(codes, scale, granularity, values.dtype)
    return out


def _turned(scheme: Scheme) -> Scheme | None:
    """The scheme of the transposed weight, with inputs quantized per token or group; None if its scales cannot be transposed.

    Scales per row of W would be scales per column of its transpose: the gradient is multiplied by them before it is rounded.
    """
    granularity = scheme.weight.granularity
    if scheme.weight.packed:
        return None
    if granularity == ROW:
        return {FP8: FP8_DYNAMIC, INT8: INT8_DYNAMIC}.get(scheme.weight.dtype)
    if scheme.weight.dtype != FP8 or granularity.rows == 1:
        return None
    if granularity.is_tensor:
        return Scheme(scheme.weight, FP8_DYNAMIC.input)
    rows, cols = granularity.rows, granularity.cols
    return Scheme(TensorScheme(Granularity(cols, rows)), TensorScheme(Granularity(1, rows), dynamic=True))


def _quantized(x: torch.Tensor, w: Weight, turned: Scheme) -> torch.Tensor:
    """A quantized matmul with the transposed weight if the device has a kernel for it, else `_exact`."""
    weight, weight_scale, scheme = w.codes, w.scale, w.scheme
    backend = "int8" if turned == INT8_DYNAMIC else "scaled_mm"
    kernel = kernel_for(x, weight.t(), turned.text, backend)
    # No `quantize`: the weight-only kernel for few rows, where reading the weight takes most of the time.
    if kernel.quantize is None or kernel.quantize is torch_mm.fake_quantize:
        return _exact(x, w, weight.shape[1])
    # All kernels except the int8 kernel for CPUs need contiguous rows.
    codes = weight.t() if turned == INT8_DYNAMIC and weight.device.type == "cpu" else weight.t().contiguous()
    if scheme.weight.granularity == ROW:
        # float32, as the product of two small numbers may underflow
        given = x.float() * scale_values(weight_scale).float().reshape(1, -1)
        scale = weight_scale.new_ones((codes.shape[0], 1), dtype=torch.float32)
    else:
        given, scale = x, weight_scale.t().contiguous() if weight_scale.ndim == 2 else weight_scale
    return kernel.multiply(kernel.quantize(given, None, turned, None), Weight(codes, scale, None, turned), x.dtype)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    scheme: str,
    transposed: bool,
    how: str,
    columns: int = 0,
    zero_point: torch.Tensor | None = None,
    column_groups: torch.Tensor | None = None,
) -> Any:
    return x.new_empty((x.shape[0], weight.shape[0] if transposed else columns or weight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, weight, weight_scale, ctx.scheme, ctx.transposed, _, ctx.columns, zero_point, column_groups = inputs
    ctx.save_for_backward(weight, weight_scale, zero_point, column_groups)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, weight_scale, *rest = ctx.saved_tensors
    again = times_weight(grad, weight, weight_scale, ctx.scheme, not ctx.transposed, "exact", ctx.columns, *rest)
    return again, *[None] * 8


times_weight = custom_op.define("times_weight", _run, fake=_fake, backward=_backward, setup_context=_setup_context)
