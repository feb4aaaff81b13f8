"""Nobody can write values over codes, part codes from their scales, or run and save what was put in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small import INDEX, OTHER, SCHEMES, K, N, X, linear, net
from torch import nn

import hf_fp8
from hf_fp8.errors import FP8Error, StateDictError, UnsupportedError

pytestmark = pytest.mark.hostless

WRITES: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "data.mul_": lambda w: w.data.mul_(0.5),
    "data.add_": lambda w: w.data.add_(OTHER, alpha=0.1),
    "+=": lambda w: w.__iadd__(1),
    "*= of data": lambda w: w.data.__imul__(2),
    "a row": lambda w: w.data[3].fill_(0),
    "element": lambda w: w.__setitem__((0, 0), 1.0),
    "slice": lambda w: w.data.__setitem__(slice(0, 3), 0.0),
    "zero_": lambda w: w.zero_(),
    "clamp_": lambda w: w.data.clamp_(-0.1, 0.1),
    "init": lambda w: nn.init.normal_(w),
    "init of data": lambda w: nn.init.zeros_(w.data),
    "copy_": lambda w: w.copy_(OTHER),
    "data.copy_": lambda w: w.data.copy_(w.data * 1.01),
    "data = ": lambda w: setattr(w, "data", OTHER),
    "data = its double": lambda w: setattr(w, "data", w.data * 2),
    "data = another shape": lambda w: setattr(w, "data", w.float()[:3]),
    "cast back": lambda w: setattr(w, "data", (w.data * 1.01).to(w.dtype)),
    "copied, cast back": lambda w: w.data.copy_(((w.data + w.data * 0.99) / 2).to(w.dtype)),
    "an empty one, filled": lambda w: setattr(w, "data", torch.empty_like(w).copy_((w.data * 1.01).to(w.dtype))),
    "out=": lambda w: torch.add(OTHER, 1, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
    "lerp_": lambda w: w.lerp_(OTHER, 0.1),
    "input cast to codes": lambda w: X.to(w.dtype) @ w.T,
    "linear of codes": lambda w: nn.functional.linear(X.to(w.dtype), w),
}


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "INT8"])
@pytest.mark.parametrize("byte", [0, 1, 0x7F])
def test_memory_of_codes_may_be_freed(scheme: str, byte: int) -> None:
    """diffusers does so when it offloads to disk. What is in fresh memory may look like values that were cast."""
    model = net(scheme)
    weight, x = model[0].weight, torch.randn(3, K)
    codes, wanted = weight.codes.clone(), model(x)
    for made in (torch.empty_like(weight.data), weight.new_empty(weight.shape)):
        made.untyped_storage().fill_(byte)
        weight.data = made
        weight.data = codes.clone()
        assert torch.equal(model(x), wanted)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "INT8"])
def test_values_are_never_written_over_codes(scheme: str) -> None:
    model = net(scheme)
    weight = model[0].weight
    before, wanted = weight.codes.clone(), model(torch.randn(3, K))
    for name, write in WRITES.items():
        with pytest.raises(UnsupportedError, match=r"0\.weight") as raised:
            write(weight)
        assert "hf_fp8" in str(raised.value) or "codes" in str(raised.value), name
        assert torch.equal(weight.codes, before), name
    assert weight is model[0].weight and model(torch.randn(3, K)).shape == wanted.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_casting_parameters_by_hand_leaves_codes_and_scales(scheme: str, dtype: torch.dtype) -> None:
    for cast in (
        lambda p: setattr(p, "data", p.data.to(dtype)),
        lambda p: setattr(p, "data", p.to(dtype)),
        lambda p: p.data.copy_(p.data.to(dtype)) if p.ndim == 2 and p.numel() == N * K else setattr(p, "data", p.to(dtype)),
    ):
        model = net(scheme)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                cast(parameter)
        for layer in (model[0], model[2]):
            assert layer.weight.dtype == state["0.weight"].dtype and layer.weight_scale.dtype == torch.float32
        for name, tensor in model.state_dict().items():
            if "bias" not in name:
                assert torch.equal(tensor, state[name]), name
        if model[0].original_dtype == dtype:
            assert (model[0].weight * 1).dtype == dtype and model(torch.randn(2, K).to(dtype)).dtype == dtype


def order(w: torch.Tensor) -> torch.Tensor:
    """As Llama's rotary halves are put into another order."""
    return w.view(5, 2, 15, K).transpose(1, 2).reshape(N, K)


