"""FP8 kernels of torch (`torch.nn.functional.scaled_mm`), and dequantization followed by a matmul.

Each takes codes (8-bit values) and scales of a weight as the checkpoint stores them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from ..formats import numerics
from ..formats.code_types import FP8
from ..formats.exponents import scale_values
from ..formats.scheme import FP8_BLOCK, FP8_DYNAMIC, FP8_STATIC, ROW, TENSOR, Granularity, Scheme
from .base import Input, Kernel, Problem, Reduce, Weight, add_bias, product_dtype
from .inputs import combined, quantize

# The end of the names of kernels, and of backends of layers, that do without fast accumulation.
SLOW_ACCUM = "_slow_accum"
# Elements of a weight that are dequantized at a time for a matmul. On a CPU, 2 cores, gradients of inputs, ms at 2**19,
# 2**20, 2**21, 2**22, all at once: 4096x4096 bfloat16, 128 rows 39, 42, 30, 28, 48; float32, 512 rows 123, 121, 124, 137,
# 153; 14336x4096 float32, 128 rows 188, 180, 170, 254, 292. GPUs: 32 MB of bfloat16; not measured.
CPU_ELEMENTS, GPU_ELEMENTS = 2**21, 2**24


def elements_at_once(device: torch.device) -> int:
    return CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS


def _scaled_mm(
    x: Input, w: Weight, w_scale: torch.Tensor, recipes: tuple[str, str], dtype: torch.dtype, fast: bool
) -> torch.Tensor:
    assert x.scale is not None
    types = torch.nn.functional.ScalingType
    # Hopper accumulates FP8 products in 14 bits; without fast accumulation they are added to float32 registers
    # every few steps, which costs up to a third of the speed. The error of fast accumulation stays well below that of the
    # E4M3 rounding of the inputs (the gpu tests compare it with the scheme's threshold), so it is used by default,
    # as in torchao's inference. Layers with a backend that ends in SLOW_ACCUM do without. CPUs do not have this option.
    fast = fast and x.x.device.type == "cuda"
    out: torch.Tensor = F.scaled_mm(
        x.x,
        w.codes.t(),
        x.scale,
        getattr(types, recipes[0]),
        w_scale,
        getattr(types, recipes[1]),
        output_dtype=product_dtype(dtype, x.x.device),
        use_fast_accum=fast,
    )
    return add_bias(out, w.bias).to(dtype)


def rowwise(x: Input, w: Weight, dtype: torch.dtype, fast: bool = True) -> torch.Tensor:
    """scaled_mm with scales of x (M, 1) and of the weight (1, N), both float32, for channel or tensor weights."""
    w_scale = scale_values(w.scale).float().reshape(1, -1).expand(1, w.codes.shape[0]).contiguous()
    return _scaled_mm(x, w, w_scale, ("RowWise", "RowWise"), dtype, fast)


def tensorwise(x: Input, w: Weight, dtype: torch.dtype, fast: bool = True) -> torch.Tensor:
    """scaled_mm with one scale for x, which is repeated for each row, and one for the weight."""
    assert x.scale is not None
    one = x._replace(scale=x.scale[:1].reshape(1))
    return _scaled_mm(one, w, scale_values(w.scale).float().reshape(1), ("TensorWise", "TensorWise"), dtype, fast)


def blockwise(x: Input, w: Weight, dtype: torch.dtype, fast: bool = True) -> torch.Tensor:
    """scaled_mm with 1x128 scales of inputs and 128x128 scales of weights."""
    return _scaled_mm(x, w, scale_values(w.scale).float().t(), ("BlockWise1x128", "BlockWise128x128"), dtype, fast)


def fake_quantize(x: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme, reduce: Reduce | None = None) -> Input:
    """Quantize and dequantize x, in its dtype."""
    if scheme.input is None:
        return Input(x)
    q, scale = numerics.quantize_input(x, scheme.input, combined(x, scheme.input, input_scale, reduce))
    return Input(numerics.dequantize_input(q, scale, scheme.input.granularity, x.dtype))


def dequantize(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize the weight some rows at a time; the matmul (in `product_dtype`) of each piece gives columns of the result."""
    elements, (m, k), n = elements_at_once(w.codes.device), x.x.shape, w.codes.shape[0]
    values = x.x.to(product_dtype(x.x.dtype, x.x.device))
    pieces = w.pieces(k, values.dtype, elements)
    if 0 < n * k <= elements:
        return add_bias(F.linear(values, next(pieces)[0]), w.bias).to(dtype)
    out = values.new_empty((m, n))
    for dense, start in pieces:
        out[:, start : start + len(dense)] = F.linear(values, dense)
    return add_bias(out, w.bias).to(dtype)


