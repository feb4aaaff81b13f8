"""Names from elsewhere: `enable_fp8_gemm`, and torchao's recipes with `quantize_`; both are `quantize_model`."""

from __future__ import annotations

import copy
import enum
import logging
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_fp8 import QuantizedLinear, calibrate, dequantize_model, quantize_model, recipes
from hf_fp8.errors import CalibrationError, ConfigError, UnsupportedError
from hf_fp8.formats.code_types import INT8
from hf_fp8.formats.scheme import (
    FP8_BLOCK,
    FP8_DYNAMIC,
    FP8_STATIC,
    FP8_TENSOR,
    FP8_WEIGHT_ONLY,
    INT8_DYNAMIC,
    INT8_WEIGHT_ONLY,
    TENSOR,
    Granularity,
    Scheme,
    TensorScheme,
)
from hf_fp8.recipes import (
    Float8DynamicActivationFloat8Weight,
    Float8StaticActivationFloat8Weight,
    Float8WeightOnly,
    FP8GemmOptions,
    Int8DynamicActivationInt8Weight,
    Int8WeightOnly,
    PerRow,
    PerTensor,
    Recipe,
    enable_fp8_gemm,
    quantize_,
    recipe,
)

pytestmark = pytest.mark.hostless

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Net(nn.Module):
    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 32).to(dtypes[0]), nn.Linear(32, 48).to(dtypes[1])
        self.between = dtypes[1]
        self.norm = nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).to(self.between))


def net(*dtypes: torch.dtype) -> Net:
    return Net(*(dtypes * 2 if len(dtypes) == 1 else dtypes or (BF16, BF16)))


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8))
        for name in left
    )


# Markers and enums as torchao spells them; nothing but names and attributes is looked at.
@dataclass(frozen=True)
class PerGroup:
    group_size: int


@dataclass(frozen=True)
class PerBlock:
    block_size: tuple[int, ...]


@dataclass(frozen=True)
class PerAxis:
    axis: int


TheirPerRow = dataclass(frozen=True)(type("PerRow", (), {"__annotations__": {"dim": int}, "dim": -1}))
OldPerRow = type("PerRow", (), {})
PlainLayout = dataclass(type("PlainLayout", (), {}))


class KernelPreference(str, enum.Enum):
    AUTO = "auto"
    TORCH = "torch"
    MSLK = "mslk"


class MappingType(enum.Enum):
    SYMMETRIC = enum.auto()
    ASYMMETRIC = enum.auto()


def int8(weight: Granularity, inputs: Granularity | None = None) -> Scheme:
    given = None if inputs is None else TensorScheme(inputs, dynamic=True, dtype=INT8)
    return Scheme(TensorScheme(weight, dtype=INT8), given)


RECIPES: list[tuple[Recipe, Scheme]] = [
    (Float8WeightOnly(), FP8_WEIGHT_ONLY),
    (Float8DynamicActivationFloat8Weight(), FP8_TENSOR),
    (Float8DynamicActivationFloat8Weight(granularity=PerTensor()), FP8_TENSOR),
    (Float8DynamicActivationFloat8Weight(granularity=PerRow()), FP8_DYNAMIC),
    (Float8DynamicActivationFloat8Weight(granularity=[PerRow(), PerRow()]), FP8_DYNAMIC),
    (Float8DynamicActivationFloat8Weight(granularity=TheirPerRow()), FP8_DYNAMIC),
    (Float8DynamicActivationFloat8Weight(granularity=OldPerRow()), FP8_DYNAMIC),
    (Float8DynamicActivationFloat8Weight(granularity=(PerBlock((1, 128)), PerBlock((128, 128)))), FP8_BLOCK),
    (Float8StaticActivationFloat8Weight(), FP8_STATIC),
    (Float8StaticActivationFloat8Weight(granularity=PerTensor()), FP8_STATIC),
    (Int8WeightOnly(), INT8_WEIGHT_ONLY),
    (Int8WeightOnly(granularity=PerTensor()), int8(TENSOR)),
    (Int8WeightOnly(16), int8(Granularity(1, 16))),
    (Int8WeightOnly(granularity=PerGroup(16)), int8(Granularity(1, 16))),
    (Int8DynamicActivationInt8Weight(), INT8_DYNAMIC),
    (Int8DynamicActivationInt8Weight(granularity=PerRow()), INT8_DYNAMIC),
    (Int8DynamicActivationInt8Weight(granularity=PerTensor()), int8(TENSOR, TENSOR)),
]


