"""Probes: check that a kernel gives exact results on a device before it is used there.

Scale layouts and supported dtypes differ between devices and versions, and a kernel that expects another layout
gives wrong numbers without an error.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from time import perf_counter

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..formats import numerics, packing
from ..formats.code_types import INT8
from ..formats.scheme import Scheme, TensorScheme
from .base import ExpertWeights, GroupedKernel, Input, Kernel, Routing, Weight
from .torch_grouped import quantize, sort

# Sizes that every kernel supports; torch._int_mm on CUDA needs at least 17 rows.
M, N, K = 32, 256, 384
# Every 8th column of x holds the largest code: more columns than can be split off as outliers.
EVERY = 8
# Experts of the rows of the probe, two for each row; 5 is no expert.
IDS = (0, 2, 2, 3, 0, 2, 2, 4, 0, 5, 4, 4)


@cache
def probe(kernel: Kernel | GroupedKernel, scheme: Scheme, device: torch.device, dtype: torch.dtype) -> str | None:
    """Run `kernel` on `device` with operands whose result is known exactly; None, or the reason why it must not be used.

    Operands are small integers with power-of-two scales that differ along every axis, so any correct kernel gives the
    float64 result bit for bit.
    """
    try:
        # Disable the caller's modes, such as fake tensors or another default device: the result is cached.
        with torch.device("cpu"), _disable_current_modes(), torch.no_grad(), torch.inference_mode(False):
            if isinstance(kernel, GroupedKernel):
                return _grouped(kernel, scheme, device, dtype)
            return _linear(kernel, scheme, device, dtype)
    except NotImplementedError:  # its message is very long
        return f"torch {torch.__version__} has no such kernel for {device.type}"
    except Exception as error:  # Triton's compiler and torch's kernels raise many types
        first_line = str(error).strip().split("\n")[0]
        return f"torch {torch.__version__} cannot run it on {device.type} with {dtype} output ({first_line[:120]})"


@cache
def int_mm_is_slow() -> bool:
    """Whether `torch._int_mm` is not faster than a float32 matmul on this CPU: by its instructions, else timed, once (5 ms).

    It is a loop over single numbers on x86 CPUs without VNNI, and where oneDNN is held to older instructions
    (ONEDNN_MAX_CPU_ISA): 30 times as slow on an AMD EPYC 7003. With VNNI it is two to four times as fast.
    """
    if platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_vnni_supported():
        return True
    with torch.device("cpu"), _disable_current_modes(), torch.no_grad(), torch.inference_mode(False):
        x, w = torch.ones((32, 512)), torch.ones((256, 512))
        x8, w8 = x.to(INT8), w.to(INT8)
        # Other programs make calls slower: the fastest of more calls for what takes less time.
        return _fastest(lambda: torch._int_mm(x8, w8.t()), 3) > 2 * _fastest(lambda: x @ w.t(), 30)


def _fastest(call: Callable[[], object], calls: int) -> float:
    """Seconds of the fastest of `calls` calls."""
    times = []
    for _ in range(calls):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)


def _linear(kernel: Kernel, scheme: Scheme, device: torch.device, dtype: torch.dtype) -> str | None:
    x, weight, weight_scale, input_scale, expected = exact_operands(scheme, dtype, loud=kernel.splits_outliers)
    static = None if input_scale is None else input_scale.to(device)
    weight, zero_point = with_zero_points(weight, scheme.weight, x.shape[1])
    points = None if zero_point is None else zero_point.to(device)
    found = kernel.run(x.to(device), static, Weight(weight.to(device), weight_scale.to(device), None, scheme, points))
    return _wrong(found, expected)


def _grouped(kernel: GroupedKernel, scheme: Scheme, device: torch.device, dtype: torch.dtype) -> str | None:
    # Few and many rows, as they run in tiles of different sizes.
    for ids in (IDS, IDS * 60):
        x, weights, scales, routing, expected = exact_experts(scheme, dtype, ids=ids)
        given = Input(x)
        if kernel.quantizes:
            assert scheme.input is not None
            given, routing = quantize(x, routing, scheme.input, None, len(weights))
        moved = Input(given.x.to(device), None if given.scale is None else given.scale.to(device))
        # If N has two rows of blocks, test them as two parts concatenated along N.
        parts = 2 if scheme.weight.granularity.rows == N // 2 else 1
        weights, zero_point = with_zero_points(weights, scheme.weight, x.shape[1])
        points = None if zero_point is None else zero_point.to(device)
        held = ExpertWeights(weights.to(device), scales.to(device), scheme, parts, points)
        for routed in (routing, routing._replace(offsets=None), routing._replace(expected=len(ids))):
            found = kernel.multiply(moved, held, routed.to(device), dtype)
            if reason := _wrong(found, expected):
                return reason
    return None


def _wrong(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    if torch.equal(found.cpu(), expected):
        return None
    return f"it gave wrong numbers on {found.device.type} with {found.dtype} output, in a check against exact values"


def exact_experts(
    scheme: Scheme, dtype: torch.dtype, n: int = N, k: int = K, ids: tuple[int, ...] = IDS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Routing, torch.Tensor]:
    """`exact_operands` for five experts: (x, weights, scales, sorted routing, expected), on the CPU.

    ids: experts of the rows of x, two consecutive ones for each row; 5 is no expert.
    """
    m = len(ids) // 2
    x, weight, scale, _, _ = exact_operands(scheme, dtype, m, n, k)
    # Experts have the same rows in another order, and other scales.
    order = torch.arange(n)
    weights = torch.stack([weight[order.roll(e)] for e in range(5)])
    scales = torch.stack([scale * 2.0**-e for e in range(5)])
    flat = torch.tensor(ids)
    routing = sort(Routing(flat, share=2), 5)
    of_w = scheme.weight.granularity
    plain = [packing.unpack(w, scheme.weight.code.bits, k) if scheme.weight.packed else w for w in weights]
    wide = [numerics.expand_scale(s, of_w, n, k).double() * w.double() for s, w in zip(scales, plain, strict=True)]
    rows = [torch.zeros(n, dtype=torch.float64) if e == 5 else wide[e] @ x[i // 2].double() for i, e in enumerate(ids)]
    return x, weights, scales, routing, torch.stack(rows).to(dtype)


def with_zero_points(packed: torch.Tensor, scheme: TensorScheme, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(codes, zero points) of the weights that `packed`, (N, words) or (E, N, words), stands for without zero points.

    Zero points differ between rows and groups, and take any value from which codes of -1 to 1 do not leave the range. None for
    a scheme without them.
    """
    if not scheme.has_zero_points:
        return packed, None
    if packed.ndim == 3:
        made = [with_zero_points(one, scheme, k) for one in packed]
        return torch.stack([codes for codes, _ in made]), torch.stack([points for _, points in made if points is not None])
    n, bits = len(packed), scheme.code.bits
    grid, least, largest = scheme.granularity.grid(n, k), int(scheme.code.least), int(scheme.code.largest)
    points = torch.randint(least + 1, largest, grid, generator=torch.Generator("cpu").manual_seed(n + k)).to(torch.int8)
    codes = packing.unpack(packed, bits, k) + numerics.expand_scale(points, scheme.granularity, n, k)
    return packing.pack(codes, bits), packing.pack_rows(points, bits)


