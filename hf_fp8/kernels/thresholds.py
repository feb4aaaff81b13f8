"""Largest number of input rows for which the weight-only kernel is used: a table with the reason of each entry.

A weight-only kernel reads the same bytes as an 8-bit matmul without quantizing the input, so it is faster while
reading weights takes most of the time; for more rows, the 8-bit units are twice as fast. `scripts/bench kernels` prints the
crossover for the machine that it runs on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..formats.code_types import INT8
from ..formats.scheme import Scheme


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
_INT8_CPU = Limit(4, "measured on a Xeon with AMX, used for every CPU")


@cache
def weight_only_limit(device: torch.device, scheme: Scheme) -> Limit:
    """The limit for `device` and the dtype of the codes."""
    if scheme.weight.dtype == INT8:
        return _INT8_CPU if device.type == "cpu" else _INT8_CUDA
    if device.type == "cuda" and torch.version.hip is None:
        return _FP8.get(("cuda", torch.cuda.get_device_capability(device)[0]), _FP8_UNKNOWN)
    return _FP8_UNKNOWN
