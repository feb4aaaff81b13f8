"""Reference arithmetic in plain torch, on any device: every kernel is tested against it.

Codes are the stored 8-bit values, E4M3 or int8. Rounding is that of compressed-tensors (quantization/lifecycle/forward.py and
quantization/utils/helpers.py): ``scale = amax / 448``, ``q = e4m3(clamp(x / scale, -448, 448))``.
int8 is the same with 127 and rounding to the nearest integer, ties to even. Scales that files store as exponents of two
(`EXPONENTS`) are converted to float32, which is exact, before anything is computed with them. Everything is computed in
float32 (float64 for inputs in float64) and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import CalibrationError
from . import native
from .code_types import CODE_TYPES, FP8
from .cpu import multiply_out
from .exponents import mx_exponents, scale_values
from .quantized_weight.tensor import codes_of
from .scheme import CODE_MAX, Granularity, TensorScheme

# The scale if amax / 448 is 0: a normal number, which no device flushes to 0 in x / scale.
MIN_SCALE = torch.finfo(torch.float32).tiny
# SAMPLE_ROWS: rows that `outlier_columns` samples, as outlier columns are large in nearly every row. OUTLYING: an outlier
# column has more than this times the mean of all columns. WORTHWHILE: there are outliers only if the largest column has more
# than this times the mean, else a separate product does not pay off. SmolLM2, 512 rows, KL divergence in 1e-3: the 16 largest
# columns by all rows 2.7, by 64 2.8, by 32 3.0; one in 24 above 2.5 times the mean 2.5, only if one is above 5 times 2.6,
# 8 times 2.7 (the input of most o_proj then has no outliers), 12 times 3.5.
SAMPLE_ROWS = 64
OUTLYING, WORTHWHILE = 2.5, 5.0
# Elements that `dequantize` processes at a time on a CPU, so that temporaries stay in the cache. Measured for
# 5632x2048 to float32 on two cores, ms: 35 at 2**16, 28 at 2**17, 27 at 2**18, 22 at 2**19, 23 at 2**20; torch's own
# cast and product 65 to 75. To bfloat16 26, 22, 17, 16, 15; torch 52 to 89.
CPU_CHUNK = 2**19
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# On other devices, where weights are dequantized in pieces to limit memory: 64 MB of float32.
GPU_CHUNK = 2**24


def compute_scale(x: torch.Tensor, granularity: Granularity, dtype: torch.dtype = FP8, mx: bool = False) -> torch.Tensor:
    """Scales (`granularity.grid`) that map the amax of each block to the largest code of `dtype`; if `mx`, MX scales.

    x: (rows, cols), any float dtype; scales are in its `wide` dtype. The scale of a zero block is the smallest normal float32,
    so its values quantize to zero; the scale of a block with NaN or inf is NaN or inf, so that the error stays visible.
    """
    if x.numel() == 0:
        return torch.full(granularity.grid(*x.shape), MIN_SCALE, dtype=wide(x.dtype), device=x.device)
    return scale_of(amax_of(x, granularity), dtype, mx)


def amax_of(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """The amax of each block of a non-empty x (rows, cols): `granularity.grid`, in the dtype of x."""
    if (
        granularity.rows != -1 and x.dtype in native.DTYPES and in_library(x)
    ):  # a tensor is one block, which one thread would do
        return native.amax(x, granularity).to(x.dtype)
    rows, cols = x.shape
    grid_rows, grid_cols = granularity.grid(rows, cols)
    magnitude = x.abs()
    if granularity.is_row:
        return magnitude.amax(dim=1, keepdim=True)
    if granularity.is_tensor:
        return magnitude.amax().reshape(1, 1)
    block_rows = rows if granularity.rows == -1 else granularity.rows
    block_cols = cols if granularity.cols == -1 else granularity.cols
    pad = (0, grid_cols * block_cols - cols, 0, grid_rows * block_rows - rows)
    tiles = torch.nn.functional.pad(magnitude, pad).view(grid_rows, block_rows, grid_cols, block_cols)
    return tiles.amax(dim=(1, 3))


def in_library(*tensors: torch.Tensor) -> bool:
    """Whether the library of CPU kernels takes them: plain tensors of a CPU, where nothing traces or differentiates."""
    return (
        not torch.compiler.is_compiling()  # first, so that nothing else is traced
        and all(type(t) in _PLAIN and t.is_cpu and t.dtype != torch.float64 for t in tensors)
        and native.why_not() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for computing with values of `dtype`: float64 for float64 (float32 cannot hold its values), else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_of(amax: torch.Tensor, dtype: torch.dtype = FP8, mx: bool = False) -> torch.Tensor:
    """The scale, in the `wide` dtype, that maps `amax` to the largest code of `dtype`; if `mx`, that of `mx_exponents`."""
    if mx:
        return scale_values(mx_exponents(amax)).to(wide(amax.dtype))
    return torch.threshold_(amax.to(wide(amax.dtype)) / CODE_MAX[dtype], 0.0, MIN_SCALE)  # NaN stays


def expand_scale(scale: torch.Tensor, granularity: Granularity, rows: int, cols: int) -> torch.Tensor:
    """`scale`, any shape with `granularity.grid` elements, broadcastable to (rows, cols)."""
    scale = scale.reshape(granularity.grid(rows, cols))
    if granularity.cols > 1:
        scale = scale.repeat_interleave(granularity.cols, dim=1)[:, :cols]
    if granularity.rows > 1:
        scale = scale.repeat_interleave(granularity.rows, dim=0)[:rows]
    return scale


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    granularity: Granularity,
    dtype: torch.dtype = FP8,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """x (rows, cols) in float -> codes of `dtype` of the same shape, contiguous.

    Finite values saturate at the largest code. NaN and infinite values become NaN in E4M3; otherwise, with a static
    scale, an earlier overflow would become a plausible finite number. int8 has no NaN: such values
    become 0, and the NaN or infinite scale of their block keeps the error visible. generator: round up or down at random
    (`stochastic_round`).
    """
    code, scale = CODE_TYPES[dtype], scale_values(scale)
    if generator is None and x.dtype in native.DTYPES and dtype in native.CODES and in_library(x, scale):
        return native.quantize(x, scale, granularity, dtype)
    scaled = x.to(wide(x.dtype)) / expand_scale(scale, granularity, *x.shape)
    # Clamp before the cast: eager casts did not saturate before torch 2.12.
    clamped = scaled.clamp(-code.largest, code.largest)
    if generator is not None:
        clamped = stochastic_round(clamped, dtype, generator)
    return code.round(torch.where(x.isinf(), torch.nan, clamped) if code.is_float else clamped.nan_to_num_(0.0))


def stochastic_round(x: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Stochastic rounding of x (float32) to one of the two neighbouring codes of `dtype`; the nearer code is more likely.

    The mean over many values is preserved. Rounding to nearest does not preserve it: values that lie on codes and change by
    less than half a step would all be rounded back. See Croci et al., doi.org/10.1098/rsos.211631.
    """
    step = CODE_TYPES[dtype].step(x)
    x = x / step  # exact: a power of two
    low = torch.floor(x)
    return low.add_(torch.rand(x.shape, generator=generator, dtype=torch.float32, device=x.device) < x - low).mul_(step)