def exact_operands(
    scheme: Scheme, dtype: torch.dtype, m: int = M, n: int = N, k: int = K, loud: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(x, weight, weight_scale, input_scale, x @ W.T in `dtype`) on the CPU, exact in any order of summation.

    loud: add outlier columns; the result is exact only if the kernel splits them off.
    """
    generator = torch.Generator("cpu").manual_seed(m + n + k)
    x = torch.randint(-1, 2, (m, k), generator=generator).float()
    w = torch.randint(-1, 2, (n, k), generator=generator).float()
    grid = scheme.weight.granularity.grid(n, k)
    weight_scale = 2.0 ** torch.randint(-3, 1, grid, generator=generator).float()
    row_factor = 2.0 ** torch.randint(-3, 4, (m, 1), generator=generator).float()
    static = None
    if scheme.input is not None:
        # Each block of x contains the largest code, hence a scale of 1 before the factor below. It occurs several times,
        # as some columns may be split off.
        step = min(EVERY, scheme.input.granularity.cols) if scheme.input.granularity.cols > 0 else EVERY
        largest = scheme.input.code.largest
        x[:, ::step] = largest
        w[:, ::step] = 0.0
        if scheme.input.dtype == INT8:
            # Sums of int8 products are exact, so large codes are tested, too: pairs of them with the same weight add up to 1.
            second = torch.arange(step, k, 2 * step)
            x[:, second] = 1 - largest
            pairs = torch.randint(-1, 2, (n, len(second)), generator=generator).float()
            w[:, second - step] = w[:, second] = pairs
        if loud:
            # Two outlier columns whose sum is small enough for bfloat16.
            sign = 2.0 * torch.randint(0, 2, (m,), generator=generator) - 1
            x[:, 1], x[:, 2] = 16 * largest * sign, 16 * (1 - largest) * sign
            w[:, 2] = w[:, 1]
        if scheme.has_static_input:
            static = torch.tensor([0.5], dtype=torch.float32)
        if scheme.input.granularity.is_tensor:
            row_factor = torch.tensor([[0.5]], dtype=torch.float32)
    x = x * row_factor
    wide = numerics.expand_scale(weight_scale, scheme.weight.granularity, n, k)
    expected = (x.double() @ (w.double() * wide.double()).t()).to(dtype)
    stored = scheme.weight
    codes = packing.pack(w.to(torch.int8), stored.code.bits) if stored.packed else w.to(stored.storage)
    return x.to(dtype), codes, weight_scale, static, expected
