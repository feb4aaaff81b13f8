"""Kernels for stacks of experts in plain torch: `scaled_grouped_mm`, and dequantization of one expert at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..formats import numerics
from ..formats.exponents import scale_values
from ..formats.scheme import FP8_DYNAMIC, ROW, Granularity, Scheme, TensorScheme
from . import torch_fp8
from .base import ExpertWeights, GroupedKernel, Input, Reduce, Routing, product_dtype
from .inputs import combined, quantize_input


def quantize(
    x: torch.Tensor,
    routing: Routing,
    scheme: TensorScheme,
    input_scale: torch.Tensor | None,
    n_experts: int,
    reduce: Reduce | None = None,
) -> tuple[Input, Routing]:
    """Codes and scales (float32; float64 for float64) of x (R, K), and the routing to use with them.

    If the scale of a row depends only on that row, tokens are quantized once, before they are copied to their experts.
    Per-tensor scales belong to an expert: the checkpoint's `input_scale` (E, 1), or computed from all rows of the expert; then
    rows are copied first, with one scale for each, (S, 1). If the scale is NaN, as for an expert that was not calibrated, the
    codes are NaN, too. reduce: as for other inputs, also for the amax of each expert, (1, E + 1). Raises CalibrationError for a
    static scheme without `input_scale`.
    """
    numerics.require_static(scheme, input_scale)
    if not scheme.granularity.is_tensor:
        return Input(*quantize_input(x, scheme, combined(x, scheme, None, reduce))), routing
    x, expert = routing.gather(x), routing.experts
    if input_scale is None:
        amax = x.new_zeros(n_experts + 1, dtype=numerics.wide(x.dtype))
        amax = amax.scatter_reduce(0, expert, x.abs().amax(1).to(amax.dtype), "amax") if x.shape[0] else amax
        amax = amax if reduce is None else reduce(amax.unsqueeze(0)).squeeze(0)
        scale = numerics.scale_of(amax, scheme.dtype)
    else:
        scale = F.pad(input_scale.float().reshape(-1), (0, 1), value=1.0)
    rows = scale[expert].unsqueeze(1)
    return Input(numerics.quantize(x, rows, ROW, scheme.dtype), rows), routing._replace(rows=None, share=1)


def scaled_grouped_mm(x: Input, w: ExpertWeights, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
    """torch's `scaled_grouped_mm` with row-wise scales on both sides; rows are sorted first if they are not."""
    assert x.scale is not None
    if routing.offsets is None:
        routing = sort(routing, w.codes.shape[0])
    assert routing.offsets is not None
    types = F.ScalingType
    n_experts, n, _ = w.codes.shape
    w_scale = scale_values(w.scale).float()
    if w.scheme.weight.granularity.is_tensor:
        w_scale = w_scale.repeat_interleave(n // w.parts, 1)
    offsets, x_scale = routing.offsets, routing.gather(x.scale).reshape(-1)
    nobody = routing.experts >= n_experts
    if routing.expected is None:
        # Rows without an expert come last and would not be written: the last expert computes them with a scale of 0.
        offsets = offsets.clone()
        offsets[-1:] = routing.experts.shape[0]
        x_scale = x_scale.masked_fill(nobody, 0.0)
    out: torch.Tensor = F.scaled_grouped_mm(  # type: ignore[attr-defined]
        routing.gather(x.x),
        w.codes.transpose(1, 2),
        x_scale,
        types.RowWise,
        w_scale.reshape(n_experts, n),
        types.RowWise,
        offs=offsets,
        output_dtype=dtype,
        use_fast_accum=True,  # as in torch_fp8
    )
    if routing.expected is not None:
        out = out.masked_fill(nobody.unsqueeze(1), 0.0)
    return out if routing.slots is None else torch.empty_like(out).index_copy_(0, routing.slots, out)


def sort(routing: Routing, n_experts: int) -> Routing:
    """The routing sorted by expert."""
    expert, order = torch.sort(routing.experts, stable=True)
    rows = order if routing.rows is None else routing.rows[order]
    slots = order if routing.slots is None else routing.slots[order]
    return Routing(expert, rows, offsets_of(expert, n_experts), slots, routing.expected, routing.share)


def offsets_of(experts: torch.Tensor, n_experts: int) -> torch.Tensor:
    """(E,) int32: the number of entries of the sorted `experts` up to and including each expert."""
    return torch.searchsorted(experts, torch.arange(n_experts, device=experts.device), right=True, out_int32=True)


def dequantize(x: Input, w: ExpertWeights, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
    """One expert after the other, its weight dequantized in pieces. Waits for a GPU, to read the number of rows per expert."""
    n_experts, n, _ = w.codes.shape
    routing = routing if routing.offsets is not None else sort(routing, n_experts)
    values = floats_of(x, w.scheme, dtype).to(product_dtype(dtype, x.x.device))
    out = values.new_zeros((routing.experts.shape[0], n))
    for expert, rows, places in by_expert(routing):
        given = values[rows]
        for dense, first, last in pieces(w, expert, values.shape[1], values.dtype):
            out[places, first:last] = F.linear(given, dense)
    return out.to(dtype)


def by_expert(routing: Routing) -> Iterator[tuple[int, slice | torch.Tensor, slice | torch.Tensor]]:
    """Yield (expert, index of its rows in the input, index of their outputs) for each expert that has rows.

    The routing must be sorted. Waits for a GPU, to read the number of rows per expert.
    """
    assert routing.offsets is not None
    rows, start = routing.row_numbers(), 0
    for expert, end in enumerate(routing.offsets.tolist()):
        some = slice(start, end)
        if end > start:
            yield expert, some if rows is None else rows[some], some if routing.slots is None else routing.slots[some]
        start = end


def floats_of(x: Input, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """x (R, K) in floats: codes times their scales, in `dtype`."""
    return x.x if x.scale is None else numerics.dequantize_input(x.x, x.scale, _of_input(scheme, x.scale), dtype)


def pieces(w: ExpertWeights, expert: int, k: int, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Yield (dequantized rows of one expert's weight, index of the first row, index after the last row)."""
    for piece, first in w.pieces(expert, k, dtype, numerics.chunk(w.codes.device)):
        yield piece, first, first + len(piece)


def times_weights(grad: torch.Tensor, w: ExpertWeights, k: int, routing: Routing) -> torch.Tensor:
    """grad (S, N), sorted by expert, times the dequantized weights of the experts: (S, K) in float32 (float64 for float64).

    In bfloat16 on GPUs all experts are computed at once, a few columns at a time, without waiting for the GPU; otherwise
    one expert after the other.
    """
    assert routing.offsets is not None
    n = w.codes.shape[1]
    found = torch.zeros((grad.shape[0], k), dtype=numerics.wide(grad.dtype), device=grad.device)
    aligned = n % 8 == 0 and k % 8 == 0 and not w.scheme.weight.packed  # rows of 16 bytes
    if aligned and grad.is_cuda and grad.dtype == torch.bfloat16 and torch.cuda.get_device_capability(grad.device) >= (8, 0):
        return _times_columns(grad.contiguous(), w, routing, found)
    start, grad = 0, grad.to(product_dtype(grad.dtype, grad.device))
    for expert, end in enumerate(routing.offsets.tolist()):
        if end > start:
            for dense, first, last in pieces(w, expert, k, grad.dtype):
                found[start:end] += grad[start:end, first:last] @ dense
        start = end
    return found


def _times_columns(grad: torch.Tensor, w: ExpertWeights, routing: Routing, out: torch.Tensor) -> torch.Tensor:
    n_experts, n, k = w.codes.shape
    granularity = w.scheme.weight.granularity
    width = granularity.cols if granularity.cols > 1 else 64
    step = max(numerics.GPU_CHUNK // (n_experts * n) // width, 1) * width
    nobody = (routing.experts >= n_experts).unsqueeze(1)  # rows without an expert come last and are not written
    for start in range(0, k, step):
        codes = w.codes[:, :, start : start + step]
        scale = scale_values(w.scale).float()
        if granularity.is_tensor:
            scale = scale.repeat_interleave(n // w.parts, 1).unsqueeze(2)
        else:
            if granularity.cols > 1:
                scale = scale[:, :, start // width : -(-(start + step) // width)]
                scale = scale.repeat_interleave(width, 2)[:, :, : codes.shape[2]]
            if granularity.rows > 1:
                each = (part.repeat_interleave(granularity.rows, 1)[:, : n // w.parts] for part in scale.chunk(w.parts, 1))
                scale = torch.cat(list(each), 1)
        dense = codes.float().mul_(scale).to(grad.dtype)
        product = F.grouped_mm(grad, dense, offs=routing.offsets)
        out[:, start : start + step] = product.masked_fill_(nobody, 0.0)
    return out


def _of_input(scheme: Scheme, scale: torch.Tensor) -> Granularity:
    """The granularity of the scales of an input; per-tensor scales are repeated for each row here."""
    assert scheme.input is not None
    return ROW if scale.shape[1] == 1 else scheme.input.granularity


SCALED_GROUPED_MM = GroupedKernel(
    name="scaled_grouped_mm", why_not_scheme=torch_fp8.why_not_rowwise, why_not_device=torch_fp8.why_not_device,
    probes=(FP8_DYNAMIC,), multiply=scaled_grouped_mm, quantizes=True,
)  # fmt: skip
DEQUANTIZE = GroupedKernel(name="grouped_dequantize", multiply=dequantize, quantizes=True)
WEIGHT_ONLY = GroupedKernel(name="grouped_weight_only", multiply=dequantize)