MIXED: dict[str, Callable[[Any, Any], Any]] = {
    "a state dict with rows by a list": lambda a, b: a.load_state_dict(
        {**a.state_dict(), "weight": a.state_dict()["weight"][list(range(N))[::-1]]}
    ),
    "rows in another order": lambda a, b: setattr(a.weight, "data", order(a.weight.data)),
    "a state dict in another order": lambda a, b: a.load_state_dict(
        {**a.state_dict(), "weight": order(a.state_dict()["weight"])}
    ),
    "codes of one, scales of another": lambda a, b: a.load_state_dict({**a.state_dict(), "weight": b.state_dict()["weight"]}),
    "a row of another": lambda a, b: a.weight.data[3].copy_(b.weight.data[5]),
    "a row of values": lambda a, b: a.weight.data[3].copy_((a.weight[3] * 2).to(a.weight.dtype)),
    "rows": lambda a, b: a.weight.data[3:9].copy_(a.weight.data[5:11]),
    "values as codes": lambda a, b: setattr(a, "weight", nn.Parameter((a.weight * 2).to(a.weight.dtype), requires_grad=False)),
    "normalized": lambda a, b: setattr(
        a, "weight", nn.Parameter((a.weight * torch.rand(N, 1)).to(a.weight.dtype), requires_grad=False)
    ),
    "relu": lambda a, b: nn.functional.relu(a.weight, inplace=True),
    "dropout": lambda a, b: nn.functional.dropout(a.weight, 0.5, True, inplace=True),
    "renormed embedding": lambda a, b: nn.functional.embedding(INDEX, a.weight, max_norm=0.1),
    "an op of torch": lambda a, b: torch.ops.aten.mul_.Scalar(a.weight, 2),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "INT8"])
@pytest.mark.parametrize("how", MIXED)
def test_codes_without_their_scales_are_refused(how: str, scheme: str) -> None:
    a, b = linear(scheme), hf_fp8.quantize_model(nn.Linear(K, N), scheme)
    wanted = a.dequantized_weight()
    with pytest.raises(FP8Error):
        MIXED[how](a, b)
    assert torch.equal(a.dequantized_weight(), wanted)


