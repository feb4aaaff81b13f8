"""Lists of kernels in order of preference: the first that supports a problem is used. The last of each supports all."""

from __future__ import annotations

from . import native, torch_fp8, torch_grouped, torch_int8
from .base import GroupedKernel, Kernel
from .triton import entries as triton

# Kernels that quantize inputs as the scheme says.
QUANTIZED: tuple[Kernel, ...] = (
    torch_fp8.TENSORWISE,
    torch_fp8.ROWWISE,
    torch_fp8.BLOCKWISE,
    native.INT8_OUTLIERS,
    native.INT8_ROWWISE,
    torch_int8.OUTLIERS,
    torch_int8.ROWWISE,
    triton.SCALED_MM,
    triton.PACKED_FAKE_QUANTIZED,
    torch_fp8.DEQUANTIZE,
)
# The same without fast accumulation, for layers that ask for that. Triton's kernel is not among them: on Hopper its products
# are accumulated fast, too.
SLOW_ACCUM: tuple[Kernel, ...] = (
    torch_fp8.SLOW_TENSORWISE,
    torch_fp8.SLOW_ROWWISE,
    torch_fp8.SLOW_BLOCKWISE,
    torch_fp8.DEQUANTIZE,
)
# Kernels that do not quantize inputs.
WEIGHT_ONLY: tuple[Kernel, ...] = (
    triton.WEIGHT_ONLY,
    triton.PACKED,
    native.WEIGHT_ONLY,
    torch_int8.WEIGHT_ONLY,
    torch_fp8.WEIGHT_ONLY,
)
# The same for stacks of experts.
GROUPED_QUANTIZED: tuple[GroupedKernel, ...] = (
    torch_grouped.SCALED_GROUPED_MM,
    triton.GROUPED_SCALED_MM,
    triton.GROUPED_PACKED_FAKE_QUANTIZED,
    torch_grouped.DEQUANTIZE,
)
GROUPED_WEIGHT_ONLY: tuple[GroupedKernel, ...] = (
    triton.GROUPED_WEIGHT_ONLY,
    triton.GROUPED_PACKED,
    native.GROUPED_WEIGHT_ONLY,
    torch_grouped.WEIGHT_ONLY,
)
KERNELS = QUANTIZED + WEIGHT_ONLY
GROUPED_KERNELS = GROUPED_QUANTIZED + GROUPED_WEIGHT_ONLY
