"""The library of CPU kernels (native/): how it is found, loaded and checked, and which instructions it uses.

It is plain C behind `ctypes`, without the binary interface of torch or Python, on the threads of torch's OpenMP runtime.
HF_FP8_NATIVE=0 in the environment turns it off, HF_FP8_NATIVE=scalar (or another name that `names` lists) chooses what it uses.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from struct import Struct, pack
from typing import Any, TypeVar

import torch

from ..errors import KernelError

VARIABLE = "HF_FP8_NATIVE"
_OFF = ("0", "off", "no", "false")
FILE = Path(__file__).with_name("_native.so")
# `hf_fp8_version` of a library that takes these arguments.
VERSION = 5
# Fields of the structures of native/common.h, all of 64 bits.
WEIGHTS_FIELDS = Struct("=13q")
PRODUCT_FIELDS = Struct("=28q")
INPUT_FIELDS = Struct("=15q")  # what follows Weights in Product
INT8_PRODUCT_FIELDS = Struct("=16q")
ROUNDING_FIELDS = Struct("=12q")
TOKENS_FIELDS = Struct("=11qdq")
COLUMNS_FIELDS = Struct("=9q")
F = TypeVar("F", bound=Callable[..., Any])
_disabled = False
_state = 0
_when_changed: list[Callable[[], object]] = []


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    wanted = os.environ.get(VARIABLE, "").strip().lower()
    if wanted in _OFF:
        return f"the library of CPU kernels is turned off ({VARIABLE}={wanted})"
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
    for index, name in enumerate(found):
        if wanted in ("", name) and library.hf_fp8_use(index) == 0 and _is_right(library):
            return library
    if not wanted:
        return f"the library of CPU kernels does not run on this processor, or gives wrong numbers ({', '.join(found)})"
    because = "does not run on this processor, or gives wrong numbers" if wanted in found else "not among the instructions"
    reason = f"{VARIABLE}={wanted}: {because} (the library has {', '.join(found)})"
    warnings.warn(f"{reason}. It is not used at all", stacklevel=2)  # it was asked for
    return reason


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
        code: WEIGHTS_FIELDS.pack(at(buffer), at(scales), code, 0, 1, n, k, len(buffer) // n, 0, 1, n, k, 0)
        for code, buffer in held.items()
    }
    for transposed, width, depth in ((0, n, k), (1, k, n)):
        step, by = (k, 1) if not transposed else (1, k)
        wanted = [scale * sum(x[d] * real[j * step + d * by] for d in range(depth)) for j in range(width)]
        for rows in (1, 2, 3, 4, 5, 6, 12, 30, 40):  # each of them is code of its own
            for weights in packed.values():
                out = (ctypes.c_float * (rows * width))()
                library.hf_fp8_multiply(
                    weights + INPUT_FIELDS.pack(at(given), 0, 0, rows, 0, 0, 0, 1, rows, 0, 0, at(out), 0, transposed, 1)
                )
                if list(out) != wanted * rows:
                    return False
    weights = packed[0]
    out, back = (ctypes.c_float * len(codes))(), ctypes.create_string_buffer(len(codes))
    library.hf_fp8_dequantize(weights, at(out), 0, 1)
    library.hf_fp8_quantize(ROUNDING_FIELDS.pack(at(values), 0, k, n, k, at(scales), 0, n, k, 0, at(back), 1))
    return list(out) == list(values) and back.raw == codes and _is_right_packed(library)


def _is_right_packed(library: ctypes.CDLL) -> bool:
    """The same for weights of 4 bits: with and without zero points, blocks that end within a vector of words or with it."""
    n, k, at = 13, 283, ctypes.addressof
    nibbles = [[(5 * row + 7 * column + column // 11) % 16 for column in range(k)] for row in range(n)]
    x = [float(i % 5 - 2) for i in range(k)]
    given = (ctypes.c_float * k)(*x)
    codes = (ctypes.c_uint32 * (n * -(-k // 8)))(*(word for row in nibbles for word in _packed(row)))
    for block in (8, 24, 32, 128, k):
        blocks = -(-k // block)
        scale = [2.0 ** ((row + b) % 3 - 1) for row in range(n) for b in range(blocks)]
        zeros = [[(3 * row + 5 * b) % 16 for row in range(n)] for b in range(blocks)]
        by_block = [_packed(rows) for rows in zeros]
        scales = (ctypes.c_float * len(scale))(*scale)
        packed = (ctypes.c_uint32 * (len(by_block[0]) * blocks))(
            *(word for words in zip(*by_block, strict=True) for word in words)
        )
        for has_zeros in (False, True):
            weights = WEIGHTS_FIELDS.pack(
                at(codes), at(scales), 4, 0, 1, n, k, len(codes) // n * 4, 0, 1, 1, block, at(packed) if has_zeros else 0
            )
            less = [[zeros[b][row] if has_zeros else 8 for b in range(blocks)] for row in range(n)]
            values = [[nibbles[row][c] - less[row][c // block] for c in range(k)] for row in range(n)]
            wanted = [sum(x[c] * values[row][c] * scale[row * blocks + c // block] for c in range(k)) for row in range(n)]
            for rows in (1, 2, 3, 4, 5, 6, 8):
                out = (ctypes.c_float * (rows * n))()
                library.hf_fp8_multiply(
                    weights + INPUT_FIELDS.pack(at(given), 0, 0, rows, 0, 0, 0, 1, rows, 0, 0, at(out), 0, 0, 1)
                )
                if list(out) != wanted * rows:
                    return False
            back = (ctypes.c_int8 * (n * k))()
            library.hf_fp8_unpack(weights, at(back), 1)
            if list(back) != [value for row in values for value in row]:
                return False
    return True


def _packed(nibbles: list[int]) -> list[int]:
    """Words of eight nibbles, the first in the lowest bits."""
    return [sum(nibble << 4 * i for i, nibble in enumerate(nibbles[at : at + 8])) for at in range(0, len(nibbles), 8)]


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
    "hf_fp8_quantize_tokens": [ctypes.c_char_p],
    "hf_fp8_columns": [ctypes.c_char_p],
    "hf_fp8_unpack": [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64],
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
    found = _load()
    return found if isinstance(found, str) else None


def names() -> tuple[list[str], str]:
    """(the instruction sets that the library was built with, in order of preference; the one in use)."""
    found = _names(library())
    return found, found[library().hf_fp8_used()]


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
    try:
        _choose(name)
        yield
    finally:
        _choose(used)
        _disabled = before


def _choose(name: str | None) -> None:
    global _disabled, _state
    _disabled = name is None
    _state += 1
    if name is not None:
        found, _ = names()
        if name not in found or library().hf_fp8_use(found.index(name)) != 0:
            raise KernelError(f"{name}: not among the instructions of this processor and of the library ({', '.join(found)})")
    for call in _when_changed:
        call()


def state() -> int:
    """A number that changes with `use`."""
    return _state


def on_change(call: Callable[[], object]) -> None:
    """`use` calls it: it forgets what depends on the library."""
    _when_changed.append(call)


def depends(cached: F) -> F:
    """Decorator of a function with a cache, which `use` empties."""
    on_change(cached.cache_clear)  # type: ignore[attr-defined]
    return cached


def library() -> ctypes.CDLL:
    found = _load()
    if isinstance(found, str):
        raise KernelError(found)
    return found
