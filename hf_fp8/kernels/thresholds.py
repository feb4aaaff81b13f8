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

# Against `_int_mm`, cold weights of SmolLM2's shapes, Xeon with AMX, ms: M=1 13.2 / 15.5, 2 12.9 / 15.5, 3 14.6 / 21.0,
# 4 19.0 / 19.9, 6 24.7 / 22.9.
_INT8_CPU = Limit(4, "measured on a Xeon with AMX, used for every CPU whose int8 matmul is fast")
# 2048x2048, AMD EPYC 7003 (AVX2), one and two threads, ms: float inputs M=4 0.87, 0.49; 8 1.39, 0.75; 16 2.37, 1.52. int8
# inputs, which are still to be quantized: 0.96, 0.51; 1.48, 0.83; 1.73, 1.10.
_INT8_NATIVE = Limit(8, "measured on an AMD EPYC with AVX2, used for every CPU without a fast int8 matmul")
# Rows of input up to which the library of CPU kernels multiplies, instead of dequantizing for torch's matmul. Ratio to a dense
# float32 matmul, 2048x2048, AMD EPYC 7003, AVX2, one and two threads: 16 rows 1.2, 1.5; 64 1.1, 1.3; 512 1.0, 1.0 to 1.1.
_EVERY = 2**62
# Of other processors, where torch may have better kernels; without vector instructions it has, for any number of rows.
_NOT_MEASURED = 64


@native.depends
@cache
def native_limit(dtype: torch.dtype) -> int:
    """Rows of input, in `dtype`, up to which the library of CPU kernels multiplies itself."""
    used = native.names()[1]
    if used == "scalar":
        return 0
    return _EVERY if used == "avx2" and not (dtype == torch.bfloat16 and has_bfloat16_units()) else _NOT_MEASURED


@cache
def weight_only_limit(device: torch.device, scheme: Scheme) -> Limit:
    """The limit for `device` and the dtype of the codes."""
    if scheme.weight.dtype == INT8:
        if device.type == "cpu":
            return _INT8_NATIVE if int_mm_is_slow() else _INT8_CPU
        return _INT8_CUDA
    if device.type == "cuda" and torch.version.hip is None:
        return _FP8.get(("cuda", torch.cuda.get_device_capability(device)[0]), _FP8_UNKNOWN)
    return _FP8_UNKNOWN
