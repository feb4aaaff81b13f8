"""The library of CPU kernels (native/): how it is found, loaded and called.

It is plain C behind `ctypes`, without the binary interface of torch or Python, on the threads of torch's OpenMP runtime.
HF_FP8_NATIVE=0 in the environment turns it off, HF_FP8_NATIVE=scalar (or another name that `names` lists) chooses what it uses.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from struct import Struct, pack
from typing import Any, TypeVar

import torch

from ..errors import InputError, KernelError
from .code_types import FP8, INT8
from .scheme import TENSOR, Granularity

VARIABLE = "HF_FP8_NATIVE"
FILE = Path(__file__).with_name("_native.so")
# `hf_fp8_version` of a library that takes these arguments.
VERSION = 3
# As native/common.h numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODES = {FP8: 0, INT8: 1}
WEIGHTS = {**CODES, torch.bfloat16: 2, torch.float16: 3}
# Fields of the structures Weights, Product, Int8Product and Rounding of native/common.h, all of 64 bits.
_WEIGHTS = Struct("=12q")
_PRODUCT = Struct("=27q")
_PREPARED = Struct("=15q")  # what follows Weights in Product
_INT8_PRODUCT = Struct("=16q")
_ROUNDING = Struct("=12q")
F = TypeVar("F", bound=Callable[..., Any])
_disabled = False
state = 0  # changes with `use`
_caches: list[Callable[[], None]] = []


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "0":
        return f"the library of CPU kernels is turned off ({VARIABLE}=0)"
    if not FILE.exists():
        return (
            "hf-fp8 was installed without its library of CPU kernels (there was no wheel for this platform, and no C++ "
            "compiler; with one, install hf-fp8 again)"
        )
    try:
        library = ctypes.CDLL(str(FILE))
        if library.hf_fp8_version() != VERSION:
            return f"the library of CPU kernels ({FILE.name}) is of another version of hf-fp8: install hf-fp8 again"
    except (OSError, AttributeError) as error:
        return f"the library of CPU kernels cannot be loaded ({error})"
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int64
    library.hf_fp8_name.restype = ctypes.c_char_p
    _share_threads(library)
    found = _names(library)
    if wanted and wanted not in found:
        return f"{VARIABLE}={wanted}: not among the instructions of the library ({', '.join(found)})"
    for index, name in enumerate(found):
        if wanted in ("", name) and library.hf_fp8_use(index) == 0 and _is_right(library):
            return library
    return f"the library of CPU kernels does not run on this processor, or gives wrong numbers ({wanted or ', '.join(found)})"


def _is_right(library: ctypes.CDLL) -> bool:
    """Whether the instructions in use give exact results here: kernels are probed before they are chosen (`kernels.probing`),
    but gradients, dequantizing, quantizing and 16-bit weights have no other check."""
    n, k = 37, 97
    # In the arithmetic of Python: torch's modes, or its default device, may be any.
    codes = bytes((7 * i) % 127 | 128 * (i % 3 == 0) for i in range(n * k))
    real = [_value(code) for code in codes]
    x = [float(i % 5 - 2) for i in range(max(n, k))]
    scale = 0.5
    given, scales, values = ((ctypes.c_float * len(v))(*v) for v in (x, [scale], [r * scale for r in real]))
    at, floats = ctypes.addressof, [pack("<f", value) for value in real]
    stored = {0: codes, 2: b"".join(value[2:] for value in floats), 3: pack(f"<{n * k}e", *real)}
    held = {code: ctypes.create_string_buffer(number, len(number)) for code, number in stored.items()}
    packed = {
        code: _WEIGHTS.pack(at(buffer), at(scales), code, 0, 1, n, k, len(buffer) // n, 0, 1, n, k)
        for code, buffer in held.items()
    }
    for transposed, width, depth in ((0, n, k), (1, k, n)):
        step, by = (k, 1) if not transposed else (1, k)
        wanted = [scale * sum(x[d] * real[j * step + d * by] for d in range(depth)) for j in range(width)]
        for rows in (1, 2, 3, 4, 5, 6, 30):  # each of them is code of its own
            for weights in packed.values():
                out = (ctypes.c_float * (rows * width))()
                library.hf_fp8_multiply(
                    weights + _PREPARED.pack(at(given), 0, 0, rows, 0, 0, 0, 1, rows, 0, 0, at(out), 0, transposed, 1)
                )
                if list(out) != wanted * rows:
                    return False
    weights = packed[0]
    out, back = (ctypes.c_float * len(codes))(), ctypes.create_string_buffer(len(codes))
    library.hf_fp8_dequantize(weights, at(out), 0, 1)
    library.hf_fp8_quantize(_ROUNDING.pack(at(values), 0, k, n, k, at(scales), 0, n, k, 0, at(back), 1))
    return list(out) == list(values) and back.raw == codes


def _value(code: int) -> float:
    """The number that an E4M3 code stands for (not NaN)."""
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -magnitude if code & 128 else magnitude


_SIGNATURES: dict[str, list[Any]] = {
    "hf_fp8_multiply": [ctypes.c_char_p],
    "hf_fp8_multiply_int8": [ctypes.c_char_p],
    "hf_fp8_dequantize": [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64],
    "hf_fp8_quantize": [ctypes.c_char_p],
    "hf_fp8_amax": [ctypes.c_char_p],
    "hf_fp8_name": [ctypes.c_int64],
    "hf_fp8_used": [],
    "hf_fp8_use": [ctypes.c_int64],
    "hf_fp8_use_openmp": [ctypes.c_void_p] * 4,
}


def _share_threads(library: ctypes.CDLL) -> None:
    """Give the library the functions of the OpenMP runtime that torch itself uses; without them it works on one thread."""
    folder = Path(torch.__path__[0], "lib")
    for file in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / file).exists():
            # Symbols are looked up in this library and those that it is linked to, in their order.
            torch_cpu = ctypes.CDLL(str(folder / file))
            functions = (getattr(torch_cpu, name, None) for name in _OPENMP)
            library.hf_fp8_use_openmp(*(None if f is None else ctypes.cast(f, ctypes.c_void_p).value for f in functions))


_OPENMP = ("GOMP_parallel", "__kmpc_fork_call", "__kmpc_push_num_threads", "__kmpc_global_thread_num")


def why_not() -> str | None:
    """The reason why the library cannot be used; None if it can."""
    if _disabled:
        return "the library of CPU kernels is turned off"
    library = _load()
    return library if isinstance(library, str) else None


def names() -> tuple[list[str], str]:
    """(the instruction sets that the library was built with, in order of preference; the one in use)."""
    library = _library()
    found = _names(library)
    return found, found[library.hf_fp8_used()]


def _names(library: ctypes.CDLL) -> list[str]:
    found: list[str] = []
    while (name := library.hf_fp8_name(len(found))) is not None:
        found.append(name.decode())
    return found


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Use another instruction set within the block, or not the library at all (None), for tests and benchmarks; in all threads.

    Raises KernelError if there is no library, or the processor does not have these instructions.
    """
    global _disabled
    before, used = _disabled, None if why_not() else names()[1]
    _choose(name)
    try:
        yield
    finally:
        _choose(used)
        _disabled = before


