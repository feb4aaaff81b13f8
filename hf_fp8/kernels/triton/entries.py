"""Kernel entries of the Triton kernels. Triton is imported when one of them runs for the first time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from ...formats.code_types import INT4, INT8
from ...formats.scheme import (
    FP8_BLOCK,
    FP8_DYNAMIC,
    FP8_WEIGHT_ONLY,
    ROW,
    W4A8,
    W4A16,
    W4A16_ASYM,
    W4AFP8,
    W8A16,
    Granularity,
    Scheme,
    TensorScheme,
)
from ..base import GroupedKernel, Kernel, Problem, why_sums_overflow
from ..inputs import quantize
from ..torch_fp8 import fake_quantize
from . import support
from .granularity import why_not_fake_quantized, why_not_packed, why_not_scaled_mm, why_not_weight_only


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
# Both widths, with and without zero points, groups narrower than a tile, and whole rows.
_PACKED = (
    W4A16, W4A16_ASYM, W8A16, Scheme(TensorScheme(ROW, dtype=INT4)),
    Scheme(TensorScheme(Granularity(1, 16), dtype=INT8, packed=True, has_zero_points=True)),
)  # fmt: skip
PACKED = Kernel(
    name="triton_packed", is_triton=True, probes=_PACKED, why_not_scheme=why_not_packed, why_not_device=why_not_device,
    multiply=_late("weight_only", "multiply"),
)  # fmt: skip
PACKED_FAKE_QUANTIZED = Kernel(
    name="triton_packed_fake_quantized", is_triton=True, probes=(*_PACKED, W4AFP8, W4A8), why_not_scheme=why_not_fake_quantized,
    why_not_device=why_not_device, quantize=fake_quantize, multiply=_late("weight_only", "multiply"),
)  # fmt: skip
GROUPED_PACKED = GroupedKernel(
    name="triton_grouped_packed", is_triton=True, probes=_PACKED, why_not_scheme=why_not_packed, why_not_device=why_not_device,
    multiply=_late("grouped", "multiply"),
)  # fmt: skip
GROUPED_PACKED_FAKE_QUANTIZED = GroupedKernel(
    name="triton_grouped_packed_fake_quantized", is_triton=True, probes=(W4AFP8, W4A8),
    why_not_scheme=why_not_fake_quantized, why_not_device=why_not_device,
    multiply=_late("grouped", "multiply_dequantized"), quantizes=True,
)  # fmt: skip