TAKEN: dict[str, Callable[[Any, Any], Any]] = {
    "copy_": lambda a, b: a.weight.data.copy_(b.weight.data),
    "data": lambda a, b: setattr(a.weight, "data", b.weight.data),
    "data of a copy": lambda a, b: setattr(a.weight, "data", b.weight.data.clone()),
    "a parameter of a copy": lambda a, b: setattr(a, "weight", nn.Parameter(b.weight.clone(), requires_grad=False)),
    "the parameter": lambda a, b: setattr(a, "weight", b.weight),
    "all parameters": lambda a, b: [p.data.copy_(q.data) for p, q in zip(a.parameters(), b.parameters(), strict=True)],
    "all parameters, backwards": lambda a, b: [
        p.data.copy_(q.data) for p, q in reversed(list(zip(a.parameters(), b.parameters(), strict=True)))
    ],
    "a state dict": lambda a, b: a.load_state_dict(b.state_dict()),
    "a state dict, assigned": lambda a, b: a.load_state_dict(b.state_dict(), assign=True),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("how", TAKEN)
def test_a_weight_of_another_layer_brings_its_scale(how: str, scheme: str) -> None:
    a, b = linear(scheme), hf_fp8.quantize_model(nn.Linear(K, N), scheme)
    TAKEN[how](a, b)
    wanted = b.dequantized_weight()
    assert torch.equal(a.dequantized_weight(), wanted) and torch.equal(a.weight.float(), wanted)
    a.bias = b.bias
    a.backend = b.backend = "int8" if scheme == "INT8" else "weight_only"
    x = torch.randn(3, K)
    assert torch.equal(a(x), b(x))


def test_codes_of_files_are_loaded_whatever_they_are() -> None:
    """Layers of zeros, of which some rows are next to nothing: what a file holds is not taken for cast values."""
    for scheme in SCHEMES:
        for change in (lambda w: w.zero_(), lambda w: w[:64].zero_(), lambda w: w[:64].mul_(1 / 20)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                dense = nn.Linear(512, 1024, bias=False, dtype=dtype)
                change(dense.weight.data)
                state = hf_fp8.quantize_model(dense, scheme).state_dict()
                layer = hf_fp8.quantize_model(nn.Linear(512, 1024, bias=False, dtype=dtype), scheme)
                layer.load_state_dict({k: getattr(v, "codes", v).clone() for k, v in state.items()})
                assert torch.equal(layer.weight.float(), state["weight"].float())


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_originals_may_change_to_anything(scheme: str) -> None:
    """What was just quantized is not taken for cast values: zeros, or small codes beside an outlier."""
    for change in (lambda w: w.zero_(), lambda w: w[7, 3].fill_(30.0)):
        model = hf_fp8.quantize_model(nn.Sequential(nn.Linear(512, 512, bias=False)), scheme, originals="keep")
        dense = model[0].to_linear(torch.float32)
        for weight in (model[0].original, dense.weight):
            change(weight)
        wanted = hf_fp8.quantize_model(nn.Sequential(copy.deepcopy(dense)), scheme)[0].dequantized_weight()
        hf_fp8.requantize_model(model)
        assert torch.equal(model[0].dequantized_weight(), wanted)
        other = hf_fp8.quantize_model(nn.Linear(512, 512, bias=False), scheme).requantized(dense)[0]
        assert float((other.dequantized_weight() - dense.weight).norm()) <= 0.06 * float(dense.weight.norm()) + 1e-6


def test_a_parameter_that_is_assigned_again() -> None:
    layer = linear("FP8_DYNAMIC")
    codes = nn.Parameter(layer.weight.codes.clone(), requires_grad=False)
    layer.weight = codes
    codes.data = layer.weight.codes.roll(1, 0)
    layer.weight = codes
    assert torch.equal(layer.weight.codes, codes.data.clone())


SOUPS: dict[str, Callable[[Any, Any], Any]] = {
    "average": lambda a, b: {k: (a[k] + b[k]) / 2 for k in a},
    "float average": lambda a, b: {k: (a[k].float() + b[k].float()) / 2 for k in a},
    "cast back": lambda a, b: {k: ((a[k].float() + b[k].float()) / 2).to(a[k].dtype) for k in a},
    "one of its own": lambda a, b: {k: (v.float() * 0.9).to(v.dtype) if "scale" not in k else v for k, v in a.items()},
    "task arithmetic": lambda a, b: {k: (a[k].float() + 0.5 * (b[k].float() - a[k].float())).to(a[k].dtype) for k in a},
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("soup", SOUPS)
def test_arithmetic_on_state_dicts_is_not_loaded_as_codes(scheme: str, soup: str) -> None:
    one, two = net(scheme), net(scheme)
    two.load_state_dict({k: getattr(v, "codes", v).roll(1, 0) for k, v in two.state_dict().items()})
    wanted = [layer.dequantized_weight() for layer in (one[0], two[0])]
    state = SOUPS[soup](one.state_dict(), two.state_dict())
    if soup == "float average":
        assert torch.equal(state["0.weight"], (wanted[0] + wanted[1]) / 2)
    with pytest.raises(FP8Error, match=r"0\.weight"):
        one.load_state_dict(state)
    with pytest.raises(FP8Error, match=r"0\.weight"):
        one.load_state_dict(state, strict=False, assign=True)
    assert torch.equal(one[0].dequantized_weight(), wanted[0])
    dense = hf_fp8.dequantize_model(one)
    dense.load_state_dict({k: v.float() for k, v in state.items() if "scale" not in k})


@torch.no_grad()
def test_a_small_weight_with_a_scale_that_is_too_large_for_it() -> None:
    """As exports for serving engines have it: q, k and v with the largest of their scales."""
    layer = hf_fp8.quantize_model(nn.Linear(64, 64), "FP8_TENSOR")
    for smaller in (10, 30, 100):
        scale = layer.weight_scale.detach().clone()
        codes = (layer.dequantized_weight() / smaller / scale).to(torch.float8_e4m3fn)
        fresh = hf_fp8.quantize_model(nn.Linear(64, 64), "FP8_TENSOR")
        fresh.load_state_dict({"weight": codes, "weight_scale": scale, "bias": layer.bias})
        assert torch.equal(fresh.dequantized_weight(), codes.float() * scale)


def test_state_dicts_that_are_loaded_all_the_same() -> None:
    model = net()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    codes, scale = state["0.weight"].codes, state["0.weight_scale"]
    # Codes that use little of their range, with scales that make up for it; of zeros; and the very values.
    small = {**state, "0.weight": (codes.float() / 64).to(codes.dtype), "0.weight_scale": scale * 64}
    model.load_state_dict(small)
    model.load_state_dict(state)
    empty = {**state, "0.weight": torch.zeros_like(codes), "0.weight_scale": torch.full_like(scale, 1e-30)}
    model.load_state_dict(empty)
    model.load_state_dict(state)
    model.load_state_dict({**state, "0.weight": model[0].dequantized_weight(torch.bfloat16)})
    assert torch.equal(model[0].weight, codes)
    with pytest.raises(StateDictError, match=r"0\.weight is torch\.float32: this layer holds codes"):
        model.load_state_dict({**state, "0.weight": model[0].dequantized_weight() * 1.1})


REPLACED: dict[str, Callable[[Any], Any]] = {
    "values in _parameters": lambda m: m._parameters.update(weight=nn.Parameter(m.dequantized_weight())),
    "a float parameter": lambda m: setattr(m, "weight", nn.Parameter(m.dequantized_weight(torch.bfloat16))),
    "other codes": lambda m: setattr(m, "weight", nn.Parameter(torch.ones(N, K, dtype=torch.uint8), requires_grad=False)),
    "another shape": lambda m: setattr(m, "weight", nn.Parameter(m.weight.codes[:5].clone(), requires_grad=False)),
    "nothing": lambda m: setattr(m, "weight", None),
    "a flat tensor": lambda m: setattr(m, "weight", nn.Parameter(m.weight.codes.flatten(), requires_grad=False)),
}

SCALES: dict[str, Callable[[Any], Any]] = {
    "one of many": lambda m: setattr(m, "weight_scale", nn.Parameter(m.weight_scale[:1].detach().clone())),
    "data": lambda m: setattr(m.weight_scale, "data", m.weight_scale.data[:7]),
    "of its inputs": lambda m: setattr(m, "weight_scale", nn.Parameter(torch.ones(K, 1))),
    "integers": lambda m: setattr(m, "weight_scale", nn.Parameter(torch.ones(N, 1, dtype=torch.int32), requires_grad=False)),
    "codes": lambda m: setattr(m, "weight_scale", nn.Parameter(torch.ones(N, 1).to(torch.float8_e4m3fn), requires_grad=False)),
    "nothing": lambda m: setattr(m, "weight_scale", None),
}


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "INT8"])
@pytest.mark.parametrize(("leaf", "how"), [("weight", how) for how in REPLACED] + [("weight_scale", how) for how in SCALES])
def test_what_was_replaced_runs_and_saves_nowhere(leaf: str, how: str, scheme: str, tmp_path: Path) -> None:
    model = net(scheme)
    (REPLACED if leaf == "weight" else SCALES)[how](model[0])
    wanted = r"\[150, 70\] codes in torch\." if leaf == "weight" else r"150 scale\(s\) in bfloat16"
    with pytest.raises(UnsupportedError, match=rf"^0\.{leaf} is .* where its scheme has {wanted}"):
        model(torch.randn(2, K))
    with pytest.raises(UnsupportedError, match=rf"^0\.{leaf} is "):
        hf_fp8.save_quantized(model, tmp_path / "saved")
    with pytest.raises(UnsupportedError, match=rf"^0\.{leaf} is "):
        model.state_dict()
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dicts_that_were_cast(scheme: str) -> None:
    """They hold the weight and a scale that was rounded: neither changes; another scale is not this weight's."""
    model = net(scheme)
    before = {k: getattr(v, "codes", v).clone() for k, v in model.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.load_state_dict({k: v.to(dtype) for k, v in model.state_dict().items()})
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "weight" in k)
    state = {k: v.float() for k, v in model.state_dict().items()}
    with pytest.raises(StateDictError, match=r"0\.weight_scale is not its scale"):
        model.load_state_dict({**state, "0.weight_scale": state["0.weight_scale"] * 2})
    assert torch.equal(model[0].weight.codes, before["0.weight"])
    assert torch.equal(model[0].weight_scale, before["0.weight_scale"])


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "INT8"])
def test_parameters_that_torch_would_swap(scheme: str) -> None:
    """It would put values in the place of the codes, and say that all was well."""
    layer = linear(scheme)
    state, wanted = layer.state_dict(), layer.dequantized_weight()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.raises(UnsupportedError, match="set_swap_module_params_on_conversion"):
            layer.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    layer.load_state_dict(state)
    assert torch.equal(layer.dequantized_weight(), wanted)
