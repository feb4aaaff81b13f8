from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from support.kernels import BY_NAME, CPU, IN_BFLOAT16, SCHEMES, THRESHOLD, expected, int_mm, operands, runs, sqnr

from hf_fp8 import kernels
from hf_fp8.errors import KernelError
from hf_fp8.formats import native
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.scheme import FP8_BLOCK, FP8_DYNAMIC, FP8_STATIC, FP8_WEIGHT_ONLY, INT8_DYNAMIC, Scheme
from hf_fp8.kernels import Input, Kernel, Problem, Weight, probe, select
from hf_fp8.kernels.probing import exact_operands
from hf_fp8.nn.functional import scaled_linear

pytestmark = pytest.mark.hostless
NATIVE = native.why_not() is None


def on_cpu(name: str, k: int) -> set[str]:
    """The kernels that a CPU has for a scheme of `SCHEMES`, and K columns."""
    scaled = {"dynamic", "static", "channel x static", "channel x dynamic tensor", "tensor x token"}
    found = {"dequantize", "weight_only"} | ({"native_weight_only"} if NATIVE else set())
    found |= {"scaled_mm_rowwise"} if name in scaled else set()
    found |= {"scaled_mm_tensorwise"} if name == "static" else set()
    if name == "int8":
        found |= {"int8_mm"} | ({"int8_mm_outliers"} if k >= 24 else set()) | ({"int8_weight_only"} if k % 64 == 0 else set())
        if NATIVE:
            found |= {"native_int8"} | ({"native_int8_outliers"} if k >= 24 else set())
    return found


def as_read(kernel: Kernel, scheme: Scheme, x: torch.Tensor) -> torch.Tensor:
    """x as a kernel reads it that splits off outliers, (M, K) in float64: which columns these are is its own choice."""
    assert kernel.quantize is not None
    found = kernel.quantize(x, None, scheme)
    assert found.scale is not None and found.columns is not None and found.outliers is not None
    read = found.x.double() * found.scale.double()
    read[:, found.columns] = found.outliers.double()
    assert sqnr(read, x.double()) > 30
    return read


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 64, 100])
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_every_kernel_that_takes_a_scheme(name: str, m: int, dtype: torch.dtype) -> None:
    scheme = SCHEMES[name]
    for n, k in ((16, 64), (72, 200), (1, 3), (33, 257), (4, 1)):
        bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
        for called in runs(scheme, n, k, dtype):
            kernel, given = BY_NAME[called], operands(scheme, m, n, k, dtype)
            if kernel.splits_outliers:
                given["x"][:, k // 2] = 40.0
            with kernels.use(kernel.name):
                found = scaled_linear(**given, bias=bias, scheme=scheme)
            assert found.dtype == dtype and found.shape == (m, n)
            if kernel.splits_outliers:
                given["x"] = as_read(kernel, scheme, given["x"])
            wanted = expected(scheme, given, kernel.quantize is not None and not kernel.splits_outliers) + bias.double()
            # A row of one output can cancel to nearly nothing: measure the matrix as a whole.
            floor = THRESHOLD[torch.bfloat16 if kernel.name == IN_BFLOAT16 else dtype] - (15 if n == 1 else 0)
            assert sqnr(found, wanted) > floor, (kernel.name, n, k)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_kernels_that_take_a_scheme_on_a_cpu(name: str, dtype: torch.dtype) -> None:
    """All that are made for it, and for no rows of input as well."""
    scheme = SCHEMES[name]
    for n, k in ((16, 64), (72, 200), (1, 3), (33, 257)):
        found = runs(scheme, n, k, dtype)
        assert set(found) == on_cpu(name, k), (n, k)
        for kernel in found:
            with kernels.use(kernel):
                nothing = scaled_linear(**operands(scheme, 0, n, k, dtype), scheme=scheme)
            assert nothing.dtype == dtype and nothing.shape == (0, n)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 64, 100])
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_exact_on_exact_operands(name: str, m: int, dtype: torch.dtype) -> None:
    """Operands in {-1, 0, 1} with power-of-two scales: bit for bit, whatever the order of the sum."""
    scheme = SCHEMES[name]
    for n, k in ((64, 128), (33, 257)):
        for kernel in runs(scheme, n, k, dtype):
            given = exact_operands(scheme, dtype, m, n, k, loud=BY_NAME[kernel].splits_outliers)
            x, weight, weight_scale, input_scale, wanted = given
            with kernels.use(kernel):
                found = scaled_linear(x, weight, weight_scale, scheme, input_scale=input_scale)
            assert torch.equal(found, wanted), (kernel, n, k)


