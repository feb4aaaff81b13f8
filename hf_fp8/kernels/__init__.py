"""Which kernel runs where: ordered lists, each entry with its reason when it declines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, Generic, TypeVar

import torch

from ..errors import KernelError
from ..formats.scheme import FP8, FP8_BLOCK, FP8_DYNAMIC, FP8_STATIC, FP8_WEIGHT_ONLY, INT8, INT8_DYNAMIC, Scheme
from . import int8_inputs as int8_quantize
from . import torch_fp8 as torch_mm
from . import torch_grouped as grouped_mm
from . import torch_int8 as int8_mm
from .base import BaseKernel, ExpertWeights, GroupedKernel, Input, Kernel, Problem, Routing, Weight
from .probe import probe
from .thresholds import weight_only_limit
from .triton import support as triton_support
from .triton import tiling

__all__ = [
    "BACKENDS",
    "GROUPED_KERNELS",
    "KERNELS",
    "ExpertWeights",
    "GroupedKernel",
    "Input",
    "Kernel",
    "Problem",
    "Routing",
    "Selection",
    "Weight",
    "grouped_mm",
    "has_fp8_matmul",
    "kernel_for",
    "probe",
    "select",
    "select_grouped",
    "use",
    "why_not_kept",
    "why_not_kept_experts",
]  # fmt: skip

BACKENDS = ("auto", "scaled_mm", "weight_only", "int8")

# Codes are -127 to 127.
LARGEST_K = (2**31 - 1) // 127**2
_NO_KERNEL = "no 8-bit kernel takes such scales"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


K = TypeVar("K", bound=BaseKernel)


@dataclass(frozen=True)
class Selection(Generic[K]):
    """The kernels chosen for a problem: `small` for up to `limit` rows of input, `kernel` for more; and why.

    Of a stack of experts, rows are those that an expert gets on average.
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


def _probed(name: str, *schemes: Scheme) -> Callable[[Problem], str | None]:
    """Whether kernel `name` passes its probe, with schemes of the layouts that it is made for."""

    def why_not_device(problem: Problem) -> str | None:
        if problem.dtype not in _FLOATS:
            return f"no {problem.dtype} output"
        reasons = (probe(_EVERY[name], scheme, problem.device, problem.dtype) for scheme in schemes)
        return next(filter(None, reasons), None)

    return why_not_device


def _scaled_mm_device(name: str, scheme: Scheme) -> Callable[[Problem], str | None]:
    probed = _probed(name, scheme)

    def why_not_device(problem: Problem) -> str | None:
        # The CPU kernel takes any size; cuBLAS, CUTLASS and oneDNN want 16-byte rows on both sides.
        if problem.device.type != "cpu" and (problem.n % 16 or problem.k % 16):
            return f"N={problem.n} and K={problem.k} must be multiples of 16 on {problem.device.type}"
        return probed(problem)

    return why_not_device


def _triton_device(name: str, *schemes: Scheme) -> Callable[[Problem], str | None]:
    probed = _probed(name, *schemes)

    def why_not_device(problem: Problem) -> str | None:
        reason = triton_support.why_not(problem.device)
        if reason is not None or problem.device.type == "cpu":
            return reason
        return probed(problem)

    return why_not_device


def _int32_sums(why_not_device: Callable[[Problem], str | None]) -> Callable[[Problem], str | None]:
    """`why_not_device`, and that int8 products can be added up in int32 without overflow."""

    def check(problem: Problem) -> str | None:
        if problem.scheme.weight.dtype == INT8 and problem.k > LARGEST_K:
            return f"sums of K={problem.k} products of int8 codes may overflow int32 (up to {LARGEST_K} never do)"
        return why_not_device(problem)

    return check


def _int8_device(problem: Problem) -> str | None:
    return int8_mm.why_not_device(problem) or _probed("int8_mm", INT8_DYNAMIC)(problem)


