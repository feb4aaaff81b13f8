"""Experts in FP8 on a real GPU: kernels exact and near, no waiting for the device, CUDA graphs, deterministic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.build import error, sqnr, write
from support.experts import experts_of, load
from support.grouped import IDS, SCHEMES, grid
from support.moe import is_linear, qwen3_moe

from hf_fp8 import FP8Config, kernels
from hf_fp8.formats.scheme import FP8_BLOCK, FP8_DYNAMIC, Scheme
from hf_fp8.kernels import GROUPED_KERNELS, Problem
from hf_fp8.kernels.probing import exact_experts, with_zero_points
from hf_fp8.kernels.triton import entries
from hf_fp8.nn.grouped import route, scaled_grouped_linear

if not torch.accelerator.is_available():
    pytest.skip("no GPU on this machine", allow_module_level=True)

pytestmark = pytest.mark.gpu
DEVICE = torch.accelerator.current_accelerator()


def runs(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> list[str]:
    problem = Problem(DEVICE, scheme, n, k, dtype)
    return [c.name for c in GROUPED_KERNELS if kernels.why_not(c, problem) is None]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("case", IDS)
def test_exact(name: str, case: str) -> None:
    scheme = SCHEMES[name]
    for n, k, dtype in ((256, 384, torch.bfloat16), (72, 384, torch.float16), (33, 421, torch.float32)):
        x, weights, scales, routing, wanted = exact_experts(scheme, dtype, n, k, IDS[case])
        static = torch.full((5, 1), 0.5, device=DEVICE) if scheme.has_static_input else None
        for kernel in runs(scheme, n, k, dtype):
            for given in (routing, routing._replace(offsets=None)):
                with kernels.use(kernel):
                    found = scaled_grouped_linear(
                        x.to(DEVICE), weights.to(DEVICE), grid(scales, scheme).to(DEVICE), scheme, given.to(DEVICE),
                        input_scale=static,
                    )  # fmt: skip
                assert torch.equal(found.cpu(), wanted), (kernel, n, k, dtype, given.offsets is None)


@pytest.mark.parametrize("scheme", entries.PACKED_FAKE_QUANTIZED.probes, ids=str)
@pytest.mark.parametrize("case", IDS)
def test_packed_codes_are_exact(scheme: Scheme, case: str) -> None:
    for n, k, dtype in ((256, 384, torch.bfloat16), (72, 384, torch.float16), (33, 421, torch.float32)):
        x, weights, scales, routing, wanted = exact_experts(scheme, dtype, n, k, IDS[case])
        weights, zero_point = with_zero_points(weights, scheme.weight, k)
        there = None if zero_point is None else zero_point.to(DEVICE)
        taking = runs(scheme, n, k, dtype)
        assert "triton_grouped_packed" in taking
        for kernel in taking:
            for given in (routing, routing._replace(offsets=None)):
                with kernels.use(kernel):
                    found = scaled_grouped_linear(
                        x.to(DEVICE), weights.to(DEVICE), scales.to(DEVICE), scheme, given.to(DEVICE), zero_point=there
                    )
                assert torch.equal(found.cpu(), wanted), (kernel, n, k, dtype, given.offsets is None)


@pytest.mark.parametrize("scheme", [FP8_DYNAMIC, FP8_BLOCK], ids=["channel", "block"])
@pytest.mark.parametrize("tokens", [1, 8, 64, 700])
def test_near_the_multiplied_out_experts(scheme: Scheme, tokens: int) -> None:
    """Sizes of Qwen3-30B-A3B: every kernel against the one that multiplies out, in float32."""
    torch.manual_seed(0)
    n_experts, n, k = 128, 1536, 2048
    weight = (torch.randn(n_experts, n, k, device=DEVICE) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    rows, cols = scheme.weight.granularity.grid(n, k)
    scale = torch.rand(n_experts, rows, cols, device=DEVICE) * 1e-3 + 1e-4
    x = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16)
    ids = torch.rand(tokens, n_experts, device=DEVICE).topk(8).indices
    for sort in (True, False):
        first, second = route(ids, n_experts, sort=sort)
        routing = first._replace(slots=second.slots)
        for quantizes, reference in ((True, "grouped_dequantize"), (False, "grouped_weight_only")):
            with kernels.use(reference):
                wanted = scaled_grouped_linear(x.float(), weight, scale, scheme, routing)
            for name in runs(scheme, n, k, x.dtype):
                if next(kernel for kernel in GROUPED_KERNELS if kernel.name == name).quantizes == quantizes:
                    with kernels.use(name):
                        assert sqnr(scaled_grouped_linear(x, weight, scale, scheme, routing), wanted) > 40, (name, sort)


@pytest.mark.parametrize("tokens", [1, 12, 300])
def test_no_waiting_and_the_same_bits_in_a_graph(tokens: int, tmp_path: Path) -> None:
    model, path = qwen3_moe(), tmp_path / "fp8"
    write(model, path, quantized=is_linear)
    module = experts_of(load(model, path, FP8Config(experts="fp8"), torch.bfloat16, device_map=DEVICE.type))[0]
    x = torch.randn(tokens, 64, device=DEVICE, dtype=torch.bfloat16)
    ids = torch.randint(0, 4, (tokens, 2), device=DEVICE)
    weights = torch.rand(tokens, 2, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = module(x, ids, weights)  # compiles and probes
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            assert torch.equal(module(x, ids, weights), wanted)
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        if DEVICE.type != "cuda":
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x, ids, weights)
        other = torch.randint(0, 4, (tokens, 2), device=DEVICE)
        ids.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, module(x, ids, weights))


def test_auto_keeps_experts_on_this_device(tmp_path: Path) -> None:
    model, path = qwen3_moe(), tmp_path / "fp8"
    write(model, path, quantized=is_linear)
    kept = load(model, path, None, torch.bfloat16, device_map=DEVICE.type)
    dense = load(model, path, FP8Config(dequantize=True), torch.float32, device_map=DEVICE.type)
    reasons = (kernels.why_not_kept(DEVICE, torch.bfloat16), kernels.why_not_kept_experts(DEVICE, torch.bfloat16))
    assert bool(experts_of(kept)) == (reasons == (None, None))
    ids = torch.arange(24, device=DEVICE).reshape(2, 12)
    with torch.no_grad():
        assert error(kept(ids).logits.cpu(), dense(ids).logits.cpu()) < 0.3
