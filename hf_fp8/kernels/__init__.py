"""Which kernel runs where: one ordered list, each entry with its reason when it declines.

A kernel of torch is trusted on an accelerator only after it has multiplied a small known problem
there correctly (`probe`): scale layouts and supported types differ between devices and versions,
and a kernel that takes the wrong layout gives wrong numbers without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from .. import numerics
from ..errors import KernelError
from ..scheme import FP8, ROW, TENSOR, Scheme, TensorScheme
from . import torch_mm

BACKENDS = ("auto", "scaled_mm", "weight_only")

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", Scheme], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """All that the choice of a kernel depends on; M varies per call and is no part of it."""

    device: torch.device
    scheme: Scheme
    n: int
    k: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Kernel:
    """A way to multiply. Each of its two questions is answered with a reason to decline, or None."""

    name: str
    run: Run
    wrong_scheme: Callable[[Scheme], str | None]
    wrong_device: Callable[[Problem], str | None]


@dataclass(frozen=True)
class Choice:
    """The kernel chosen for a problem, and why: the reasons of those before it that declined."""

    kernel: Kernel
    reason: str


# A scheme of each layout for the probe.
_PROBES = {
    "rowwise": Scheme(TensorScheme(ROW), TensorScheme(ROW, dynamic=True)),
    "tensorwise": Scheme(TensorScheme(TENSOR), TensorScheme(TENSOR)),
    "blockwise": Scheme(TensorScheme(torch_mm.BLOCK_WEIGHT), TensorScheme(torch_mm.BLOCK_INPUT, dynamic=True)),
}


@cache
def probe(layout: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Run one `scaled_mm` layout on `device` with operands whose result is known exactly.

    Small integers with power-of-two scales that differ along every axis: any correct kernel gives
    the float64 result bit for bit. Returns None, or the reason why the kernel must not be used.
    """
    scheme = _PROBES[layout]
    m, n, k = 16, 256, 384
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (m, k), generator=generator).float()
    x[:, ::128] = 448.0  # every group of 128 has amax 448, hence scale 1 before the factor below
    w = torch.randint(-1, 2, (n, k), generator=generator).float()
    w[:, ::128] = 0.0
    assert scheme.input is not None
    grid = scheme.weight.granularity.grid(n, k)
    w_scale = 2.0 ** torch.randint(-3, 1, grid, generator=generator).float()
    row_factor = 2.0 ** torch.randint(-3, 4, (m, 1), generator=generator).float()
    static = None
    if scheme.has_static_input:
        static, row_factor = torch.tensor([0.5]), torch.tensor([[0.5]])
    x = x * row_factor
    wide = numerics.expand_scale(w_scale, scheme.weight.granularity, n, k)
    expected = (x.double() @ (w.double() * wide.double()).t()).to(dtype)
    try:
        run: Run = getattr(torch_mm, layout)
        found = run(
            x.to(device, dtype),
            w.to(FP8).to(device),
            w_scale.to(device),
            None if static is None else static.to(device),
            scheme,
        )
        found = found.cpu()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        first_line = str(error).strip().split("\n")[0]
        return f"torch {torch.__version__} cannot run it on {device.type} with {dtype} output ({first_line[:120]})"
    if not torch.equal(found, expected):
        return f"it gave wrong numbers on {device.type} with {dtype} output, in a check against exact values"
    return None


def _scaled_mm_device(layout: str) -> Callable[[Problem], str | None]:
    def wrong_device(problem: Problem) -> str | None:
        if problem.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"no {problem.dtype} output"
        # The CPU kernel takes any size; cuBLAS, CUTLASS and oneDNN want 16-byte rows on both sides.
        if problem.device.type != "cpu" and (problem.n % 16 or problem.k % 16):
            return f"N={problem.n} and K={problem.k} must be multiples of 16 on {problem.device.type}"
        return probe(layout, problem.device, problem.dtype)

    return wrong_device


def _never(_: object) -> None:
    return None


KERNELS: tuple[Kernel, ...] = (
    Kernel("scaled_mm_tensorwise", torch_mm.tensorwise, torch_mm.tensor_scheme, _scaled_mm_device("tensorwise")),
    Kernel("scaled_mm_rowwise", torch_mm.rowwise, torch_mm.row_scheme, _scaled_mm_device("rowwise")),
    Kernel("scaled_mm_blockwise", torch_mm.blockwise, torch_mm.block_scheme, _scaled_mm_device("blockwise")),
    Kernel("weight_only", torch_mm.weight_only, torch_mm.weight_only_scheme, _never),
    Kernel("dequantize", torch_mm.dequantize, _never, _never),
)
_BY_NAME = {kernel.name: kernel for kernel in KERNELS}
_WEIGHT_ONLY = _BY_NAME["weight_only"]

_forced: ContextVar[str | None] = ContextVar("hf_fp8_forced_kernel", default=None)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force one kernel of `KERNELS` by name within the block, for tests, benchmarks and bug reports.

    A layer that the kernel cannot serve raises `KernelError` instead of taking another one.
    """
    if name not in _BY_NAME:
        raise KernelError(f"unknown kernel {name!r}; there are: {', '.join(_BY_NAME)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def select(problem: Problem, backend: str = "auto") -> Choice:
    """The kernel for `problem`: the forced one, else the first of the list that does not decline.

    backend: "auto" and "scaled_mm" compute what the checkpoint says (inputs quantized by the
    scheme, `scaled_mm` where the device has the layout); "weight_only" leaves inputs as they are.
    """
    forced = _forced.get()
    if forced is not None:
        kernel = _BY_NAME[forced]
        # Forcing weight_only on a scheme with quantized inputs is what `backend="weight_only"` does too.
        reason = None
        if kernel is not _WEIGHT_ONLY:
            reason = kernel.wrong_scheme(problem.scheme) or kernel.wrong_device(problem)
        if reason is not None:
            raise KernelError(f"kernel {forced!r} was forced, but cannot run {problem.scheme.describe()}: {reason}")
        return Choice(kernel, "forced")
    return _select(problem, backend)


@lru_cache(maxsize=4096)
def _select(problem: Problem, backend: str) -> Choice:
    if backend == "weight_only":
        return Choice(_WEIGHT_ONLY, "backend='weight_only'")
    if backend not in BACKENDS:
        raise KernelError(f"unknown backend {backend!r}; there are: {', '.join(BACKENDS)}")
    if problem.scheme.input is None:
        return Choice(_WEIGHT_ONLY, "the checkpoint does not quantize inputs (W8A16)")
    reasons: list[str] = []
    for kernel in KERNELS:
        if kernel.wrong_scheme(problem.scheme) is not None:
            continue  # made for other schemes: no news
        reason = kernel.wrong_device(problem)
        if reason is None:
            return Choice(kernel, "; ".join(reasons) or f"FP8 matmul on {problem.device.type}")
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
    reasons = [probe(layout, device, torch.bfloat16) for layout in ("rowwise", "tensorwise")]
    return None if None in reasons else reasons[0]
