"""The logic of Triton's kernels, in its interpreter on a CPU; and that they compile for the GPUs they are made for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.kernels import SCHEMES, expected, operands, sqnr

from hf_fp8.formats import numerics
from hf_fp8.formats.code_types import FP8, INT8
from hf_fp8.formats.scheme import (
    FP8_BLOCK,
    FP8_STATIC,
    FP8_WEIGHT_ONLY,
    INT8_DYNAMIC,
    ROW,
    TENSOR,
    Granularity,
    Scheme,
    TensorScheme,
)
from hf_fp8.kernels import use
from hf_fp8.kernels.probing import exact_operands
from hf_fp8.kernels.triton import granularity as tiling
from hf_fp8.kernels.triton import support as triton_support
from hf_fp8.nn.functional import scaled_linear

pytestmark = [pytest.mark.hostless, pytest.mark.usefixtures("interpreter")]

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a machine with a GPU, tests/kernels/test_gpu.py runs the kernels themselves", allow_module_level=True)

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def bytes_of(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


INPUTS = {
    "token": TensorScheme(ROW, dynamic=True),
    "static": TensorScheme(TENSOR),
    "tensor": TensorScheme(TENSOR, dynamic=True),
    "group 128": TensorScheme(Granularity(1, 128), dynamic=True),
    "group 40": TensorScheme(Granularity(1, 40), dynamic=True),
    "token int8": TensorScheme(ROW, dynamic=True, dtype=INT8),
    "group 64 int8": TensorScheme(Granularity(1, 64), dynamic=True, dtype=INT8),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("k", [1, 40, 257, 384])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantization_is_the_references(name: str, k: int, dtype: torch.dtype) -> None:
    """Scales bit for bit on any input; codes where they are exactly representable, which int8's always are here."""
    from hf_fp8.kernels.triton.quantize import quantize

    scheme = INPUTS[name]
    m = 5
    generator = torch.Generator().manual_seed(k)
    static = torch.tensor([0.05]) if name == "static" else None
    x = torch.randn(m, k, generator=generator).mul(3).to(dtype)
    x[1] = 0
    q, scale = quantize(x, scheme, static)
    wanted_q, wanted_scale = numerics.quantize_input(x, scheme, static)
    assert q.shape == wanted_q.shape and q.dtype == scheme.dtype
    assert torch.equal(scale, wanted_scale.expand(m, -1))
    if scheme.dtype == INT8:
        assert torch.equal(q, wanted_q)
    # The interpreter rounds to E4M3 in its own way: there, values that need no rounding.
    powers = 2.0 ** torch.randint(-3, 4, (m, 1), generator=generator)
    exact = torch.randint(-8, 9, (m, k), generator=generator).float()
    exact[:, :: (k if scheme.granularity.cols == -1 else scheme.granularity.cols)] = 448.0 if scheme.dtype == FP8 else 127.0
    exact = (exact if scheme.granularity.is_tensor else exact * powers).to(dtype)
    static = torch.tensor([1.0]) if name == "static" else None
    q, _ = quantize(exact, scheme, static)
    assert torch.equal(bytes_of(q), bytes_of(numerics.quantize_input(exact, scheme, static)[0]))


@pytest.mark.parametrize("name", ["token", "group 128", "token int8", "static"])
def test_quantization_of_what_is_not_finite(name: str) -> None:
    from hf_fp8.kernels.triton.quantize import quantize

    scheme = INPUTS[name]
    x = torch.ones(4, 256)
    x[0, 3], x[1, 5], x[2, 7] = float("nan"), float("inf"), float("-inf")
    static = torch.tensor([1.0]) if name == "static" else None
    q, scale = quantize(x, scheme, static)
    wanted_q, wanted_scale = numerics.quantize_input(x, scheme, static)
    torch.testing.assert_close(scale, wanted_scale.expand(4, -1), rtol=0, atol=0, equal_nan=True)
    if scheme.dtype == INT8:
        assert torch.equal(q, wanted_q)
    else:  # NaN has a sign, which nobody reads
        assert torch.equal(q.float().isnan(), wanted_q.float().isnan())
        finite = ~q.float().isnan()
        assert torch.equal(q.float()[finite], wanted_q.float()[finite])


