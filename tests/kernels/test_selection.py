"""Which kernel is chosen on which GPU, and what is kept in FP8 there: the policy, on GPUs that are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.kernels import int_mm

from hf_fp8 import FP8Config
from hf_fp8.errors import KernelError
from hf_fp8.formats import native
from hf_fp8.formats.scheme import (
    FP8_BLOCK,
    FP8_DYNAMIC,
    FP8_STATIC,
    FP8_WEIGHT_ONLY,
    INT8_DYNAMIC,
    ROW,
    W4A8,
    W4A16,
    W4A16_ASYM,
    W4AFP8,
    W8A16,
    Granularity,
    Scheme,
    TensorScheme,
)
from hf_fp8.integrations.placement import compute_device, why_dense, why_dense_experts
from hf_fp8.kernels import (
    Problem,
    Selection,
    has_fp8_matmul,
    prepared,
    select,
    select_grouped,
    selection,
    thresholds,
    why_not_kept,
    why_not_kept_experts,
)
from hf_fp8.kernels.triton import support as triton_support

pytestmark = pytest.mark.hostless

BF16 = torch.bfloat16
GPU = torch.device("cuda", 0)
_CACHED = (
    selection._select, selection._select_grouped, has_fp8_matmul, why_not_kept, why_not_kept_experts,
    thresholds.weight_only_limit,
)  # fmt: skip
Fake = Callable[..., None]


def forget() -> None:
    for function in _CACHED:
        function.cache_clear()
    prepared._calls.clear()


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Call it with what the GPU is to be: its compute capability; failing, names of kernels that its probe refuses, each with
    the reason; triton, whether Triton is installed. Nothing can be run there."""

    def fake(capability: tuple[int, int], failing: dict[str, str] | None = None, triton: bool = True) -> None:
        def probe(kernel: Any, scheme: Any, device: torch.device, dtype: torch.dtype) -> str | None:
            assert device == GPU
            return (failing or {}).get(kernel.name)

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(selection, "probe", probe)
        monkeypatch.setattr(triton_support, "_installed", lambda: triton)
        forget()

    yield fake
    forget()


NO_UNITS = "compute capability 8.0 has no FP8 units"
GROUPS = Scheme(TensorScheme(Granularity(1, 40)), TensorScheme(ROW, dynamic=True))


def chosen(scheme: Scheme, backend: str = "auto", n: int = 256, k: int = 512) -> Selection:
    return select(Problem(GPU, scheme, n, k, BF16), backend)


