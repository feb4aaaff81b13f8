"""Matmul kernels for quantized weights, and their selection with reasons: `select`, `select_grouped`, `use`, `why_not`."""

from .base import LARGEST_K, ExpertWeights, GroupedKernel, Input, Kernel, Problem, Routing, Weight
from .probing import probe
from .registry import GROUPED_KERNELS, KERNELS, WEIGHT_ONLY
from .selection import (
    BACKENDS,
    BACKENDS_OF_LAYERS,
    Selection,
    has_fp8_matmul,
    kernel_for,
    select,
    select_grouped,
    use,
    why_not,
    why_not_kept,
    why_not_kept_experts,
)

__all__ = [
    "BACKENDS", "BACKENDS_OF_LAYERS", "GROUPED_KERNELS", "KERNELS", "LARGEST_K", "WEIGHT_ONLY", "ExpertWeights",
    "GroupedKernel", "Input", "Kernel", "Problem", "Routing", "Selection", "Weight", "has_fp8_matmul", "kernel_for", "probe",
    "select", "select_grouped", "use", "why_not", "why_not_kept", "why_not_kept_experts",
]  # fmt: skip
