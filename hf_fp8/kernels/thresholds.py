"""Up to how many rows of input the weight-only kernel is taken: a table, with what each entry rests on.

A weight-only kernel reads the same bytes as an 8-bit matmul and spares the quantization of the input, so it wins
where time is the reading of weights; above, the 8-bit units are twice as fast. `scripts/bench kernels` prints the
crossing for the machine that it runs on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..formats.scheme import INT8, Scheme


@dataclass(frozen=True)
class Limit:
    """Rows up to which weight-only is taken, and why."""

    m: int
    why: str


# Where a bfloat16 matmul stops being bound by memory: M = FLOP/s / (2 x bytes/s), at one byte a weight. Half of it, as
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
# torch._int_mm takes no fewer than 17 rows on CUDA, and loses badly at the next few (0.09x of bfloat16 at decode
# on an A100, torchao's table).
_INT8_CUDA = Limit(32, "torch._int_mm takes more than 16 rows; 32 not measured")

# Against `_int_mm`, cold weights of SmolLM2's shapes, Xeon with AMX, ms: M=1 13.2 / 15.5, 2 12.9 / 15.5, 3 14.6 / 21.0,
# 4 19.0 / 19.9, 6 24.7 / 22.9.
_INT8_CPU = Limit(4, "measured on a Xeon with AMX, taken for every CPU")


@cache
def weight_only_limit(device: torch.device, scheme: Scheme) -> Limit:
    """The entry for `device` and the kind of codes."""
    if scheme.weight.dtype == INT8:
        return _INT8_CPU if device.type == "cpu" else _INT8_CUDA
    if device.type == "cuda" and torch.version.hip is None:
        return _FP8.get(("cuda", torch.cuda.get_device_capability(device)[0]), _FP8_UNKNOWN)
    return _FP8_UNKNOWN
