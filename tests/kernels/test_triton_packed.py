"""Triton's kernels for packed codes, in its interpreter on a CPU, against float64; `test_triton` compiles them."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from hf_fp8.formats import packing, storage
from hf_fp8.formats.code_types import INT4, INT8
from hf_fp8.formats.scheme import FP8_WEIGHT_ONLY, ROW, W4A8, W4A16, W4AFP8, W8A16, Granularity, Scheme, TensorScheme
from hf_fp8.kernels import ExpertWeights, Routing, Weight, use
from hf_fp8.kernels.probing import exact_experts, probe, with_zero_points
from hf_fp8.kernels.torch_fp8 import fake_quantize
from hf_fp8.kernels.torch_grouped import floats_of, quantize, sort
from hf_fp8.kernels.triton import entries
from hf_fp8.kernels.triton import granularity as tiling
from hf_fp8.nn.functional import scaled_linear
from hf_fp8.nn.grouped import scaled_grouped_linear

pytestmark = [pytest.mark.hostless, pytest.mark.usefixtures("interpreter")]

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a machine with a GPU, tests/kernels/test_gpu.py runs the kernels themselves", allow_module_level=True)

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def scheme_of(bits: int, cols: int, zeros: bool = False, inputs: TensorScheme | None = None) -> Scheme:
    granularity, dtype = Granularity(1, cols), INT4 if bits == 4 else INT8
    return Scheme(TensorScheme(granularity, dtype=dtype, packed=True, has_zero_points=zeros), inputs)


def random_weight(scheme: Scheme, n: int, k: int, seed: int = 0) -> Weight:
    """All codes and zero points are as likely; scales around 0.01, some negative."""
    generator = torch.Generator().manual_seed(seed + n + k)
    weight, (rows, groups) = scheme.weight, scheme.weight.granularity.grid(n, k)
    bits, least, end = weight.code.bits, int(weight.code.least), int(weight.code.largest) + 1
    codes = torch.randint(least, end, (n, k), generator=generator).to(torch.int8)
    points = torch.randint(least, end, (rows, groups), generator=generator).to(torch.int8)
    scale = torch.randn(rows, groups, generator=generator) * 0.01
    zero_point = packing.pack_rows(points, bits) if weight.has_zero_points else None
    return Weight(packing.pack(codes, bits), scale, None, scheme, zero_point)


def dense(w: Weight, k: int) -> torch.Tensor:
    """(N, K) in float64, without rounding."""
    return storage.dequantize(w._replace(scale=w.scale.double()).tensors(), w.scheme.weight, k, torch.float64)


def linear(x: torch.Tensor, w: Weight, kernel: str = "triton_packed") -> torch.Tensor:
    with use(kernel):
        return scaled_linear(x, w.codes, w.scale, w.scheme, bias=w.bias, zero_point=w.zero_point)


def check(found: torch.Tensor, x: torch.Tensor, wide: torch.Tensor, bias: torch.Tensor | float = 0.0) -> None:
    """Within what sums in float32, and one rounding to the dtype of x (the interpreter truncates), may lose."""
    wanted = x.double() @ wide.t() + bias
    allowed = 2e-6 * (x.double().abs() @ wide.abs().t() + abs(bias))
    if found.dtype != torch.float32:
        allowed += torch.finfo(found.dtype).eps * wanted.abs()
    assert found.dtype == x.dtype and found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= allowed).all(), float((found.double() - wanted).abs().max())


def inputs(m: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(dtype)


def test_which_schemes_are_taken() -> None:
    for cols in (16, 32, 64, 128, -1, 48, 256):
        for bits in (4, 8):
            assert tiling.why_not_packed(scheme_of(bits, cols)) is None
            assert "one byte" in str(tiling.why_not_weight_only(scheme_of(bits, cols)))
    for scheme in (W4A8, W4AFP8):
        assert tiling.why_not_fake_quantized(scheme) is tiling.why_not_packed(scheme) is None
        assert tiling.why_not_scaled_mm(scheme) is not None
    assert "8 columns" in str(tiling.why_not_packed(scheme_of(4, 8)))
    assert "40 columns" in str(tiling.why_not_packed(scheme_of(8, 40)))
    ordered = Scheme(TensorScheme(Granularity(1, 32), dtype=INT4, is_ordered=True))
    assert "next to each other" in str(tiling.why_not_packed(ordered))
    assert "packed codes" in str(tiling.why_not_packed(FP8_WEIGHT_ONLY))
    assert "does not quantize inputs" in str(tiling.why_not_fake_quantized(W4A16))


@pytest.mark.thinned(5)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("cols", [16, 32, 64, 128, -1, 48, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linears(bits: int, zeros: bool, cols: int, dtype: torch.dtype) -> None:
    scheme = scheme_of(bits, cols, zeros)
    # Whole groups, and a last group and a last word that are not full.
    for n, k in ((33, 3 * cols), (70, cols + cols // 2 + 3)) if cols > 0 else ((33, 301), (1, 7)):
        w = random_weight(scheme, n, k)
        wide = dense(w, k)
        for m in (1, 3, 17):
            x = inputs(m, k, dtype)
            check(linear(x, w), x, wide)


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_and_many_columns(bits: int) -> None:
    """Larger tiles, several of them; and K is split."""
    for m, n, k, cols in ((40, 70, 192, 64), (130, 140, 128, 128), (2, 20, 4096, 128), (2, 20, 4096, -1)):
        w, x, bias = random_weight(scheme_of(bits, cols, True), n, k), inputs(m, k), torch.arange(n).float()
        found = linear(x, w._replace(bias=bias))
        check(found, x, dense(w, k), bias)
        if m == 2:
            assert torch.equal(found, linear(x, w._replace(bias=bias)))


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_with_every_zero_point(bits: int) -> None:
    count = 2**bits
    codes = torch.arange(count).sub(count // 2).to(torch.int8)
    points = codes if bits == 4 else codes[::17]
    n = len(points)
    w = Weight(
        packing.pack(codes.repeat(n, 1), bits), torch.ones(n, 1), None, scheme_of(bits, -1, True),
        packing.pack_rows(points[:, None], bits),
    )  # fmt: skip
    wanted = codes.float()[:, None] - points.float()
    for dtype in DTYPES:
        assert torch.equal(linear(torch.eye(count, dtype=dtype), w).float(), wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("exponent", [-125, -110, 0, 100, 110, 118])
def test_scales_of_any_magnitude(bits: int, exponent: int) -> None:
    """Powers of two: exact, though sums of codes that are not scaled, or scales first, would leave float32."""
    scheme = scheme_of(bits, 32, True)
    w = random_weight(scheme, 9, 64)
    w = w._replace(scale=torch.full_like(w.scale, 2.0**exponent))
    x = torch.randint(-4, 5, (3, 64)).float() * (2.0**-8 if exponent > 0 else 2.0**8)
    assert torch.equal(linear(x, w).double(), x.double() @ dense(w, 64).t())
    if exponent == -125:
        x = x / x.abs().amax() * 2.0**126
        assert torch.equal(linear(x, w).double(), x.double() @ dense(w, 64).t())


def test_operands_with_any_strides() -> None:
    scheme = scheme_of(4, 16, True)
    w, x = random_weight(scheme, 24, 80), inputs(5, 80).t().contiguous().t()
    assert w.zero_point is not None
    scale = w.scale.to(torch.bfloat16)
    every_other = torch.stack((w.codes, w.codes), 1).flatten(0, 1)[::2]
    strided = w._replace(codes=every_other, scale=scale.t().contiguous().t(), zero_point=w.zero_point.t().contiguous().t())
    assert not strided.codes.is_contiguous()
    wide = dense(w._replace(scale=scale), 80)
    check(linear(x, strided), x, wide)


@pytest.mark.parametrize("cols", [32, -1])
def test_not_finite_input_stays_in_its_row(cols: int) -> None:
    w, x = random_weight(scheme_of(4, cols, True), 20, 96), inputs(6, 96)
    x[2, 3], x[4, 80] = float("nan"), float("inf")
    found = linear(x, w)
    assert not found[2].isfinite().any() and not found[4].isfinite().all()
    rest = [0, 1, 3, 5]
    check(found[rest], x[rest], dense(w, 96))
    broken = w._replace(scale=w.scale.clone())
    broken.scale[7, 0] = float("nan")
    seen = linear(x[rest], broken)
    assert seen[:, 7].isnan().all() and seen[:, :7].isfinite().all() and seen[:, 8:].isfinite().all()


@pytest.mark.parametrize("scheme", entries.PACKED_FAKE_QUANTIZED.probes, ids=str)
def test_probes_of_linears(scheme: Scheme) -> None:
    for kernel in (entries.PACKED, entries.PACKED_FAKE_QUANTIZED):
        if scheme in kernel.probes:
            assert probe(kernel, scheme, CPU, torch.float32) is None


@pytest.mark.thinned(3)
@pytest.mark.parametrize("scheme", [*entries.GROUPED_PACKED.probes, W4AFP8, W4A8], ids=str)
def test_exact_experts(scheme: Scheme) -> None:
    """What the probes of stacks do, with fewer rows: the interpreter takes minutes for theirs."""
    for n, k in ((40, 128), (21, 256)):
        x, weights, scales, routing, wanted = exact_experts(scheme, torch.float32, n, k)
        codes, zero_point = with_zero_points(weights, scheme.weight, k)
        kernel = "triton_grouped_packed" if scheme.input is None else "triton_grouped_packed_fake_quantized"
        for given in (routing, routing._replace(offsets=None)):
            with use(kernel):
                found = scaled_grouped_linear(x, codes, scales, scheme, given, zero_point=zero_point)
            assert torch.equal(found, wanted)


def random_experts(scheme: Scheme, count: int, n: int, k: int, parts: int) -> tuple[ExpertWeights, torch.Tensor]:
    """A stack of experts, of `parts` matrices (n, k) each, and their weights (E, parts * n, K) in float64."""
    each = [[random_weight(scheme, n, k, seed=100 * e + p) for p in range(parts)] for e in range(count)]
    stack = [
        None if tensors[0][0] is None else torch.stack([torch.cat(of_parts) for of_parts in tensors])
        for tensors in (
            [[getattr(w, name) for w in expert] for expert in each] for name in ("codes", "scale", "zero_point")
        )
    ]  # fmt: skip
    wide = torch.stack([torch.cat([dense(w, k) for w in expert]) for expert in each])
    return ExpertWeights(stack[0], stack[1], scheme, parts, stack[2]), wide


@pytest.mark.thinned(9)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("cols", [16, 32, 128, -1])
def test_experts(parts: int, bits: int, zeros: bool, cols: int) -> None:
    """Of 4 experts one has no rows; some rows have no expert. 21 rows fill no word of zero points."""
    n, k = 21, cols + cols // 2 if cols > 0 else 75
    w, wide = random_experts(scheme_of(bits, cols, zeros), 4, n, k, parts)
    few = [3, 0, 3, 4, 1, 3, 0, 3]
    for dtype, ids in ((torch.float32, few), (torch.float32, few + [3] * 20), (torch.float16, few), (torch.bfloat16, few)):
        x = inputs(len(ids) // 2, k, dtype)
        unsorted = Routing(torch.tensor(ids), share=2)
        for routing in (unsorted, sort(unsorted, 4)) if ids is few else (sort(unsorted, 4),):
            with use("triton_grouped_packed"):
                found = scaled_grouped_linear(x, w.codes, w.scale, w.scheme, routing, parts=parts, zero_point=w.zero_point)
            for i, e in enumerate(ids):
                check(found[i : i + 1], x[i // 2 : i // 2 + 1], wide[e] if e < 4 else torch.zeros_like(wide[0]))


def test_not_finite_rows_of_experts_stay_there() -> None:
    w, wide = random_experts(scheme_of(4, 32, True), 3, 16, 64, 1)
    x, ids = inputs(6, 64), torch.tensor([0, 1, 1, 2, 3, 1])
    x[2, 5], x[4] = float("nan"), float("inf")
    with use("triton_grouped_packed"):
        found = scaled_grouped_linear(x, w.codes, w.scale, w.scheme, ids, zero_point=w.zero_point)
    assert found[2].isnan().all() and not found[4].any()  # the last has no expert
    for i in (0, 1, 3, 5):
        check(found[i : i + 1], x[i : i + 1], wide[ids[i]])


@pytest.mark.parametrize(
    "scheme", [W4A8, W4AFP8, scheme_of(8, 32, True, TensorScheme(Granularity(1, 32), dynamic=True))], ids=str
)
def test_inputs_that_are_fake_quantized(scheme: Scheme) -> None:
    n, k = 30, 256
    w, x = random_weight(scheme, n, k), inputs(5, k)
    rounded = fake_quantize(x, None, scheme).x
    assert not torch.equal(rounded, x)
    check(linear(x, w, "triton_packed_fake_quantized"), rounded, dense(w, k))
    experts, wide = random_experts(scheme, 2, n, k, 1)
    ids = torch.tensor([1, 0, 1, 1, 0])
    with use("triton_grouped_packed_fake_quantized"):
        found = scaled_grouped_linear(x, experts.codes, experts.scale, scheme, ids, zero_point=experts.zero_point)
    assert scheme.input is not None and experts.scheme == scheme
    given = quantize(x, Routing(ids), scheme.input, None, 2)[0]  # the interpreter rounds to E4M3 in its own way
    rounded = floats_of(given, experts.scheme, torch.float32)
    for i, e in enumerate(ids.tolist()):
        check(found[i : i + 1], rounded[i : i + 1], wide[e])


def test_of_one_row_and_one_word() -> None:
    for scheme, k in ((W4A16, 5), (W8A16, 3), (Scheme(TensorScheme(ROW, dtype=INT4)), 1)):
        w, x = random_weight(scheme, 1, k), inputs(1, k)
        check(linear(x, w), x, dense(w, k))
