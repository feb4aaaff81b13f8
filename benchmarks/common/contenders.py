"""Contenders: ways to compute the same layer; and what the device could do at best."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from hf_fp8 import kernels
from hf_fp8.formats.scheme import FP8_BLOCK, FP8_DYNAMIC, FP8_STATIC

from .timing import median, time_of

SCHEMES = {"channel": FP8_DYNAMIC, "static": FP8_STATIC, "block": FP8_BLOCK}
# bytes/s and dense bfloat16 FLOP/s as the makers state them; 8-bit units do twice as many. What is not here is measured.
PEAKS = {
    "H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12), "B200": (8e12, 2250e12), "A100-SXM4-80GB": (2.04e12, 312e12),
    "L40S": (0.864e12, 362e12), "4090": (1.01e12, 165e12),
}  # fmt: skip


@dataclass
class Contender:
    """A way to compute a layer. calls: the same one over copies of the weight; none and an error if it is not there."""

    name: str
    calls: list[Callable[..., Any]]
    weight_bytes: int
    eight_bit: bool = False
    forced: str | None = None
    times: list[float] = field(default_factory=list)
    cpu_times: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def seconds(self) -> float:
        return median(self.times)

    @property
    def cpu_seconds(self) -> float:
        """Of all threads together."""
        return median(self.cpu_times)

    def again(self) -> Contender:
        """The same one, not yet measured; an error in the measurement is forgotten."""
        return Contender(
            self.name, self.calls, self.weight_bytes, self.eight_bit, self.forced, error="" if self.calls else self.error
        )

    def chosen(self) -> AbstractContextManager[None]:
        """Within the block, the kernel that this contender is named after is used."""
        return kernels.use(self.forced) if self.forced else nullcontext()


@dataclass(frozen=True)
class Peak:
    """What the device can do: bytes/s, FLOP/s at the dtype and with 8-bit operands, and where the numbers are from."""

    bandwidth: float
    flops: float
    flops_8bit: float
    source: str

    def roofline(self, contender: Contender, flops: float, moved: float) -> dict[str, float]:
        """TFLOP/s, GB/s, and the share of what memory and arithmetic units allow at best. moved: bytes read and written."""
        least = max(moved / self.bandwidth, flops / (self.flops_8bit if contender.eight_bit else self.flops))
        return {
            "tflops": flops / contender.seconds / 1e12,
            "gbs": moved / contender.seconds / 1e9,
            "roofline_pct": 100 * least / contender.seconds,
        }


def shortest(call: Callable[[], object], device: str) -> float:
    """The least of up to 15 times, of no more than a second together: CPUs without int8 units take seconds for one."""
    times = [time_of(call, device)]
    while len(times) < 15 and sum(times) < 1:
        times.append(time_of(call, device))
    return min(times)


def peaks(device: str, dtype: torch.dtype) -> Peak:
    """As the maker states them, else measured now: the best of reading, of a dense matmul and of an int8 one."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for key, (bandwidth, flops) in PEAKS.items():
            if key in name:
                return Peak(bandwidth, flops, 2 * flops, "stated by the maker")
    wide = torch.randn(16384, 4096, device=device)
    vector = torch.randn(1, 4096, device=device)
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    c, d = (torch.randint(-9, 9, (n, n), device=device, dtype=torch.int8) for _ in range(2))
    read, dense, eight = (
        shortest(call, device) for call in (lambda: F.linear(vector, wide), lambda: a @ b, lambda: torch._int_mm(c, d.t()))
    )
    flops = 2 * n**3
    return Peak(wide.numel() * 4 / read, flops / dense, flops / eight, "the best measured here")
