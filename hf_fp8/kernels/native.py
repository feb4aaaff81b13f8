"""Kernels of the library of CPU kernels (`formats.native`): weights are read as they are stored, one byte each.

Inputs are not quantized; sums are float32, also for 16-bit inputs. int8 inputs times int8 weights are summed exactly in int32.
"""

from __future__ import annotations

import platform
from functools import cache

import torch

from ..formats import native, packing
from ..formats.code_types import INT4, INT8
from ..formats.scheme import FP8_BLOCK, FP8_WEIGHT_ONLY, INT8_DYNAMIC, TENSOR, W4A16, W8A16, Scheme
from . import torch_fp8, torch_grouped, torch_int8
from .base import ExpertWeights, GroupedKernel, Input, Kernel, Problem, Routing, Weight, has_bfloat16_units, why_sums_overflow
from .int8_inputs import COLUMNS_PER_OUTLIER, quantize, quantize_but_outliers
from .probing import int_mm_is_slow
from .thresholds import native_limit, packed_limit


def multiply(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """x (M, K) times the weight; above `native_limit` rows the weight is dequantized in pieces for torch's matmul."""
    m = x.x.shape[0]
    if m > native_limit(dtype):
        return torch_fp8.dequantize(x, w, dtype)
    if w.scheme.weight.packed and not (w.scheme.weight.dtype == INT4 and m <= packed_limit()):
        return _unpacked(x.x, w)
    return native.multiply(x.x, w.codes, w.scale, w.scheme.weight.granularity, bias=w.bias, zero_points=w.zero_point)


def _unpacked(x: torch.Tensor, w: Weight) -> torch.Tensor:
    """x (M, K) times a packed weight whose codes are unpacked to int8, some rows at a time."""
    k, scheme = x.shape[1], w.scheme.weight
    step = max(_ELEMENTS // max(k, 1) // 8, 1) * 8  # zero points of eight rows are in a word
    found = []
    for start in range(0, w.codes.shape[0], step):
        rows = slice(start, start + step)
        codes = packing.differences(w.codes, w.zero_point, scheme.code.bits, k, scheme.granularity.cols, rows)
        bias = None if w.bias is None else w.bias[rows]
        found.append(native.multiply(x, codes, w.scale.reshape(len(w.codes), -1)[rows], scheme.granularity, bias=bias))
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def multiply_grouped(x: Input, w: ExpertWeights, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
    """The same for stacks of experts; only experts that have rows are read."""
    n_experts, scheme = w.codes.shape[0], w.scheme.weight
    if routing.offsets is None:
        routing = torch_grouped.sort(routing, n_experts)
    rows_each = routing.rows_each(n_experts)
    if rows_each > native_limit(dtype):
        return torch_grouped.dequantize(x, w, routing, dtype)
    if scheme.packed and not (scheme.dtype == INT4 and rows_each <= packed_limit()):
        return _grouped_unpacked(x.x, w, routing, dtype)
    return native.multiply(
        x.x, w.codes, w.scale, scheme.granularity, parts=w.parts, dtype=dtype, zero_points=w.zero_point,
        rows=routing.experts.shape[0], ends=routing.offsets, sources=routing.rows, targets=routing.slots, share=routing.share,
    )  # fmt: skip


def _grouped_unpacked(x: torch.Tensor, w: ExpertWeights, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
    """Rows times packed weights, one expert after the other; outputs without an expert are 0."""
    out = x.new_zeros((routing.experts.shape[0], w.codes.shape[1]), dtype=dtype)
    parts = [w.part(index) for index in range(w.parts)]
    for expert, rows, places in torch_grouped.by_expert(routing):
        out[places] = torch.cat([_unpacked(x[rows], part.matrix(expert)) for part in parts], 1).to(dtype)
    return out


def multiply_int8(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """int8 codes of x times those of the weight, with the outlier columns in float."""
    assert x.scale is not None
    added = None
    if (columns := torch_int8.beside(x, w)) is not None and x.outliers is not None:
        # With `out`, as autocast would multiply in 16 bits.
        added = torch.mm(x.outliers, columns, out=columns.new_empty((x.x.shape[0], w.codes.shape[0])))
    return native.multiply_int8(x.x, x.scale, w.codes, w.scale, dtype, bias=w.bias, added=added)


def times_weight(x: torch.Tensor, w: Weight) -> torch.Tensor | None:
    """x (M, N) times a weight (N, K), not its transpose: (M, K) in the dtype of x; None if torch is to do it."""
    weight = w.scheme.weight
    if weight.packed or weight.dtype not in native.CODES or why_not_here(w.codes.device, x.dtype) is not None:
        return None
    if x.shape[0] > native_limit(x.dtype):  # 0 rows without vectors
        return None
    return native.multiply(x, w.codes, w.scale, w.scheme.weight.granularity, transposed=True)


def times_weights(grad: torch.Tensor, w: ExpertWeights, routing: Routing) -> torch.Tensor | None:
    """grad (S, N), sorted by expert, times the weights of the experts: (S, K) in float32; None if torch is to do it."""
    if (
        w.scheme.weight.packed
        or w.scheme.weight.dtype not in native.CODES
        or why_not_here(w.codes.device, grad.dtype) is not None
        or routing.rows_each(w.codes.shape[0]) > native_limit(grad.dtype)
    ):
        return None
    return native.multiply(
        grad, w.codes, w.scale, w.scheme.weight.granularity, parts=w.parts, dtype=torch.float32, transposed=True,
        rows=grad.shape[0], ends=routing.offsets,
    )  # fmt: skip


def times_dense(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, transposed: bool = False
) -> torch.Tensor:
    """x times a weight (N, K) in bfloat16 or float16 that was never quantized: (M, N), or (M, K) if `transposed`."""
    return native.multiply(x, weight.detach(), None, TENSOR, bias=bias, transposed=transposed)


@native.depends
@cache
def why_not_dense(dtype: torch.dtype) -> str | None:
    """The reason why torch multiplies weights of `dtype` that are not quantized, on the CPU; None if the library does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"torch's matmul in {dtype} is fast"
    if has_bfloat16_units():
        return "this CPU has units for bfloat16"
    if dtype == torch.float16 and platform.machine().lower() in ("aarch64", "arm64"):
        return "torch's matmul in float16 uses ARM's units for it"
    if (reason := native.why_not()) is not None:
        return reason
    return _NO_VECTORS if native.names()[1] == "scalar" else None


def why_not_here(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the library cannot be used on `device` for inputs of `dtype`; None if it can."""
    if device.type != "cpu":
        return f"it is for CPUs, not for {device.type}"
    if dtype not in native.DTYPES:
        return f"no {dtype} inputs"
    return native.why_not()


def why_not_scheme(scheme: Scheme) -> str | None:
    """The reason why the weight-only kernels do not support `scheme`; None if they do."""
    weight = scheme.weight
    if weight.is_ordered:
        return "it takes groups of columns that lie next to each other"
    if weight.packed and weight.granularity.cols % 8 and weight.granularity.cols != -1:
        return f"it takes packed codes in groups of a multiple of 8 columns, not {weight.granularity.cols}"
    if weight.packed and weight.dtype == INT8 and weight.has_zero_points:
        return "differences of 8-bit codes and zero points have 9 bits"
    if weight.packed:
        return None
    return None if weight.dtype in native.CODES else f"it takes E4M3 or int8 weights, not {weight.code.label}"


def why_not_device(problem: Problem) -> str | None:
    """The reason why the kernels cannot run on this device; None if they can."""
    return why_not_here(problem.device, problem.dtype)


def why_not_int8(problem: Problem) -> str | None:
    """`why_not_device` for `multiply_int8`."""
    return why_not_device(problem) or why_sums_overflow(problem)


def why_no_outliers(problem: Problem) -> str | None:
    """`why_not_int8` for the kernel that splits off outlier columns."""
    if problem.k < COLUMNS_PER_OUTLIER:
        return f"K={problem.k} is less than {COLUMNS_PER_OUTLIER} columns"
    return why_not_int8(problem)


_NO_VECTORS = "this CPU has no vector instructions that the library of CPU kernels has code for"


def why_slow(problem: Problem) -> str | None:
    """The reason to prefer torch's kernels; None if there is none."""
    # 2048x2048 by 1, 4, 16, 64 rows, AMD EPYC 7003, two threads: 0.18, 0.40, 0.12, 0.07 x dense float32.
    return _NO_VECTORS if native.names()[1] == "scalar" else None


def why_slow_int8(problem: Problem) -> str | None:
    """`why_slow` for `multiply_int8`."""
    return why_slow(problem) or (None if int_mm_is_slow() else "torch's int8 matmul is fast on this CPU")


def takes_int8(scheme: Scheme) -> str | None:
    """The reason why `multiply_int8` does not support `scheme`; None if it does."""
    return None if scheme == INT8_DYNAMIC else "it takes int8 weights with a scale per row, and inputs per token"


# Elements of a packed weight that are unpacked at a time, in int8.
_ELEMENTS = 2**24
_PROBES = (FP8_WEIGHT_ONLY, Scheme(FP8_BLOCK.weight), W4A16, W8A16)
WEIGHT_ONLY = Kernel(
    name="native_weight_only", why_not_scheme=why_not_scheme, why_not_device=why_not_device, why_slow=why_slow, probes=_PROBES,
    multiply=multiply,
)  # fmt: skip
GROUPED_WEIGHT_ONLY = GroupedKernel(
    name="native_grouped_weight_only", why_not_scheme=why_not_scheme, why_not_device=why_not_device, why_slow=why_slow,
    probes=_PROBES, multiply=multiply_grouped,
)  # fmt: skip
INT8_OUTLIERS = Kernel(
    name="native_int8_outliers", why_not_scheme=takes_int8, why_not_device=why_no_outliers, why_slow=why_slow_int8,
    probes=(INT8_DYNAMIC,), quantize=quantize_but_outliers, multiply=multiply_int8, splits_outliers=True,
)  # fmt: skip
INT8_ROWWISE = Kernel(
    name="native_int8", why_not_scheme=takes_int8, why_not_device=why_not_int8, why_slow=why_slow_int8, probes=(INT8_DYNAMIC,),
    quantize=quantize, multiply=multiply_int8,
)  # fmt: skip