@pytest.mark.parametrize(
    ("capability", "limit", "why"),
    [
        ((8, 9), 96, "from the roofline"), ((9, 0), 64, "from the roofline"), ((10, 0), 64, "from the roofline"),
        ((12, 0), 64, "from the roofline"), ((11, 0), 32, "unknown device"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [(FP8_DYNAMIC, "scaled_mm_rowwise"), (FP8_STATIC, "scaled_mm_tensorwise"), (FP8_BLOCK, "scaled_mm_blockwise")],
    ids=["dynamic", "static", "block"],
)
def test_gpus_with_fp8_units(
    capability: tuple[int, int], limit: int, why: str, scheme: Scheme, kernel: str, fake_gpu: Fake
) -> None:
    fake_gpu(capability)
    choice = chosen(scheme)
    assert (choice.at(1).name, choice.at(limit).name, choice.at(limit + 1).name) == (
        "triton_weight_only", "triton_weight_only", kernel,
    )  # fmt: skip
    assert choice.reason.startswith(f"FP8 matmul on cuda; weight-only up to M = {limit}") and why in choice.reason
    assert chosen(scheme, "scaled_mm").at(1).name == kernel
    assert chosen(scheme, "weight_only").at(9999).name == "triton_weight_only"
    assert has_fp8_matmul(GPU) is None
    assert why_not_kept(GPU, BF16) is None and why_not_kept_experts(GPU, BF16) is None


def test_gpus_without_fp8_units(fake_gpu: Fake) -> None:
    """Weights stay in FP8 as long as there is a kernel that widens them as it reads."""
    fake_gpu((8, 0))
    for scheme in (FP8_DYNAMIC, FP8_STATIC, FP8_BLOCK):
        choice = chosen(scheme)
        assert str(choice) == "triton_weight_only" and NO_UNITS in choice.reason and "int8" in choice.reason
    assert NO_UNITS in str(has_fp8_matmul(GPU))
    assert why_not_kept(GPU, BF16) is None and why_not_kept_experts(GPU, BF16) is None
    assert chosen(INT8_DYNAMIC).at(33).name == "int8_mm_outliers"  # int8 units need no FP8
    int8 = chosen(INT8_DYNAMIC, "int8")
    assert (int8.at(32).name, int8.at(33).name) == ("triton_weight_only", "int8_mm_outliers")
    assert chosen(INT8_DYNAMIC, "int8", n=250).at(33).name == "triton_scaled_mm"  # torch._int_mm wants multiples of 8


def test_without_fp8_units_and_without_triton(fake_gpu: Fake) -> None:
    fake_gpu((8, 0), {"scaled_mm_rowwise": "no such matmul", "scaled_mm_tensorwise": "no such matmul"}, triton=False)
    choice = chosen(FP8_DYNAMIC)
    assert str(choice) == "dequantize"
    assert "scaled_mm_rowwise: no such matmul" in choice.reason and "triton_scaled_mm: Triton is not installed" in choice.reason
    assert str(chosen(FP8_DYNAMIC, "weight_only")) == "weight_only"
    for because in (why_not_kept(GPU, BF16), why_not_kept_experts(GPU, BF16)):
        assert "Triton is not installed" in str(because)
    assert NO_UNITS in str(why_not_kept(GPU, BF16))


def test_what_torchs_kernels_do_not_take_goes_to_triton(fake_gpu: Fake) -> None:
    fake_gpu((9, 0))
    for n, k in ((250, 512), (256, 500)):
        choice = chosen(FP8_DYNAMIC, n=n, k=k)
        assert choice.at(1000).name == "triton_scaled_mm" and f"N={n} and K={k} must be multiples of 16" in choice.reason
    # Scales that fit no tile are no reason to fail, but one to say so.
    choice = chosen(GROUPS)
    assert str(choice) == "dequantize" and "no 8-bit kernel takes such scales" in choice.reason
    wide = Problem(GPU, FP8_DYNAMIC, 256, 512, torch.float64)
    assert str(select(wide)) == "dequantize" and why_not_kept(GPU, torch.float64) is None


@pytest.mark.parametrize(
    ("failing", "left"),
    [
        ({"scaled_mm_rowwise": "it gave wrong numbers"}, "triton_scaled_mm"),
        ({"scaled_mm_rowwise": "it gave wrong numbers", "triton_scaled_mm": "it gave wrong numbers"}, "dequantize"),
    ],
)
def test_kernels_that_fail_their_probe_are_passed_over(failing: dict[str, str], left: str, fake_gpu: Fake) -> None:
    fake_gpu((9, 0), failing)
    choice = chosen(FP8_DYNAMIC, "scaled_mm")
    assert choice.kernel.name == left and "scaled_mm_rowwise: it gave wrong numbers" in choice.reason
    # Static scales have another kernel, which is no worse for that.
    assert has_fp8_matmul(GPU) is None
    assert chosen(FP8_STATIC, "scaled_mm").kernel.name == "scaled_mm_tensorwise"


def test_a_gpu_whose_matmuls_all_fail_has_none(fake_gpu: Fake) -> None:
    fake_gpu((9, 0), {"scaled_mm_rowwise": "rows are wrong", "scaled_mm_tensorwise": "tensors are wrong"})
    assert has_fp8_matmul(GPU) == "rows are wrong"
    assert str(chosen(FP8_DYNAMIC)) == "triton_weight_only"


def test_w8a16_never_quantizes_inputs(fake_gpu: Fake) -> None:
    fake_gpu((9, 0))
    for backend in ("auto", "scaled_mm", "weight_only"):
        choice = chosen(FP8_WEIGHT_ONLY, backend)
        assert str(choice) == "triton_weight_only"
    fake_gpu((9, 0), {"triton_weight_only": "it gave wrong numbers"})
    assert str(chosen(FP8_WEIGHT_ONLY)) == "weight_only"


def test_packed_codes(fake_gpu: Fake) -> None:
    """Multiplied with floats; inputs are rounded to 8 bits only on request, as that is no faster."""
    for capability in ((8, 0), (9, 0)):
        fake_gpu(capability)
        for scheme in (W4A16, W4A16_ASYM, W8A16, W4A8, W4AFP8):
            problem = Problem(GPU, scheme, 256, 512, BF16)
            assert str(chosen(scheme)) == str(chosen(scheme, "weight_only")) == "triton_packed"
            assert str(select_grouped(problem)) == str(select_grouped(problem, "weight_only")) == "triton_grouped_packed"
            rounds = "_fake_quantized" if scheme.input is not None else ""
            assert str(chosen(scheme, "scaled_mm")) == f"triton_packed{rounds}"
            assert str(select_grouped(problem, "scaled_mm")) == f"triton_grouped_packed{rounds}"
    assert "rounding these gains nothing" in chosen(W4AFP8).reason
    assert chosen(W4A8, "scaled_mm").reason == "no 8-bit kernel takes packed codes"
    ordered = Scheme(TensorScheme(Granularity(1, 128), dtype=W4A16.weight.dtype, is_ordered=True))
    assert (
        str(chosen(ordered)) == "weight_only" and select(Problem(GPU, W4A16, 8, 8, torch.float64)).kernel.name == "weight_only"
    )
    fake_gpu((9, 0), {"triton_packed": "it gave wrong numbers"})
    assert str(chosen(W4A16)) == "weight_only" and str(chosen(FP8_WEIGHT_ONLY)) == "triton_weight_only"


def test_experts(fake_gpu: Fake) -> None:
    problem = Problem(GPU, FP8_DYNAMIC, 256, 512, BF16)
    fake_gpu((9, 0))
    choice = select_grouped(problem)
    assert str(choice) == "triton_grouped_weight_only (M <= 64), scaled_grouped_mm" and "64 rows per expert" in choice.reason
    assert str(select_grouped(problem, "scaled_mm")) == "scaled_grouped_mm"
    assert str(select_grouped(problem, "weight_only")) == "triton_grouped_weight_only"
    block = select_grouped(Problem(GPU, FP8_BLOCK, 256, 512, BF16), "scaled_mm")
    assert str(block) == "triton_grouped_scaled_mm"
    fake_gpu((8, 0))
    assert str(select_grouped(problem)) == "triton_grouped_weight_only" and NO_UNITS in select_grouped(problem).reason
    fake_gpu((9, 0), {"scaled_grouped_mm": "wrong", "triton_grouped_scaled_mm": "wrong"}, triton=False)
    assert str(select_grouped(problem)) == "grouped_dequantize"
    with pytest.raises(KernelError, match="experts run with"):
        select_grouped(problem, "int8")


def test_what_is_kept_on_a_cpu_with_the_library_of_cpu_kernels() -> None:
    if native.why_not() is not None:
        pytest.skip(str(native.why_not()))
    cpu = torch.device("cpu")
    for dtype in (BF16, torch.float16, torch.float32):
        assert why_dense(FP8Config(), cpu, dtype) is None
        assert why_dense_experts(FP8Config(), cpu, dtype, GROUPS) is None
    assert "no torch.float64 inputs" in str(why_dense(FP8Config(), cpu, torch.float64))
    assert "no kernel for torch.float64" in str(
        why_dense_experts(FP8Config(backend="scaled_mm"), cpu, torch.float64, FP8_DYNAMIC)
    )
    assert "for Linears" in str(why_dense_experts(FP8Config(backend="int8"), cpu, BF16, FP8_DYNAMIC))


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
@pytest.mark.parametrize(
    ("used", "is_slow", "sizes"),
    [
        ("amx", False, {(2048, 2048): 56, (576, 576): 752, (8192, 8192): 16}),
        ("avx512-vnni", False, {(2048, 2048): 8, (576, 576): 144, (8192, 8192): 8}),
        ("avx512", True, {(2048, 2048): 32, (1536, 576): 168, (576, 576): 2**62, (8192, 8192): 8}),
        ("avx2-f16c", True, {(2048, 2048): 32, (1536, 576): 168, (576, 576): 2**62, (8192, 8192): 8}),
        ("avx2", True, {(2048, 2048): 8, (576, 1536): 2**62, (8192, 8192): 8}),
    ],
)
def test_int8_inputs_of_small_layers(
    used: str, is_slow: bool, sizes: dict[tuple[int, int], int], real_int8_limit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cost more than they gain up to more rows than those of large layers, on some CPUs for any number."""
    monkeypatch.setattr(thresholds.Int8Cost, "limit", real_int8_limit)
    monkeypatch.setattr(native, "names", lambda: ([used], used))
    monkeypatch.setattr(native, "why_not", lambda: None)
    cpu = torch.device("cpu")
    try:
        with int_mm(is_slow):
            for (n, k), rows in sizes.items():
                problem = Problem(cpu, INT8_DYNAMIC, n, k, torch.float32)
                assert thresholds.weight_only_limit(problem).m == rows
                choice = select(problem, "int8")
                assert choice.at(rows).name == "native_weight_only"
                assert ("int8" in choice.at(rows + 1).name) == (rows < 2**62) and (rows < 2**62 or f"{n}x{k}" in choice.reason)
    finally:
        forget()


@pytest.mark.parametrize(("used", "dtype"), [("scalar", torch.float32), ("amx", torch.float64)])
def test_int8_inputs_where_the_library_does_not_multiply(
    used: str, dtype: torch.dtype, real_int8_limit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits of its kernels are not those of torch's."""
    monkeypatch.setattr(thresholds.Int8Cost, "limit", real_int8_limit)
    monkeypatch.setattr(native, "names", lambda: ([used], used))
    monkeypatch.setattr(native, "why_not", lambda: None)
    try:
        with int_mm(is_slow=False):
            limit = thresholds.weight_only_limit(Problem(torch.device("cpu"), INT8_DYNAMIC, 576, 576, dtype))
            assert limit == thresholds._INT8_TORCH
    finally:
        forget()


@pytest.mark.usefixtures("no_native")
def test_what_is_kept_in_fp8(fake_gpu: Fake) -> None:
    """Of a checkpoint, by options and device."""
    cpu = torch.device("cpu")
    auto, kept = FP8Config(), FP8Config(backend="scaled_mm")
    fake_gpu((9, 0))
    assert why_dense(auto, GPU, BF16) is None and why_dense_experts(auto, GPU, BF16, FP8_DYNAMIC) is None
    assert "CPUs have no FP8 units" in str(why_dense(auto, cpu, BF16))
    assert why_dense(kept, cpu, BF16) is None and why_dense(FP8Config("FP8_DYNAMIC"), cpu, BF16) is None
    assert "where no kernel gains" in str(why_dense_experts(kept, cpu, BF16, FP8_DYNAMIC))
    assert why_dense_experts(FP8Config(experts="fp8"), cpu, BF16, FP8_DYNAMIC) is None
    dense = FP8Config(dequantize=True)
    for device in (GPU, cpu):
        assert why_dense(dense, device, BF16) == why_dense_experts(dense, device, BF16, FP8_DYNAMIC) == "dequantize=True"
    assert why_dense_experts(FP8Config(experts="dequantize"), GPU, BF16, FP8_DYNAMIC) == "experts='dequantize'"
    assert "for Linears" in str(why_dense_experts(FP8Config(backend="int8"), GPU, BF16, FP8_DYNAMIC))
    # A scale granularity that no tile of the grouped kernel takes.
    assert "where no kernel gains" in str(why_dense_experts(auto, GPU, BF16, GROUPS))
    fake_gpu((8, 0), triton=False)
    assert NO_UNITS in str(why_dense(auto, GPU, BF16)) and "Triton" in str(why_dense_experts(auto, GPU, BF16, FP8_DYNAMIC))


def test_where_a_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute_device("cuda:1") == torch.device("cuda", 1)
    assert compute_device({"model.embed": "cpu", "model.layers": "cuda:0"}) == GPU
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    for device_map in ("auto", "balanced", "sequential", None):
        assert compute_device(device_map) == torch.device("cuda")
    assert compute_device({"": 0}) == GPU and compute_device({"a": "disk", "b": 1}) == torch.device("cuda", 1)
    assert compute_device("cpu") == compute_device({"": "cpu"}) == torch.device("cpu")
