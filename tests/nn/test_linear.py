"""QuantizedLinear as a module: shapes, dtypes, gradients, and everything that PyTorch does to modules."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from hf_fp8 import QuantizedLinear, dequantize_model
from hf_fp8.errors import InputError
from hf_fp8.formats import numerics
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.scheme import FP8_BLOCK, FP8_DYNAMIC, FP8_STATIC, FP8_WEIGHT_ONLY, Scheme

pytestmark = pytest.mark.hostless

SCHEMES = [FP8_DYNAMIC, FP8_STATIC, FP8_BLOCK, FP8_WEIGHT_ONLY]


def layer(scheme: Scheme, n: int = 72, k: int = 200, bias: bool = True, backend: str = "scaled_mm") -> QuantizedLinear:
    torch.manual_seed(0)
    w = torch.randn(n, k)
    made = QuantizedLinear(k, n, scheme, bias=bias, bias_dtype=torch.float32, backend=backend)
    scale = numerics.compute_scale(w, scheme.weight.granularity)
    made.weight.copy_(numerics.quantize(w, scale, scheme.weight.granularity))
    made.weight_scale.copy_(scale.reshape(made.weight_scale.shape))
    if made.input_scale is not None:
        made.input_scale.fill_(4 / 448)
    if bias:
        nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("backend", ["scaled_mm", "weight_only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(200,), (0, 200), (1, 200), (17, 200), (2, 3, 200), (2, 0, 200), (2, 2, 3, 200)])
def test_shapes_and_dtypes(scheme: Scheme, backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    out = layer(scheme, backend=backend)(torch.randn(shape).to(dtype))
    assert out.shape == (*shape[:-1], 72)
    assert out.dtype == dtype


@pytest.mark.parametrize("scheme", [FP8_DYNAMIC, FP8_BLOCK], ids=str)
@pytest.mark.parametrize("shape", [(6, 200), (2, 3, 200), (1, 2, 3, 200)])
def test_no_token_depends_on_another(scheme: Scheme, shape: tuple[int, ...]) -> None:
    module, x = layer(scheme), torch.randn(6, 200)
    alone = module(x.view(shape)).view(6, 72)
    for row in range(6):
        others = torch.full((6, 1), 1e3)
        others[row] = 1
        assert torch.equal(module((x * others).view(shape)).view(6, 72)[row], alone[row])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_not_contiguous_input(scheme: Scheme) -> None:
    module, x = layer(scheme), torch.randn(200, 3, 5)
    view = x.permute(1, 2, 0)
    assert not view.is_contiguous()
    assert torch.equal(module(view), module(view.contiguous()))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zero_rows_and_nan_stay_in_their_rows(scheme: Scheme) -> None:
    module, x = layer(scheme, bias=False), torch.randn(4, 200)
    clean = module(x)
    x[1], x[2, 7] = 0, float("nan")
    out = module(x)
    assert torch.equal(out[1], torch.zeros(72))
    assert out[2].isnan().all()
    if scheme != FP8_WEIGHT_ONLY:
        assert torch.equal(out[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_copies_and_files(scheme: Scheme) -> None:
    module, x = layer(scheme), torch.randn(3, 200)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    fresh = QuantizedLinear(200, 72, scheme, bias=True, bias_dtype=torch.float32, backend="scaled_mm")
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), loaded, fresh):
        assert torch.equal(other(x), module(x))
    assert set(module.state_dict()) == {"weight", "weight_scale", "bias"} | (
        {"input_scale"} if scheme.has_static_input else set()
    )


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16)])
def test_a_cast_reaches_the_bias_alone(cast) -> None:  # type: ignore[no-untyped-def]
    module = layer(FP8_STATIC)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    cast(module)
    assert module.bias.dtype != torch.float32
    for name in ("weight", "weight_scale", "input_scale"):
        assert getattr(module, name).dtype == before[name].dtype
        assert torch.equal(getattr(module, name), before[name])


def test_meta_and_back() -> None:
    module = layer(FP8_DYNAMIC).to("meta")
    assert module.weight.is_meta and module.weight.dtype == FP8
    module.to_empty(device="cpu")
    assert module.weight.device.type == "cpu" and module.weight.dtype == FP8


@pytest.mark.parametrize("shape", [(3, 200), (2, 3, 200)])
def test_output_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    module, x = layer(FP8_DYNAMIC), torch.randn(shape, requires_grad=True)
    out = module(x)
    out += 1
    out.mul_(2).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_state_dicts_that_do_not_fit() -> None:
    module, state = layer(FP8_STATIC), layer(FP8_STATIC).state_dict()
    before = module(torch.ones(1, 200))
    with pytest.raises(RuntimeError, match="would not quantize"):
        module.load_state_dict({**state, "weight": torch.randn(72, 200)}, strict=False)
    with pytest.raises(RuntimeError, match="without its weight_scale"):
        module.load_state_dict({"weight": state["weight"]}, strict=False)
    assert torch.equal(module(torch.ones(1, 200)), before)
    module.to(torch.float32).load_state_dict({**state, "weight_scale": state["weight_scale"].bfloat16()})
    assert module.weight_scale.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 200, dtype=torch.int64), "int64"),
        (torch.zeros(2, 200).to(FP8), "cast it to the dtype of the layer's weight"),
        (torch.zeros(2, 199), "199 columns"),
        (torch.tensor(1.0), "at least one dimension"),
        (torch.zeros(2, 200).to_sparse(), "sparse_coo"),
        (torch.nested.nested_tensor([torch.zeros(2, 200), torch.zeros(3, 200)]), "padded sequences"),
        (torch.nested.nested_tensor([torch.zeros(2, 200), torch.zeros(3, 200)], layout=torch.jagged), "padded sequences"),
    ],
)
def test_wrong_inputs(x: torch.Tensor, words: str) -> None:
    module = layer(FP8_DYNAMIC, backend="auto")
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(InputError, match=words):
                module(x)
            module(torch.zeros(2, 200))  # prepares the next call


def test_dequantize_model_keeps_shared_modules_shared() -> None:
    shared = layer(FP8_BLOCK)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(layer(FP8_STATIC), nn.LayerNorm(72))})
    x = torch.randn(2, 200)
    wanted = shared.to_linear(torch.float32)(x)
    dequantize_model(model)
    assert type(model["a"]) is nn.Linear and model["a"] is model["b"]
    assert model["a"].weight.dtype == torch.float32  # that of the LayerNorm
    assert torch.equal(model["a"](x), wanted)
    assert type(dequantize_model(layer(FP8_DYNAMIC), torch.float16)) is nn.Linear


@pytest.mark.parametrize("backend", ["weight_only", "scaled_mm"])
def test_forward_mode_gradients_are_not_those_of_rounding(backend: str) -> None:
    """The op has none, and says so, instead of giving zeros or differentiating through the quantizer."""
    linear = QuantizedLinear.from_linear(nn.Linear(64, 32, bias=False), FP8_DYNAMIC, backend=backend)
    x, tangent = torch.randn(3, 64), torch.randn(3, 64)
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(InputError, match="forward-mode"):
            linear(torch.autograd.forward_ad.make_dual(x, tangent))
        assert linear(x).shape == (3, 32)
    with pytest.raises(InputError, match="forward-mode"):
        torch.func.jvp(linear, (x,), (tangent,))


@torch.no_grad()
def test_a_scale_changed_behind_torchs_back_is_seen() -> None:
    linear = QuantizedLinear.from_linear(nn.Linear(64, 32, bias=False, dtype=torch.bfloat16), FP8_DYNAMIC, backend="scaled_mm")
    assert linear.weight_scale.dtype == torch.bfloat16
    x = torch.randn(3, 64)
    before = linear(x)
    linear.weight_scale.data.mul_(2)
    assert torch.equal(linear(x), before * 2)
