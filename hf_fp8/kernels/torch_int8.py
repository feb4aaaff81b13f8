"""int8 kernels: weights with one scale per row, inputs with one per token, `torch._int_mm` on CPUs and CUDA.

Sums of products of int8 codes (8-bit values) are exact in int32, so the only error is from rounding weights and inputs.
"""

from __future__ import annotations

from functools import cache

import torch

from ..formats import native
from ..formats.code_types import INT8
from ..formats.cpu import SIZE, scratch
from ..formats.exponents import scale_values
from ..formats.scheme import INT8_DYNAMIC, ROW, Scheme
from .base import Input, Kernel, Problem, Weight, add_bias, why_sums_overflow
from .int8_inputs import COLUMNS_PER_OUTLIER, quantize, quantize_but_outliers
from .probing import int_mm_is_slow
from .triton import support as triton_support

# The vector loop of the CPU kernel behind `_weight_int8pack_mm` reads 16 to 64 columns at a time without a
# remainder: with K = 24 it gives wrong numbers, with K = 5 it crashes (torch 2.13.0, AVX-512).
PACK_COLUMNS = 64
# Up to this many elements of a weight, `_weight_int8pack_mm` is faster for few rows: it needs fewer and simpler steps, but
# reads weights at 10 GB/s, `_int_mm` at 14. SmolLM2's linears (up to 0.9 M), M = 1: 13.2 ms against 15.5;
# TinyLlama's (up to 11.5 M) 61 against 48.
PACK_ELEMENTS = 2**21
# For weight scales below this, scale times a sum of products of codes, or of codes and inputs below `LARGE`, fits float32.
LARGE = 2.0**90
# If the amax of an input is above this, its values lose no bits to underflow in bfloat16.
SMALL = 2.0**-100
# cuBLAS needs at least 17 rows of input; 32 is the next tile size.
LEAST_ROWS = 32


