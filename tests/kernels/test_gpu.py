"""Every kernel on a real GPU: exact on exact operands, near enough on random ones, in CUDA graphs, and as selected."""

from __future__ import annotations

import pytest
import torch
from support.extremes import ROWS as SIZES
from support.extremes import WEIGHTS, check, inputs, weights
from support.kernels import BY_NAME, SCHEMES, THRESHOLD, expected, operands, runs, sqnr

from hf_fp8 import QuantizedLinear, kernels, quantize_model, requantize_model
from hf_fp8.formats import numerics
from hf_fp8.formats.scheme import FP8_DYNAMIC, INT8_DYNAMIC, ROW, TENSOR, Granularity, Scheme, TensorScheme
from hf_fp8.formats.weights import quantize_weight
from hf_fp8.kernels import WEIGHT_ONLY, Problem, select
from hf_fp8.kernels.probing import exact_operands, with_zero_points
from hf_fp8.kernels.triton import entries
from hf_fp8.kernels.triton import support as triton_support
from hf_fp8.nn.functional import scaled_linear

if not torch.accelerator.is_available():
    pytest.skip("no GPU on this machine", allow_module_level=True)

pytestmark = pytest.mark.gpu
DEVICE = torch.accelerator.current_accelerator()
ROWS = [1, 2, 15, 16, 17, 64, 100, 300]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("m", ROWS)
def test_exact(name: str, m: int) -> None:
    scheme = SCHEMES[name]
    for n, k, dtype in ((256, 512, torch.bfloat16), (72, 384, torch.float16), (33, 421, torch.bfloat16)):
        x, weight, weight_scale, input_scale, wanted = exact_operands(scheme, dtype, m, n, k)
        moved = [None if t is None else t.to(DEVICE) for t in (x, weight, weight_scale, input_scale)]
        for kernel in runs(scheme, n, k, dtype, DEVICE):
            with kernels.use(kernel):
                found = scaled_linear(*moved[:3], scheme, input_scale=moved[3]).cpu()
            assert torch.equal(found, wanted), (kernel, n, k, dtype)


@pytest.mark.parametrize("scheme", entries.PACKED_FAKE_QUANTIZED.probes, ids=str)
@pytest.mark.parametrize("m", ROWS)
def test_packed_codes_are_exact(scheme: Scheme, m: int) -> None:
    for n, k, dtype in (
        (256, 512, torch.bfloat16),
        (72, 384, torch.float16),
        (33, 421, torch.bfloat16),
        (33, 421, torch.float32),
    ):
        x, weight, weight_scale, _, wanted = exact_operands(scheme, dtype, m, n, k)
        weight, zero_point = with_zero_points(weight, scheme.weight, k)
        there = None if zero_point is None else zero_point.to(DEVICE)
        taking = runs(scheme, n, k, dtype, DEVICE)
        assert "triton_packed" in taking and (scheme.input is None or "triton_packed_fake_quantized" in taking)
        for kernel in taking:
            with kernels.use(kernel):
                found = scaled_linear(x.to(DEVICE), weight.to(DEVICE), weight_scale.to(DEVICE), scheme, zero_point=there)
            assert torch.equal(found.cpu(), wanted), (kernel, n, k, dtype)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_near(name: str, dtype: torch.dtype) -> None:
    """K as in real models: what fast accumulation loses is bounded here."""
    scheme = SCHEMES[name]
    for m, n, k in ((1, 256, 4096), (17, 1024, 8192), (64, 72, 200), (257, 512, 14336)):
        given = operands(scheme, m, n, k, dtype)
        moved = {key: None if t is None else t.to(DEVICE) for key, t in given.items()}
        for kernel in runs(scheme, n, k, dtype, DEVICE):
            with kernels.use(kernel):
                found = scaled_linear(**moved, scheme=scheme).cpu()
            wanted = expected(scheme, given, BY_NAME[kernel] not in WEIGHT_ONLY)
            # Quantized inputs on a GPU: E4M3 itself is at 30 dB; 40 leaves the accumulation a tenth of its error.
            assert sqnr(found, wanted) > 40, (kernel, m, n, k)


