"""Calls of the library of CPU kernels (`native_library`) with tensors: products, weights to floats and back."""

from __future__ import annotations

from functools import cache
from math import prod

import torch

from ..errors import InputError
from .code_types import FP8, INT8
from .exponents import scale_values
from .native_library import (
    COLUMNS_FIELDS,
    FILE,
    INPUT_FIELDS,
    INT8_PRODUCT_FIELDS,
    PRODUCT_FIELDS,
    ROUNDING_FIELDS,
    TOKENS_FIELDS,
    VARIABLE,
    WEIGHTS_FIELDS,
    depends,
    library,
    names,
    on_change,
    state,
    use,
    why_not,
)
from .scheme import ROW, TENSOR, Granularity

__all__ = [
    "CODES", "DTYPES", "FILE", "VARIABLE", "Prepared", "amax", "columns_of", "depends", "dequantize", "multiply",
    "multiply_int8", "names", "on_change", "quantize", "quantize_tokens", "state", "unpack", "use", "why_not",
]  # fmt: skip

# As native/common.h numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODES = {FP8: 0, INT8: 1}
# Eight codes of 4 bits: the first in the lowest bits, each less 8 (`pack-quantized` of compressed-tensors).
PACKED = torch.int32
WEIGHTS = {**CODES, torch.bfloat16: 2, torch.float16: 3, PACKED: 4}


