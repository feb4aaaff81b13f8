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
from struct import Struct
from typing import Any, TypeVar

import torch

from ..errors import InputError, KernelError
from .code_types import FP8, INT8
from .scheme import Granularity

VARIABLE = "HF_FP8_NATIVE"
FILE = Path(__file__).with_name("_native.so")
# `hf_fp8_version` of a library that takes these arguments.
VERSION = 2
# As native/common.h numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODES = {FP8: 0, INT8: 1}
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
    if wanted:
        found = _names(library)
        if wanted not in found or library.hf_fp8_use(found.index(wanted)) != 0:
            return f"{VARIABLE}={wanted}: not among the instructions of this processor and of the library ({', '.join(found)})"
    return library


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
    found: dict[str, int | None] = {}
    for file in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / file).exists():
            # Symbols are looked up in this library and those that it is linked to, in their order.
            torch_cpu = ctypes.CDLL(str(folder / file))
            for name in ("GOMP_parallel", "__kmpc_fork_call", "__kmpc_push_num_threads", "__kmpc_global_thread_num"):
                function = getattr(torch_cpu, name, None)
                found[name] = None if function is None else ctypes.cast(function, ctypes.c_void_p).value
    library.hf_fp8_use_openmp(*(found.get(name) for name in _OPENMP))


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
    scale: torch.Tensor,
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

    All tensors on the CPU. x: float32, bfloat16 or float16, any strides. codes: (N, K) or a stack (E, N, K), E4M3 or
    int8. scale: as `granularity` says, for each of `parts` matrices one above the other. bias: (N,). transposed: x (M, N)
    times the weight itself, (M, K). A stack needs ends (E,), int32, contiguous: the number of outputs, of `rows` in total,
    up to and including each expert; those after the last are 0. sources, targets (S,) int64: row of x (times `share`) of
    each output, and where it is written. Raises MemoryError if there is not enough for a copy of x.
    """
    n, k = codes.shape[-2:]
    width, depth = (k, n) if transposed else (n, k)
    out, used = _empty(x, dtype, width, x.shape[0] if rows is None else rows, ends)
    if not used or not width:
        return out
    if not depth:
        return out.zero_() if bias is None else out.copy_(bias)
    _require(bias, "numbers of a bias", width)
    if x.shape[1] != depth or (ends is not None and ends.shape[0] != codes.shape[0]):
        raise InputError(f"an input of shape {tuple(x.shape)} does not fit a weight of shape {tuple(codes.shape)}")
    if x.stride(1) != 1 and depth > 1:
        x = x.contiguous()
    if bias is not None and bias.dtype not in DTYPES:
        bias = bias.float()
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
        _require(bias, "numbers of a bias", codes.shape[0])
        if used[0] is not codes or used[1].data_ptr() != scale.data_ptr() or (bias is not None and bias.dtype not in DTYPES):
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
        """x (..., K) in `dtype`, contiguous, at least one row -> (..., N)."""
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


def _require(tensor: torch.Tensor | None, what: str, count: int) -> None:
    """Raise InputError if `tensor` does not have `count` elements: the library would read memory that is not its own."""
    if tensor is not None and tensor.numel() != count:
        raise InputError(f"there are {tensor.numel()} {what}, where {count} are needed")


def _at(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dequantize(codes: torch.Tensor, scale: torch.Tensor, granularity: Granularity, out: torch.Tensor) -> torch.Tensor:
    """Codes (N, K) in E4M3 or int8 times their scales in float32, rounded once to the dtype of `out` (N, K), contiguous."""
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
    if not x.numel():
        return
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
    codes: torch.Tensor, scale: torch.Tensor, granularity: Granularity, parts: int
) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor]:
    """The fields of `Weights`, and the tensors that they point to, which the caller has to keep until the call returns."""
    n, k = codes.shape[-2:]
    if codes.stride(-1) != 1 and k > 1:
        codes = codes.contiguous()
    if scale.dtype not in DTYPES:
        scale = scale.float()
    scale = scale.contiguous()
    count, stride = (codes.shape[0], codes.stride(0)) if codes.ndim == 3 else (1, 0)
    grid_rows, grid_cols = granularity.grid(n // parts, k)
    _require(scale, "scales of the weight", count * parts * grid_rows * grid_cols)
    rows, cols = granularity.rows, granularity.cols
    fields = (
        codes.data_ptr(), scale.data_ptr(), CODES[codes.dtype], DTYPES[scale.dtype], count, n, k, codes.stride(-2), stride,
        parts, max(n // parts, 1) if rows == -1 else rows, max(k, 1) if cols == -1 else cols,
    )  # fmt: skip
    return fields, codes, scale


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
        _require(tensor, what, count)
    x, codes = (t if t.stride(1) == 1 else t.contiguous() for t in (x, codes))
    scale, x_scale = scale if scale.dtype in DTYPES else scale.float(), x_scale.float().contiguous()
    scale = scale.contiguous()
    if bias is not None and bias.dtype not in DTYPES:
        bias = bias.float()
    arguments = _INT8_PRODUCT.pack(
        x.data_ptr(), x.stride(0), x_scale.data_ptr(),
        codes.data_ptr(), codes.stride(0), scale.data_ptr(), DTYPES[scale.dtype],
        _at(bias), 0 if bias is None else DTYPES[bias.dtype], _at(added),
        out.data_ptr(), DTYPES[dtype], m, n, k, torch.get_num_threads(),
    )  # fmt: skip
    if out.numel() and _library().hf_fp8_multiply_int8(arguments):
        raise MemoryError(f"not enough memory to multiply an input of shape {tuple(x.shape)}")
    return out
