"""Inputs and scales at the ends of their dtypes: what is finite comes out finite and as right as the format is, by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.build import error
from support.extremes import ROWS, WEIGHTS, check, inputs, weights
from support.grouped import INTERPRETED, TRITON, grid
from support.grouped import SCHEMES as GROUPED
from support.kernels import SCHEMES, fake_quantize, runs
from torch import nn

from hf_fp8 import QuantizedConv1x1, QuantizedLinear, kernels
from hf_fp8.formats import numerics
from hf_fp8.formats.code_types import FP8, INT8
from hf_fp8.formats.scheme import FP8_DYNAMIC, FP8_STATIC, INT8_DYNAMIC, ROW, TENSOR, Scheme, TensorScheme
from hf_fp8.kernels import KERNELS
from hf_fp8.kernels.base import BaseKernel
from hf_fp8.kernels.triton import granularity as tiling
from hf_fp8.kernels.triton import support as triton_support
from hf_fp8.nn.functional import scaled_linear
from hf_fp8.nn.grouped import known, route, scaled_grouped_linear

pytestmark = pytest.mark.hostless

BY_NAME: dict[str, BaseKernel] = {kernel.name: kernel for kernel in (*KERNELS, *kernels.GROUPED_KERNELS)}
LINEAR_TRITON = {"triton_scaled_mm": tiling.why_not_scaled_mm, "triton_weight_only": tiling.why_not_weight_only}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    """`int8_mm/triton`: with Triton's steps before and after."""
    name, _, interpreted = kernel.partition("/")
    if interpreted or name.startswith("triton"):
        with triton_support.interpreted(), kernels.use(name):
            yield
    else:
        with kernels.use(name):
            yield


def interpreted(name: str, scheme: Scheme) -> list[str]:
    if not INTERPRETED:
        return []
    found = [kernel for kernel, why in LINEAR_TRITON.items() if why(scheme) is None]
    return found + (["int8_mm/triton", "int8_mm_outliers/triton"] if scheme.weight.dtype == INT8 else [])


def ends_of(sizes: list[float]) -> set[float]:
    """The smallest, an ordinary and the largest: the interpreter takes seconds for each."""
    return {min(sizes), 1.0, max(sizes)}


@pytest.mark.thinned(10)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_linears(name: str, dtype: torch.dtype) -> None:
    scheme, seen = SCHEMES[name], dict[str, int]()
    per_tensor = scheme.input is not None and scheme.input.granularity.is_tensor
    for size in WEIGHTS[dtype]:
        for n, k in ((24, 64), (33, 70)):
            codes, scale, dense = weights(scheme, n, k, size)
            for kernel in (*runs(scheme, n, k, dtype), *interpreted(name, scheme)):
                in_triton = kernel.startswith("triton") or "/" in kernel
                if in_triton and size not in ends_of(WEIGHTS[dtype]):
                    continue
                for m in (3,) if in_triton else (1, 3, 17, 40):
                    for sizes in [[s] for s in ROWS[dtype]] + ([] if per_tensor else [ROWS[dtype]]):
                        if in_triton and len(sizes) == 1 and (k == 70 or not per_tensor):
                            continue
                        x = inputs(m, k, sizes, dtype)
                        static = x.abs().amax().float().reshape(1) / 448 if scheme.has_static_input else None
                        with forced(kernel):
                            found = scaled_linear(x, codes, scale, scheme, input_scale=static)
                        seen[kernel] = seen.get(kernel, 0) + check(found, x, dense, kernel, scheme)
    assert min(seen.values()) > 100, seen


@pytest.mark.thinned(13)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GROUPED)
def test_experts(name: str, dtype: torch.dtype) -> None:
    scheme, seen = GROUPED[name], dict[str, int]()
    per_tensor = scheme.input is not None and scheme.input.granularity.is_tensor
    usable = ["grouped_dequantize", "grouped_weight_only", *(k for k, why in TRITON.items() if INTERPRETED and not why(scheme))]
    for size in WEIGHTS[dtype]:
        parts = [weights(scheme, 24, 64, size * factor) for factor in (1.0, 0.5, 0.25)]
        codes = torch.stack([part[0] for part in parts])
        scale = grid(torch.stack([part[1].reshape(scheme.weight.granularity.grid(24, 64)) for part in parts]), scheme)
        for sizes in [[s] for s in ROWS[dtype]] + ([] if per_tensor else [ROWS[dtype]]):
            x, ids = inputs(8, 64, sizes, dtype), torch.tensor([[0, 1], [1, 2]] * 4)
            static = x.abs().amax().float().expand(3, 1) / 448 if scheme.has_static_input else None
            for kernel in usable:
                if kernel in TRITON and (size not in ends_of(WEIGHTS[dtype]) or (len(sizes) == 1 and not per_tensor)):
                    continue
                for sort in (True,) if kernel in TRITON else (True, False):
                    first, second = route(known(ids, 3)[0], 3, sort=sort)
                    with forced(kernel):
                        found = scaled_grouped_linear(
                            x, codes, scale, scheme, first._replace(slots=second.slots), input_scale=static
                        ).view(8, 2, 24)
                    for expert in range(3):
                        rows, slots = torch.where(ids == expert)
                        # the largest of all is at least as large as that of an expert's rows
                        seen[kernel] = seen.get(kernel, 0) + check(
                            found[rows, slots], x[rows], parts[expert][2], kernel, scheme
                        )
    assert min(seen.values()) > 100, seen