def _int8_outliers_device(problem: Problem) -> str | None:
    few = int8_quantize.too_narrow(problem)
    return few or int8_mm.why_not_device(problem) or _probed("int8_mm_outliers", INT8_DYNAMIC)(problem)


def _int8_weight_only_device(problem: Problem) -> str | None:
    return int8_mm.why_not_device_weight_only(problem) or _probed("int8_weight_only", INT8_DYNAMIC)(problem)


def _late(module: str, function: str) -> Callable[..., Any]:
    """A function of one of the files that import Triton, which happens at the first call."""
    found: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(import_module(f".triton.{module}", __name__), function)
        return found(*args)

    return call


def _never(_: object) -> None:
    return None


# They compute what the scheme says, inputs quantized.
SCALED: tuple[Kernel, ...] = (
    Kernel(
        "scaled_mm_tensorwise", torch_mm.tensor_scheme, _scaled_mm_device("scaled_mm_tensorwise", FP8_STATIC),
        torch_mm.quantize_tensorwise, torch_mm.tensorwise,
    ),
    Kernel(
        "scaled_mm_rowwise", torch_mm.row_scheme, _scaled_mm_device("scaled_mm_rowwise", FP8_DYNAMIC),
        torch_mm.quantize_rowwise, torch_mm.rowwise,
    ),
    Kernel(
        "scaled_mm_blockwise", torch_mm.block_scheme, _scaled_mm_device("scaled_mm_blockwise", FP8_BLOCK),
        torch_mm.quantize_blockwise, torch_mm.blockwise,
    ),
    Kernel(
        "int8_mm_outliers", int8_mm.int8_scheme, _int32_sums(_int8_outliers_device),
        int8_quantize.quantize_but_outliers, int8_mm.multiply, splits_outliers=True,
    ),
    Kernel("int8_mm", int8_mm.int8_scheme, _int32_sums(_int8_device), int8_quantize.quantize, int8_mm.multiply),
    Kernel(
        "triton_scaled_mm", tiling.scaled_mm_scheme, _int32_sums(_triton_device("triton_scaled_mm", FP8_DYNAMIC)),
        _late("scaled_mm", "quantize"), _late("scaled_mm", "multiply"),
    ),
    Kernel("dequantize", _never, _never, torch_mm.fake_quantize, torch_mm.dequantize),
)  # fmt: skip
# They leave inputs as they are.
WEIGHT_ONLY: tuple[Kernel, ...] = (
    Kernel("int8_weight_only", int8_mm.int8_scheme, _int8_weight_only_device, None, int8_mm.weight_only),
    Kernel(
        "triton_weight_only", tiling.weight_only_scheme, _triton_device("triton_weight_only", FP8_WEIGHT_ONLY),
        None, _late("weight_only", "multiply"),
    ),
    Kernel("weight_only", _never, _never, None, torch_mm.dequantize),
)  # fmt: skip
# The same two lists for stacks of experts.
GROUPED_SCALED: tuple[GroupedKernel, ...] = (
    GroupedKernel(
        "scaled_grouped_mm", torch_mm.row_scheme, _scaled_mm_device("scaled_grouped_mm", FP8_DYNAMIC),
        grouped_mm.scaled_grouped_mm, quantizes=True,
    ),
    GroupedKernel(
        "triton_grouped_scaled_mm", tiling.scaled_mm_scheme, _triton_device("triton_grouped_scaled_mm", FP8_DYNAMIC, FP8_BLOCK),
        _late("grouped", "multiply"), quantizes=True,
    ),
    GroupedKernel("grouped_dequantize", _never, _never, grouped_mm.dequantize, quantizes=True),
)  # fmt: skip
GROUPED_WEIGHT_ONLY: tuple[GroupedKernel, ...] = (
    GroupedKernel(
        "triton_grouped_weight_only", tiling.weight_only_scheme,
        _triton_device("triton_grouped_weight_only", FP8_WEIGHT_ONLY, Scheme(FP8_BLOCK.weight)),
        _late("grouped", "multiply"), quantizes=False,
    ),
    GroupedKernel("grouped_weight_only", _never, _never, grouped_mm.dequantize, quantizes=False),
)  # fmt: skip
KERNELS = SCALED + WEIGHT_ONLY
GROUPED_KERNELS = GROUPED_SCALED + GROUPED_WEIGHT_ONLY
_BY_NAME = {kernel.name: kernel for kernel in KERNELS}
_GROUPED_BY_NAME = {kernel.name: kernel for kernel in GROUPED_KERNELS}
_EVERY: dict[str, Kernel | GroupedKernel] = {**_BY_NAME, **_GROUPED_BY_NAME}

