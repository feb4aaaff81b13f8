"""int8 inputs: which columns are set aside, that the others are quantized by the reference, and what is gained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.kernels import THRESHOLD, operands, sqnr

from hf_fp8 import kernels
from hf_fp8.errors import InputError
from hf_fp8.formats import native, numerics
from hf_fp8.formats.scheme import INT8_DYNAMIC
from hf_fp8.kernels import KERNELS, Input, Weight, use
from hf_fp8.kernels import int8_inputs as int8_quantize
from hf_fp8.nn.functional import scaled_linear

pytestmark = pytest.mark.hostless

SIZES = [(1, 64), (3, 200), (40, 576), (70, 1000), (600, 1536)]  # in one go, and in pieces of at most 2**19 elements


@pytest.fixture(params=["library", "torch"])
def by(request: pytest.FixtureRequest) -> Iterator[None]:
    """Who quantizes: the library of CPU kernels, if there is one, or torch."""
    if request.param == "library":
        yield
    else:
        with native.use(None):
            yield


def loud(m: int, k: int, dtype: torch.dtype, columns: tuple[int, ...] = (5, 33), factor: float = 60.0) -> torch.Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m + k))
    x[:, list(columns)] = factor * (1 + x[:, list(columns)].abs())
    return x.to(dtype)


def outliers_of(x: torch.Tensor) -> Input:
    return int8_quantize.quantize_but_outliers(x, None, INT8_DYNAMIC)


def values(given: Input, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What an input as the kernel takes it stands for."""
    assert given.scale is not None
    out = given.x.to(dtype) * given.scale.to(dtype)
    if given.columns is not None and given.outliers is not None:
        out[:, given.columns] = given.outliers.to(dtype)
    return out


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_codes_are_the_reference_s(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(*size).to(dtype)
    x[0] = 0.0
    wide = torch.randn(size[0], 2 * size[1]).to(dtype)[:, ::2]
    for given in (x, wide):
        assert INT8_DYNAMIC.input is not None
        codes, scale = numerics.quantize_input(given, INT8_DYNAMIC.input, None)
        found = int8_quantize.quantize(given, None, INT8_DYNAMIC)
        assert torch.equal(found.x, codes) and torch.equal(found.scale, scale) and found.columns is None


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_what_stands_out_is_set_aside_and_the_rest_is_the_reference_s(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = loud(*size, dtype)
    found = outliers_of(x)
    assert found.columns is not None and found.outliers is not None
    assert {5, 33} <= set(found.columns.tolist())
    assert len(found.columns) <= min(2 * size[0], size[1] // 24, 64)
    if size[0] > 3:  # the mean of a few rows is no more even than that
        assert len(found.columns) == 2
    assert torch.equal(found.outliers, x[:, found.columns].float())
    rest = x.index_fill(1, found.columns, 0.0)
    assert INT8_DYNAMIC.input is not None
    codes, scale = numerics.quantize_input(rest, INT8_DYNAMIC.input, None)
    assert torch.equal(found.x, codes) and torch.equal(found.scale, scale)


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("m", [1, 2, 4, 15, 16, 17, 64, 100, 700])
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_product_of_what_it_stands_for(m: int, dtype: torch.dtype) -> None:
    """Both orders of the product, whole and in pieces."""
    for n, k in ((72, 200), (33, 257), (1, 64), (7000 if m == 700 else 8, 96)):
        given = operands(INT8_DYNAMIC, m, n, k, dtype)
        given["x"] = loud(m, k, dtype)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
        with use("int8_mm_outliers"):
            found = scaled_linear(**given, bias=bias, scheme=INT8_DYNAMIC)
        dense = given["weight"].double() * given["weight_scale"].double()
        wanted = values(outliers_of(given["x"])) @ dense.t() + bias.double()
        assert found.dtype == dtype and found.is_contiguous()
        assert sqnr(found, wanted) > THRESHOLD[dtype] - (15 if n == 1 else 0), (n, k)


@pytest.mark.parametrize("m", [1, 8, 300])
def test_nearer_to_the_truth(m: int) -> None:
    """dB of the product against that of inputs left alone."""
    given = operands(INT8_DYNAMIC, m, 128, 512, torch.float32)
    given["x"] = loud(m, 512, torch.float32)
    wanted = given["x"].double() @ (given["weight"].double() * given["weight_scale"].double()).t()
    found = {}
    for kernel in ("int8_mm", "int8_mm_outliers"):
        with use(kernel):
            found[kernel] = sqnr(scaled_linear(**given, scheme=INT8_DYNAMIC), wanted)
    assert found["int8_mm_outliers"] > found["int8_mm"] + 25


def test_an_even_input_is_not_split() -> None:
    x = torch.randn(64, 512)
    assert outliers_of(x).columns is None
    given = {**operands(INT8_DYNAMIC, 64, 48, 512, torch.float32), "x": x}
    with use("int8_mm"):
        wanted = scaled_linear(**given, scheme=INT8_DYNAMIC)
    with use("int8_mm_outliers"):
        assert torch.equal(scaled_linear(**given, scheme=INT8_DYNAMIC), wanted)
    assert outliers_of(torch.zeros(5, 64)).columns is None


def test_columns_of_a_weight() -> None:
    if native.why_not() is not None:
        pytest.skip(str(native.why_not()))
    for n, k, count in ((1, 5, 1), (600, 300, 40), (33, 64, 0)):
        codes = torch.randint(-128, 128, (k, n)).to(torch.int8).t()[:, : k - 1]  # not contiguous
        columns = torch.randperm(k - 1)[:count] if count else torch.empty(0, dtype=torch.int64)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            scale = torch.rand(n, 1).to(dtype)
            found = native.columns_of(codes, scale, columns)
            assert torch.equal(found, codes[:, columns].float() * scale.float())
    with pytest.raises(InputError, match="scales of the weight"):
        native.columns_of(codes, scale[1:], columns)
    with pytest.raises(InputError, match="columns that are kept"):
        native.quantize_tokens(torch.ones(3, 8), 1e-38, torch.ones(7))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_default_dtype_changes_nothing(default: torch.dtype) -> None:
    for size in SIZES:
        for dtype in THRESHOLD:
            x = loud(*size, dtype)
            wanted = outliers_of(x)
            torch.set_default_dtype(default)
            try:
                found = outliers_of(x)
            finally:
                torch.set_default_dtype(torch.float32)
            for a, b in zip(wanted, found, strict=True):
                assert a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("kernel", ["int8_mm", "int8_mm_outliers"])
@pytest.mark.parametrize("m", [3, 16, 17, 100])
def test_huge_inputs_with_small_scales_do_not_overflow(kernel: str, m: int) -> None:
    given = operands(INT8_DYNAMIC, m, 24, 512, torch.float32)
    given["weight_scale"] = torch.full_like(given["weight_scale"], 1e-4)
    given["x"] = loud(m, 512, torch.float32) * 1e33
    with use(kernel):
        found = scaled_linear(**given, scheme=INT8_DYNAMIC)
    assert found.isfinite().all()
    assert sqnr(found, given["x"].double() @ (given["weight"].double() * 1e-4).t()) > 20


def test_a_kernel_that_loses_outliers_fails_its_probe() -> None:
    kernel = next(k for k in KERNELS if k.name == "int8_mm_outliers")
    assert kernels.probe(kernel, INT8_DYNAMIC, torch.device("cpu"), torch.float32) is None

    def lose(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
        assert x.outliers is not None
        return kernel.multiply(x._replace(outliers=x.outliers * 0), w, dtype)

    reason = kernels.probe(replace(kernel, multiply=lose), INT8_DYNAMIC, torch.device("cpu"), torch.float32)
    assert reason is not None and "wrong numbers" in reason


def test_a_device_that_cannot_be_asked_takes_all() -> None:
    x = torch.randn(64, 512, device="meta")
    assert numerics.outlier_columns(x, 16).shape == (16,)


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("m", [1, 9, 200])
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_what_is_not_finite_stays_visible(m: int, dtype: torch.dtype) -> None:
    """In its own rows, set aside or not, seen in the sample of rows or not."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        for row in {0, m - 1, m // 2}:
            given = operands(INT8_DYNAMIC, m, 24, 128, dtype)
            given["x"] = loud(m, 128, dtype)
            given["x"][row, 77] = bad
            with use("int8_mm_outliers"):
                found = scaled_linear(**given, scheme=INT8_DYNAMIC)
            others = torch.arange(m) != row
            assert not found[row].isfinite().any() and found[others].isfinite().all()


@pytest.mark.parametrize("spoil", ["nan", "inf", "all nan", "huge", "loud and even", "zeros"])
def test_one_odd_row_does_not_spoil_the_others(spoil: str) -> None:
    given = operands(INT8_DYNAMIC, 64, 40, 512, torch.float32)
    x = given["x"] = loud(64, 512, torch.float32)
    wanted = x.double() @ (given["weight"].double() * given["weight_scale"].double()).t()
    others = torch.arange(64) != 10
    with use("int8_mm_outliers"):
        clean = sqnr(scaled_linear(**given, scheme=INT8_DYNAMIC)[others], wanted[others])
        bad = {"nan": torch.nan, "inf": torch.inf, "all nan": torch.nan, "huge": 3e38, "zeros": 0.0}.get(spoil, 1e4)
        x[10, slice(200, 201) if spoil in ("nan", "inf") else slice(None)] = bad
        assert abs(sqnr(scaled_linear(**given, scheme=INT8_DYNAMIC)[others], wanted[others]) - clean) < 1
