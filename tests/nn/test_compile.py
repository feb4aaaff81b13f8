"""torch.compile: one graph whatever the backend, the same numbers, and no compiling again while decoding."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from support.build import IDS, STATIC_TENSOR, cached, load, tiny_llama, write
from transformers import StaticCache

from hf_fp8 import FP8Config, QuantizedLinear
from hf_fp8.formats.scheme import FP8_BLOCK, FP8_DYNAMIC, FP8_STATIC, FP8_WEIGHT_ONLY, TENSOR, Granularity, Scheme

BACKENDS = ["weight_only", "scaled_mm", "int8"]
SCHEMES: dict[str, dict[str, Any]] = {
    "channel": {},
    "static": {"weight": TENSOR, "inputs": STATIC_TENSOR},
    "block": {"weight": Granularity(32, 32)},
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("scheme", [FP8_DYNAMIC, FP8_STATIC, FP8_BLOCK, FP8_WEIGHT_ONLY], ids=str)
def test_a_layer_in_one_graph(scheme: Scheme) -> None:
    layer = QuantizedLinear.from_linear(torch.nn.Linear(200, 72), scheme, backend="scaled_mm")
    if layer.input_scale is not None:
        layer.input_scale.data.fill_(0.01)
        layer.see_calibration()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(3, 200), torch.zeros(5, 200)):
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("scheme", "backend"), [*(("channel", backend) for backend in BACKENDS), ("static", "scaled_mm"), ("block", "scaled_mm")]
)
def test_a_model_in_one_graph(scheme: str, backend: str, tmp_path: Path) -> None:
    write(tiny_llama(num_hidden_layers=1), tmp_path, **SCHEMES[scheme])
    model = load(tmp_path, FP8Config(backend=backend))
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (IDS, IDS[:, :1], IDS[:1, :7]):
            assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def ops_of(module: torch.nn.Module, x: torch.Tensor) -> set[str]:
    """Names of the ops of hf_fp8 in the graph of `module`."""
    found: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(module, fullgraph=True, backend=compiler)(x)
    return {name for name in found if name.startswith("hf_fp8.")}


def test_the_op_without_gradients() -> None:
    """Where nothing is differentiated: half of the time of a small call. Exported programs may be differentiated later."""
    layer = QuantizedLinear.from_linear(torch.nn.Linear(64, 32), FP8_DYNAMIC)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert ops_of(layer, x) == {"hf_fp8.scaled_linear_inference.default"}
        exported = torch.export.export(layer, (x,))
        assert any(str(node.target) == "hf_fp8.scaled_linear.default" for node in exported.graph.nodes)
        out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(out, layer(x))
    torch.compiler.reset()
    assert ops_of(layer, x) == {"hf_fp8.scaled_linear.default"}
    x.requires_grad_()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert x.grad is not None and layer.bias.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_compiles_once(backend: str, fp8: Path) -> None:
    model = load(fp8, FP8Config(backend=backend))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(IDS[:1], **cached(model, cache), use_cache=True)
        for token in range(6):
            step(IDS[:1, token : token + 1].contiguous(), **cached(model, cache), use_cache=True)
            if token == 1:
                settled = counter.frame_count
    assert counter.frame_count == settled


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on CPUs")
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_inductor(backend: str, fp8: Path) -> None:
    layer = load(fp8, FP8Config(backend=backend)).model.layers[0].mlp
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for rows in (1, 9):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