@pytest.mark.parametrize(("made", "scheme"), RECIPES, ids=[f"{type(r).__name__}-{s}" for r, s in RECIPES])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_recipe_is_its_scheme(made: Recipe, scheme: Scheme, dtype: torch.dtype) -> None:
    assert made.scheme == scheme
    ours, theirs = net(dtype), net(dtype)
    quantize_model(ours, scheme)
    assert quantize_(theirs, made) is None  # type: ignore[func-returns-value]
    assert theirs.first.scheme == scheme and type(theirs.second) is QuantizedLinear and type(theirs.norm) is nn.LayerNorm
    assert same(ours, theirs)
    x = torch.randn(5, 64).to(dtype)
    if scheme != FP8_STATIC:
        assert torch.equal(ours(x), theirs(x))
        exact = net(dtype)(x)
        assert (theirs(x) - exact).norm() < 0.06 * exact.norm()


@pytest.fixture
def without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported torchao, which other tests may have done."""
    monkeypatch.delitem(sys.modules, "torchao", raising=False)


def test_names() -> None:
    for name, kind in recipes.RECIPES.items():
        assert getattr(recipes, name) is getattr(recipes, f"{name}Config") is kind
        assert type(recipe(name)) is type(recipe(f"{name}Config")) is kind
    assert len(recipes.RECIPES) == 11
    assert type(recipe("float8_dynamic_activation_float8_weight")) is Float8DynamicActivationFloat8Weight
    assert recipe("Float8DynamicActivationFloat8WeightConfig", granularity=PerRow()).scheme == FP8_DYNAMIC
    model = net()
    quantize_(model, "Int8WeightOnlyConfig")
    assert model.first.scheme == INT8_WEIGHT_ONLY


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Float8DynamicActivationFloat8SemiSparseWeightConfig", "cuSPARSELt.*wrong numbers.*dense Float8Dynamic"),
        ("float8_dynamic_activation_float8_semi_sparse_weight", "SM90"),
        ("SemiSparseWeightConfig", "cuSPARSELt"),
        ("UIntXWeightOnlyConfig", "4 or 8 bits"),
        ("uintx_weight_only", "4 or 8 bits"),
        ("fpx_weight_only", "Float8WeightOnlyConfig"),
        ("gemlite_uintx_weight_only", "UIntxWeightOnlyConfig"),
        ("int4_dynamic_activation_int4_weight", "inputs of 4 bits"),
        ("autoquant", "hf_fp8.quality"),
        ("Int4WeightOnlyGPTQQuantizer", "GPTQ checkpoint"),
        ("GPTQConfig", "fits weights to data"),
        ("MXDynamicActivationMXWeightConfig", "powers of two"),
        ("MXFPInferenceConfig", "powers of two"),
        ("NVFP4InferenceConfig", "two levels"),
        ("NVFP4DynamicActivationNVFP4WeightConfig", "two levels"),
    ],
)
@pytest.mark.usefixtures("without_torchao")
def test_refused_names(name: str, why: str) -> None:
    model = net()
    for refused in (lambda: recipe(name), lambda: quantize_(model, name)):
        with pytest.raises(UnsupportedError, match=why) as error:
            refused()
        assert name in str(error.value)
    assert same(model, net())


def test_unknown_recipes() -> None:
    with pytest.raises(ConfigError, match=r"'Float9'.*Float8WeightOnly.*Int8DynamicActivationInt8Weight"):
        recipe("Float9")
    with pytest.raises(ConfigError, match=r"did you mean int4_weight_only\?"):
        recipe("int4_wieght_only")
    with pytest.raises(AttributeError, match=r"did you mean Int4WeightOnlyConfig\?"):
        recipes.Int4WeightOnlyConfg  # noqa: B018
    for unknown in (FP8_DYNAMIC, object(), Float8WeightOnly):
        with pytest.raises(ConfigError, match="Float8WeightOnly"):
            quantize_(net(), unknown)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        (Float8WeightOnly, {"weight_dtype": torch.float8_e5m2}),
        (Float8DynamicActivationFloat8Weight, {"weight_dtype": torch.float8_e4m3fnuz}),
        (Float8DynamicActivationFloat8Weight, {"activation_dtype": torch.float8_e5m2}),
        (Float8DynamicActivationFloat8Weight, {"granularity": PerAxis(0)}),
        (Float8DynamicActivationFloat8Weight, {"granularity": PerRow(dim=0)}),
        (Float8DynamicActivationFloat8Weight, {"granularity": (PerRow(), PerTensor())}),
        (Float8DynamicActivationFloat8Weight, {"granularity": (PerRow(),)}),
        (Float8DynamicActivationFloat8Weight, {"granularity": PerBlock((128, 128))}),
        (Float8DynamicActivationFloat8Weight, {"granularity": "PerRow"}),
        (Float8DynamicActivationFloat8Weight, {"kernel_preference": KernelPreference.MSLK}),
        (Float8DynamicActivationFloat8Weight, {"mm_config": "Float8MMConfig(emulate=True)"}),
        (Float8DynamicActivationFloat8Weight, {"activation_value_ub": 1200.0}),
        (Float8DynamicActivationFloat8Weight, {"packing_format": "sparse_cutlass"}),
        (Float8DynamicActivationFloat8Weight, {"set_inductor_config": "often"}),
        (Float8DynamicActivationFloat8Weight, {"alg_id": 3}),
        (Float8DynamicActivationFloat8Weight, {"version": 3}),
        (Float8DynamicActivationFloat8Weight, {"group_size": 128}),
        (Float8StaticActivationFloat8Weight, {"granularity": PerRow()}),
        (Float8StaticActivationFloat8Weight, {"step": "observe"}),
        (Float8StaticActivationFloat8Weight, {"quantize_and_dequantize_output": True}),
        (Int8WeightOnly, {"granularity": PerBlock((128, 128))}),
        (Int8DynamicActivationInt8Weight, {"act_mapping_type": MappingType.ASYMMETRIC}),
        (Int8DynamicActivationInt8Weight, {"weight_only_decode": True}),
        (Int8DynamicActivationInt8Weight, {"granularity": (PerRow(), PerAxis(0))}),
        (Int8DynamicActivationInt8Weight, {"layout": "SemiSparseLayout()"}),
    ],
    ids=str,
)
def test_refused_parameters(kind: type[Recipe], parameters: dict[str, Any]) -> None:
    ((name, value),) = parameters.items()
    with pytest.raises(UnsupportedError, match="hf_fp8 supports") as error:
        kind(**parameters)
    assert kind.__name__ in str(error.value) and f"{name}={value!r}" in str(error.value)


def test_parameters_that_mean_what_is_done() -> None:
    Float8WeightOnly(torch.float8_e4m3fn, set_inductor_config=False, version=1)
    Float8DynamicActivationFloat8Weight(
        torch.float8_e4m3fn, torch.float8_e4m3fn, PerRow(), kernel_preference=KernelPreference.AUTO, mm_config=None,
        activation_value_lb=None, activation_value_ub=None, packing_format="plain",
    )  # fmt: skip
    Int8DynamicActivationInt8Weight(
        layout=PlainLayout(), act_mapping_type=MappingType.SYMMETRIC, weight_only_decode=False, reduce_range=False
    )
    with pytest.raises(UnsupportedError, match="group_size alone"):
        Int8WeightOnly(32, granularity=PerRow())


def test_filter_is_called_as_torchao_does() -> None:
    seen: dict[str, type] = {}

    def only_second(module: nn.Module, name: str) -> bool:
        assert isinstance(module, nn.Module)
        seen[name] = type(module)
        return name == "second"

    model = net()
    quantize_(model, Float8WeightOnly(), only_second)
    assert type(model.first) is nn.Linear and type(model.second) is QuantizedLinear
    assert seen == {"first": nn.Linear, "second": nn.Linear}


def test_what_cannot_be_quantized_stays(caplog: pytest.LogCaptureFixture) -> None:
    class Own(nn.Linear):
        pass

    for change in (lambda m: quantize_(m, Float8WeightOnly()), enable_fp8_gemm):
        model = net()
        model.first = Own(64, 32).to(BF16)
        with caplog.at_level(logging.WARNING):
            change(model)
        assert type(model.first) is Own and type(model.second) is QuantizedLinear
        assert "first (Own is a subclass of Linear" in caplog.text
        caplog.clear()


def test_merged_experts_and_the_head_of_a_transformers_model_stay() -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=50, num_local_experts=4,
    )  # fmt: skip
    for change in (lambda m: quantize_(m, Float8WeightOnly(), lambda module, name: True), enable_fp8_gemm):
        model = MixtralForCausalLM(config).to(BF16)
        change(model)
        layer = model.model.layers[0]
        assert type(layer.self_attn.q_proj) is QuantizedLinear and type(layer.mlp.experts) is MixtralExperts
        assert isinstance(model.lm_head, nn.Linear) and not isinstance(model.lm_head, QuantizedLinear)
        assert model.hf_quantizer is not None


def test_device_is_where_it_is_quantized_and_then_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    steps: list[tuple[str, Any, type]] = []

    def quantize(*args: Any, device: Any, **options: Any) -> nn.Module:
        steps.append(("quantize", device, type(model.first)))
        return quantize_model(*args, device=device, **options)

    def to(device: Any) -> nn.Module:
        steps.append(("to", device, type(model.first)))
        return model

    monkeypatch.setattr(recipes.apply, "quantize_model", quantize)
    monkeypatch.setattr(model, "to", to)
    quantize_(model, Float8WeightOnly(), None, "cpu")
    assert steps == [("quantize", torch.device("cpu"), nn.Linear), ("to", torch.device("cpu"), QuantizedLinear)]


def test_a_linear_itself() -> None:
    with pytest.raises(UnsupportedError, match="quantize_model"):
        quantize_(nn.Linear(8, 8), Float8WeightOnly())
    assert type(enable_fp8_gemm(nn.Linear(8, 8))) is QuantizedLinear


def test_static_scale_given() -> None:
    x = torch.randn(40, 64)
    for given in (
        Float8StaticActivationFloat8Weight(0.0125),
        Float8StaticActivationFloat8Weight(scale=torch.tensor(0.0125)),
        Float8StaticActivationFloat8Weight(act_quant_scale=torch.tensor([[0.0125]])),
    ):
        model = net(FP32)
        quantize_(model, given)
        for layer in (model.first, model.second):
            assert layer.input_scale.tolist() == [torch.tensor(0.0125).item()] and not layer.needs_calibration
        # The factor that codes are multiplied by: 0.0125 * 448 = 5.6 holds these inputs, 1 / 0.0125 would not resolve them.
        exact = net(FP32)(x)
        assert (model(x) - exact).norm() < 0.06 * exact.norm()


def test_static_scale_of_new_layers_alone() -> None:
    model = net()
    quantize_(model, Float8StaticActivationFloat8Weight(0.5), lambda module, name: name == "first")
    quantize_(model, Float8StaticActivationFloat8Weight(0.25))
    assert (model.first.input_scale.item(), model.second.input_scale.item()) == (0.5, 0.25)
    waiting = net()
    quantize_(waiting, Float8StaticActivationFloat8Weight(), lambda module, name: name == "first")
    quantize_(waiting, Float8StaticActivationFloat8Weight(0.25))
    assert waiting.first.needs_calibration and not waiting.second.needs_calibration


@pytest.mark.usefixtures("no_native")
def test_static_scale_not_given() -> None:
    model, x = net(FP32), torch.randn(40, 64)
    quantize_(model, Float8StaticActivationFloat8Weight())
    assert model.first.needs_calibration
    with pytest.raises(CalibrationError, match="calibrate"):
        model(x)
    with calibrate(model, "amax"):
        model(x)
    assert model.first.input_scale.item() == pytest.approx(x.abs().max().item() / 448)
    exact = net(FP32)(x)
    assert (model(x) - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), torch.ones(2)], ids=str)
def test_scales_that_are_none(scale: Any) -> None:
    with pytest.raises(ConfigError, match="one finite positive number"):
        Float8StaticActivationFloat8Weight(scale)
    with pytest.raises(ConfigError, match="one finite positive number"):
        Float8StaticActivationFloat8Weight(1.0, act_quant_scale=1.0)


@pytest.mark.parametrize("dtypes", [(BF16,), (FP16,), (FP32,), (FP16, FP32), (FP32, BF16), (BF16, FP16)], ids=str)
@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("back", [True, False])
def test_gemm_dtypes(dtypes: tuple[torch.dtype, ...], cast: bool, back: bool) -> None:
    model, reference = net(*dtypes), quantize_model(net(*dtypes), "FP8_DYNAMIC")
    exact = net(*dtypes)
    assert enable_fp8_gemm(model, options=FP8GemmOptions(cast_inputs=cast, cast_output_back=back)) is model
    assert same(model, reference)
    for name in ("first", "second"):
        layer, wide = getattr(model, name), getattr(exact, name).weight.dtype == FP32
        x = torch.randn(7, layer.in_features).to(getattr(exact, name).weight.dtype)
        assert layer.scheme == FP8_DYNAMIC
        assert layer.compute_dtype == (BF16 if wide and cast else None)
        out, there = layer(x), getattr(reference, name)
        assert out.dtype == (BF16 if wide and cast and not back else x.dtype)
        expected = there(x.to(BF16)) if wide and cast else there(x)
        assert torch.equal(out, expected.to(out.dtype))
        assert (out - getattr(exact, name)(x)).norm() < 0.06 * getattr(exact, name)(x).norm()


def test_gemm_casts_float64() -> None:
    model = enable_fp8_gemm(net(torch.float64))
    x = torch.randn(3, 64, dtype=torch.float64)
    assert model(x).dtype == torch.float64
    assert (model(x) - net(torch.float64)(x)).norm() < 0.06 * model(x).norm()


@pytest.mark.parametrize("dtypes", [(BF16,), (FP16,), (FP32,), (FP16, FP32)], ids=str)
@pytest.mark.parametrize("storage", ["keep", "cpu_offload"])
def test_gemm_gives_originals_back(dtypes: tuple[torch.dtype, ...], storage: Any) -> None:
    model = enable_fp8_gemm(net(*dtypes), options={"fp16_weight_storage": storage})
    assert model.first.originals == {"keep": "keep", "cpu_offload": "offload"}[storage]
    assert same(dequantize_model(model), net(*dtypes))


def test_gemm_discards_by_default() -> None:
    model = enable_fp8_gemm(net())
    assert model.first.original is None
    assert not torch.equal(dequantize_model(model).first.weight, net().first.weight)


@pytest.mark.parametrize("storage", ["keep", "cpu_offload", "discard"])
def test_gemm_of_a_copy(storage: Any) -> None:
    model = net(FP16, FP32)
    before = copy.deepcopy(model)
    made = enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage=storage), inplace=False)
    assert made is not model and type(made.first) is type(made.second) is QuantizedLinear
    assert (made.first.compute_dtype, made.second.compute_dtype) == (None, BF16)
    assert type(model.first) is type(model.second) is nn.Linear and same(model, before)
    with torch.no_grad():
        made.norm.weight.zero_()
    assert same(model, before)


def test_gemm_filter() -> None:
    seen: dict[str, type] = {}

    def only_second(name: str, module: nn.Module) -> bool:
        seen[name] = type(module)
        return name == "second"

    model = enable_fp8_gemm(net(FP32), module_filter=only_second)
    assert type(model.first) is nn.Linear and type(model.second) is QuantizedLinear
    assert seen == {"first": nn.Linear, "second": nn.Linear}


def test_gemm_leaves_layers_that_were_quantized() -> None:
    model = quantize_model(net(FP32), "INT8", filter_fn=lambda name, module: name == "first")
    enable_fp8_gemm(model)
    assert (model.first.scheme, model.first.compute_dtype) == (INT8_DYNAMIC, None)
    assert (model.second.scheme, model.second.compute_dtype) == (FP8_DYNAMIC, BF16)


@pytest.mark.parametrize("storage", ["keep", "cpu_offload"])
@pytest.mark.parametrize("on_wrap", [True, False])
def test_gemm_follows_kept_weights(storage: Any, on_wrap: bool) -> None:
    """A change is seen at the next call, as in the original utility; `materialize_fp8_on_wrap=False` is for later values."""
    model = enable_fp8_gemm(net(), options=FP8GemmOptions(fp16_weight_storage=storage, materialize_fp8_on_wrap=on_wrap))
    x, other = torch.randn(5, 64).to(BF16), torch.randn(32, 64).to(BF16)
    before = model.first(x)
    assert not model.first.is_stale
    model.first.original.copy_(other)
    with torch.inference_mode():
        changed = model.first(x)
    exact = x @ other.T + net().first.bias
    assert (changed - exact).norm() < 0.06 * exact.norm() and not torch.equal(changed, before)
    assert not model.first.is_stale
    model.first.original.copy_(net().first.weight)
    assert same(model, enable_fp8_gemm(net())), "saving sees it, too"
    model.first.original.copy_(other).mul_(2)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.first(x), enable_fp8_gemm(_with(other * 2)).first(x))


def _with(weight: torch.Tensor) -> Net:
    model = net()
    model.first.weight = nn.Parameter(weight)
    return model


def test_gemm_weights_by_hand() -> None:
    model = enable_fp8_gemm(net(), options={"fp16_weight_storage": "keep"})
    codes = model.first.weight
    model.first.materialize_fp8_weight("cpu")
    assert model.first.weight is codes, "nothing has changed"
    model.first.invalidate_weight_cache()
    assert model.first.is_stale and not model.second.is_stale
    recipes.materialize_fp8_weight(model)
    assert not model.first.is_stale and model.first.weight is not codes and same(model, enable_fp8_gemm(net()))
    recipes.invalidate_weight_cache(model)
    assert model.first.is_stale and model.second.is_stale
    model(torch.randn(2, 64).to(BF16))
    assert not model.first.is_stale
    discarded = enable_fp8_gemm(net())
    for refused in (lambda: recipes.invalidate_weight_cache(discarded), discarded.first.invalidate_weight_cache):
        with pytest.raises(UnsupportedError, match="not kept"):
            refused()
    recipes.materialize_fp8_weight(discarded, "cpu")
    for function in (recipes.materialize_fp8_weight, recipes.invalidate_weight_cache):
        with pytest.raises(ConfigError, match="no quantized layers"):
            function(net())


@pytest.mark.parametrize(("mode", "scheme"), [("int8", INT8_DYNAMIC), ("fp8", FP8_DYNAMIC)])
def test_w8a8(mode: str, scheme: Scheme) -> None:
    model = net()
    assert recipes.apply_w8a8_monkey_patch(model, mode) is model
    assert model.first.scheme == model.second.scheme == scheme
    some = recipes.apply_w8a8_monkey_patch(net(), w8a8_mode=mode, module_filter=lambda name, module: name == "first")
    assert type(some.second) is nn.Linear
    quantized = quantize_model(net(), "FP8_DYNAMIC")
    recipes.apply_w8a8_monkey_patch(quantized, mode)
    assert quantized.first.scheme == scheme
    x = torch.randn(40, 64).to(BF16).requires_grad_()
    for one in (model, quantized):
        out = one(x)
        assert (out - net()(x)).norm() < 0.06 * out.norm()
    model(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("mode", "scheme"), [("int8", INT8_DYNAMIC), ("fp8", FP8_DYNAMIC)])
def test_w8a8_under_adapters(mode: str, scheme: Scheme) -> None:
    torch.manual_seed(0)
    model = get_peft_model(net(FP32), LoraConfig(target_modules=["first"], init_lora_weights=False))
    x, before = torch.randn(40, 64), copy.deepcopy(model)
    recipes.apply_w8a8_monkey_patch(model, mode)
    layer = model.base_model.model.first
    assert type(layer.base_layer) is QuantizedLinear and layer.base_layer.scheme == scheme
    assert type(model.base_model.model.second) is nn.Linear, "it has no adapter"
    assert (model(x) - before(x)).norm() < 0.06 * before(x).norm()
    model(x).sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora" in name]
    assert grads and all(grad is not None for grad in grads)
    merged, dense = model.merge_and_unload(), before.merge_and_unload()
    assert type(merged.first) is QuantizedLinear and merged.first.scheme == scheme
    assert (merged(x) - dense(x)).norm() < 0.06 * dense(x).norm()


def test_w8a8_refused() -> None:
    with pytest.raises(ConfigError, match=r"w8a8_mode='int4'.*int8, fp8"):
        recipes.apply_w8a8_monkey_patch(net(), "int4")
    config = MixtralConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    model = quantize_model(MixtralForCausalLM(config).to(BF16), "FP8_DYNAMIC")
    with pytest.raises(UnsupportedError, match="backend='int8'"):
        recipes.apply_w8a8_monkey_patch(model)
    peft = get_peft_model(net(), LoraConfig(target_modules=["first"]))
    with pytest.raises(ConfigError, match="no plain Linear under one"):
        recipes.apply_w8a8_monkey_patch(peft, module_filter=lambda name, module: False)
    peft.merge_adapter()
    with pytest.raises(UnsupportedError, match="unmerge_adapter"):
        recipes.apply_w8a8_monkey_patch(peft)


def test_gemm_options() -> None:
    with pytest.raises(ConfigError, match=r"'disk'.*keep, cpu_offload, discard"):
        FP8GemmOptions(fp16_weight_storage="disk")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"materialize_fp8_on_wrap.*when the layer is made"):
        FP8GemmOptions(materialize_fp8_on_wrap=False)
    with pytest.raises(ConfigError, match=r"'cast_input'.*cast_inputs, cast_output_back"):
        enable_fp8_gemm(net(), options={"cast_input": True})
    with pytest.raises(UnsupportedError, match="materialize_fp8_on_wrap"):
        enable_fp8_gemm(net(), options={"materialize_fp8_on_wrap": False})
