"""Per-token int8 quantization of inputs, with outlier columns kept in float (LLM.int8()).

In language models a few columns of an input are 10 to 100 times as large as the others, in nearly every row
(arXiv 2208.07339). A scale that covers them leaves few codes (8-bit values) for the others, so they are multiplied in float.
"""

from __future__ import annotations

import torch

from ..formats import native, numerics
from ..formats.code_types import INT8
from ..formats.cpu import scratch
from ..formats.scheme import Scheme
from .base import Input, Reduce
from .inputs import combined, quantize_input
from .triton import support as triton_support

# Limits for the number of outlier columns: OUTLIERS in total, OUTLIERS_PER_ROW for each row of input, and one in
# COLUMNS_PER_OUTLIER of all columns. Measured together with numerics.OUTLYING, the threshold for outliers: SmolLM2 (K = 576 and
# 1,536), KL divergence from int8 weights with float inputs, 4,096 tokens in calls of 512 rows, in 1e-3: no outliers 23.0; up
# to one column in 32 and above 3 times the mean 2.9; one in 24 and 2.5 times 2.5; one in 16 and 2 times 2.1, for twice as many
# columns. In calls of 1 row with 1 column 5.9, 2 2.9, 4 1.6; of 2 rows with 4 2.1; of 4 with 8 1.6.
# The cost, 2 threads, warm weights, 12 to 16 columns: 512 rows of 576x576 44%, 576x1536 25%, 2048x5632 13%; 64 rows 33 to
# 74%; of a prefill of 512 tokens 5% (float32) and 11% (bfloat16).
OUTLIERS, OUTLIERS_PER_ROW, COLUMNS_PER_OUTLIER = 64, 2, 24
# Up to this many elements of an input, the time depends on the number of torch calls instead of memory traffic: one thread
# processes them at once (at::internal::GRAIN_SIZE).
SMALL = 2**15
# Elements of larger inputs that are processed at a time: 2 MB of float32, which stay in the caches of two cores between
# passes. From 2**17 to all at once, a prefill of SmolLM2 differed by less than the noise (820 to 876 ms).
PIECE = 2**19


def quantize(
    x: torch.Tensor,
    input_scale: torch.Tensor | None,
    scheme: Scheme,
    reduce: Reduce | None = None,
    kept: torch.Tensor | None = None,
) -> Input:
    """int8 codes (M, K) and scales (M, 1) of x, as `numerics.quantize_input` defines them.

    kept: (K,) float32, 0 for columns that are treated as zeros, else 1.
    """
    assert scheme.input is not None
    if reduce is not None:
        x = x if kept is None else x * kept
        return Input(*numerics.quantize_input(x, scheme.input, combined(x, scheme.input, None, reduce)))
    if not _is_for_cpu(x):
        return Input(*quantize_input(x, scheme.input, None, kept))
    if native.why_not() is None:
        return Input(*native.quantize_tokens(x, numerics.MIN_SCALE, kept)[:2])
    return _in_torch(x, kept)


def quantize_but_outliers(
    x: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme, reduce: Reduce | None = None
) -> Input:
    """As `quantize`, with outlier columns returned in float instead.

    The choice of columns depends on all rows of the call, as in LLM.int8(), and so does the result of each row: if only one
    row is large in a column, that column is quantized as in `quantize`. With `reduce`, each process chooses among its own.
    """
    m, k = x.shape
    columns = numerics.outlier_columns(x, min(OUTLIERS, OUTLIERS_PER_ROW * m, k // COLUMNS_PER_OUTLIER))
    if not len(columns):
        return quantize(x, None, scheme, reduce)
    kept = torch.ones(k, dtype=torch.float32, device=x.device).index_fill_(0, columns, 0.0)
    if reduce is None and _is_for_cpu(x) and native.why_not() is None:
        codes, scale, outliers = native.quantize_tokens(x, numerics.MIN_SCALE, kept, columns)
        return Input(codes, scale, columns, outliers)
    # This order of operations is three times as fast for 16-bit floats: 0.03 ms instead of 0.1 for 512 rows.
    outliers = x.t().index_select(0, columns).t().float()
    return quantize(x, None, scheme, reduce, kept)._replace(columns=columns, outliers=outliers)


def _is_for_cpu(x: torch.Tensor) -> bool:
    """Whether the CPU's own code quantizes x, not Triton's (in its interpreter) or the reference."""
    return x.is_cpu and x.dtype in native.DTYPES and triton_support.why_not(x.device) is not None


def _in_torch(x: torch.Tensor, kept: torch.Tensor | None) -> Input:
    """Quantize on a CPU without the library, in fewer passes than the reference code, on pieces that stay in the cache."""
    m, k = x.shape
    if m * k <= SMALL:
        values = x.float() if kept is None else x * kept
        scale = _scale(values.abs().amax(1, keepdim=True))
        return Input(torch.div(values, scale).round_().to(INT8), scale)
    codes = torch.empty((m, k), dtype=INT8, device=x.device)
    scales = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    step = -(-m // -(-m * k // PIECE))
    for start in range(0, m, step):
        piece, scale = x[start : start + step], scales[start : start + step]
        values = scratch("values", (piece.shape[0], k), torch.float32)
        if kept is not None and x.dtype == torch.float32:
            torch.mul(piece, kept, out=values)
        else:
            values.copy_(piece)
            if kept is not None:
                values.mul_(kept)
        # Two reductions, as abs needs a pass that writes, and vector_norm and aminmax are not vectorized.
        torch.maximum(values.amax(1, keepdim=True), values.amin(1, keepdim=True).neg_(), out=scale)
        # No clamp needed, as the scale comes from the amax. Rows with NaN or inf become NaN, which the cast converts to 0.
        codes[start : start + step] = values.div_(_scale(scale)).round_()
    return Input(codes, scales)


def _scale(amax: torch.Tensor) -> torch.Tensor:
    """Scales (M, 1) for the amax of rows, computed in place."""
    return torch.threshold_(amax.div_(127.0), 0.0, numerics.MIN_SCALE)  # as `numerics.scale_of`
