"""FP8 kernels of torch (`torch.nn.functional.scaled_mm`), and dequantization followed by a matmul.

Each takes codes (8-bit values) and scales of a weight as the checkpoint stores them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..formats import numerics
from ..formats.code_types import FP8
from ..formats.scheme import FP8_BLOCK, FP8_DYNAMIC, FP8_STATIC, ROW, TENSOR, Scheme
from .base import Input, Kernel, Problem, Weight, add_bias, product_dtype
from .inputs import quantize_input

# Elements of a weight that are dequantized at a time for a matmul. On a CPU, 2 cores, gradients of inputs, ms at 2**19,
# 2**20, 2**21, 2**22, all at once: 4096x4096 bfloat16, 128 rows 39, 42, 30, 28, 48; float32, 512 rows 123, 121, 124, 137,
# 153; 14336x4096 float32, 128 rows 188, 180, 170, 254, 292. GPUs: 32 MB of bfloat16; not measured.
CPU_ELEMENTS, GPU_ELEMENTS = 2**21, 2**24


def elements_at_once(device: torch.device) -> int:
    return CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS


def _scaled_mm(x: Input, w: Weight, w_scale: torch.Tensor, recipes: tuple[str, str], dtype: torch.dtype) -> torch.Tensor:
    assert x.scale is not None
    types = torch.nn.functional.ScalingType
    # Hopper accumulates FP8 products in 14 bits; without fast accumulation they are added to float32 registers
    # every few steps, which costs up to a third of the speed. The error of fast accumulation stays well below that of the
    # E4M3 rounding of the inputs (the gpu tests compare it with the scheme's threshold), so it is used here,
    # as in torchao's inference. CPUs do not have this option.
    fast = x.x.device.type == "cuda"
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


def quantize_rowwise(x: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme) -> Input:
    """Codes and one scale per row, (M, 1), for any input scheme, as scaled_mm cannot mix row and tensor scales."""
    assert scheme.input is not None
    return Input(*quantize_input(x, scheme.input, input_scale, per_row=True))


def rowwise(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """scaled_mm with scales of x (M, 1) and of the weight (1, N), both float32, for channel or tensor weights."""
    w_scale = w.scale.float().reshape(1, -1).expand(1, w.codes.shape[0]).contiguous()
    return _scaled_mm(x, w, w_scale, ("RowWise", "RowWise"), dtype)


def quantize_tensorwise(x: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme) -> Input:
    """Codes and one scale for the whole input, (1,)."""
    assert scheme.input is not None
    q, scale = quantize_input(x, scheme.input, input_scale)
    return Input(q, scale.reshape(1))


def tensorwise(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """scaled_mm with one scale for x and one for the weight."""
    return _scaled_mm(x, w, w.scale.float().reshape(1), ("TensorWise", "TensorWise"), dtype)


def quantize_blockwise(x: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme) -> Input:
    """Codes and a scale per 128 columns, (M, ceil(K / 128)) with the outer dimension contiguous, as cuBLAS needs it."""
    assert scheme.input is not None
    q, scale = quantize_input(x, scheme.input, input_scale)
    return Input(q, scale.t().contiguous().t())  # the Triton kernel returns this order already


def blockwise(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """scaled_mm with 1x128 scales of inputs and 128x128 scales of weights."""
    return _scaled_mm(x, w, w.scale.float().t(), ("BlockWise1x128", "BlockWise128x128"), dtype)


def fake_quantize(x: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme) -> Input:
    """Quantize and dequantize x, in its dtype."""
    if scheme.input is None:
        return Input(x)
    scale = numerics.input_scale_for(x, scheme.input, input_scale)
    return Input(numerics.fake_quantize(x, scale, scheme.input.granularity, scheme.input.dtype))


def dequantize(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize the weight some rows at a time; the matmul (in `product_dtype`) of each piece gives columns of the result."""
    granularity, elements = w.scheme.weight.granularity, elements_at_once(w.codes.device)
    values = x.x.to(product_dtype(x.x.dtype, x.x.device))
    if w.codes.numel() <= elements:
        return add_bias(F.linear(values, numerics.dequantize(w.codes, w.scale, granularity, values.dtype)), w.bias).to(dtype)
    out = values.new_empty((values.shape[0], w.codes.shape[0]))
    for codes, scale, start in numerics.pieces(w.codes, w.scale, granularity, elements):
        out[:, start : start + len(codes)] = F.linear(values, numerics.dequantize(codes, scale, granularity, values.dtype))
    return add_bias(out, w.bias).to(dtype)


def why_not_rowwise(scheme: Scheme) -> str | None:
    """The reason why the row-wise kernel does not support `scheme`; None if it does."""
    if reason := _quantized_fp8(scheme):
        return reason
    assert scheme.input is not None
    if scheme.weight.granularity not in (ROW, TENSOR) or scheme.input.granularity not in (ROW, TENSOR):
        return "row-wise scaled_mm takes one scale per row or per tensor, not per group or block"
    return None


def why_not_tensorwise(scheme: Scheme) -> str | None:
    """The reason why the tensor-wise kernel does not support `scheme`; None if it does."""
    if reason := _quantized_fp8(scheme):
        return reason
    assert scheme.input is not None
    if not (scheme.weight.granularity.is_tensor and scheme.input.granularity.is_tensor):
        return "tensor-wise scaled_mm takes one scale per tensor on both sides"
    return None


def why_not_blockwise(scheme: Scheme) -> str | None:
    """The reason why the block-wise kernel does not support `scheme`; None if it does."""
    if reason := _quantized_fp8(scheme):
        return reason
    return None if scheme == FP8_BLOCK else "block-wise scaled_mm takes 1x128 inputs by 128x128 weights"


def _quantized_fp8(scheme: Scheme) -> str | None:
    if scheme.input is None:
        return "the scheme does not quantize inputs"
    if scheme.weight.dtype != FP8 or scheme.input.dtype != FP8:
        return "scaled_mm takes E4M3 codes on both sides"
    return None


def why_not_device(problem: Problem) -> str | None:
    """The reason why scaled_mm cannot run on this device with these sizes; None if it can."""
    # The CPU kernel supports any size; cuBLAS, CUTLASS and oneDNN need rows of a multiple of 16 bytes on both sides.
    if problem.device.type != "cpu" and (problem.n % 16 or problem.k % 16):
        return f"N={problem.n} and K={problem.k} must be multiples of 16 on {problem.device.type}"
    return None


TENSORWISE = Kernel(
    name="scaled_mm_tensorwise", why_not_scheme=why_not_tensorwise, why_not_device=why_not_device, probes=(FP8_STATIC,),
    quantize=quantize_tensorwise, multiply=tensorwise,
)  # fmt: skip
ROWWISE = Kernel(
    name="scaled_mm_rowwise", why_not_scheme=why_not_rowwise, why_not_device=why_not_device, probes=(FP8_DYNAMIC,),
    quantize=quantize_rowwise, multiply=rowwise,
)  # fmt: skip
BLOCKWISE = Kernel(
    name="scaled_mm_blockwise", why_not_scheme=why_not_blockwise, why_not_device=why_not_device, probes=(FP8_BLOCK,),
    quantize=quantize_blockwise, multiply=blockwise,
)  # fmt: skip
DEQUANTIZE = Kernel(name="dequantize", quantize=fake_quantize, multiply=dequantize)
WEIGHT_ONLY = Kernel(name="weight_only", multiply=dequantize)
