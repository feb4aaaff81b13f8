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
from .base import Problem, has_bfloat16_units
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

# torch's own weight-only int8 kernel, which is there without the library, cold weights of SmolLM2's shapes, int8 / weight-only:
# 4 rows 19.9 / 19.0 ms, 6 rows 22.9 / 24.7.
_INT8_TORCH = Limit(4, "measured on a Xeon with AMX, used for every CPU whose int8 matmul is fast")


@dataclass(frozen=True)
class Int8Cost:
    """What quantizing inputs costs on a CPU, as where it begins to pay: when M x N x K is more than `products`.

    Choosing outlier columns and starting a dozen torch calls takes 0.1 to 0.2 ms whatever the size of the layer, and passing
    over inputs is shared by N outputs, so that a small layer needs more rows than a large one. least: rows up to which it never
    pays. small: elements of a weight up to which it does not for any number of rows.
    """

    products: int
    least: int
    why: str
    small: int = 0

    def limit(self, n: int, k: int) -> Limit:
        """The limit for a weight (N, K)."""
        if n * k <= self.small:
            return Limit(_EVERY, f"int8 inputs do not pay for a layer of {n}x{k}, {self.why}")
        return Limit(max(self.least, self.products // (n * k) // 8 * 8), self.why)


# Two threads, float32 inputs with one outlier column in 27, cold weights, ms, int8 / the library with float inputs.
# Xeon with AMX: 2048x2048 by 16 rows 1.43 / 1.10, 64 rows 2.15 / 2.31; 1024x1024 by 64 .83 / .60, 512 2.70 / 3.13; 576x576 by
# 64 .42 / .22, 512 1.02 / .97; 576x1536 by 64 .70 / .38, 512 2.20 / 2.75.
_TILES = Int8Cost(250_000_000, 16, "measured on a Xeon with AMX")
# Its AVX-512 alone: 2048x2048 by 16 rows 1.67 / 1.64, 64 rows 2.68 / 4.45; 1024x1024 by 16 .56 / .36, 64 .76 / .91; 576x576 by
# 64 .40 / .34, 512 1.14 / 1.88; 192x576 by 512 .93 / 1.04.
_VNNI = Int8Cost(50_000_000, 8, "measured on the AVX-512 of a Xeon, used for every CPU without AMX whose int8 matmul is fast")
# Its AVX2 alone: 2048x2048 by 16 rows 1.60 / 1.47, 64 rows 4.18 / 4.76; 1024x1024 by 64 1.28 / 1.26, 512 7.4 / 8.4; 576x576 by
# 512 2.92 / 2.86; 1536x576 by 512 7.31 / 7.18; 192x576 by 512 1.60 / 1.06; 256x2048 by 512 7.98 / 7.52.
_AVX2 = Int8Cost(150_000_000, 8, "measured on the AVX2 of a Xeon, used for every CPU without fast int8 but AMD's", 2**19)
# AMD EPYC 7003, when quantizing took up to twice as long as now: 2048x2048 by 8 rows .83 and the quantizing / .75, 16 rows 1.10
# and the quantizing / 1.52. A prefill of 512 tokens, x dense float32: SmolLM2 (576x576 to 1536x576) .96 to .99 / 1.10, 1.1B
# (2048x2048 to 5632x2048) 1.36 / 1.06.
_AVX2_AMD = Int8Cost(34_000_000, 8, "measured on an AMD EPYC with AVX2", 2**21)
# Rows of input up to which the library of CPU kernels multiplies, instead of dequantizing for torch's matmul: all. Ratio to a
# dense matmul of that dtype, 2048x2048 by 16, 64, 512 rows, two threads. Float32: AMD EPYC 7003, AVX2 1.7, 1.7, 1.2; Xeon with
# AMX 3.2, 1.7 to 2.1, 2.2, its AVX-512 alone 1.4, 1.0, 1.05. bfloat16: Xeon with AMX 1.7, 1.4, 1.3; its AVX-512, torch held to
# VNNI, 2.6 and 4.1 (16, 512).
_EVERY = 2**62
# int4 codes are multiplied as they are for few rows; for more, unpacking them to int8 in each call is faster: above 9 to 12
# rows in bfloat16, 13 in float32 (2048x2048, group 128, Xeon with AMX, one thread).
_PACKED_ROWS = 8
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
def packed_limit() -> int:
    """Rows of input up to which the library multiplies with int4 codes as they are packed; more are unpacked to int8 first."""
    return _PACKED_ROWS


@native.depends
@cache
def weight_only_limit(problem: Problem) -> Limit:
    """The limit for a device, the dtype of the codes and that of inputs; with int8 on CPUs also for the size of the weight."""
    device = problem.device
    if problem.scheme.weight.packed:
        return Limit(_EVERY, "no kernel multiplies packed codes with 8-bit inputs, so rounding these gains nothing")
    if problem.scheme.weight.dtype == INT8:
        return _int8_limit_on_cpu(problem) if device.type == "cpu" else _INT8_CUDA
    if device.type == "cuda" and torch.version.hip is None:
        return _FP8.get(("cuda", torch.cuda.get_device_capability(device)[0]), _FP8_UNKNOWN)
    return _FP8_UNKNOWN


def _int8_limit_on_cpu(problem: Problem) -> Limit:
    used = None if native.why_not() is not None else native.names()[1]
    if used in (None, "scalar") or problem.dtype not in native.DTYPES:
        return _INT8_TORCH  # for few rows there is torch's kernel, not the library's
    if int_mm_is_slow():
        cost = _AVX2_AMD if used == "avx2" else _AVX2
    elif used != "amx":
        cost = _VNNI
    elif problem.dtype == torch.float32:
        cost = _TILES
    else:
        return Limit(_EVERY, "AMX multiplies inputs of 16 bits as fast as int8")
    return cost.limit(problem.n, problem.k)
