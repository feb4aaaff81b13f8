"""int8 weights with one scale per row, int8 inputs with one per token: `torch._int_mm` on CPUs and CUDA.

Products of int8 codes add up exactly in int32, so all the error is that of rounding weights and inputs.
"""

from __future__ import annotations

from functools import cache

import torch

from .. import numerics
from ..scheme import INT8, ROW, Scheme
from ..scratch import rows_at_once, scratch
from . import triton_support
from .kernel import Problem, add_bias
from .quantize import quantize_input

# The vector loop of the CPU kernel behind `_weight_int8pack_mm` reads 16 to 64 columns at a time without a
# remainder: with K = 24 it gives wrong numbers, with K = 5 it crashes (torch 2.13.0, AVX-512).
PACK_COLUMNS = 64
# Elements of a weight up to which it is the faster one for few rows: it has fewer and simpler steps around it, but
# streams weights at 10 GB/s where `_int_mm` does 14. SmolLM2's linears (up to 0.9 M), M = 1: 13.2 ms against 15.5;
# TinyLlama's (up to 11.5 M) 61 against 48.
PACK_ELEMENTS = 2**21
# cuBLAS refuses fewer rows of input than 17; 32 is the next tile.
LEAST_ROWS = 32
# Elements of an input up to which the number of steps counts, not the memory that they go through: what one thread
# does at a time (at::internal::GRAIN_SIZE).
SMALL = 2**15