@pytest.mark.slow
def test_quantization_of_strided_and_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fp8.kernels.triton import quantize as triton_quantize

    wide = torch.randn(6, 900)
    token, group = INPUTS["token int8"], INPUTS["group 64 int8"]
    for x in (wide[::2, ::3], wide.t(), wide[:, 5:77]):
        assert not x.is_contiguous()
        for scheme in (token, group):
            q, scale = triton_quantize.quantize(x, scheme, None)
            wanted = numerics.quantize_input(x, scheme, None)
            assert torch.equal(q, wanted[0]) and torch.equal(scale, wanted[1])
    monkeypatch.setattr(triton_quantize, "ONE_PASS", 100)  # read twice
    q, scale = triton_quantize.quantize(wide, token, None)
    wanted = numerics.quantize_input(wide, token, None)
    assert torch.equal(q, wanted[0]) and torch.equal(scale, wanted[1])


def test_group_scales_are_in_the_order_that_block_matmuls_want() -> None:
    from hf_fp8.kernels.triton.quantize import quantize

    _, scale = quantize(torch.randn(7, 384), INPUTS["group 128"], None)
    assert scale.shape == (7, 3) and scale.stride() == (1, 7)
    _, scale = quantize(torch.randn(7, 384), INPUTS["static"], torch.tensor([0.5]))
    assert scale.tolist() == [[0.5]] * 7


TAKEN = [
    (kernel, name)
    for kernel, why in (("triton_scaled_mm", tiling.why_not_scaled_mm), ("triton_weight_only", tiling.why_not_weight_only))
    for name, scheme in SCHEMES.items()
    if why(scheme) is None
]


def test_which_schemes_are_taken() -> None:
    names = {kernel: {name for k, name in TAKEN if k == kernel} for kernel, _ in TAKEN}
    assert names["triton_scaled_mm"] == set(SCHEMES) - {"weight_only", "group 40 x group 64"}
    assert names["triton_weight_only"] == set(SCHEMES) - {"group 40 x group 64"}


@pytest.mark.thinned(8)
@pytest.mark.parametrize(("kernel", "name"), TAKEN)
@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 64, 100])
def test_matmuls_are_exact_on_exact_operands(kernel: str, name: str, m: int) -> None:
    scheme = SCHEMES[name]
    # One size with everything in whole tiles, one in which nothing is. In float32: the interpreter truncates to bfloat16.
    for n, k in ((64, 256), (33, 421)):
        x, weight, weight_scale, input_scale, _ = exact_operands(scheme, torch.float32, m, n, k)
        bias = torch.randint(-3, 4, (n,), generator=torch.Generator().manual_seed(n)).float()
        wanted = expected_with(scheme, x, weight, weight_scale, input_scale) + bias.double()
        with use(kernel):
            found = scaled_linear(x, weight, weight_scale, scheme, input_scale=input_scale, bias=bias)
        assert torch.equal(found.double(), wanted), (n, k)


def expected_with(
    scheme: Scheme, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor | None
) -> torch.Tensor:
    """In float64: on these operands quantizing the input changes nothing."""
    wide = numerics.expand_scale(weight_scale, scheme.weight.granularity, *weight.shape)
    return x.double() @ (weight.double() * wide.double()).t()