_forced: ContextVar[str | None] = ContextVar("hf_fp8_forced_kernel", default=None)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force one kernel of `KERNELS` or `GROUPED_KERNELS` by name within the block, for tests, benchmarks and bug reports.

    A layer that the kernel cannot serve raises `KernelError` instead of taking another one; linears take no notice of a
    kernel for experts, and the other way round. Kernels are chosen when a layer runs: compiled code obeys, too, but a
    CUDA graph that was recorded before does not.
    """
    if name not in _EVERY:
        raise KernelError(f"unknown kernel {name!r}; there are: {', '.join(_EVERY)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def select(problem: Problem, backend: str = "auto") -> Selection[Kernel]:
    """The kernels for `problem`: the forced one, else the first of its list that does not decline.

    backend: "scaled_mm" computes what the checkpoint says (inputs quantized by the scheme); "weight_only"
    leaves inputs as they are; "int8" is for layers re-quantized to int8. "auto" takes what is fastest: the
    checkpoint's arithmetic for many rows of input, and a weight-only kernel for few, if the device has a fused one.
    """
    if forced := _BY_NAME.get(_forced.get() or ""):
        return _honour(forced, problem)
    return _select(problem.device, problem.scheme.text, problem.n, problem.k, problem.dtype, backend)


def kernel_for(x: torch.Tensor, weight: torch.Tensor, scheme: str, backend: str) -> Kernel:
    """`select`, for the operands of a call: x (M, K) and weight (N, K)."""
    m, k = x.shape
    if forced := _BY_NAME.get(_forced.get() or ""):
        return _honour(forced, Problem(x.device, Scheme.parse(scheme), weight.shape[0], k, x.dtype)).kernel
    return _select(x.device, scheme, weight.shape[0], k, x.dtype, backend).at(m)


def select_grouped(problem: Problem, backend: str = "auto") -> Selection[GroupedKernel]:
    """`select` for a stack of experts, (E, N, K): N and K of the problem are those of one of them."""
    if forced := _GROUPED_BY_NAME.get(_forced.get() or ""):
        return _honour(forced, problem)
    return _select_grouped(problem.device, problem.scheme.text, problem.n, problem.k, problem.dtype, backend)


def _honour(kernel: K, problem: Problem) -> Selection[K]:
    reason = kernel.why_not_scheme(problem.scheme) or kernel.why_not_device(problem)
    if reason is not None:
        raise KernelError(f"kernel {kernel.name!r} was forced, but cannot run {problem.scheme.describe()}: {reason}")
    return Selection(kernel, "forced")


@lru_cache(maxsize=4096)
def _select(device: torch.device, text: str, n: int, k: int, dtype: torch.dtype, backend: str) -> Selection[Kernel]:
    problem = Problem(device, Scheme.parse(text), n, k, dtype)
    scheme = problem.scheme
    if backend not in BACKENDS:
        raise KernelError(f"unknown backend {backend!r}; there are: {', '.join(BACKENDS)}")
    if backend == "int8" and int8_mm.int8_scheme(scheme) is not None:
        raise KernelError(f"backend='int8' runs layers that were re-quantized to int8, not {scheme.describe()}")
    if backend == "weight_only":
        return Selection(_first(WEIGHT_ONLY, problem)[0], "backend='weight_only'")
    if scheme.input is None:
        return Selection(_first(WEIGHT_ONLY, problem)[0], "the checkpoint does not quantize inputs (W8A16)")
    fused = _first(WEIGHT_ONLY, problem)[0]
    few = None if fused.name == "weight_only" else fused
    if backend == "auto" and few is not None and (lacking := has_fp8_matmul(device)) and scheme.weight.dtype == FP8:
        return Selection(few, f"weights stay in FP8, inputs as they are: {lacking}; backend='int8' may be faster for many rows")
    kernel, declined = _first(SCALED, problem)
    name = "int8" if scheme.weight.dtype == INT8 else "FP8"
    reason = declined or (_NO_KERNEL if kernel is SCALED[-1] else f"{name} matmul on {device.type}")
    if backend == "scaled_mm" or few is None:
        return Selection(kernel, reason)
    limit = weight_only_limit(device, scheme)
    return Selection(kernel, f"{reason}; weight-only up to M = {limit.m} ({limit.why})", few, limit.m)


@lru_cache(maxsize=4096)
def _select_grouped(
    device: torch.device, text: str, n: int, k: int, dtype: torch.dtype, backend: str
) -> Selection[GroupedKernel]:
    problem = Problem(device, Scheme.parse(text), n, k, dtype)
    if backend not in ("auto", "scaled_mm", "weight_only"):
        raise KernelError(f"experts run with backend 'auto', 'scaled_mm' or 'weight_only', not {backend!r}")
    wide = _first(GROUPED_WEIGHT_ONLY, problem)[0]
    if backend == "weight_only":
        return Selection(wide, "backend='weight_only'")
    if problem.scheme.input is None:
        return Selection(wide, "the checkpoint does not quantize inputs (W8A16)")
    if backend == "auto" and (lacking := has_fp8_matmul(device)):
        return Selection(wide, f"weights stay in FP8, inputs as they are: {lacking}")
    kernel, declined = _first(GROUPED_SCALED, problem)
    reason = declined or (_NO_KERNEL if kernel is GROUPED_SCALED[-1] else f"FP8 matmul on {device.type}")
    if backend == "scaled_mm" or wide is GROUPED_WEIGHT_ONLY[-1]:
        return Selection(kernel, reason)
    limit = weight_only_limit(device, problem.scheme)
    return Selection(kernel, f"{reason}; weight-only up to {limit.m} rows an expert ({limit.why})", wide, limit.m)


def _first(kernels: tuple[K, ...], problem: Problem) -> tuple[K, str]:
    """The first of `kernels` that does not decline, and the reasons of those before it."""
    reasons: list[str] = []
    for kernel in kernels:
        if kernel.why_not_scheme(problem.scheme) is not None:
            continue  # made for other schemes: no news
        reason = kernel.why_not_device(problem)
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
    reasons = [
        probe(_BY_NAME[name], scheme, device, torch.bfloat16)
        for name, scheme in (("scaled_mm_rowwise", FP8_DYNAMIC), ("scaled_mm_tensorwise", FP8_STATIC))
    ]
    return None if None in reasons else reasons[0]


@cache
def why_not_kept(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if "auto" gains from FP8 weights on `device`: it has FP8 units, or a kernel that widens weights as it reads them."""
    lacking = has_fp8_matmul(device)
    if lacking is None or dtype not in _FLOATS:
        return lacking
    widening = _BY_NAME["triton_weight_only"].why_not_device(Problem(device, FP8_WEIGHT_ONLY, 128, 128, dtype))
    return None if widening is None else f"{lacking}; {widening}"


@cache
def why_not_kept_experts(device: torch.device, dtype: torch.dtype, scheme: Scheme = FP8_WEIGHT_ONLY) -> str | None:
    """None if "auto" gains from experts in FP8 on `device`: it has a kernel that reads just those with rows, as they are."""
    if dtype not in _FLOATS:
        return f"no kernel for {dtype}"
    reading = GROUPED_WEIGHT_ONLY[0]
    return reading.why_not_device(Problem(device, scheme, 128, 128, dtype)) or reading.why_not_scheme(scheme)