def quantize_rows(x: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes and scales (M, 1): `numerics.quantize_input`, in fewer passes and without fresh memory on a CPU."""
    assert scheme.input is not None
    if x.device.type != "cpu" or x.dtype.itemsize > 4 or triton_support.why_not(x.device) is None:
        return quantize_input(x, scheme.input, input_scale)
    m, k = x.shape
    if m * k <= SMALL:
        magnitude = x.abs()
        scale = magnitude.amax(1, keepdim=True).float().div_(127.0).clamp_(min=numerics.MIN_SCALE)
        return torch.div(x, scale).round_().to(INT8), scale
    x = x.contiguous()
    codes = torch.empty((m, k), dtype=INT8, device=x.device)
    scales = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    step = rows_at_once(k)
    for start in range(0, m, step):
        piece, scale = x[start : start + step], scales[start : start + step]
        scaled = scratch("scaled", (piece.shape[0], k), torch.float32)
        if x.dtype == torch.float32:
            scale.copy_(torch.abs(piece, out=scaled).amax(1, keepdim=True))
        else:
            # Without the sign, the order of 16-bit floats is that of their bits. The maximum of integers is a vector
            # loop on CPUs, that of 16-bit floats is not: 0.13 ms instead of 0.36 for bfloat16 512x1536.
            bits = torch.bitwise_and(piece.view(torch.int16), 0x7FFF, out=scratch("bits", (piece.shape[0], k), torch.int16))
            scale.copy_(bits.amax(1, keepdim=True).view(x.dtype))
            scaled.copy_(piece)
        scale.div_(127.0).clamp_(min=numerics.MIN_SCALE)
        # No clamp: the scale is that of the largest. Rows with NaN or inf give NaN, which the cast makes 0.
        torch.div(piece if x.dtype == torch.float32 else scaled, scale, out=scaled)
        codes[start : start + step] = scaled.round_()
    return codes, scales


def multiply(
    q: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
) -> torch.Tensor:
    """q (M, K) times weight (N, K) in int32, then both scales and the bias in float32, rounded once to `dtype`."""
    assert x_scale is not None
    if q.device.type == "cpu" and triton_support.why_not(q.device) is not None:
        return _multiply_cpu(q, x_scale, weight, weight_scale, bias, dtype)
    m = q.shape[0]
    if m < LEAST_ROWS:
        sums = torch._int_mm(torch.nn.functional.pad(q, (0, 0, 0, LEAST_ROWS - m)), weight.t())[:m]
    else:
        sums = torch._int_mm(q, weight.t())
    if triton_support.why_not(q.device) is None:
        from .triton_epilogue import scale_sums

        return scale_sums(sums, x_scale, weight_scale, bias, dtype)
    return add_bias(sums.float().mul_(weight_scale.reshape(1, -1)).mul_(x_scale), bias).to(dtype)


def _multiply_cpu(
    q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    m, n = q.shape[0], weight.shape[0]
    if m <= _weight_first_up_to():
        sums = torch._int_mm(weight, q.t())  # (N, M)
        scaled = (sums * (weight_scale.reshape(n, 1) * x_scale.reshape(1, m))).t()
        return add_bias(scaled, bias).to(dtype).contiguous()
    out = torch.empty((m, n), dtype=dtype, device=q.device)
    in_place = dtype == torch.float32
    step = m if in_place else rows_at_once(n)
    for start in range(0, m, step):
        piece = q[start : start + step]
        sums = out.view(torch.int32) if in_place else scratch("sums", (piece.shape[0], n), torch.int32)
        torch._int_mm(piece, weight.t(), out=sums)
        scaled = add_bias(_scale(sums, weight_scale.reshape(1, n), x_scale[start : start + step]), bias)
        if not in_place:
            out[start : start + step] = scaled
    return out


def _scale(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int32 sums times two scales, in float32, in their own place: the first touch of new memory costs more than the cast."""
    return sums.view(torch.float32).copy_(sums).mul_(a).mul_(b)


@cache
def _weight_first_up_to() -> int:
    """Rows of input up to which the product is taken as weight times input.

    oneDNN repacks the second operand at each call, so that had better be the small one. Measured with cold weights,
    both ways, ms for a model's linears: Xeon with AMX, 826 MB of TinyLlama's shapes M=1 48 / 64, 4 54 / 66,
    16 64 / 83; 110 MB of SmolLM2's M=1 15.5 / 18.4, 16 20.4 / 23.9. Without AMX (oneDNN held to VNNI) M=1 44 / 44,
    2 92 / 76.
    """
    return 16 if torch.cpu._is_amx_tile_supported() else 1


def weight_only(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Codes times x in bfloat16: for CPUs, few rows and small weights.

    The sums are float32, but x and the product are rounded to bfloat16 (8 bits), also for a float32 x. That is less
    than int8 codes of x lose.
    """
    out = torch._weight_int8pack_mm(x.contiguous().to(torch.bfloat16), weight, _ones(weight.shape[0]))
    return add_bias(torch.mul(out, weight_scale.float().reshape(1, -1)), bias).to(dtype)


@cache
def _ones(n: int) -> torch.Tensor:
    """The scales that the kernel wants in bfloat16: ours are applied in float32."""
    with torch.inference_mode(False):
        return torch.ones(n, dtype=torch.bfloat16, device="cpu")


def int8_scheme(scheme: Scheme) -> str | None:
    """Why the int8 kernels cannot take `scheme`; None if they can."""
    if scheme.weight.dtype != INT8 or scheme.weight.granularity != ROW:
        return "it takes int8 weights with a scale per row"
    if scheme.input is None or scheme.input.dtype != INT8 or scheme.input.granularity != ROW or not scheme.input.dynamic:
        return "it takes inputs quantized to int8 per token"
    return None


def wrong_device(problem: Problem) -> str | None:
    """Why `multiply` cannot run there; None if it can."""
    if problem.k < 2:
        return "torch._int_mm gives wrong numbers for K=1 (torch 2.13.0, CPU)"
    if problem.device.type == "cuda" and (problem.n % 8 or problem.k % 8):
        return f"N={problem.n} and K={problem.k} must be multiples of 8 on {problem.device.type}"
    if problem.device.type not in ("cpu", "cuda"):
        return f"torch has no int8 matmul on {problem.device.type}"
    return None


def wrong_device_weight_only(problem: Problem) -> str | None:
    """Why `weight_only` cannot run there; None if it can."""
    if problem.device.type != "cpu":
        return f"made for CPUs, not for {problem.device.type}"
    if problem.k % PACK_COLUMNS:
        return f"K={problem.k} must be a multiple of {PACK_COLUMNS}"
    if problem.n * problem.k > PACK_ELEMENTS:
        return f"slower for weights of more than {PACK_ELEMENTS} elements"
    return None
