"""Whoever reads a weight of codes gets the weight; whoever moves it moves the codes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import moe
from support.small import INDEX, OTHER, SCHEMES, K, N, X, linear, net
from torch import nn

import hf_fp8
from hf_fp8 import QuantizedLinear
from hf_fp8.errors import UnsupportedError
from hf_fp8.formats.quantized_weight.tensor import QuantizedWeight

pytestmark = pytest.mark.hostless

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "matmul": lambda w: X.to(w.dtype if w.dtype in DTYPES else CASE["dtype"]) @ w.T,
    "t()": lambda w: torch.mm(w, w.t()),
    "linear": lambda w: nn.functional.linear(X.to(CASE["dtype"]), w),
    "einsum": lambda w: torch.einsum("bk,nk->bn", X.to(CASE["dtype"]), w),
    "addmm": lambda w: torch.addmm(torch.zeros(5, N, dtype=CASE["dtype"]), X.to(CASE["dtype"]), w.t()),
    "out=": lambda w: torch.mm(X.to(CASE["dtype"]), w.t(), out=torch.empty(5, N, dtype=CASE["dtype"])),
    "embedding": lambda w: nn.functional.embedding(INDEX, w),
    "plus": lambda w: w + 1,
    "plus itself": lambda w: w + w,
    "times": lambda w: 0.5 * w,
    "minus a tensor": lambda w: OTHER.to(CASE["dtype"]) - w,
    "into another": lambda w: OTHER.to(CASE["dtype"], copy=True).add_(w, alpha=0.1),
    "lerp": lambda w: torch.lerp(OTHER.to(CASE["dtype"]), w, 0.25),
    "where": lambda w: torch.where(OTHER > 0, w, OTHER.to(CASE["dtype"])),
    "negative": lambda w: -w,
    "power": lambda w: w**2,
    "comparison": lambda w: w > 0.01,
    "norm": lambda w: w.norm(),
    "torch.norm": lambda w: torch.norm(w, dim=1),
    "linalg": lambda w: torch.linalg.vector_norm(w, dim=0),
    "abs max": lambda w: w.abs().max(),
    "mean": lambda w: w.mean(),
    "std": lambda w: w.std(),
    "sum": lambda w: w.sum(1),
    "topk": lambda w: w.flatten().topk(3).values,
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack([w, OTHER.to(CASE["dtype"])]),
    "item": lambda w: torch.tensor(w[3, 5].item()),
    "iteration": lambda w: next(iter(w)) * 1,
    "list": lambda w: torch.tensor(w.tolist()),
    "rows": lambda w: w[17:140] * 1,
    "a row": lambda w: w[21] * 1,
    "last row": lambda w: w[-1] * 1,
    "columns": lambda w: w[:, 3:60] * 1,
    "steps": lambda w: w[::7] * 1,
    "an element": lambda w: w[3, 4] * 1,
    "by index": lambda w: w[INDEX],
    "by a list": lambda w: w[[3, 140, 3]],
    "all rows by a list": lambda w: w[list(range(N))[::-1]],
    "all columns by a list": lambda w: w[:, list(range(K))[::-1]],
    "by an array": lambda w: w[numpy.arange(N)[::-1].copy()],
    "by a list of flags": lambda w: w[[True] * N],
    "by mask": lambda w: w[OTHER > 1],
    "index_select": lambda w: w.index_select(0, INDEX),
    "rows of rows": lambda w: w[10:100][5:50][3:] * 1,
    "rows of columns": lambda w: w[:, 5:][9:20] * 1,
    "transposed rows": lambda w: w.T[3:9] * 1,
    "chunk": lambda w: w.chunk(4)[2] * 1,
    "split": lambda w: w.split([30, 120])[1] * 1,
    "split by columns": lambda w: w.split(30, 1)[2] * 1,
    "narrow": lambda w: w.narrow(0, 7, 9) * 1,
    "unbind": lambda w: w.unbind(0)[5] * 1,
    "flat": lambda w: w.view(-1)[11:5000] * 1,
    "reshaped": lambda w: w.reshape(N // 2, -1) * 1,
    "unsqueezed": lambda w: w.unsqueeze(0)[0, 4:8] * 1,
    "heads": lambda w: w.view(5, 30, K).transpose(0, 1)[3:7] * 1,
    "heads in another order": lambda w: w.view(5, 2, 15, K).transpose(1, 2).reshape(N, K) * 1,
    "one head": lambda w: w.view(1, N, K)[0, 5:9] * 1,
    "cloned": lambda w: w.clone()[3:7].clone() * 1,
    "detached": lambda w: w.detach().data.contiguous() * 1,
    "zeros_like": lambda w: torch.zeros_like(w).add_(w),
    "a mask": lambda w: torch.ones_like(w).tril() * w,
    "rounded": lambda w: w.round(decimals=2),
    "vector": lambda w: nn.utils.parameters_to_vector([w]),
    "parameter of its own": lambda w: nn.Parameter(w * 1, requires_grad=True).detach(),
}  # fmt: skip
CASE: dict[str, Any] = {"dtype": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_reading_is_reading_the_dequantized_weight(scheme: str, dtype: torch.dtype) -> None:
    layer = linear(scheme, dtype)
    CASE["dtype"] = dtype
    before = layer.weight.codes.clone()
    dense = layer.dequantized_weight(dtype)
    for name, read in READS.items():
        found, wanted = read(layer.weight), read(dense)
        assert type(found) is torch.Tensor and found.dtype == wanted.dtype and torch.equal(found, wanted), name
        found = read(layer.state_dict()["weight"])
        assert torch.equal(found, wanted), f"{name} of a state dict"
    for other in (*DTYPES, torch.float64):
        wanted = layer.dequantized_weight(other)
        for w in (layer.weight, layer.weight.detach()):
            casts = (
                w.to(other),
                w.to("cpu", other),
                w.to(wanted),
                w.type(other),
                w.type_as(wanted),
                w.to(dtype=other, copy=True),
            )
            assert all(torch.equal(cast, wanted) for cast in casts) and torch.equal(w[9:33].to(other), wanted[9:33])
    assert torch.equal(layer.weight.float(), layer.dequantized_weight())
    assert torch.equal(OTHER.to(layer.weight), OTHER.to(dtype)) and torch.equal(OTHER.type_as(layer.weight), OTHER.to(dtype))
    if dtype == torch.float32:
        assert torch.equal(torch.linalg.svdvals(layer.weight), torch.linalg.svdvals(dense))
    assert torch.equal(layer.weight.codes, before)


def test_what_is_asked_of_it_is_the_codes() -> None:
    weight = linear("FP8_DYNAMIC").weight
    assert isinstance(weight, nn.Parameter) and weight.dtype == torch.float8_e4m3fn and weight.shape == (N, K)
    assert weight.nbytes == N * K and weight.element_size() == 1 and weight.is_floating_point() and not weight.requires_grad
    assert type(weight.codes) is torch.Tensor and weight.codes.data_ptr() == weight.data_ptr()
    assert weight.view(torch.uint8).dtype == torch.uint8 and type(weight.view(torch.uint8)) is torch.Tensor
    assert torch.equal(weight, weight.codes.clone()) and torch.equal(weight.codes.clone(), weight)
    assert "float8_e4m3fn" in repr(weight) and "QuantizedWeight" in f"{weight}"
    assert torch.empty_like(weight).dtype == torch.float8_e4m3fn


def test_pointers_and_streams_are_those_of_the_codes() -> None:
    """Values live for one operation: a pointer to them would be one to free memory, a stream would guard nothing."""
    layer = linear("FP8_DYNAMIC")
    weight, given = layer.weight, list[Any]()

    def record_stream(tensor: Any, stream: Any) -> None:  # torch's runs on GPUs alone
        given.append(tensor)

    QuantizedWeight.__torch_function__(record_stream, (QuantizedWeight,), (weight, None))
    QuantizedWeight.__torch_function__(record_stream, (QuantizedWeight,), (weight.data, None))
    assert given[0] is weight and given[1].data_ptr() == weight.codes.data_ptr()
    assert weight.const_data_ptr() == weight.data_ptr() == weight.codes.data_ptr()
    assert not hasattr(weight, "__cuda_array_interface__")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_moving_moves_the_codes(scheme: str, tmp_path: Path) -> None:
    model = net(scheme, torch.bfloat16)
    wanted, codes = model[0].dequantized_weight(), model[0].weight.codes.clone()
    for way in (
        lambda w: w.cpu(), lambda w: w.to("cpu"), lambda w: w.clone(), lambda w: w.detach(), lambda w: w.data, copy.deepcopy,
        lambda w: w.contiguous(), lambda w: w.to(torch.device("cpu"), copy=True), lambda w: w.to(w.dtype), copy.copy,
    ):  # fmt: skip
        moved = way(model[0].weight)
        assert type(moved) is QuantizedWeight and torch.equal(moved.codes, codes) and torch.equal(moved.float(), wanted)
    pieces = model[0].weight.chunk(3)
    assert all(type(piece) is QuantizedWeight and piece.dtype == codes.dtype for piece in pieces)
    state = model.state_dict()
    save_file(state, tmp_path / "state.safetensors")
    assert torch.equal(load_file(tmp_path / "state.safetensors")["0.weight"], codes)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    plain = torch.load(buffer, weights_only=True)
    assert type(plain["0.weight"]) is torch.Tensor and torch.equal(plain["0.weight"], codes)
    again = net(scheme, torch.bfloat16)
    for each in (again[0].weight_scale, again[2].weight_scale):
        each.data.mul_(0.5)
    again.load_state_dict(plain)
    assert torch.equal(again[0].weight.float(), wanted)
    parameter = pickle.loads(pickle.dumps(model[0].weight))
    assert isinstance(parameter, nn.Parameter) and torch.equal(parameter.data, codes)
    if scheme == "INT8":
        assert (state["0.weight"].numpy() == codes.numpy()).all()  # whoever exports a state dict gets what is in it


def test_copies_of_state_dicts_stay() -> None:
    model, other = net(), net()
    other[0].weight.codes.copy_(other[0].weight.codes.roll(1, 0))
    wanted = model[0].dequantized_weight()
    copies = [copy.deepcopy(model.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}]
    parts = [model[0].weight.T.clone(), model[0].weight[3:7].clone(), copy.deepcopy(model[0].weight.T)]
    with torch.no_grad():
        other[0].weight_scale.mul_(3)
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(each["0.weight"].float(), wanted) for each in copies)
    assert all(torch.equal(p.float(), w) for p, w in zip(parts, (wanted.T, wanted[3:7], wanted.T), strict=True))


def test_traced() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x = net(), torch.randn(3, K)
    with torch.no_grad():
        assert torch.equal(make_fx(lambda x: model(x))(x)(x), model(x))


def test_a_copy_outlives_the_layer_and_does_not_follow_it() -> None:
    model = net()
    wanted = model[0].dequantized_weight()
    copied, entry, alias = model[0].weight.clone(), model.state_dict()["0.weight"], model[0].weight.detach()
    with torch.no_grad():
        model[0].weight_scale.mul_(2)
    assert torch.equal(copied.float(), wanted) and torch.equal(alias.float(), 2 * wanted)
    assert torch.equal(entry.float(), 2 * wanted)  # in the memory of the layer, as state dicts are
    del model
    assert torch.equal(copied.float(), wanted) and torch.equal(entry.float(), 2 * wanted)
    with pytest.raises(UnsupportedError, match="the layer that held them was deleted"):
        alias.float()


def test_codes_that_were_replaced_are_not_read_by_the_new_scale() -> None:
    model = net()
    old = model[0].weight
    model[0].weight = nn.Parameter(torch.ones(N, K).to(torch.float8_e4m3fn), requires_grad=False)
    assert torch.equal(model[0].weight.float(), model[0].weight_scale.expand(N, K))
    with pytest.raises(UnsupportedError, match="holds other codes now"):
        old.float()


def test_gradients_are_asked_for_in_vain() -> None:
    layer = linear("FP8_DYNAMIC")
    layer.weight.requires_grad_(True)
    x = torch.randn(2, K)
    with pytest.raises(UnsupportedError, match="have no gradient, and requires_grad is set"):
        x @ layer.weight.T
    with torch.no_grad():
        x @ layer.weight.T
    layer.weight.requires_grad = False
    x.requires_grad_()
    (x @ layer.weight.T).sum().backward()
    assert torch.allclose(x.grad, layer.dequantized_weight().sum(0).expand_as(x), atol=1e-5)


def test_compiled_code_that_reads_it() -> None:
    layer = linear("FP8_DYNAMIC")

    def fused(x: torch.Tensor) -> torch.Tensor:
        return (x @ layer.weight.to(x.dtype).T).logsumexp(-1)

    x = torch.randn(3, K)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(fused, backend="eager")(x), fused(x), atol=1e-5)
    torch._dynamo.reset()
    transposed = torch.compile(lambda x: x @ layer.weight.T, backend="eager")
    assert torch.allclose(transposed(x), x @ layer.dequantized_weight().T, atol=1e-5)
    asked = torch.compile(lambda x: x.to(layer.weight.device) + len(layer.weight.shape), backend="eager", fullgraph=True)
    assert torch.equal(asked(x), x + 2)


def test_functions_that_take_codes_take_the_parameter() -> None:
    layer = linear("FP8_DYNAMIC")
    x = torch.randn(3, K)
    rest = layer.weight_scale, layer.scheme
    assert torch.equal(
        hf_fp8.nn.functional.scaled_linear(x, layer.weight, *rest),
        hf_fp8.nn.functional.scaled_linear(x, layer.weight.codes, *rest),
    )
    granularity = layer.scheme.weight.granularity
    assert torch.equal(
        hf_fp8.formats.numerics.dequantize(layer.weight, layer.weight_scale, granularity), layer.dequantized_weight()
    )


def test_layers_that_share_a_weight() -> None:
    model = nn.ModuleDict({"a": nn.Linear(K, N, bias=False), "b": nn.Linear(K, N, bias=False)})
    model["b"].weight = model["a"].weight
    hf_fp8.quantize_model(model)
    assert model["a"].weight is model["b"].weight
    wanted = model["a"].dequantized_weight()
    b = model["b"]
    del model["a"]
    assert torch.equal(b.weight.float(), wanted)


def test_other_parameters_are_left_as_they_are() -> None:
    layer = linear("FP8_DYNAMIC")
    assert type(layer.bias) is nn.Parameter and not isinstance(layer.weight_scale, QuantizedWeight)
    assert type(layer.weight_scale * 2) is torch.Tensor
    assert isinstance(copy.deepcopy(layer), QuantizedLinear)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stacks_of_experts(family: str) -> None:
    model: Any = getattr(moe, family)()
    hf_fp8.quantize_model(model, "FP8_BLOCK" if family == "mixtral" else "FP8_DYNAMIC", experts="fp8", backend="weight_only")
    name, experts = next((n, m) for n, m in model.named_modules() if isinstance(m, hf_fp8.QuantizedExperts))
    for leaf in ("gate_up_proj", "down_proj"):
        stack = getattr(experts, leaf)
        for dtype in (torch.float32, experts.original_dtype):
            dense = getattr(experts.to_dense(dtype), leaf).detach()
            assert type(stack) is QuantizedWeight and torch.equal(stack.to(dtype), dense)
            assert torch.equal(stack[1].to(dtype), dense[1]) and torch.equal(stack[1:3, 5:9].to(dtype), dense[1:3, 5:9])
        assert torch.equal(stack * 2, dense * 2) and torch.equal(stack.norm(), dense.norm())
        with pytest.raises(UnsupportedError, match=rf"{name}\.{leaf} holds codes"), torch.no_grad():
            stack.mul_(2)
        with torch.no_grad():
            stack.data = stack.data.to(torch.float16)
        assert stack.dtype == torch.float8_e4m3fn and experts.original_dtype == torch.float16
    experts._parameters["down_proj"] = nn.Parameter(experts.down_proj.float(), requires_grad=False)
    with pytest.raises(UnsupportedError, match=rf"^{name}\.down_proj is .* where its scheme has"):
        model(torch.arange(8)[None])
    with pytest.raises(UnsupportedError, match=rf"^{name}\.down_proj is "):
        model.state_dict()


def test_stacks_that_the_family_holds_otherwise() -> None:
    model: Any = moe.gpt_oss()
    hf_fp8.quantize_model(model, experts="fp8", backend="weight_only")
    experts = next(m for m in model.modules() if isinstance(m, hf_fp8.QuantizedExperts))
    with pytest.raises(UnsupportedError, match=r"gate_up_proj is read as values, and GptOssExperts would hold it transposed"):
        experts.gate_up_proj.norm()
    assert experts.gate_up_proj.clone().dtype == torch.float8_e4m3fn
    copy.deepcopy(model).to("cpu").state_dict()


@torch.no_grad()
def test_convolutions() -> None:
    conv = nn.Conv2d(16, 32, 1)
    model = hf_fp8.quantize_model(nn.Sequential(conv), conv1x1=True, backend="weight_only")
    assert torch.equal(model[0].weight.float(), model[0].dequantized_weight())
    assert torch.equal(model[0].weight.flatten(1).norm(), model[0].dequantized_weight().norm())


def test_nothing_keeps_a_model_alive() -> None:
    model = net()
    weights = [model[0].weight, model[0].weight.detach(), model[0].weight.T, model.state_dict()["0.weight"]]
    gone = weakref.ref(model[0])
    gc.disable()
    try:
        del model
        assert gone() is None and len(weights) == 4
    finally:
        gc.enable()
    layer = linear("FP8_DYNAMIC")
    for _ in range(20):
        layer = layer.to(torch.bfloat16).to(torch.float32)
        layer.load_state_dict(copy.deepcopy(layer).state_dict(), assign=True)
    assert len(layer.weight._source.owners) == 1 and torch.equal(layer.weight.float(), layer.dequantized_weight())
