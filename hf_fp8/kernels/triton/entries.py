"""Kernel entries of the Triton kernels. Triton is imported when one of them runs for the first time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from ...formats.scheme import FP8_BLOCK, FP8_DYNAMIC, FP8_WEIGHT_ONLY, Scheme
from ..base import GroupedKernel, Kernel, Problem, why_sums_overflow
from ..inputs import quantize
from . import support
from .granularity import why_not_scaled_mm, why_not_weight_only


def why_not_device(problem: Problem) -> str | None:
    """The reason why Triton kernels cannot run on the device; None if they can."""
    return support.why_not(problem.device)


def _late(module: str, function: str) -> Callable[..., Any]:
    """A function of a module that imports Triton; the module is imported at the first call."""
    found = cache(lambda: getattr(import_module(f".{module}", __package__), function))
    return lambda *args: found()(*args)


SCALED_MM = Kernel(
    name="triton_scaled_mm", is_triton=True, probes=(FP8_DYNAMIC,), why_not_scheme=why_not_scaled_mm,
    why_not_device=lambda problem: why_sums_overflow(problem) or why_not_device(problem),
    quantize=quantize, multiply=_late("scaled_mm", "multiply"),
)  # fmt: skip
WEIGHT_ONLY = Kernel(
    name="triton_weight_only", is_triton=True, probes=(FP8_WEIGHT_ONLY,), why_not_scheme=why_not_weight_only,
    why_not_device=why_not_device, multiply=_late("weight_only", "multiply"),
)  # fmt: skip
GROUPED_SCALED_MM = GroupedKernel(
    name="triton_grouped_scaled_mm", is_triton=True, probes=(FP8_DYNAMIC, FP8_BLOCK), why_not_scheme=why_not_scaled_mm,
    why_not_device=why_not_device, multiply=_late("grouped", "multiply"), quantizes=True,
)  # fmt: skip
GROUPED_WEIGHT_ONLY = GroupedKernel(
    name="triton_grouped_weight_only", is_triton=True, probes=(FP8_WEIGHT_ONLY, Scheme(FP8_BLOCK.weight)),
    why_not_scheme=why_not_weight_only, why_not_device=why_not_device, multiply=_late("grouped", "multiply"),
)  # fmt: skip