def multiply(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Codes (M, K) times codes (N, K) in int32, then outliers, both scales and the bias in float32; rounded once to `dtype`."""
    assert x.scale is not None
    m, has_triton = x.x.shape[0], triton_support.why_not(x.x.device) is None
    if x.x.device.type == "cpu" and not has_triton:
        return _weight_first(x, w, dtype) if m <= _weight_first_up_to() else _on_cpu(x, w, dtype)
    padded = x.x if m >= LEAST_ROWS else torch.nn.functional.pad(x.x, (0, 0, 0, LEAST_ROWS - m))
    sums = torch._int_mm(padded, w.codes.t())[:m]
    if has_triton:
        from .triton.int8_epilogue import scale_sums

        return scale_sums(sums, x, w, None if x.columns is None else _columns(w.codes, x.columns), dtype)
    return _scaled(sums.float(), x, w, beside(x, w)).to(dtype)


def _columns(codes: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(R, N): columns of a weight. Gathering rows of the transposed view is three times as fast as columns."""
    return codes.t().index_select(0, columns).float()


def beside(x: Input, w: Weight) -> torch.Tensor | None:
    """(R, N), any strides: dequantized weights of the outlier columns; None if there are none."""
    if x.columns is None:
        return None
    if w.codes.is_cpu and native.why_not() is None:
        return native.columns_of(w.codes, w.scale, x.columns).t()
    return _columns(w.codes, x.columns).mul_(scale_values(w.scale).float().reshape(1, -1))


def _scaled(total: torch.Tensor, x: Input, w: Weight, columns: torch.Tensor | None) -> torch.Tensor:
    """Apply scales, outliers (times `columns`) and bias to `total` (M, N), float32 sums, in place."""
    assert x.scale is not None
    w_scale = scale_values(w.scale).float().reshape(1, -1)
    if w_scale.device.type != "cpu" or float(w_scale.amax()) < LARGE:
        total.mul_(w_scale).mul_(x.scale)  # in this order: a large x_scale alone could overflow
    else:
        total.mul_(torch.minimum(w_scale, x.scale)).mul_(torch.maximum(w_scale, x.scale))
    if columns is not None:
        assert x.outliers is not None
        total.addmm_(x.outliers, columns)
    return add_bias(total, w.bias)


def _weight_first(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    total = torch._int_mm(w.codes, x.x.t()).float().t()
    return _scaled(total, x, w, beside(x, w)).to(dtype).contiguous()


def _on_cpu(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    m, n, columns = x.x.shape[0], w.codes.shape[0], beside(x, w)
    out = torch.empty((m, n), dtype=dtype, device=x.x.device)
    in_place = dtype == torch.float32
    step = m if in_place else max(1, SIZE // (n * torch.int32.itemsize))
    for start in range(0, m, step):
        part = x.rows(start, start + step)
        sums = out.view(torch.int32) if in_place else scratch("sums", (part.x.shape[0], n), torch.int32)
        torch._int_mm(part.x, w.codes.t(), out=sums)
        # Cast int32 to float32 in place: the first access to new memory costs more than the cast.
        total = _scaled(sums.view(torch.float32).copy_(sums), part, w, columns)
        if not in_place:
            out[start : start + step] = total
    return out


@cache
def _weight_first_up_to() -> int:
    """Number of input rows up to which the product is computed as weight times input.

    oneDNN repacks the second operand at each call, so the second operand should be the small one. Measured with cold weights,
    both ways, ms for a model's linears: Xeon with AMX, 826 MB of TinyLlama's shapes M=1 48 / 64, 4 54 / 66,
    16 64 / 83; 110 MB of SmolLM2's M=1 15.5 / 18.4, 16 20.4 / 23.9. Without AMX (oneDNN held to VNNI) M=1 44 / 44,
    2 92 / 76.
    """
    return 16 if torch.cpu._is_amx_tile_supported() else 1


def weight_only(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Codes times x in bfloat16, for CPUs, few rows and small weights.

    Sums are float32, but x and the product are rounded to bfloat16 (8 bits), also for a float32 x. This error is smaller
    than that of quantizing x to int8.
    """
    least, most = (end.item() for end in torch.aminmax(x.x))
    if SMALL < max(-least, most) < LARGE:
        return add_bias(torch.mul(_packed(x.x, w.codes), scale_values(w.scale).float().reshape(1, -1)), w.bias).to(dtype)
    # Scale rows to a magnitude of about 1, so that sums with codes do not overflow.
    amax = x.x.abs().amax(1, keepdim=True).float()
    power = torch.ldexp(torch.ones_like(amax), torch.frexp(amax).exponent.clamp_(-100, 120))
    return _scaled(_packed(x.x / power, w.codes).float(), Input(x.x, power), w, None).to(dtype)


def _packed(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return torch._weight_int8pack_mm(x.contiguous().to(torch.bfloat16), codes.contiguous(), _ones(codes.shape[0]))


@cache
def _ones(n: int) -> torch.Tensor:
    """Dummy bfloat16 scales for the kernel; the real scales are applied in float32."""
    with torch.inference_mode(False):
        return torch.ones(n, dtype=torch.bfloat16, device="cpu")


def why_not_scheme(scheme: Scheme) -> str | None:
    """The reason why the int8 kernels do not support `scheme`; None if they do."""
    if scheme.weight != INT8_DYNAMIC.weight:
        return "it takes int8 weights with a scale per row"
    if scheme.input is None or scheme.input.dtype != INT8 or scheme.input.granularity != ROW or not scheme.input.dynamic:
        return "it takes inputs quantized to int8 per token"
    return None


def why_not_device(problem: Problem) -> str | None:
    """The reason why `multiply` cannot run on this device with these sizes; None if it can."""
    if reason := why_sums_overflow(problem):
        return reason
    if problem.k < 2:
        return "torch._int_mm gives wrong numbers for K=1 (torch 2.13.0, CPU)"
    if problem.device.type == "cuda" and (problem.n % 8 or problem.k % 8):
        return f"N={problem.n} and K={problem.k} must be multiples of 8 on {problem.device.type}"
    if problem.device.type not in ("cpu", "cuda"):
        return f"torch has no int8 matmul on {problem.device.type}"
    return None


def why_slow(problem: Problem) -> str | None:
    """The reason not to choose `multiply` on this device; None if there is none."""
    if problem.device.type == "cpu" and int_mm_is_slow():
        return "torch._int_mm is slower than a float32 matmul on this CPU"
    return None


def why_no_outliers(problem: Problem) -> str | None:
    """`why_not_device` for the kernel that splits off outlier columns."""
    if problem.k < COLUMNS_PER_OUTLIER:
        return f"K={problem.k} is less than {COLUMNS_PER_OUTLIER} columns"
    return why_not_device(problem)


def why_not_weight_only(problem: Problem) -> str | None:
    """The reason why `weight_only` cannot run on this device with these sizes; None if it can."""
    if problem.device.type != "cpu":
        return f"it is for CPUs, not for {problem.device.type}"
    if problem.k % PACK_COLUMNS:
        return f"K={problem.k} must be a multiple of {PACK_COLUMNS}"
    if problem.n * problem.k > PACK_ELEMENTS:
        return f"it is slower for weights of more than {PACK_ELEMENTS} elements"
    return None


OUTLIERS = Kernel(
    name="int8_mm_outliers", why_not_scheme=why_not_scheme, why_not_device=why_no_outliers, why_slow=why_slow,
    probes=(INT8_DYNAMIC,), quantize=quantize_but_outliers, multiply=multiply, splits_outliers=True,
)  # fmt: skip
ROWWISE = Kernel(
    name="int8_mm", why_not_scheme=why_not_scheme, why_not_device=why_not_device, why_slow=why_slow, probes=(INT8_DYNAMIC,),
    quantize=quantize, multiply=multiply,
)  # fmt: skip
WEIGHT_ONLY = Kernel(
    name="int8_weight_only", why_not_scheme=why_not_scheme, why_not_device=why_not_weight_only, probes=(INT8_DYNAMIC,),
    multiply=weight_only,
)  # fmt: skip