def _choose(name: str | None) -> None:
    global _disabled, state
    _disabled = name is None
    state += 1
    if name is not None:
        found, _ = names()
        if name not in found or _library().hf_fp8_use(found.index(name)) != 0:
            raise KernelError(f"{name}: not among the instructions of this processor and of the library ({', '.join(found)})")
    for clear in _caches:
        clear()


def depends(cached: F) -> F:
    """Decorator of a function with a cache, which `use` empties."""
    _caches.append(cached.cache_clear)  # type: ignore[attr-defined]
    return cached


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise KernelError(library)
    return library


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
) -> torch.Tensor:
    """x (M, K) times the dequantized weight, transposed, (N, K): (M, N) in `dtype` (by default that of x), summed in float32.

    All tensors on the CPU. x: float32, bfloat16 or float16, any strides. codes: (N, K) or a stack (E, N, K), E4M3, int8, or
    numbers in bfloat16 or float16. scale: as `granularity` says, for each of `parts` matrices one above the other; None for
    numbers that were never quantized. bias: (N,). transposed: x (M, N) times the weight itself, (M, K). A stack needs
    ends (E,), int32, contiguous: the number of outputs, of `rows` in total, up to and including each expert; those after
    the last are 0. sources, targets (S,) int64: row of x (times `share`) of each output, and where it is written. Raises
    MemoryError if there is not enough for a copy of x.
    """
    n, k = codes.shape[-2:]
    width, depth = (k, n) if transposed else (n, k)
    _on_cpu(x, bias)
    rows = _checked_rows(x, codes, rows, ends, sources, targets, share)
    out, used = _empty(x, dtype, width, rows, ends)
    if not used or not width:
        return out
    if not depth:
        return out.zero_() if bias is None else out.copy_(bias)
    _require(bias, "numbers of a bias", width)
    if x.shape[1] != depth:
        raise InputError(f"an input of shape {tuple(x.shape)} does not fit a weight of shape {tuple(codes.shape)}")
    x = x.resolve_neg()
    if x.stride(1) != 1 and depth > 1:
        x = x.contiguous()
    bias = _as_read(bias)
    held, codes, scale = _weights(codes, scale, granularity, parts)
    arguments = _PRODUCT.pack(
        *held,
        x.data_ptr(), DTYPES[x.dtype], x.stride(0),
        used, _at(ends), _at(sources), _at(targets), share, x.shape[0],
        _at(bias), 0 if bias is None else DTYPES[bias.dtype],
        out.data_ptr(), DTYPES[out.dtype], transposed, torch.get_num_threads(),
    )  # fmt: skip
    if _library().hf_fp8_multiply(arguments):
        raise MemoryError(f"not enough memory to multiply an input of shape {tuple(x.shape)}")
    return out