@pytest.mark.parametrize("k", [1, 40, 257, 4096, 20000])
def test_quantization_is_the_references(k: int) -> None:
    """Bit for bit, rounding included; not-finite values too."""
    from hf_fp8.kernels.inputs import quantize_input

    schemes = [
        TensorScheme(ROW, dynamic=True), TensorScheme(TENSOR), TensorScheme(Granularity(1, 128), dynamic=True),
        TensorScheme(ROW, dynamic=True, dtype=torch.int8),
    ]  # fmt: skip
    for scheme in schemes:
        if scheme.dtype != torch.int8 and not triton_support.native_e4m3(DEVICE):
            continue
        static = None if scheme.dynamic else torch.tensor([0.05])
        for dtype in THRESHOLD:
            x = torch.randn(9, k).mul(3).to(dtype)
            x[1] = 0
            x[2, k // 2], x[3, 0] = float("nan"), float("inf")
            q, scale = quantize_input(x.to(DEVICE), scheme, None if static is None else static.to(DEVICE))
            wanted_q, wanted_scale = numerics.quantize_input(x, scheme, static)
            torch.testing.assert_close(scale.cpu(), wanted_scale.expand(9, -1), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(q.cpu().float(), wanted_q.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scheme", [FP8_DYNAMIC, INT8_DYNAMIC], ids=["fp8", "int8"])
@pytest.mark.parametrize("m", [1, 300])
def test_in_a_cuda_graph(scheme: Scheme, m: int) -> None:
    if DEVICE.type != "cuda":
        pytest.skip("CUDA graphs are CUDA's")
    given = {k: None if t is None else t.cuda() for k, t in operands(scheme, m, 256, 512, torch.bfloat16).items()}
    backend = "int8" if scheme is INT8_DYNAMIC else "auto"
    scaled_linear(**given, scheme=scheme, backend=backend)  # compiles and probes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = scaled_linear(**given, scheme=scheme, backend=backend)
    given["x"].copy_(torch.randn_like(given["x"]))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, scaled_linear(**given, scheme=scheme, backend=backend))


def test_compiled_with_reduced_overhead() -> None:
    layer = QuantizedLinear(512, 256, FP8_DYNAMIC, device=DEVICE)
    given = operands(FP8_DYNAMIC, 4, 256, 512, torch.bfloat16)
    layer.weight.data, layer.weight_scale.data = given["weight"].to(DEVICE), given["weight_scale"].to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(4, 512, device=DEVICE, dtype=torch.bfloat16)
            assert torch.equal(compiled(x).clone(), layer(x))


@pytest.mark.parametrize("originals", ["keep", "offload"])
def test_kept_weights_with_reduced_overhead(originals: str) -> None:
    """They are not copied in each replay, and a layer that was not changed is not taken for one that was."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 256, dtype=torch.bfloat16, device=DEVICE))
    quantize_model(model, originals=originals)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(4, 512, device=DEVICE, dtype=torch.bfloat16)
            assert torch.equal(compiled(x).clone(), model(x))
            requantize_model(model)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", THRESHOLD, ids=str)
def test_extremes(name: str, dtype: torch.dtype) -> None:
    scheme, n, k = SCHEMES[name], 64, 256
    for size in WEIGHTS[dtype]:
        codes, scale, dense = weights(scheme, n, k, size)
        for kernel in runs(scheme, n, k, dtype, DEVICE):
            for m in (1, 17, 70):
                for row in SIZES[dtype]:
                    x = inputs(m, k, [row], dtype)
                    static = (x.abs().amax().float().reshape(1) / 448).to(DEVICE) if scheme.has_static_input else None
                    with kernels.use(kernel):
                        found = scaled_linear(x.to(DEVICE), codes.to(DEVICE), scale.to(DEVICE), scheme, input_scale=static)
                    check(found.cpu(), x, dense, kernel, scheme)


def test_what_auto_takes() -> None:
    """Printed for the record; on FP8 hardware the checkpoint's arithmetic must be there for many rows."""
    for name, scheme in SCHEMES.items():
        choice = select(Problem(DEVICE, scheme, 4096, 4096, torch.bfloat16))
        print(f"{name}: {choice} ({choice.reason})")
        if kernels.has_fp8_matmul(DEVICE) is None and name in ("dynamic", "static"):
            assert choice.kernel.name.startswith("scaled_mm")


@pytest.mark.parametrize("granularity", [ROW, TENSOR, Granularity(128, 128), Granularity(1, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quantizing_gives_the_bytes_of_a_cpu(granularity: Granularity, dtype: torch.dtype) -> None:
    """Quotients are rounded to the dtype of the weight there, too; and a model quantized through the GPU comes back."""
    weight = (torch.randn(300, 448) * 0.05).to(dtype)
    codes, scale = quantize_weight(weight, granularity)
    there = quantize_weight(weight.to(DEVICE), granularity)
    assert torch.equal(there[0].cpu().view(torch.uint8), codes.view(torch.uint8)) and torch.equal(there[1].cpu(), scale)
    model = quantize_model(torch.nn.Sequential(torch.nn.Linear(448, 300, dtype=dtype)), device=DEVICE)
    assert model[0].weight.device.type == "cpu"
