"""Scales that are stored as exponents: their values, how they are rounded, and every kernel with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from hf_fp8.errors import ScaleError
from hf_fp8.formats import numerics
from hf_fp8.formats.exponents import EXPONENTS, exponents_of, mx_exponents, scale_values
from hf_fp8.formats.scheme import FP8_BLOCK, FP8_DYNAMIC, MXFP8, ROW, Granularity, Scheme, TensorScheme
from hf_fp8.formats.weights import quantize_weight
from hf_fp8.kernels import GROUPED_KERNELS, KERNELS, Problem, use, why_not
from hf_fp8.kernels.triton import support as triton_support
from hf_fp8.nn.functional import scaled_linear
from hf_fp8.nn.grouped import scaled_grouped_linear

pytestmark = pytest.mark.hostless
EVERY = torch.arange(256, dtype=torch.uint8)
CHANNEL = Scheme(FP8_DYNAMIC.weight)


def stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.view(dtype)


@pytest.mark.parametrize("dtype", EXPONENTS)
def test_every_byte(dtype: torch.dtype) -> None:
    found = scale_values(EVERY.view(dtype)).double()
    assert found[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert found[255].isnan()
    back = exponents_of(scale_values(EVERY.view(dtype)), dtype)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), EVERY)


@pytest.mark.parametrize("exact", [torch.float32, torch.float64])
def test_scales_are_rounded_up(exact: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.0 + 2.0**-20, 0.75, 3.0, 448.0, 2.0**-126, 2.0**-130, 1e38, 3e38], dtype=exact)
    found = scale_values(exponents_of(values, torch.uint8)).double()
    for value, power in zip(values.double().tolist(), found.tolist(), strict=True):
        assert power == min(max(2.0 ** math.ceil(math.log2(value)), 2.0**-127), 2.0**127)
    for bad in (torch.inf, torch.nan):
        assert int(exponents_of(torch.tensor([bad]), torch.uint8)) == 255


def test_mx_scales_of_every_power() -> None:
    """Just below 1.75 times a power of two, and there."""
    for power in range(-126, 127):
        below, there = torch.tensor([1.7499999, 1.75]).mul(2.0**power)
        wanted = max(power - 8, -127)
        assert int(mx_exponents(below)) - 127 == wanted
        assert int(mx_exponents(there)) - 127 == max(power - 7, -127)
        assert float(there) / 2.0 ** max(power - 7, -127) <= 448
    assert int(mx_exponents(torch.zeros(()))) == 0
    assert int(mx_exponents(torch.tensor(1e-45))) == 0
    assert [int(mx_exponents(torch.tensor(bad))) for bad in (torch.nan, torch.inf)] == [255, 255]


@pytest.mark.parametrize("granularity", [Granularity(128, 128), Granularity(1, 32), ROW])
@pytest.mark.parametrize("mx", [False, True])
@pytest.mark.parametrize("dtype", EXPONENTS)
def test_a_small_change_keeps_scales_and_a_large_one_rounds_them_up(
    granularity: Granularity, dtype: torch.dtype, mx: bool
) -> None:
    weight = torch.randn(150, 96, generator=torch.Generator().manual_seed(0))
    _, scale = quantize_weight(weight, granularity)
    held = exponents_of(scale, dtype)
    weight[0, :32] = 448 * scale_values(held).max()  # the largest code, with which MX formats have the next scale
    _, scale = quantize_weight(weight, granularity)
    held = exponents_of(scale, dtype)
    codes = numerics.quantize(weight, held, granularity)
    dense = numerics.dequantize(codes, held, granularity)
    same, kept = quantize_weight(dense, granularity, held=held, mx=mx)
    assert kept.dtype == dtype
    assert torch.equal(kept.view(torch.uint8), held.view(torch.uint8))
    assert torch.equal(same.view(torch.uint8), codes.view(torch.uint8))

    larger, new = quantize_weight(dense * 5, granularity, held=held, mx=mx)
    amax = numerics.amax_of(dense * 5, granularity).reshape(new.shape)
    assert bool((amax <= 448 * scale_values(new)).all())
    assert bool((amax >= 224 * scale_values(new)).all())
    back = numerics.dequantize(larger, new, granularity)
    assert float((back - dense * 5).norm() / (dense * 5).norm()) <= 0.04


def test_a_weight_that_is_not_finite() -> None:
    with pytest.raises(ScaleError, match="NaN or infinite"):
        quantize_weight(torch.full((32, 32), torch.inf), Granularity(1, 32), mx=True)


def operands(scheme: Scheme, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randn(n, k, generator=generator).mul(20).to(torch.float8_e4m3fn)
    grid = scheme.weight.granularity.grid(n, k)
    return codes, torch.randint(115, 125, grid, generator=generator, dtype=torch.uint8)


@contextmanager
def running(name: str) -> Iterator[None]:
    if name.startswith("triton"):
        with triton_support.interpreted(), use(name):
            yield
    else:
        with use(name):
            yield


SCHEMES = {
    "MXFP8": MXFP8, "MXFP8A16": Scheme(MXFP8.weight), "block": FP8_BLOCK, "block A16": Scheme(FP8_BLOCK.weight),
    "channel": FP8_DYNAMIC, "channel A16": CHANNEL,
    "MX inputs by blocks": Scheme(FP8_BLOCK.weight, TensorScheme(Granularity(1, 128), dynamic=True, mx=True)),
}  # fmt: skip


def names(kernels: tuple[object, ...]) -> list[str]:
    found = [kernel.name for kernel in kernels]  # type: ignore[attr-defined]
    return [name for name in found if "int8" not in name and "packed" not in name]


@pytest.mark.parametrize("name", names(KERNELS))
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("m", [1, 17])
def test_every_kernel_takes_them_as_floats(name: str, scheme: Scheme, m: int) -> None:
    """The same output as for the same scales in float32, and near that of the dequantized operands."""
    n, k = 48, 160 if scheme is not FP8_BLOCK else 128
    codes, scale = operands(scheme, n, k)
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    with triton_support.interpreted():
        if reason := why_not(kernel, Problem(torch.device("cpu"), scheme, n, k, torch.float32)):
            pytest.skip(reason)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    with running(name):
        found = [scaled_linear(x, codes, given, scheme) for given in (scale_values(scale), scale, stored(scale, EXPONENTS[1]))]
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    given = x.double()
    if kernel.quantize is not None and scheme.input is not None:
        parts = numerics.quantize_input(x, scheme.input, None)
        given = numerics.dequantize(*parts, scheme.input.granularity).double()
    wide = numerics.expand_scale(scale_values(scale), scheme.weight.granularity, n, k).double()
    wanted = given @ (codes.double() * wide).T
    # Triton's interpreter rounds inputs to E4M3 in its own way; MX inputs are quantized by the reference.
    limit = 0.1 if name.startswith("triton") and scheme.input is not None and not scheme.input.mx else 1e-5
    assert float((found[0] - wanted).norm() / wanted.norm()) <= limit


@pytest.mark.parametrize("name", names(GROUPED_KERNELS))
@pytest.mark.parametrize("scheme", [MXFP8, Scheme(MXFP8.weight), Scheme(FP8_BLOCK.weight), FP8_DYNAMIC], ids=str)
def test_every_kernel_of_experts(name: str, scheme: Scheme) -> None:
    n, k = 48, 160
    codes, scale = (torch.stack(pair) for pair in zip(*(operands(scheme, n, k) for _ in range(3)), strict=True))
    kernel = next(kernel for kernel in GROUPED_KERNELS if kernel.name == name)
    with triton_support.interpreted():
        if reason := why_not(kernel, Problem(torch.device("cpu"), scheme, n, k, torch.float32)):
            pytest.skip(reason)
    x, groups = torch.randn(7, k, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 2, 1, 0, 3, 2])
    with running(name):
        found = [
            scaled_grouped_linear(x, codes, given, scheme, groups)
            for given in (scale_values(scale), scale, stored(scale, EXPONENTS[1]))
        ]
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    assert not bool(found[0][5].count_nonzero())


@pytest.mark.parametrize("backend", ["auto", "weight_only"])
def test_the_smallest_and_the_largest_scales(backend: str) -> None:
    """2 ** -127, which is not a normal float32, and 2 ** 127; zeros have the first in MX formats."""
    codes = torch.tensor([1.0, -2.0, 0.0, 448.0]).repeat(8, 16).to(torch.float8_e4m3fn)
    scale = torch.full((8, 2), 127, dtype=torch.uint8)
    scale[0], scale[1], scale[2, 1] = 0, 254, 254
    scheme = Scheme(MXFP8.weight)
    x = torch.eye(64)
    out = scaled_linear(x, codes, scale, scheme, backend=backend)
    wanted = codes.double() * 2.0 ** (scale.double() - 127).repeat_interleave(32, 1)
    finite = wanted.abs() <= torch.finfo(torch.float32).max
    assert torch.equal(out.T.double()[finite], wanted[finite])
    assert bool(out.T[~finite].isinf().all())


def test_gradients() -> None:
    codes, scale = operands(MXFP8, 48, 64)
    wide = numerics.dequantize(codes, scale, MXFP8.weight.granularity)
    for how in ("exact", "quantized"):
        x = torch.randn(5, 64, requires_grad=True)
        scaled_linear(x, codes, scale, Scheme(MXFP8.weight), backward=how).sum().backward()
        assert x.grad is not None
        assert float((x.grad - torch.ones(5, 48) @ wide).norm() / x.grad.norm()) <= 1e-6
