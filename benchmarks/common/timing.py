"""Times of calls, medians, and the first line of an error for a table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def time_of(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, until the device has done its work."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median(values: Sequence[float]) -> float:
    """NaN if there are none."""
    return statistics.median(values) if values else float("nan")


def first_line(error: BaseException, most: int = 120) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:most]
