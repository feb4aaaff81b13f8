from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_fp8 import kernels, numerics
from hf_fp8.errors import KernelError
from hf_fp8.functional import scaled_linear
from hf_fp8.kernels import KERNELS, Problem, probe, select
from hf_fp8.scheme import (
    FP8,
    FP8_BLOCK,
    FP8_DYNAMIC,
    FP8_STATIC,
    FP8_WEIGHT_ONLY,
    ROW,
    TENSOR,
    Granularity,
    Scheme,
    TensorScheme,
)

CPU = torch.device("cpu")
SCHEMES = {
    "dynamic": FP8_DYNAMIC,
    "static": FP8_STATIC,
    "block": FP8_BLOCK,
    "weight_only": FP8_WEIGHT_ONLY,
    "channel x static": Scheme(TensorScheme(ROW), TensorScheme(TENSOR)),
    "channel x dynamic tensor": Scheme(TensorScheme(ROW), TensorScheme(TENSOR, dynamic=True)),
    "tensor x token": Scheme(TensorScheme(TENSOR), TensorScheme(ROW, dynamic=True)),
    "group 40 x group 64": Scheme(TensorScheme(Granularity(1, 40)), TensorScheme(Granularity(1, 64), dynamic=True)),
    "block 48x32 x token": Scheme(TensorScheme(Granularity(48, 32)), TensorScheme(ROW, dynamic=True)),
}
# dB below which an output is too far from the product of the dequantized operands, by dtype: 20 log10(2) per bit
# of mantissa, less a few for the sum.
THRESHOLD = {torch.float32: 110.0, torch.bfloat16: 42.0, torch.float16: 58.0}


def operands(scheme: Scheme, m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(m + n + k)
    w = torch.randn(n, k, generator=generator)
    w_scale = numerics.compute_scale(w, scheme.weight.granularity)
    x = torch.randn(m, k, generator=generator).clamp(-4, 4).to(dtype)
    return {
        "x": x,
        "weight": numerics.quantize(w, w_scale, scheme.weight.granularity),
        "weight_scale": w_scale,
        "input_scale": torch.tensor([4 / 448]) if scheme.has_static_input else None,
    }


def expected(scheme: Scheme, given: dict[str, torch.Tensor], quantized_input: bool = True) -> torch.Tensor:
    """The matmul of the dequantized operands, in float64."""
    x = given["x"].float()
    if scheme.input is not None and quantized_input:
        scale = numerics.input_scale_for(x, scheme.input.granularity, given["input_scale"])
        q = numerics.quantize(x, scale, scheme.input.granularity).double()
        x = q * numerics.expand_scale(scale, scheme.input.granularity, *q.shape).double()
    w = given["weight"].double() * numerics.expand_scale(
        given["weight_scale"], scheme.weight.granularity, *given["weight"].shape
    )
    return x.double() @ w.t()


def sqnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(20 * torch.log10(wanted.norm() / (found.double() - wanted).norm().clamp(min=1e-300)))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 16), (17, 72, 200), (5, 1, 3), (33, 130, 257)])
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_every_kernel_that_takes_a_scheme(name: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    scheme = SCHEMES[name]
    given = operands(scheme, m, n, k, dtype)
    ran = []
    for kernel in KERNELS:
        problem = Problem(CPU, scheme, n, k, dtype)
        if kernel.wrong_scheme(scheme) or kernel.wrong_device(problem):
            continue
        with kernels.use(kernel.name):
            found = scaled_linear(**given, scheme=scheme)
        assert found.dtype == dtype
        # A row of one output can cancel to nearly nothing: measure the matrix as a whole.
        floor = THRESHOLD[dtype] - (15 if n == 1 else 0)
        assert sqnr(found, expected(scheme, given)) > floor, kernel.name
        ran.append(kernel.name)
    assert "dequantize" in ran


@pytest.mark.parametrize("name", SCHEMES)
def test_weight_only_leaves_inputs_alone(name: str) -> None:
    scheme = SCHEMES[name]
    given = operands(scheme, 9, 48, 80, torch.float32)
    found = scaled_linear(**given, scheme=scheme, backend="weight_only")
    assert sqnr(found, expected(scheme, given, quantized_input=False)) > 110


@pytest.mark.parametrize("layout", ["rowwise", "tensorwise"])
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_probe_accepts_what_works(layout: str, dtype: torch.dtype) -> None:
    assert probe(layout, CPU, dtype) is None


def test_probe_says_what_the_device_lacks() -> None:
    reason = probe("blockwise", CPU, torch.bfloat16)
    assert reason is not None and "cannot run" in reason


@pytest.mark.parametrize("wrong", [lambda s: s.roll(1, 0), lambda s: s * 2, lambda s: s.flip(0)])
def test_probe_catches_a_kernel_that_misreads_scales(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    right = kernels.torch_mm.rowwise

    def misread(x, weight, weight_scale, input_scale, scheme):  # type: ignore[no-untyped-def]
        return right(x, weight, wrong(weight_scale), input_scale, scheme)

    monkeypatch.setattr(kernels.torch_mm, "rowwise", misread)
    reason = probe.__wrapped__("rowwise", CPU, torch.float32)
    assert reason is not None and "wrong numbers" in reason


def test_selection_and_reasons() -> None:
    def chosen(scheme: Scheme, backend: str = "scaled_mm") -> tuple[str, str]:
        choice = select(Problem(CPU, scheme, 64, 64, torch.bfloat16), backend)
        return choice.kernel.name, choice.reason

    assert chosen(FP8_DYNAMIC)[0] == "scaled_mm_rowwise"
    assert chosen(FP8_STATIC)[0] == "scaled_mm_tensorwise"
    assert chosen(FP8_DYNAMIC, "weight_only") == ("weight_only", "backend='weight_only'")
    assert chosen(FP8_WEIGHT_ONLY)[0] == "weight_only"
    name, reason = chosen(FP8_BLOCK)
    assert name == "dequantize" and "scaled_mm_blockwise" in reason


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


def test_codes_are_e4m3() -> None:
    assert FP8 is torch.float8_e4m3fn


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_kernels_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator on this machine")
    device = torch.accelerator.current_accelerator()
    scheme = SCHEMES[name]
    for m, n, k in ((1, 256, 512), (17, 128, 384), (64, 72, 200)):
        given = operands(scheme, m, n, k, dtype)
        moved = {key: None if t is None else t.to(device) for key, t in given.items()}
        for backend in ("scaled_mm", "weight_only"):
            found = scaled_linear(**moved, scheme=scheme, backend=backend).cpu()
            wanted = expected(scheme, given, quantized_input=backend == "scaled_mm")
            assert sqnr(found, wanted) > min(THRESHOLD[dtype], 60.0), (backend, m, n, k)