@pytest.mark.parametrize("name", SCHEMES)
def test_weight_only_leaves_inputs_alone(name: str) -> None:
    scheme = SCHEMES[name]
    given = operands(scheme, 9, 48, 80, torch.float32)
    found = scaled_linear(**given, scheme=scheme, backend="weight_only")
    assert sqnr(found, expected(scheme, given, quantized_input=False)) > 110


PROBED = [("scaled_mm_rowwise", FP8_DYNAMIC), ("scaled_mm_tensorwise", FP8_STATIC), ("int8_mm_outliers", INT8_DYNAMIC)]


@pytest.mark.parametrize(("name", "scheme"), PROBED, ids=[name for name, _ in PROBED])
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_probe_accepts_what_works(name: str, scheme: Scheme, dtype: torch.dtype) -> None:
    assert probe(BY_NAME[name], scheme, CPU, dtype) is None


def test_probe_says_what_the_device_lacks() -> None:
    reason = probe(BY_NAME["scaled_mm_blockwise"], FP8_BLOCK, CPU, torch.bfloat16)
    assert reason is not None and "cannot run" in reason


@pytest.mark.parametrize("wrong", [lambda s: s.roll(1, 0), lambda s: s * 2, lambda s: s.flip(0)])
@pytest.mark.parametrize(("name", "scheme"), [PROBED[0], PROBED[2]], ids=["rowwise", "int8"])
def test_probe_catches_a_kernel_that_misreads_scales(
    name: str, scheme: Scheme, wrong: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    right = BY_NAME[name].multiply

    def misread(x: Input, w: Weight, dtype: torch.dtype) -> torch.Tensor:
        return right(x, w._replace(scale=wrong(w.scale)), dtype)

    reason = probe(replace(BY_NAME[name], multiply=misread), scheme, CPU, torch.float32)
    assert reason is not None and "wrong numbers" in reason


def test_selection_and_reasons() -> None:
    def chosen(scheme: Scheme, backend: str = "scaled_mm") -> tuple[str, str]:
        choice = select(Problem(CPU, scheme, 64, 64, torch.bfloat16), backend)
        return choice.kernel.name, choice.reason

    assert chosen(FP8_DYNAMIC)[0] == "scaled_mm_rowwise"
    assert chosen(FP8_STATIC)[0] == "scaled_mm_tensorwise"
    for name in ("native_weight_only", "weight_only") if NATIVE else ("weight_only",):
        with nullcontext() if name.startswith("native") else native.use(None):
            assert chosen(FP8_DYNAMIC, "weight_only") == (name, "backend='weight_only'")
            assert chosen(FP8_WEIGHT_ONLY)[0] == name
            auto = chosen(FP8_DYNAMIC, "auto")
            assert auto[0] == (name if name.startswith("native") else "scaled_mm_rowwise")
            assert "CPUs have no FP8 units" in auto[1] or name == "weight_only"
    name, reason = chosen(FP8_BLOCK)
    assert name == "dequantize" and "scaled_mm_blockwise" in reason and "triton_scaled_mm" in reason
    for is_slow, prefix in ((True, "native_int8"), (False, "int8_mm")) if NATIVE else ((False, "int8_mm"),):
        with int_mm(is_slow):
            assert chosen(INT8_DYNAMIC)[0] == f"{prefix}_outliers"
            narrow = select(Problem(CPU, INT8_DYNAMIC, 64, 23, torch.float32), "int8")
            assert narrow.kernel.name == prefix and "K=23 is less than 24 columns" in narrow.reason
    with int_mm(is_slow=True), native.use(None):
        name, reason = chosen(INT8_DYNAMIC)
        assert name == "dequantize" and "slower than a float32 matmul on this CPU" in reason


def test_int8_takes_another_kernel_for_few_rows() -> None:
    with int_mm(is_slow=False), native.use(None):
        few_rows_where_torch_is_fast()
    if NATIVE:
        with int_mm(is_slow=False):
            choice = select(Problem(CPU, INT8_DYNAMIC, 576, 576, torch.float32), "int8")
            assert str(choice) == f"native_weight_only (M <= {choice.limit}), int8_mm_outliers" and "measured" in choice.reason
        with int_mm(is_slow=True):
            for n, k in ((576, 576), (576, 24), (576, 5), (4096, 4096)):
                choice = select(Problem(CPU, INT8_DYNAMIC, n, k, torch.float32), "int8")
                assert choice.small is not None and choice.small.name == "native_weight_only" and choice.limit == 8


def few_rows_where_torch_is_fast() -> None:
    choice = select(Problem(CPU, INT8_DYNAMIC, 576, 576, torch.float32), "int8")
    assert choice.small is not None and choice.small.name == "int8_weight_only"
    assert [choice.at(m).name for m in (1, choice.limit, choice.limit + 1)] == ["int8_weight_only"] * 2 + ["int8_mm_outliers"]
    assert str(choice) == f"int8_weight_only (M <= {choice.limit}), int8_mm_outliers" and "measured" in choice.reason
    # Where it reads beyond the end of a row, and where it is slower.
    for n, k in ((576, 24), (576, 5), (4096, 4096)):
        assert select(Problem(CPU, INT8_DYNAMIC, n, k, torch.float32), "int8").small is None
    # What was asked for by name is what runs, for any M.
    assert select(Problem(CPU, INT8_DYNAMIC, 576, 576, torch.float32), "scaled_mm").small is None


@pytest.mark.parametrize("is_slow", [False, True] if NATIVE else [False])
def test_int8_sums_never_overflow(is_slow: bool) -> None:
    k = kernels.LARGEST_K
    with int_mm(is_slow):
        for columns, name in ((k, "native_int8_outliers" if is_slow else "int8_mm_outliers"), (k + 1, "dequantize")):
            choice = select(Problem(CPU, INT8_DYNAMIC, 2, columns, torch.float32), "int8")
            assert choice.kernel.name == name and ("overflow" in choice.reason) == (columns > k)
            codes = torch.full((2, columns), 127, dtype=torch.int8)
            found = scaled_linear(torch.ones(20, columns), codes, torch.full((2, 1), 1 / 127), INT8_DYNAMIC, backend="int8")
            assert torch.allclose(found, torch.full((20, 2), float(columns)), rtol=1e-5)


def test_int8_is_for_layers_that_are_int8() -> None:
    with pytest.raises(KernelError, match="re-quantized to int8"):
        select(Problem(CPU, FP8_DYNAMIC, 64, 64, torch.bfloat16), "int8")
    with pytest.raises(KernelError, match="int8 weights"), kernels.use("int8_mm"):
        scaled_linear(**operands(FP8_DYNAMIC, 3, 64, 64, torch.float32), scheme=FP8_DYNAMIC)


def test_triton_is_not_for_cpus() -> None:
    given = operands(FP8_DYNAMIC, 3, 64, 64, torch.float32)
    for name in ("triton_scaled_mm", "triton_weight_only"):
        with pytest.raises(KernelError, match="does not compile for cpu"), kernels.use(name):
            scaled_linear(**given, scheme=FP8_DYNAMIC)


def test_forced_kernels_are_honoured_or_refused() -> None:
    given = operands(FP8_BLOCK, 3, 32, 32, torch.float32)
    with pytest.raises(KernelError, match="per group or block"), kernels.use("scaled_mm_rowwise"):
        scaled_linear(**given, scheme=FP8_BLOCK)
    with pytest.raises(KernelError, match="unknown kernel"), kernels.use("fastest"):
        pass
    with pytest.raises(KernelError, match="unknown backend"):
        scaled_linear(**given, scheme=FP8_BLOCK, backend="cutlass")


def test_cpu_has_no_fp8_units() -> None:
    assert "CPU" in str(kernels.has_fp8_matmul(CPU))


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_reach_from_one_end_to_the_other(name: str) -> None:
    """Codes of an input are of the scheme's dtype, the largest magnitude is the largest code; static scales saturate there."""
    scheme = SCHEMES[name]
    given = operands(scheme, 5, 48, 128, torch.float32)
    found = [BY_NAME[kernel] for kernel in runs(scheme, 48, 128, torch.float32)]
    quantize = [k.quantize for k in found if k.quantize is not None and k.name != "dequantize" and not k.splits_outliers]
    assert len(quantize) == len(on_cpu(name, 128) & {"scaled_mm_rowwise", "scaled_mm_tensorwise", "int8_mm", "native_int8"})
    for function in quantize:
        codes = function(4 * given["x"], given["input_scale"], scheme).x
        assert scheme.input is not None and codes.dtype == scheme.input.dtype
        assert codes.float().abs().amax() == {FP8: 448, torch.int8: 127}[codes.dtype]