def _takes(fits: Callable[[Granularity, Granularity], bool], reason: str) -> Callable[[Scheme], str | None]:
    """A `why_not_scheme`. fits: whether the kernel supports the granularities of weight and input; reason: if it does not."""

    def why_not_scheme(scheme: Scheme) -> str | None:
        if scheme.input is None:
            return "the scheme does not quantize inputs"
        if scheme.weight.dtype != FP8 or scheme.input.dtype != FP8:
            return "scaled_mm takes E4M3 codes on both sides"
        return None if fits(scheme.weight.granularity, scheme.input.granularity) else reason

    return why_not_scheme


why_not_tensorwise = _takes(lambda w, x: {w, x} == {TENSOR}, "tensor-wise scaled_mm takes one scale per tensor on both sides")
why_not_rowwise = _takes(
    lambda w, x: {w, x} <= {ROW, TENSOR}, "row-wise scaled_mm takes one scale per row or per tensor, not per group or block"
)
why_not_blockwise = _takes(
    lambda w, x: (w, x) == (Granularity(128, 128), Granularity(1, 128)),
    "block-wise scaled_mm takes 1x128 inputs by 128x128 weights",
)


def why_not_device(problem: Problem) -> str | None:
    """The reason why scaled_mm cannot run on this device with these sizes; None if it can."""
    # The CPU kernel supports any size; cuBLAS, CUTLASS and oneDNN need rows of a multiple of 16 bytes on both sides.
    if problem.device.type != "cpu" and (problem.n % 16 or problem.k % 16):
        return f"N={problem.n} and K={problem.k} must be multiples of 16 on {problem.device.type}"
    return None


TENSORWISE = Kernel(
    name="scaled_mm_tensorwise", why_not_scheme=why_not_tensorwise, why_not_device=why_not_device, probes=(FP8_STATIC,),
    quantize=quantize, multiply=tensorwise,
)  # fmt: skip
ROWWISE = Kernel(
    name="scaled_mm_rowwise", why_not_scheme=why_not_rowwise, why_not_device=why_not_device, probes=(FP8_DYNAMIC,),
    quantize=quantize, multiply=rowwise,
)  # fmt: skip
BLOCKWISE = Kernel(
    name="scaled_mm_blockwise", why_not_scheme=why_not_blockwise, why_not_device=why_not_device, probes=(FP8_BLOCK,),
    quantize=quantize, multiply=blockwise,
)  # fmt: skip
# The same, without fast accumulation on CUDA devices.
SLOW_TENSORWISE, SLOW_ROWWISE, SLOW_BLOCKWISE = (
    replace(kernel, name=f"{kernel.name}{SLOW_ACCUM}", multiply=partial(multiply, fast=False))
    for kernel, multiply in ((TENSORWISE, tensorwise), (ROWWISE, rowwise), (BLOCKWISE, blockwise))
)
DEQUANTIZE = Kernel(name="dequantize", quantize=fake_quantize, multiply=dequantize)
WEIGHT_ONLY = Kernel(name="weight_only", multiply=dequantize)
