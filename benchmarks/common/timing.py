"""Times of calls, medians, and the first line of an error for a table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Cost(NamedTuple):
    """Of a call: seconds that passed, and seconds that the process's threads ran together.

    Of one thread the latter is the work, whatever else the machine does. Of several it counts also those that wait for others.
    """

    wall: float
    cpu: float


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def cost_of(call: Callable[[], object], device: str) -> Cost:
    """Of one call, until the device has done its work."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    synchronize(device)
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def time_of(call: Callable[[], object], device: str) -> float:
    """Seconds that pass."""
    return cost_of(call, device).wall


def median(values: Sequence[float]) -> float:
    """NaN if there are none."""
    return statistics.median(values) if values else float("nan")


def first_line(error: BaseException, most: int = 120) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:most]