class Prepared:
    """`multiply` for one weight (N, K), with everything but the input prepared: a third of the time of a small call.

    It holds references to codes, scale and bias, and the addresses of their memory: see `is_valid`.
    """

    __slots__ = ("_addresses", "_after", "_before", "bias", "codes", "dtype", "n", "scale")

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor, granularity: Granularity, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        """dtype: that of inputs and outputs. Raises ValueError for tensors that `multiply` would convert first."""
        fields, *used = _weights(codes, scale, granularity, 1)
        _on_cpu(bias)
        _require(bias, "numbers of a bias", codes.shape[0])
        if used[0] is not codes or used[1].data_ptr() != scale.data_ptr() or _as_read(bias) is not bias:
            raise ValueError("not as the library reads it")
        self.codes, self.scale, self.bias, self.dtype, self.n = codes, scale, bias, dtype, codes.shape[0]
        self._addresses = codes.data_ptr(), scale.data_ptr(), _at(bias)
        self._before = _WEIGHTS.pack(*fields)
        self._after = self._addresses[2], 0 if bias is None else DTYPES[bias.dtype]

    def is_valid(self, codes: Any, scale: Any, bias: Any) -> bool:
        """Whether these are still the tensors that it was prepared for, in the same memory."""
        return (
            codes is self.codes
            and scale is self.scale
            and bias is self.bias
            and (codes.data_ptr(), scale.data_ptr(), 0 if bias is None else bias.data_ptr()) == self._addresses
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) in `dtype` on the CPU, contiguous, at least one row -> (..., N)."""
        *rows, k = x.shape
        out = x.new_empty((*rows, self.n))
        m, code = x.numel() // k, DTYPES[self.dtype]
        call = _PREPARED.pack(
            x.data_ptr(), code, k, m, 0, 0, 0, 1, m, *self._after, out.data_ptr(), code, 0, torch.get_num_threads()
        )
        if _library().hf_fp8_multiply(self._before + call):
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
        held, codes, scale = _weights(codes, scale, granularity, 1)
        _library().hf_fp8_dequantize(_WEIGHTS.pack(*held), out.data_ptr(), DTYPES[out.dtype], torch.get_num_threads())
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
    arguments = _ROUNDING.pack(
        x.data_ptr(), DTYPES[x.dtype], x.stride(0), rows, cols, _at(scale), 0 if scale is None else DTYPES[scale.dtype],
        block_rows, block_cols, code, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    getattr(_library(), function)(arguments)


def _weights(
    codes: torch.Tensor, scale: torch.Tensor | None, granularity: Granularity, parts: int
) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor]:
    """The fields of `Weights`, and the tensors that they point to, which the caller has to keep until the call returns."""
    n, k = codes.shape[-2:]
    if scale is None:
        scale, granularity = _ones(codes.shape[0] * parts if codes.ndim == 3 else parts), TENSOR
    _on_cpu(codes, scale)
    if codes.numel() and not codes.untyped_storage().nbytes():
        raise InputError(f"the memory of a weight of shape {tuple(codes.shape)} was freed")
    codes = codes.resolve_neg()
    if codes.stride(-1) != 1 and k > 1:
        codes = codes.contiguous()
    if scale.dtype not in DTYPES:
        scale = scale.float()
    scale = scale.contiguous()
    count, stride = (codes.shape[0], codes.stride(0)) if codes.ndim == 3 else (1, 0)
    size = codes.element_size()
    grid_rows, grid_cols = granularity.grid(n // parts, k)
    _require(scale, "scales of the weight", count * parts * grid_rows * grid_cols)
    rows, cols = granularity.rows, granularity.cols
    fields = (
        codes.data_ptr(), scale.data_ptr(), WEIGHTS[codes.dtype], DTYPES[scale.dtype], count, n, k,
        codes.stride(-2) * size, stride * size, parts,
        max(n // parts, 1) if rows == -1 else rows, max(k, 1) if cols == -1 else cols,
    )  # fmt: skip
    return fields, codes, scale


@cache
def _ones(count: int) -> torch.Tensor:
    return torch.ones(count, device="cpu", dtype=torch.float32)


def _as_read(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias as the library reads it: its numbers next to each other, in a dtype that it knows."""
    if bias is None:
        return None
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
    if not k:
        return out.copy_(sum((t.float() for t in (added, bias) if t is not None), start=out.new_zeros((), dtype=torch.float32)))
    _on_cpu(x)
    x, codes = (t if t.stride(1) == 1 else t.contiguous() for t in (x, codes))
    scale, x_scale = scale if scale.dtype in DTYPES else scale.float(), x_scale.float().contiguous()
    scale = scale.contiguous()
    bias = _as_read(bias)
    arguments = _INT8_PRODUCT.pack(
        x.data_ptr(), x.stride(0), x_scale.data_ptr(),
        codes.data_ptr(), codes.stride(0), scale.data_ptr(), DTYPES[scale.dtype],
        _at(bias), 0 if bias is None else DTYPES[bias.dtype], _at(added),
        out.data_ptr(), DTYPES[dtype], m, n, k, torch.get_num_threads(),
    )  # fmt: skip
    if out.numel() and _library().hf_fp8_multiply_int8(arguments):
        raise MemoryError(f"not enough memory to multiply an input of shape {tuple(x.shape)}")
    return out