def spared(x: torch.Tensor, dense: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows that torch's matmul of a dense weight leaves finite.

    oneDNN with AMX reads on into the next row where K is not a multiple of 32: 17x70 by 33x70 in bfloat16 (torch 2.13).
    """
    finite = nn.functional.linear(x, dense.to(dtype)).isfinite().all(1)
    assert int((~finite[2:]).sum()) == 0
    return finite


OF_ROWS = [name for name, scheme in SCHEMES.items() if scheme.input is None or not scheme.input.granularity.is_tensor]


@pytest.mark.thinned(21)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OF_ROWS)
def test_a_row_spoils_no_other(name: str, dtype: torch.dtype) -> None:
    """Whatever it holds; and it is itself what it is alone, NaN if there is one in it."""
    scheme, largest = SCHEMES[name], torch.finfo(dtype).max
    for n, k in ((24, 64), (33, 70)):
        codes, scale, dense = weights(scheme, n, k, 1e-3)
        for kernel in (*runs(scheme, n, k, dtype), *(interpreted(name, scheme) if k == 64 else ())):
            for m in (3, 17):
                x = inputs(m, k, [1.0], dtype)
                for odd in (torch.nan, torch.inf, -torch.inf, largest, 0.0, torch.finfo(dtype).tiny):
                    given = x.clone()
                    given[1, 5 if odd != 0.0 else slice(None)] = odd
                    with forced(kernel):
                        found = scaled_linear(given, codes, scale, scheme)
                    others = torch.arange(m) != 1
                    if kernel in ("dequantize", "weight_only"):  # torch's matmul
                        others &= spared(given, dense, dtype)
                    assert check(found[others], x[others], dense, kernel, scheme) == n * others.sum()
                    if odd in (torch.nan, torch.inf, -torch.inf):
                        assert not found[1].isfinite().any(), (kernel, odd)
                    else:
                        check(found[1:2], given[1:2], dense, kernel, scheme)
                    assert odd != 0.0 or not found[1].any()


@pytest.mark.thinned(6)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_beyond_the_dtype_is_infinite(name: str, dtype: torch.dtype) -> None:
    scheme, huge = SCHEMES[name], 3e4 if dtype == torch.float16 else 1e38
    granularity = scheme.weight.granularity
    w = torch.rand(24, 64) + 0.5
    scale = numerics.compute_scale(w, granularity, scheme.weight.dtype)
    codes = numerics.quantize(w, scale, granularity, scheme.weight.dtype)
    for kernel in (*runs(scheme, 24, 64, dtype), *interpreted(name, scheme)):
        for m in (3, 17):
            x = ((torch.rand(m, 64) + 1) * huge).to(dtype)
            static = x.abs().amax().float().reshape(1) / 448 if scheme.has_static_input else None
            for sign in (1, -1):
                with forced(kernel):
                    found = scaled_linear(x * sign, codes, scale, scheme, input_scale=static)
                assert bool((found == sign * torch.inf).all()), kernel


def test_scales_of_one_weight_may_be_far_apart() -> None:
    """A column of the output is as right as if it were alone."""
    for scheme in (FP8_DYNAMIC, INT8_DYNAMIC):
        codes, scale, _ = weights(scheme, 24, 64, 1.0)
        scale = scale * torch.tensor([1e-36, 1.0, 1e30] * 8).unsqueeze(1)
        dense = codes.double() * scale.double()
        for kernel in (*runs(scheme, 24, 64, torch.float32), *interpreted("", scheme)):
            seen = 0
            for sizes in ([1e36, 1.0, 1e-37], [1e5], [1e-20]):
                x = inputs(3, 64, sizes, torch.float32)
                with forced(kernel):
                    found = scaled_linear(x, codes, scale, scheme)
                for column in range(24):
                    seen += check(found[:, column : column + 1], x, dense[column : column + 1], kernel, scheme)
            assert seen > 100


@pytest.mark.parametrize("kernel", ["scaled_mm_rowwise", "dequantize", "weight_only"])
def test_a_bias_brings_sums_back_into_the_range_of_float16(kernel: str) -> None:
    codes, scale, dense = torch.full((8, 64), 1.0).to(FP8), torch.ones(8, 1), torch.ones(8, 64).double()
    x, bias = torch.full((5, 64), 1250.0).half(), torch.full((8,), -40000.0).half()
    with kernels.use(kernel):
        found = scaled_linear(x, codes, scale, FP8_DYNAMIC, bias=bias)
    assert error(found, x.double() @ dense.t() + bias.double()) < 1e-3


@pytest.mark.parametrize("kernel", ["dequantize", "weight_only"])
def test_a_static_scale_may_round_up_beyond_the_largest_number(kernel: str) -> None:
    """336.5 steps of 32 are 11 of them."""
    for dtype in DTYPES:
        largest = torch.finfo(dtype).max
        x, scale = torch.full((2, 16), largest, dtype=dtype), torch.tensor([largest / 337])
        codes, w_scale = torch.ones(8, 16).to(FP8), torch.full((1,), 1e-4)
        with kernels.use(kernel):
            found = scaled_linear(x, codes, w_scale, FP8_STATIC, input_scale=scale)
        assert error(found / largest, torch.full((2, 8), 16e-4)) < 0.05


@pytest.mark.parametrize("codes", [FP8, INT8], ids=str)
def test_quantized_inputs_are_scaled_down_to_the_smallest(codes: torch.dtype) -> None:
    """And no scale is 0, or one that a device may take for 0 beside a row of zeros."""
    x = torch.randn(6, 512).clamp(-3, 3).double()
    sizes = torch.tensor([[3e37], [1e-30], [1e-36], [1e-38], [1e-40], [0.0]], dtype=torch.float64)
    x = (x * sizes).float()
    scheme = TensorScheme(ROW, dynamic=True, dtype=codes)
    q, scale = numerics.quantize_input(x, scheme, None)
    back = q.double() * scale.double()
    for row in range(5):
        assert error(back[row] / sizes[row], x[row].double() / sizes[row]) < 0.04, row
    assert float(scale[5]) == numerics.MIN_SCALE == torch.finfo(torch.float32).tiny and not back[5].any()
    deep = torch.full((1, 8), 1e-45)
    assert fake_quantize(deep, numerics.compute_scale(deep, ROW, codes), ROW, codes).isfinite().all()


def test_columns_that_stand_out_are_found_at_any_size() -> None:
    x = torch.randn(70, 576, generator=torch.Generator().manual_seed(0))
    x[:, [5, 33]] = 60 * (1 + x[:, [5, 33]].abs())
    wanted = set(numerics.outlier_columns(x, 24).tolist())
    assert wanted == {5, 33}
    for size in (1e36, 1e-36, 1e-40):
        assert set(numerics.outlier_columns(x * size, 24).tolist()) == wanted, size
    x[3], x[4], x[5] = 3e38, torch.nan, torch.inf
    assert set(numerics.outlier_columns(x, 24).tolist()) == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [FP8_DYNAMIC, INT8_DYNAMIC, Scheme(TensorScheme(TENSOR))], ids=str)
def test_layers(scheme: Scheme, dtype: torch.dtype) -> None:
    """The whole way, convolutions too: rows of all sizes, each as near to the dense layer as the others."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(64, 24, bias=False), nn.Conv2d(64, 24, 1, bias=False)
    backends = ["auto", "scaled_mm", "weight_only"] + (["int8"] if scheme == INT8_DYNAMIC else [])
    for m in (1, 4, 17):
        x = inputs(m, 64, ROW_SIZES[dtype], dtype)
        for backend in backends:
            layer = QuantizedLinear.from_linear(linear, scheme, backend=backend)
            pointwise = QuantizedConv1x1.from_linear(conv, scheme, backend=backend)
            points = x.t().reshape(1, 64, m, 1)
            for found, weight in (
                (layer(x), linear.weight), (pointwise(points)[0, :, :, 0].t(), conv.weight.flatten(1)),
            ):  # fmt: skip
                wanted = x.double() @ weight.double().t()
                for row in range(m):
                    size = x[row].double().abs().amax()
                    assert error(found[row].double() / size, wanted[row] / size) < 0.06, (backend, row)


ROW_SIZES = {torch.float32: [3e37, 1.0, 1e-34], torch.bfloat16: [3e37, 1.0, 1e-34], torch.float16: [2e4, 1.0, 1e-2]}