def dequantize(
    q: torch.Tensor, scale: torch.Tensor, granularity: Granularity, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """q (rows, cols) in E4M3 or integers times its scales, multiplied in their `wide` dtype and rounded once to `dtype`."""
    q, scale = codes_of(q), scale_values(scale)
    computed = wide(scale.dtype)
    if q.dtype in native.CODES and dtype in native.DTYPES and in_library(q, scale):
        return native.dequantize(q, scale, granularity, torch.empty(q.shape, dtype=dtype, device=q.device))
    if q.device.type != "cpu" or q.dtype != FP8 or computed == torch.float64 or torch.compiler.is_compiling():
        return q.to(computed).mul_(expand_scale(scale, granularity, *q.shape)).to(dtype)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    for piece, part, start in pieces(q, scale, granularity, CPU_CHUNK):
        multiply_out(piece, expand_scale(part.float(), granularity, *piece.shape), out[start : start + len(piece)])
    return out


def dequantize_rows(
    q: torch.Tensor, scale: torch.Tensor, rows: slice, dtype: torch.dtype, *, granularity: Granularity
) -> torch.Tensor:
    """Rows (start, stop) of ``dequantize(q, scale, granularity, dtype)``; only the blocks that contain them are dequantized."""
    count, cols = q.shape
    if rows.start == 0 and rows.stop == count:
        return dequantize(q, scale, granularity, dtype)
    grid, height = scale.reshape(granularity.grid(count, cols)), max(granularity.rows, 1)
    first = rows.start // height * height
    part = grid if granularity.rows == -1 else grid[first // height : -(-rows.stop // height)]
    return dequantize(codes_of(q)[first : rows.stop], part, granularity, dtype)[rows.start - first :]


def dequantize_input(q: torch.Tensor, scale: torch.Tensor, granularity: Granularity, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize`, with values beyond the range of `dtype` (by rounding up) clamped to its largest number."""
    largest = torch.finfo(dtype).max
    return dequantize(q, scale, granularity, dtype).clamp_(-largest, largest)


def require_static(scheme: TensorScheme, static: torch.Tensor | None) -> None:
    """Raise CalibrationError if the scheme of the inputs is static and `static`, its scale, is None."""
    if static is None and not scheme.dynamic:
        raise CalibrationError(
            "this layer quantizes its inputs with a static scale, and has no input scale yet: it was not calibrated, or the "
            "checkpoint has none. Run data through the model under `with hf_fp8.calibrate(model):`, use backend='weight_only' "
            "(inputs are not quantized), or a scheme with dynamic inputs, for example FP8_DYNAMIC"
        )


def quantize_input(x: torch.Tensor, scheme: TensorScheme, static: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) of an input x (M, K). The scale: `static`, in the `wide` dtype of x, if there is one, else of x itself.

    Raises CalibrationError for a static scheme without a scale.
    """
    require_static(scheme, static)
    made = compute_scale(x, scheme.granularity, scheme.dtype, scheme.mx) if static is None else static
    scale = scale_values(made).to(wide(x.dtype))
    return quantize(x, scale, scheme.granularity, scheme.dtype), scale


def outlier_columns(x: torch.Tensor, most: int) -> torch.Tensor:
    """Indices of the columns of x (M, K) with the largest magnitude relative to the mean magnitude of the row.

    Estimated on up to `SAMPLE_ROWS` evenly spaced rows; zero and non-finite rows are ignored. On a CPU at most `most`: only
    columns above `OUTLYING` times the mean of all columns, and none if no column is above `WORTHWHILE` times the mean. On
    other devices always `most`, as counting them would wait for the device.
    """
    rows = x[:: -(-x.shape[0] // SAMPLE_ROWS)].abs()
    # Divide by the row's amax first: the mean of a row of huge values would overflow.
    rows = rows.to(wide(x.dtype)).div_(rows.amax(1, keepdim=True))
    rows = rows.div_(rows.mean(1, keepdim=True)).nan_to_num_(nan=0.0)
    sums = rows.sum(0, dtype=torch.float32)
    largest, columns = sums.topk(most)
    if x.device.type != "cpu":
        return columns
    mean, loudness = sums.mean().item(), largest.tolist()
    if loudness[0] <= WORTHWHILE * mean:
        return columns[:0]
    return columns[: sum(value > OUTLYING * mean for value in loudness)]


def chunk(device: torch.device) -> int:
    """Elements of a weight that are processed at a time."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


def pieces(
    q: torch.Tensor, scale: torch.Tensor, granularity: Granularity, elements: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield (codes, their scales as stored, first row): q in pieces of whole blocks of rows, about `elements` each."""
    q = codes_of(q)
    rows, cols = q.shape
    scale = scale.reshape(granularity.grid(rows, cols))
    height = max(granularity.rows, 1)
    step = max(elements // max(cols, 1) // height, 1) * height
    for start in range(0, rows, step):
        part = scale if granularity.rows == -1 else scale[start // height : -(-(start + step) // height)]
        yield q[start : start + step], part, start


def pieces_of_columns(
    q: torch.Tensor, scale: torch.Tensor, granularity: Granularity, elements: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield (codes, their scales, first column): views of q in pieces of whole blocks of columns, about `elements` each."""
    rows, cols = q.shape
    scale = scale.reshape(granularity.grid(rows, cols))
    width = granularity.cols if granularity.cols > 1 else 64  # a multiple that suits matmuls
    step = max(elements // max(rows, 1) // width, 1) * width
    for start in range(0, cols, step):
        part = scale if granularity.cols == -1 else scale[:, start // width : -(-(start + step) // width)]
        yield q[:, start : start + step], part, start