@pytest.mark.parametrize("name", ["dynamic", "block", "weight_only", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_only_is_as_good_as_its_dtype(name: str, dtype: torch.dtype) -> None:
    scheme = SCHEMES[name]
    given = operands(scheme, 9, 72, 300, dtype)
    with use("triton_weight_only"):
        found = scaled_linear(**given, scheme=scheme)
    assert sqnr(found, expected(scheme, given, quantized_input=False)) > {torch.float32: 110, torch.float16: 58}.get(dtype, 42)


def test_weight_only_with_a_split_and_strided_input() -> None:
    x, weight, weight_scale, _, _ = exact_operands(FP8_WEIGHT_ONLY, torch.float32, 4, 40, 4096)
    x = x.t().contiguous().t()
    with use("triton_weight_only"):
        found = scaled_linear(x, weight, weight_scale, FP8_WEIGHT_ONLY)
        again = scaled_linear(x, weight, weight_scale, FP8_WEIGHT_ONLY)
    assert torch.equal(found.double(), expected_with(FP8_WEIGHT_ONLY, x, weight, weight_scale, None))
    assert torch.equal(found, again)


def test_every_code_is_widened_right() -> None:
    """All 256, on the route of GPUs without the type as well as on the other."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8).reshape(16, 16)
    one = torch.ones(1, 1)
    for native in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hf_fp8.kernels.triton.weight_only.native_e4m3", lambda device, native=native: native)
            # One column at a time: NaN times zero would spread. The interpreter's own type has no NaN.
            for code in range(15 if native else 16):
                with use("triton_weight_only"):
                    found = scaled_linear(one, codes[:, code : code + 1], torch.ones(1), FP8_STATIC)
                torch.testing.assert_close(found[0], codes[:, code].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kernel", ["int8_mm", "int8_mm_outliers"])
@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_with_the_fused_epilogue(kernel: str, m: int, dtype: torch.dtype) -> None:
    for n, k in ((72, 256), (136, 421)):
        x, weight, weight_scale, _, wanted = exact_operands(INT8_DYNAMIC, dtype, m, n, k, loud=kernel == "int8_mm_outliers")
        bias = torch.arange(n).fmod(5).to(dtype)
        with use(kernel):
            assert torch.equal(scaled_linear(x, weight, weight_scale, INT8_DYNAMIC), wanted)
            found = scaled_linear(x.float(), weight, weight_scale, INT8_DYNAMIC, bias=bias)
        assert torch.equal(found.double(), expected_with(INT8_DYNAMIC, x, weight, weight_scale, None) + bias.double())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("one_pass", [16384, 100])
def test_int8_beside_outliers(one_pass: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as the steps of a CPU without Triton, whatever the number of columns set aside."""
    from hf_fp8.kernels.triton import quantize as triton_quantize

    monkeypatch.setattr(triton_quantize, "ONE_PASS", one_pass)
    for count in (0, 1, 9):
        given = operands(INT8_DYNAMIC, 70, 136, 600, torch.float32)
        given["x"][:, torch.arange(count) * 11] *= 50
        with use("int8_mm_outliers"):
            found = scaled_linear(**given, scheme=INT8_DYNAMIC)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(triton_support, "why_not", lambda device: "not now")
                plain = scaled_linear(**given, scheme=INT8_DYNAMIC)
        assert sqnr(found, plain.double()) > 130
    # As many as there may be, as on a device that is not asked.
    monkeypatch.setattr(numerics, "outlier_columns", lambda x, most: x.abs().sum(0).topk(most).indices)
    with use("int8_mm_outliers"):
        found = scaled_linear(**given, scheme=INT8_DYNAMIC)
    assert sqnr(found, plain.double()) > 40


def test_not_finite_input_stays_visible() -> None:
    given = operands(FP8_BLOCK, 6, 64, 256, torch.float32)
    given["x"][2, 3], given["x"][4, 200] = float("nan"), float("inf")
    for kernel in ("triton_scaled_mm", "triton_weight_only"):
        with use(kernel):
            found = scaled_linear(**given, scheme=FP8_BLOCK)
        assert not found[[2, 4]].isfinite().any(1).all() and found[[0, 1, 3, 5]].isfinite().all()
        assert not found[2].isfinite().any()


@pytest.mark.slow
def test_they_compile_for_real_gpus() -> None:
    """To machine code, by the compiler that Triton brings: A100 and H100."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, str(script), "quick"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all compiled" in done.stdout