def multiply(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    granularity: Granularity,
    *,
    bias: torch.Tensor | None = None,
    parts: int = 1,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
    ends: torch.Tensor | None = None,
    sources: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    share: int = 1,
    zero_points: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (M, K) times the dequantized weight, transposed, (N, K): (M, N) in `dtype` (by default that of x), summed in float32.

    All tensors on the CPU. x: float32, bfloat16 or float16, any strides. codes: (N, K) or a stack (E, N, K), E4M3, int8, or
    numbers in bfloat16 or float16. scale: as `granularity` says, for each of `parts` matrices one above the other; None for
    numbers that were never quantized. bias: (N,). transposed: x (M, N) times the weight itself, (M, K). A stack needs
    ends (E,), int32, contiguous: the number of outputs, of `rows` in total, up to and including each expert; those after
    the last are 0. sources, targets (S,) int64: row of x (times `share`) of each output, and where it is written. Raises
    MemoryError if there is not enough for a copy of x.

    codes may also be packed, eight of 4 bits in an int32: (N, K / 8, rounded up). Then scales are of whole rows, or of groups
    of a multiple of 8 columns, `transposed` is refused, and there may be zero_points, int32, eight rows in each, for each of
    `parts`: (N / 8, groups), rounded up.
    """
    n, k = codes.shape[-2:]
    columns = None
    if codes.dtype == PACKED:
        if transposed or scale is None:
            raise InputError("packed weights are multiplied as they are, not transposed, and have scales")
        columns = k = x.shape[1]
    width, depth = (k, n) if transposed else (n, k)
    _on_cpu(x, bias)
    rows = _checked_rows(x, codes, rows, ends, sources, targets, share)
    out, used = _empty(x, dtype, width, rows, ends)
    if not used or not width:
        return out
    if not depth:
        _require_words(codes, columns)
        return out.zero_() if bias is None else out.copy_(bias)
    _require(bias, "numbers of a bias", width)
    x = _input(x, codes, depth)
    bias = _as_read(bias)
    held, codes, scale, zero_points = _weights(codes, scale, granularity, parts, columns, zero_points)
    arguments = PRODUCT_FIELDS.pack(
        *held,
        x.data_ptr(), DTYPES[x.dtype], x.stride(0),
        used, _at(ends), _at(sources), _at(targets), share, x.shape[0],
        _at(bias), 0 if bias is None else DTYPES[bias.dtype],
        out.data_ptr(), DTYPES[out.dtype], transposed, torch.get_num_threads(),
    )  # fmt: skip
    if library().hf_fp8_multiply(arguments):
        raise MemoryError(f"not enough memory to multiply an input of shape {tuple(x.shape)}")
    return out


def _input(x: torch.Tensor, codes: torch.Tensor, depth: int) -> torch.Tensor:
    """x, with rows whose values are one after the other in memory."""
    if x.shape[1] != depth:
        raise InputError(f"an input of shape {tuple(x.shape)} does not fit a weight of shape {tuple(codes.shape)}")
    x = x.resolve_neg()
    return x.contiguous() if x.stride(1) != 1 and depth > 1 else x


class Prepared:
    """`multiply` for one weight (N, K), with everything but the input prepared: a third of the time of a small call.

    It has the addresses of codes, scale, bias and zero points, not the tensors: the caller has to keep these in their memory.
    """

    __slots__ = ("_addresses", "_after", "_before", "dtype", "k", "n")

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        granularity: Granularity,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        k: int | None = None,
        zero_points: torch.Tensor | None = None,
    ) -> None:
        """dtype: that of inputs and outputs. k: columns of packed codes. Raises ValueError for tensors that `multiply` would
        convert first."""
        fields, *used = _weights(codes, scale, granularity, 1, k, zero_points)
        _on_cpu(bias)
        _require(bias, "numbers of a bias", codes.shape[0])
        if used[0] is not codes or _at(used[1]) != scale.data_ptr() or used[2] is not zero_points or _as_read(bias) is not bias:
            raise ValueError("not as the library reads it")
        self.dtype, self.n, self.k = dtype, codes.shape[0], codes.shape[1] if k is None else k
        self._addresses = codes.data_ptr(), scale.data_ptr(), _at(bias), _at(zero_points)
        self._before = WEIGHTS_FIELDS.pack(*fields)
        self._after = self._addresses[2], 0 if bias is None else DTYPES[bias.dtype]

    def reads(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        zero_points: torch.Tensor | None = None,
    ) -> bool:
        """Whether the tensors that it was prepared for are still in the same memory."""
        return (codes.data_ptr(), scale.data_ptr(), _at(bias), _at(zero_points)) == self._addresses

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) in `dtype` on the CPU, contiguous, at least one row -> (..., N)."""
        *rows, k = x.shape
        out = x.new_empty((*rows, self.n))
        m, code = x.numel() // k, DTYPES[self.dtype]
        call = INPUT_FIELDS.pack(
            x.data_ptr(), code, k, m, 0, 0, 0, 1, m, *self._after, out.data_ptr(), code, 0, torch.get_num_threads()
        )
        if library().hf_fp8_multiply(self._before + call):
            raise MemoryError(f"not enough memory to multiply an input of shape {tuple(x.shape)}")
        return out


def _empty(
    x: torch.Tensor, dtype: torch.dtype | None, width: int, rows: int, ends: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """(the output, the number of its rows that are computed); the others are zeros."""
    used = rows if ends is None else int(ends[-1])
    make = x.new_empty if used == rows else x.new_zeros
    return make((rows, width), dtype=dtype or x.dtype), used


def _checked_rows(
    x: torch.Tensor,
    codes: torch.Tensor,
    rows: int | None,
    ends: torch.Tensor | None,
    sources: torch.Tensor | None,
    targets: torch.Tensor | None,
    share: int,
) -> int:
    """The number of rows of the output. Raises InputError for a routing that names rows that do not exist."""
    if ends is None:
        return x.shape[0]
    count = x.shape[0] if rows is None else rows
    of = (("ends", ends, torch.int32, count + 1), ("sources", sources, torch.int64, x.shape[0] * share))
    for what, given, dtype, limit in (*of, ("targets", targets, torch.int64, count)):
        if given is None:
            continue
        length = codes.shape[0] if what == "ends" else count
        if given.dtype != dtype or given.shape != (length,) or not given.is_cpu or not given.is_contiguous():
            raise InputError(
                f"{what} is {tuple(given.shape)} in {given.dtype}, where ({length},) in {dtype} on the CPU is needed"
            )
        if length and not 0 <= int(given.min()) <= int(given.max()) < limit:
            raise InputError(f"{what} has numbers outside of 0 to {limit - 1}")
    if sources is None and count > x.shape[0] * share:
        raise InputError(f"{count} outputs of {x.shape[0]} inputs, {share} of each, do not fit")
    return count


def _on_cpu(*tensors: torch.Tensor | None) -> None:
    """Raise InputError for tensors of another device, whose addresses mean nothing to the library."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            raise InputError(
                f"expected all tensors on the CPU, as the input or the weight is, but found one on {tensor.device}"
            )


def _require_memory(tensor: torch.Tensor, what: str) -> None:
    """Raise InputError if the memory of `tensor` was freed, as FSDP does between uses."""
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise InputError(f"the memory of {what} of shape {tuple(tensor.shape)} was freed")


def _require(tensor: torch.Tensor | None, what: str, count: int) -> None:
    """Raise InputError if `tensor` does not have `count` elements: the library would read memory that is not its own."""
    if tensor is not None and tensor.numel() != count:
        raise InputError(f"there are {tensor.numel()} {what}, where {count} are needed")


def _at(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dequantize(codes: torch.Tensor, scale: torch.Tensor, granularity: Granularity, out: torch.Tensor) -> torch.Tensor:
    """Codes (N, K) in E4M3 or int8 times their scales in float32, rounded once to the dtype of `out` (N, K), contiguous."""
    _on_cpu(out)
    if out.numel():
        held, codes, _scale, _ = _weights(codes, scale, granularity, 1)
        library().hf_fp8_dequantize(WEIGHTS_FIELDS.pack(*held), out.data_ptr(), DTYPES[out.dtype], torch.get_num_threads())
    return out


def unpack(
    codes: torch.Tensor,
    k: int,
    *,
    parts: int = 1,
    zero_points: torch.Tensor | None = None,
    granularity: Granularity = ROW,
) -> torch.Tensor:
    """int8 codes (N, K) of packed ones, or of a stack of them, as `multiply` takes these: less 8, less their zero points.

    granularity: that of the zero points.
    """
    held, codes, _, zero_points = _weights(codes, None, granularity, parts, k, zero_points)
    out = torch.empty((*codes.shape[:-1], k), dtype=INT8, device="cpu")
    if out.numel():
        library().hf_fp8_unpack(WEIGHTS_FIELDS.pack(*held), out.data_ptr(), torch.get_num_threads())
    return out


def quantize(x: torch.Tensor, scale: torch.Tensor, granularity: Granularity, code: torch.dtype) -> torch.Tensor:
    """`numerics.quantize` of x (rows, cols) in float32, bfloat16 or float16, in one pass: codes (rows, cols)."""
    out = torch.empty(x.shape, dtype=code, device="cpu")
    _round("hf_fp8_quantize", x, scale, granularity, CODES[code], out)
    return out


def amax(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """`numerics.amax_of` of x (rows, cols) in float32, bfloat16 or float16, in one pass: the grid, in float32."""
    out = torch.empty(granularity.grid(*x.shape), dtype=torch.float32, device="cpu")
    _round("hf_fp8_amax", x, None, granularity, 0, out)
    return out


def _round(
    function: str, x: torch.Tensor, scale: torch.Tensor | None, granularity: Granularity, code: int, out: torch.Tensor
) -> None:
    rows, cols = x.shape
    _on_cpu(x, scale)
    if not x.numel():
        return
    x = x.resolve_neg()
    x = x if x.stride(1) == 1 else x.contiguous()
    scale = scale if scale is None or scale.dtype in DTYPES else scale.float()
    scale = None if scale is None else scale.contiguous()
    _require(scale, "scales", prod(granularity.grid(rows, cols)))
    block_rows, block_cols = (
        n if extent == -1 else extent for n, extent in ((rows, granularity.rows), (cols, granularity.cols))
    )
    arguments = ROUNDING_FIELDS.pack(
        x.data_ptr(), DTYPES[x.dtype], x.stride(0), rows, cols, _at(scale), 0 if scale is None else DTYPES[scale.dtype],
        block_rows, block_cols, code, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    getattr(library(), function)(arguments)


def quantize_tokens(
    x: torch.Tensor, smallest: float, kept: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int8 codes (M, K) of x (M, K) in float32, bfloat16 or float16, scales (M, 1) and `columns` of x (M, R), both in float32.

    As `numerics.quantize_input` with a scale per row, in one pass. smallest: the scale of rows of zeros. kept: (K,) float32,
    0 for columns that are quantized as if they were zeros, else 1. columns: (R,) int64, each at least 0 and less than K.
    """
    (m, k), count = x.shape, 0 if columns is None else len(columns)
    _on_cpu(x, kept, columns)
    _require(kept, "columns that are kept or not", k)
    codes = torch.empty((m, k), dtype=INT8, device="cpu")
    scales = torch.empty((m, 1), dtype=torch.float32, device="cpu")
    outliers = torch.empty((m, count), dtype=torch.float32, device="cpu")
    x = x.resolve_neg()
    x = x if x.stride(1) == 1 else x.contiguous()
    kept, columns = (None if t is None else t.contiguous() for t in (kept, columns))
    library().hf_fp8_quantize_tokens(TOKENS_FIELDS.pack(
        x.data_ptr(), DTYPES[x.dtype], x.stride(0), m, k, _at(kept), _at(columns), count,
        codes.data_ptr(), scales.data_ptr(), outliers.data_ptr(), smallest, torch.get_num_threads(),
    ))  # fmt: skip
    return codes, scales, outliers


def columns_of(codes: torch.Tensor, scale: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Columns of an int8 weight (N, K), dequantized with its scales, N elements: (N, R) in float32.

    columns: (R,) int64, each at least 0 and less than K.
    """
    n = codes.shape[0]
    _on_cpu(codes, scale, columns)
    _require(scale, "scales of the weight", n)
    _require_memory(codes, "a weight")
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    scale = (scale if scale.dtype in DTYPES else scale_values(scale).float()).contiguous()
    columns = columns.contiguous()
    out = torch.empty((n, len(columns)), dtype=torch.float32, device="cpu")
    library().hf_fp8_columns(COLUMNS_FIELDS.pack(
        codes.data_ptr(), codes.stride(0), scale.data_ptr(), DTYPES[scale.dtype], n, columns.data_ptr(), len(columns),
        out.data_ptr(), torch.get_num_threads(),
    ))  # fmt: skip
    return out


def _weights(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    granularity: Granularity,
    parts: int,
    k: int | None = None,
    zero_points: torch.Tensor | None = None,
) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The fields of `Weights`, and the tensors that they point to, which the caller has to keep until the call returns.

    k: columns of packed codes. scale: None for codes that have none, or whose scales are not read.
    """
    _require_words(codes, k)
    n, words = codes.shape[-2:]
    k = words if k is None else k
    is_packed = codes.dtype == PACKED
    if scale is None and not is_packed:
        scale, granularity = _ones(codes.shape[0] * parts if codes.ndim == 3 else parts), TENSOR
    _on_cpu(codes, scale, zero_points)
    _require_memory(codes, "a weight")
    codes = codes.resolve_neg()
    if codes.stride(-1) != 1 and words > 1:
        codes = codes.contiguous()
    count, stride = (codes.shape[0], codes.stride(0)) if codes.ndim == 3 else (1, 0)
    size = codes.element_size()
    grid_rows, grid_cols = granularity.grid(n // parts, k)
    if scale is not None:
        _require_memory(scale, "the scales of a weight")
        scale = (scale if scale.dtype in DTYPES else scale_values(scale).float()).contiguous()
        _require(scale, "scales of the weight", count * parts * grid_rows * grid_cols)
    rows, cols = granularity.rows, granularity.cols
    if is_packed and (n % parts or (cols % 8 and -1 != cols < k)):
        raise InputError(f"{n} rows of {k} packed codes: {parts} parts with scales of {granularity} are not supported")
    if zero_points is not None:
        if not is_packed or rows != 1 or zero_points.dtype != torch.int32:
            raise InputError("only packed codes with scales of single rows have zero points, which are packed in int32")
        _require_memory(zero_points, "the zero points of a weight")
        zero_points = zero_points.contiguous()
        _require(zero_points, "words of zero points", count * parts * -(-(n // parts) // 8) * grid_cols)
    fields = (
        codes.data_ptr(), _at(scale), WEIGHTS[codes.dtype], 0 if scale is None else DTYPES[scale.dtype], count, n, k,
        codes.stride(-2) * size, stride * size, parts,
        max(n // parts, 1) if rows == -1 else rows, max(k, 1) if cols == -1 else cols, _at(zero_points),
    )  # fmt: skip
    return fields, codes, scale, zero_points


def _require_words(codes: torch.Tensor, k: int | None) -> None:
    """Raise InputError if codes are packed and do not have k columns, or have k columns and are not packed."""
    if (codes.dtype == PACKED) != (k is not None):
        raise InputError(f"codes in {codes.dtype} are not as they are needed here: packed codes are in {PACKED}")
    if k is not None and (k < 0 or codes.shape[-1] != -(-k // 8)):
        raise InputError(f"a weight of {k} columns does not fit codes of shape {tuple(codes.shape)}, eight in each {PACKED}")


@cache
def _ones(count: int) -> torch.Tensor:
    return torch.ones(count, device="cpu", dtype=torch.float32)


def _as_read(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias as the library reads it: its numbers next to each other, in a dtype that it knows."""
    if bias is None:
        return None
    _require_memory(bias, "a bias")
    return (bias if bias.dtype in DTYPES else bias.float()).resolve_neg().contiguous()


def multiply_int8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    bias: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """int8 codes of inputs (M, K) times those of a weight (N, K), exact in int32, times their scales: (M, N) in `dtype`.

    x_scale: (M, 1) float32. scale: N elements. added: (M, N) float32, contiguous, added to the scaled product, then the bias.
    K is at most `LARGEST_K` of `kernels.base`.
    """
    m, k = x.shape
    n = codes.shape[0]
    out = torch.empty((m, n), dtype=dtype, device="cpu")
    for tensor, what, count in (
        (codes, "codes", n * k), (scale, "scales of the weight", n), (x_scale, "scales of the input", m),
        (bias, "numbers of a bias", n), (added, "numbers that are added", m * n),
    ):  # fmt: skip
        _on_cpu(tensor)
        _require(tensor, what, count)
        if tensor is not None:
            _require_memory(tensor, what)
    if not k:
        return out.copy_(sum((t.float() for t in (added, bias) if t is not None), start=out.new_zeros((), dtype=torch.float32)))
    _on_cpu(x)
    x, codes = (t if t.stride(1) == 1 else t.contiguous() for t in (x, codes))
    scale, x_scale = scale if scale.dtype in DTYPES else scale_values(scale).float(), x_scale.float().contiguous()
    scale = scale.contiguous()
    bias = _as_read(bias)
    arguments = INT8_PRODUCT_FIELDS.pack(
        x.data_ptr(), x.stride(0), x_scale.data_ptr(),
        codes.data_ptr(), codes.stride(0), scale.data_ptr(), DTYPES[scale.dtype],
        _at(bias), 0 if bias is None else DTYPES[bias.dtype], _at(added),
        out.data_ptr(), DTYPES[dtype], m, n, k, torch.get_num_threads(),
    )  # fmt: skip
    if out.numel() and library().hf_fp8_multiply_int8(arguments):
        raise MemoryError(f"not enough memory to multiply an input of shape {tuple(x.shape)}")
    return out
