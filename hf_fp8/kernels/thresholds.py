"""Largest number of input rows for which the weight-only kernel is used: a table with the reason of each entry.

A weight-only kernel reads the same bytes as an 8-bit matmul without quantizing the input, so it is faster while
reading weights takes most of the time; for more rows, the 8-bit units are twice as fast. `scripts/bench kernels` prints the
crossover for the machine that it runs on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..formats import native
from ..formats.code_types import INT8
from ..formats.scheme import Scheme
from .base import has_bfloat16_units
from .probing import int_mm_is_slow


@dataclass(frozen=True)
class Limit:
    """Number of rows up to which the weight-only kernel is used, and the reason."""

    m: int
    why: str

    @property
    def is_every(self) -> bool:
        """Whether it is used for any number of rows."""
        return self.m >= _EVERY


# A bfloat16 matmul is memory-bound up to M = FLOP/s / (2 x bytes/s), at one byte per weight. The table has half of it, as
# kernels reach neither peak: H100 989e12 / (2 x 3.35e12) = 148; Ada (L40S) 362e12 / (2 x 0.86e12) = 210;
# Blackwell (B200) 2250e12 / (2 x 8e12) = 141.
_MODELLED = "from the roofline, not measured"
_FP8: dict[tuple[str, int], Limit] = {
    ("cuda", 8): Limit(96, _MODELLED),
    ("cuda", 9): Limit(64, _MODELLED),
    ("cuda", 10): Limit(64, _MODELLED),
    ("cuda", 12): Limit(64, _MODELLED),
}
_FP8_UNKNOWN = Limit(32, "a cautious default for an unknown device, not measured")
# torch._int_mm needs at least 17 rows on CUDA, and is slow for the next few (0.09x of bfloat16 at decode
# on an A100, torchao's table).
_INT8_CUDA = Limit(32, "torch._int_mm needs more than 16 rows; 32 is not measured")

# 2048x2048, two threads, ms, `_int_mm` with columns set aside, without them / the library with float inputs. Xeon with AMX:
# 1 row 0.9, 0.7 / 0.2, 4 rows 0.9, 0.7 / 0.4, 16 rows 1.4, 1.0 / 0.5, 64 rows 1.9, 1.6 / 1.7, 512 rows 8.5, 7.5 / 9.9 (5.5 if
# inputs have 16 bits). The library with its AVX-512 alone: 4 rows 0.5, 16 rows 1.2, 64 rows 4.1.
# torch's own weight-only kernel, which is there without the library, cold weights of SmolLM2's shapes: 4 rows 19.9 / 19.0,
# 6 rows 22.9 / 24.7.
_INT8_TORCH = Limit(4, "measured on a Xeon with AMX, used for every CPU whose int8 matmul is fast")
_INT8_TILES = Limit(64, "measured on a Xeon with AMX")
_INT8_CPU = Limit(8, "measured on the AVX-512 of a Xeon, used for every CPU without AMX whose int8 matmul is fast")
# 2048x2048, AMD EPYC 7003 (AVX2), one and two threads, ms: float inputs M=4 0.87, 0.49; 8 1.39, 0.75; 16 2.37, 1.52. int8
# inputs, which are still to be quantized: 0.96, 0.51; 1.48, 0.83; 1.73, 1.10.
_INT8_NATIVE = Limit(8, "measured on an AMD EPYC with AVX2, used for every CPU without a fast int8 matmul")
# Rows of input up to which the library of CPU kernels multiplies, instead of dequantizing for torch's matmul: all. Ratio to a
# dense matmul of that dtype, 2048x2048 by 16, 64, 512 rows, two threads. Float32: AMD EPYC 7003, AVX2 1.7, 1.7, 1.2; Xeon with
# AMX 3.2, 1.7 to 2.1, 2.2, its AVX-512 alone 1.4, 1.0, 1.05. bfloat16: Xeon with AMX 1.7, 1.4, 1.3; its AVX-512, torch held to
# VNNI, 2.6 and 4.1 (16, 512).
_EVERY = 2**62
# Where torch may have better kernels: units for bfloat16 that the library has no code for, or what no one has measured.
_NOT_MEASURED = 64


@native.depends
@cache
def native_limit(dtype: torch.dtype) -> int:
    """Rows of input, in `dtype`, up to which the library of CPU kernels multiplies itself."""
    used = native.names()[1]
    if used == "scalar":
        return 0  # torch is faster for any number of rows
    if used == "amx":
        return _EVERY
    measured = used == "avx2" or used.startswith("avx512")
    return _EVERY if measured and not (dtype == torch.bfloat16 and has_bfloat16_units()) else _NOT_MEASURED


@native.depends
@cache
def weight_only_limit(device: torch.device, scheme: Scheme, dtype: torch.dtype) -> Limit:
    """The limit for `device`, the dtype of the codes and that of inputs."""
    if scheme.weight.dtype == INT8:
        return _int8_limit_on_cpu(dtype) if device.type == "cpu" else _INT8_CUDA
    if device.type == "cuda" and torch.version.hip is None:
        return _FP8.get(("cuda", torch.cuda.get_device_capability(device)[0]), _FP8_UNKNOWN)
    return _FP8_UNKNOWN


def _int8_limit_on_cpu(dtype: torch.dtype) -> Limit:
    if int_mm_is_slow():
        return _INT8_NATIVE
    if native.why_not() is not None:
        return _INT8_TORCH
    if native.names()[1] == "amx":
        return _INT8_TILES if dtype == torch.float32 else Limit(_EVERY, "AMX multiplies inputs of 16 bits as fast as int8")
    return _INT8_CPU
