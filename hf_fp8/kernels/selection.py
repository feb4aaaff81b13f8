"""Kernel selection: the first kernel of a list that supports a problem, with the reasons why those before it do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Generic, TypeVar

import torch

from ..errors import KernelError
from ..formats import native
from ..formats.code_types import FP8, INT8
from ..formats.scheme import FP8_WEIGHT_ONLY, INT8_DYNAMIC, ROW, Scheme, TensorScheme
from .base import BaseKernel, GroupedKernel, Kernel, Problem
from .probing import probe
from .registry import GROUPED_KERNELS, GROUPED_QUANTIZED, GROUPED_WEIGHT_ONLY, KERNELS, QUANTIZED, SLOW_ACCUM, WEIGHT_ONLY
from .thresholds import weight_only_limit
from .torch_fp8 import ROWWISE, TENSORWISE
from .torch_fp8 import SLOW_ACCUM as SLOW

BACKENDS = ("auto", "scaled_mm", "weight_only", "int8")
# Those that one layer may have. The last two are as "auto" and "scaled_mm", but without fast accumulation on CUDA devices.
BACKENDS_OF_LAYERS = (*BACKENDS, f"auto{SLOW}", f"scaled_mm{SLOW}")

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_LINEAR_NAMES = {kernel.name: kernel for kernel in (*KERNELS, *SLOW_ACCUM)}
_GROUPED_NAMES = {kernel.name: kernel for kernel in GROUPED_KERNELS}
_forced: ContextVar[str] = ContextVar("hf_fp8_forced_kernel", default="")

K = TypeVar("K", bound=BaseKernel)


@dataclass(frozen=True)
class Selection(Generic[K]):
    """The kernels selected for a problem: `small` for up to `limit` rows of input, `kernel` for more; and the reason.

    For a stack of experts, the number of rows is the average per expert.
    """

    kernel: K
    reason: str
    small: K | None = None
    limit: int = 0

    def at(self, m: int) -> K:
        """The kernel for M = `m`."""
        return self.kernel if self.small is None or m > self.limit else self.small

    def __str__(self) -> str:
        if self.small is None:
            return self.kernel.name
        return f"{self.small.name} (M <= {self.limit}), {self.kernel.name}"


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force one kernel of `KERNELS` or `GROUPED_KERNELS` by name within the block, for tests, benchmarks and bug reports.

    A layer that the kernel does not support raises `KernelError` instead of using another kernel. Linears ignore a kernel for
    experts, and experts ignore one for linears. Kernels are selected when a layer runs, in compiled code, too, but a CUDA graph
    that was recorded before does not change.
    """
    known = [*_LINEAR_NAMES, *_GROUPED_NAMES]
    if name not in known:
        raise KernelError(f"unknown kernel {name!r}; use one of {', '.join(known)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str:
    """The name of the kernel that `use` forces; empty if there is none."""
    return _forced.get()


def select(problem: Problem, backend: str = "auto") -> Selection[Kernel]:
    """The kernels for `problem`: the forced one, else the first of its list that supports it.

    backend: "scaled_mm" quantizes inputs as the checkpoint's scheme says; "weight_only" does not quantize
    inputs; "int8" is for layers re-quantized to int8. "auto" uses the fastest: the checkpoint's scheme for many rows of
    input, and a weight-only kernel for few, if the device has a fused one. "auto_slow_accum", "scaled_mm_slow_accum": the same
    without fast accumulation in `scaled_mm` on CUDA devices.
    """
    if forced := _LINEAR_NAMES.get(_forced.get()):
        return _honour(forced, problem)
    return _select(problem.device, problem.scheme.text, problem.n, problem.k, problem.dtype, backend)


def kernel_for(x: torch.Tensor, weight: torch.Tensor, scheme: str, backend: str) -> Kernel:
    """The selected kernel for the operands of a call: x (M, K) and weight (N, K)."""
    m, k = x.shape
    if forced := _LINEAR_NAMES.get(_forced.get()):
        return _honour(forced, Problem(x.device, Scheme.parse(scheme), weight.shape[0], k, x.dtype)).kernel
    return _select(x.device, scheme, weight.shape[0], k, x.dtype, backend).at(m)


def select_grouped(problem: Problem, backend: str = "auto") -> Selection[GroupedKernel]:
    """`select` for a stack of experts (E, N, K); `problem` has N and K of one expert."""
    if forced := _GROUPED_NAMES.get(_forced.get()):
        return _honour(forced, problem)
    return _select_grouped(problem.device, problem.scheme.text, problem.n, problem.k, problem.dtype, backend)


def why_not(kernel: BaseKernel, problem: Problem) -> str | None:
    """None if `kernel` supports `problem`, else the reason why not."""
    return kernel.why_not_scheme(problem.scheme) or _why_not_there(kernel, problem)


def _why_not_there(kernel: BaseKernel, problem: Problem) -> str | None:
    """`why_not` for a scheme that the kernel supports. A kernel with `probes` must pass them on the device."""
    if reason := kernel.why_not_device(problem):
        return reason
    if kernel.probes and problem.dtype not in _FLOATS:
        return f"no {problem.dtype} output"
    probes = () if kernel.is_triton and problem.device.type == "cpu" else kernel.probes
    return next(filter(None, (probe(kernel, scheme, problem.device, problem.dtype) for scheme in probes)), None)


def _honour(kernel: K, problem: Problem) -> Selection[K]:
    if reason := why_not(kernel, problem):
        raise KernelError(f"kernel {kernel.name!r} was forced, but cannot run {problem.scheme.describe()}: {reason}")
    return Selection(kernel, "forced")


@native.depends
@lru_cache(maxsize=4096)
def _select(device: torch.device, text: str, n: int, k: int, dtype: torch.dtype, backend: str) -> Selection[Kernel]:
    problem = Problem(device, Scheme.parse(text), n, k, dtype)
    scheme = problem.scheme
    if backend not in BACKENDS_OF_LAYERS:
        raise KernelError(f"unknown backend {backend!r}; use one of {', '.join(BACKENDS_OF_LAYERS)}")
    # int8 products are summed exactly by every kernel.
    quantized = SLOW_ACCUM if backend.endswith(SLOW) and scheme.weight.dtype == FP8 else QUANTIZED
    backend = backend.removesuffix(SLOW)
    if backend == "int8" and scheme.weight.dtype != FP8 and scheme != INT8_DYNAMIC:
        backend = "auto"  # packed, or of other inputs: not re-quantized
    if backend == "int8" and scheme != INT8_DYNAMIC:
        raise KernelError(f"backend='int8' is for layers that were re-quantized to int8, not {scheme.describe()}")
    fused, reason = _first(WEIGHT_ONLY, problem)[0], _why_weight_only(scheme, backend)
    # Inputs in float64, which no fused kernel takes, are not quantized either where others are not.
    narrow = problem if dtype in _FLOATS else replace(problem, dtype=torch.float32)
    auto = backend == "auto" and scheme.weight.dtype == FP8 and _first(WEIGHT_ONLY, narrow)[0] is not WEIGHT_ONLY[-1]
    if reason is None and auto and (lacking := has_fp8_matmul(device)):
        reason = f"weights stay in FP8, inputs are not quantized: {lacking}; backend='int8' may be faster for many rows"
    if reason is not None:
        return Selection(fused, reason + _if_none_reads(WEIGHT_ONLY, scheme))
    return _by_rows(quantized, WEIGHT_ONLY, problem, backend, "M = {}")


@native.depends
@lru_cache(maxsize=4096)
def _select_grouped(
    device: torch.device, text: str, n: int, k: int, dtype: torch.dtype, backend: str
) -> Selection[GroupedKernel]:
    problem = Problem(device, Scheme.parse(text), n, k, dtype)
    if backend not in ("auto", "scaled_mm", "weight_only"):
        raise KernelError(f"experts run with backend 'auto', 'scaled_mm' or 'weight_only', not {backend!r}")
    reason = _why_weight_only(problem.scheme, backend)
    if reason is None and backend == "auto" and not problem.scheme.weight.packed and (lacking := has_fp8_matmul(device)):
        reason = f"weights stay in FP8, inputs are not quantized: {lacking}"
    if reason is not None:
        return Selection(_first(GROUPED_WEIGHT_ONLY, problem)[0], reason + _if_none_reads(GROUPED_WEIGHT_ONLY, problem.scheme))
    return _by_rows(GROUPED_QUANTIZED, GROUPED_WEIGHT_ONLY, problem, backend, "{} rows per expert")


def _why_weight_only(scheme: Scheme, backend: str) -> str | None:
    """The reason, independent of the device, why inputs are not quantized; None if there is none."""
    if backend == "weight_only":
        return "backend='weight_only'"
    return "the checkpoint does not quantize inputs" if scheme.input is None else None


def _if_none_reads(kernels: tuple[K, ...], scheme: Scheme) -> str:
    """What to add to a reason if none of `kernels` but the last, which dequantizes, takes codes of that type at all."""
    plain = Scheme(TensorScheme(ROW, dtype=scheme.weight.dtype))
    if any(kernel.why_not_scheme(plain) is None for kernel in kernels[:-1]):
        return ""
    return f"; no kernel reads {scheme.weight.code.label} codes, so weights are dequantized at each call"


def _by_rows(quantized: tuple[K, ...], weight_only: tuple[K, ...], problem: Problem, backend: str, unit: str) -> Selection[K]:
    """The kernel that quantizes inputs; for few rows the weight-only one, if it is fused and the backend is not "scaled_mm"."""
    kernel, declined = _first(quantized, problem)
    codes = problem.scheme.weight.code.label
    found = "no 8-bit kernel takes such scales" if kernel is quantized[-1] else f"{codes} matmul on {problem.device.type}"
    if problem.scheme.weight.packed:
        found = "no 8-bit kernel takes packed codes"
    elif problem.scheme.weight.dtype not in (FP8, INT8):
        found = f"no 8-bit kernel takes {codes} weights"
    reason, few = declined or found, _first(weight_only, problem)[0]
    if backend == "scaled_mm" or few is weight_only[-1]:
        return Selection(kernel, reason)
    limit = weight_only_limit(problem)
    if limit.is_every:
        return Selection(few, f"inputs are not quantized: {limit.why}")
    return Selection(kernel, f"{reason}; weight-only up to {unit.format(limit.m)} ({limit.why})", few, limit.m)


def _first(kernels: tuple[K, ...], problem: Problem) -> tuple[K, str]:
    """The first of `kernels` that supports `problem`, and the reasons why those before it do not."""
    reasons: list[str] = []
    for kernel in kernels:
        if kernel.why_not_scheme(problem.scheme) is not None:
            continue  # other schemes: not worth a reason
        reason = _why_not_there(kernel, problem) or kernel.why_slow(problem)
        if reason is None:
            return kernel, "; ".join(reasons)
        reasons.append(f"{kernel.name}: {reason}")
    raise AssertionError("the last kernel takes every problem")


@cache
def has_fp8_matmul(device: torch.device) -> str | None:
    """None if FP8 matmuls run on `device` in hardware, else the reason why not."""
    if device.type == "cpu":
        return "CPUs have no FP8 units"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            return f"compute capability {capability[0]}.{capability[1]} has no FP8 units (8.9 or newer has)"
    reasons = [probe(kernel, scheme, device, torch.bfloat16) for kernel in (ROWWISE, TENSORWISE) for scheme in kernel.probes]
    return None if None in reasons else reasons[0]


@native.depends
@cache
def why_not_kept(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if "auto" keeps FP8 weights on `device`: it has FP8 units, or a kernel that dequantizes weights as it reads them."""
    lacking = has_fp8_matmul(device)
    if lacking is None:
        return None
    widening = _why_none(WEIGHT_ONLY, Problem(device, FP8_WEIGHT_ONLY, 128, 128, dtype))
    return None if widening is None else f"{lacking}; {widening}"


@native.depends
@cache
def why_not_kept_experts(device: torch.device, dtype: torch.dtype, scheme: Scheme = FP8_WEIGHT_ONLY) -> str | None:
    """None if "auto" keeps experts in FP8 on `device`: it has a kernel that reads the codes of only the experts with rows."""
    if dtype not in _FLOATS:
        return f"no kernel for {dtype}"
    return _why_none(GROUPED_WEIGHT_ONLY, Problem(device, scheme, 128, 128, dtype))


def _why_none(kernels: tuple[K, ...], problem: Problem) -> str | None:
    """The reasons why none of `kernels` except the last, which dequantizes, runs `problem`; None if one does."""
    kernel, reasons = _first(kernels, problem)
    return reasons if kernel is kernels[-1] else None
