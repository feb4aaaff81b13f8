"""Merging adapters into quantized layers: what is kept, what is reported, what is saved, and the way back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoHaConfig, LoraConfig, get_peft_model
from support.adapted import adapted, held
from support.build import IDS, STATIC_TENSOR, error, load, logits, stock_transformers, tensors, tiny_llama, write
from torch import nn
from transformers import AutoModelForCausalLM

import hf_fp8
from hf_fp8 import FP8Config, QuantizedLinear, dequantize_model, merging, quantize_model
from hf_fp8.errors import ConfigError, ScaleError, UnsupportedError
from hf_fp8.formats import numerics
from hf_fp8.formats.code_types import FP8, INT8
from hf_fp8.formats.scheme import ROW, TENSOR, Granularity
from hf_fp8.formats.weights import Change, quantize_weight
from hf_fp8.nn.base import QuantizedModule

WEIGHTS: dict[str, dict[str, Any]] = {
    "channel": {},
    "channel, float32 scales": {"scale_dtype": torch.float32},
    "tensor, static inputs": {"weight": TENSOR, "inputs": STATIC_TENSOR},
    "block": {"weight": Granularity(32, 32)},
    "group": {"weight": Granularity(1, 32)},
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_there_and_back(case: str, rounding: str, tmp_path: Path) -> None:
    """Merged outputs are near; the saved checkpoint gives them to the bit; and the base comes back byte for byte."""
    write(tiny_llama(), tmp_path / "fp8", **WEIGHTS[case])
    model = adapted(load(tmp_path / "fp8"))
    before, base = logits(model), held(model)
    torch.manual_seed(7)
    with merging(rounding=rounding) as report:
        model.merge_adapter()
        merged = held(model)
        assert merged.keys() == base.keys()
        assert sum(not torch.equal(merged[name], base[name]) for name in base) >= 14
        # Weights rounded again in all 14 linears of a model of random weights, which does not average errors out.
        assert error(logits(model), before) < (0.2 if rounding == "stochastic" else 0.15)
        assert len(report.layers) == 14 and 0.9 < report.kept < 1.1
        model.unmerge_adapter()
        assert not report.layers
    assert all(torch.equal(tensor, base[name]) for name, tensor in held(model).items())
    assert torch.equal(logits(model), before)
    torch.manual_seed(7)  # the same draws
    with merging(rounding=rounding):
        plain = model.merge_and_unload()
    inside = {name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor for name, tensor in merged.items()}
    assert inside.keys() == held(plain).keys() and all(torch.equal(t, inside[name]) for name, t in held(plain).items())
    plain.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert torch.equal(logits(again), logits(plain))
    read, written = tensors(tmp_path / "fp8"), tensors(tmp_path / "merged")
    assert read.keys() == written.keys()
    assert all(written[name].dtype == t.dtype and written[name].shape == t.shape for name, t in read.items() if "_proj" in name)
    assert all(torch.equal(t, written[name]) for name, t in read.items() if name.endswith("input_scale"))


def test_stock_reads_what_was_merged(fp8: Path, tmp_path: Path) -> None:
    model = adapted(load(fp8)).merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    wanted = logits(load(tmp_path / "merged", FP8Config(backend="scaled_mm")))
    with stock_transformers():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert error(logits(stock), wanted) < 1e-5


@pytest.mark.parametrize("backend", ["weight_only", "int8"])
def test_small_changes_are_not_rounded_away(backend: str, fp8: Path) -> None:
    """Weights lie on codes, and go back there from anywhere within half a step."""
    kept = {}
    for rounding in ("nearest", "stochastic"):
        model = adapted(load(fp8, FP8Config(backend=backend)), std=1e-4)
        with merging(rounding=rounding) as report:
            model.merge_adapter()
        kept[rounding] = report.kept
        assert f"{report.kept:.0%}" in str(report)
    assert kept["nearest"] < 0.2 and 0.8 < kept["stochastic"] < 1.2


def test_what_is_lost_is_said(fp8: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(load(fp8), std=1e-4)
    model.merge_adapter()
    assert "14 quantized layers" in caplog.text and "hf_fp8.merging('dense')" in caplog.text and "is lost" not in caplog.text
    model.unmerge_adapter()
    caplog.clear()
    with merging(rounding="nearest") as report:
        model.merge_adapter()
    assert not caplog.text and report.kept < 0.2  # who asked for a report reads it
    worst = min(report.layers.values(), key=lambda layer: layer.change.kept)
    assert worst.name in str(report) and not worst.dense and "is lost" in str(report) and worst.change.noise > 0


@pytest.mark.parametrize("options", [{"into": "dense"}, {"rounding": "nearest", "least_kept": 0.5}])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_dense_keeps_all(options: dict[str, Any], targets: Any, fp8: Path, tmp_path: Path) -> None:
    model = adapted(load(fp8), std=1e-4, target_modules=targets)
    before, base = logits(model), held(model)
    with merging(**options) as report:
        model.merge_adapter()
        assert error(logits(model), before) < 1e-6
        model.unmerge_adapter()
        assert all(torch.equal(tensor, base[name]) for name, tensor in held(model).items())
        plain = model.merge_and_unload()
    assert {layer.dense for layer in report.layers.values()} == {True} and report.kept == 1
    assert all(type(plain.get_submodule(name)) is nn.Linear for name in report.layers)
    plain.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged") if targets != "all-linear" else AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert error(logits(again), before) < 1e-6
    found = getattr(again.config, "quantization_config", None)
    assert (found is None) == (targets == "all-linear")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_variants(options: dict[str, Any], tmp_path: Path) -> None:
    write(tiny_llama(attention_bias=True), tmp_path)
    model = adapted(load(tmp_path), target_modules=["q_proj", "o_proj"], **options)
    for name, parameter in model.named_parameters():
        if "magnitude" in name or "lora_B" in name:
            parameter.data *= 1.1
    before, base = logits(model), held(model)
    bias = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias.clone()
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert error(logits(model), before) < 0.1
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)
        assert all(torch.equal(tensor, base[name]) for name, tensor in held(model).items())
        assert torch.equal(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias, bias)


def test_several_adapters_are_rounded_once(fp8: Path) -> None:
    """Merged one after the other, they give what they give merged at once: each time from the base as it was."""
    model = adapted(load(fp8), target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    base, both = held(model), logits(model)
    model.merge_adapter(["default"])
    one = held(model)
    torch.manual_seed(7)
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    in_turn = held(model)
    assert error(logits(model), both) < 0.1
    model.unmerge_adapter()
    torch.manual_seed(7)
    model.merge_adapter()
    assert all(torch.equal(tensor, in_turn[name]) for name, tensor in held(model).items())
    assert any(not torch.equal(tensor, in_turn[name]) for name, tensor in one.items())
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="unmerged"):
        model.unmerge_adapter()
    assert all(torch.equal(tensor, base[name]) for name, tensor in held(model).items())


def test_disabled_while_merged(fp8: Path) -> None:
    """PEFT unmerges in the forward then."""
    model = adapted(load(fp8))
    plain, before = logits(load(fp8)), logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("into", ["quantized", "dense"])
def test_broken_adapters_change_nothing(into: str, safe: bool, fp8: Path) -> None:
    model = adapted(load(fp8), target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    before, base, good = logits(model), held(model), layer.lora_B["default"].weight.data.clone()
    layer.lora_B["default"].weight.data[0, 0] = torch.inf
    error_class, words = (ValueError, "broken") if safe else (ScaleError, r"layers\.1\.self_attn\.q_proj")
    with merging(into), pytest.raises(error_class, match=words):
        model.merge_adapter(safe_merge=safe)
    assert not layer.merged and isinstance(layer.base_layer, QuantizedLinear)
    model.unmerge_adapter()  # what came before it
    layer.lora_B["default"].weight.data = good
    assert all(torch.equal(tensor, base[name]) for name, tensor in held(model).items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("originals", ["keep", "offload"])
def test_originals_are_merged_into(originals: str) -> None:
    """The adapter is added to the float weight that was kept, which stays beside the new codes."""
    model = quantize_model(tiny_llama().float(), "FP8_WEIGHT_ONLY", originals=originals)
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).original.clone()
    model = adapted(model, target_modules=["up_proj"])
    delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
    merged = model.merge_and_unload().get_submodule(name)
    assert error(merged.original, weight + delta) < 1e-6 and error(merged.dequantized_weight(), weight + delta) < 0.05
    assert torch.equal(dequantize_model(copy.deepcopy(merged)).weight, merged.original)


@pytest.mark.parametrize("options", [{"into": "bf16"}, {"rounding": "up"}, {"least_kept": 0.9}])
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be one of|is for rounding='nearest'"), merging(**options):
        pass


def test_an_adapter_that_does_nothing_changes_nothing(fp8: Path) -> None:
    """Scales that are not the largest value over 448 stay, too, and with them all codes."""
    model = load(fp8)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.weight_scale.data *= 1.3
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    base, before = held(model), logits(model)
    with merging() as report:
        assert "no quantized layer" in str(report)
        model.merge_adapter()
    assert "change nothing" in str(report)
    assert all(torch.equal(tensor, base[name]) for name, tensor in held(model).items())
    assert torch.equal(logits(model), before)


def test_made_dense_while_merged(fp8: Path, tmp_path: Path) -> None:
    """Unmerging gives back the dense layer, not codes."""
    model = adapted(load(fp8))
    before = logits(model)
    model.merge_adapter()
    dequantize_model(model.get_base_model(), torch.float32)
    model.unmerge_adapter()
    assert not [m for m in model.modules() if isinstance(m, QuantizedModule)]
    assert error(logits(model), before) < 1e-6


def test_merged_again_after_it_was_made_dense() -> None:
    """Into the dense layers, with nothing rounded."""
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model = adapted(quantize_model(net, backend="weight_only"), target_modules=["0", "2"])
    x = torch.randn(5, 32)
    wanted = {None: model(x)}
    model.merge_adapter()
    dequantize_model(model.get_base_model(), torch.float32)
    model.add_adapter("b", LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    model.merge_adapter(["b"])
    assert not [m for m in model.modules() if isinstance(m, QuantizedModule)]
    model.unmerge_adapter()
    assert error(model(x), wanted[None]) < 1e-6
    plain = model.merge_and_unload(adapter_names=["default"])
    assert error(plain(x), wanted[None]) < 1e-6 and not [m for m in plain.modules() if isinstance(m, QuantizedModule)]


def test_shallow_copies_are_the_same_adapter() -> None:
    """As in PEFT: modules and lists are shared, so that either is merged and unmerged through the other."""
    for dense in (False, True):
        net = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
        model = adapted(net if dense else quantize_model(net, backend="weight_only"), target_modules=["0"])
        layer, x = model.base_model.model[0], torch.randn(5, 32)
        before = layer(x)
        for first, second in ((copy.copy(layer), layer), (layer, copy.copy(layer))):
            first.merge()
            assert first.merged and second.merged
            assert error(first(x), before) < 0.1 and torch.equal(first(x), second(x))
            second.unmerge()
            assert not first.merged and not second.merged
            assert error(first(x), before) < 1e-6 and error(second(x), before) < 1e-6


def test_cast_while_merged(fp8: Path) -> None:
    """The weight is read in the dtype of the model afterwards, too."""
    model = adapted(load(fp8, dtype=torch.bfloat16), target_modules=["q_proj"])
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert isinstance(base, QuantizedLinear) and (base.weight * 1).dtype == torch.float32


def test_a_bias_is_cast_with_the_layer_that_it_was_merged_into() -> None:
    model = adapted(quantize_model(nn.Sequential(nn.Linear(32, 32), nn.ReLU()).bfloat16()), target_modules=["0"])
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    assert model.base_model.model[0].base_layer.bias.dtype == torch.float32


def test_adapters_of_several_kinds_on_a_layer(fp8: Path) -> None:
    """PEFT's mixed model, which takes inner adapters out while it merges: all are merged, and rounded once."""
    model = get_peft_model(load(fp8), LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False), mixed=True)
    model.add_adapter("b", LoHaConfig(target_modules=["q_proj"], r=4, init_weights=False))
    model.set_adapter(["default", "b"])
    before = logits(model)
    model.merge_adapter()
    merged = [module.dequantized_weight() for module in model.modules() if isinstance(module, QuantizedLinear)]
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    plain = model.merge_and_unload()
    assert error(logits(plain), before) < 0.1
    found = [module.dequantized_weight() for module in plain.modules() if isinstance(module, QuantizedLinear)]
    assert len(found) == len(merged) == 14
    assert all(error(a, b) < 0.06 for a, b in zip(found, merged, strict=True))


def test_hooks_stay_when_another_adapter_is_added(fp8: Path) -> None:
    model = adapted(load(fp8), target_modules=["q_proj"], use_dora=True)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    calls: list[str] = []

    class Counts(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append("forward")
            return args, kwargs

    add_hook_to_module(layer.lora_magnitude_vector["default"], Counts())
    merge = layer.merge
    layer.merge = lambda *args, **kwargs: (calls.append("merge"), merge(*args, **kwargs))
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"], use_dora=True))
    logits(model)
    assert calls == ["forward"]
    model.merge_adapter()
    assert set(calls[1:]) == {"merge"} and isinstance(layer.base_layer, QuantizedLinear)


def test_merged_in_inference_mode_and_trained_on(fp8: Path) -> None:
    model = adapted(load(fp8))
    with torch.inference_mode():
        model.merge_adapter()
    model = get_peft_model(model.merge_and_unload(), LoraConfig(target_modules=["q_proj"]))
    model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("into", ["quantized", "dense"])
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"], ids=str)
def test_a_weight_is_changed_at_the_start_only_while_nothing_is_merged(into: str, targets: Any, fp8: Path) -> None:
    model = adapted(load(fp8), target_modules=targets)
    before, base = logits(model), held(model)
    with merging(into):
        model.merge_adapter()
    with pytest.raises(UnsupportedError, match="unmerge them first"):
        model.add_adapter("pissa", LoraConfig(target_modules=targets, init_lora_weights="pissa"))
    model.unmerge_adapter()
    assert all(torch.equal(tensor, base[name]) for name, tensor in held(model).items())
    assert torch.equal(logits(model), before)


def test_calibrated_while_merged() -> None:
    model = quantize_model(tiny_llama().float(), "FP8")
    model = adapted(model, target_modules=["q_proj"])
    model.merge_adapter()
    with hf_fp8.calibrate(model.get_base_model()):
        model(IDS, use_cache=False)
    model.unmerge_adapter()
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_rounding_by_chance(dtype: torch.dtype) -> None:
    """Values that are codes stay; all others become one of their two neighbours, and their mean stays."""
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = every[every.isfinite()].unique()
    assert torch.equal(numerics.stochastic_round(codes, dtype, generator), codes)
    x = torch.randn(500) * torch.logspace(-4, 2, 500)
    many = torch.stack([numerics.stochastic_round(x, dtype, generator) for _ in range(2000)]).clamp(codes.min(), codes.max())
    assert bool(torch.isin(many, codes).all())
    above = torch.searchsorted(codes, x.clamp(codes.min(), codes.max())).clamp(1, len(codes) - 1)
    low, high = codes[above - 1], codes[above]
    inside = (x > codes.min()) & (x < codes.max())
    assert bool(((many >= low) & (many <= high))[:, inside].all())
    error_of_mean = (many.mean(0) - x)[inside].abs() / (high - low)[inside]
    assert float(error_of_mean.max()) < 5 * 0.5 / 2000**0.5  # five deviations of a coin


def test_a_change_in_numbers() -> None:
    w, m = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.2])
    change = Change()
    change.add(w, m, torch.tensor([1.0, 2.1]))
    assert change.kept == pytest.approx(0.5, abs=1e-6) and change.size == pytest.approx(0.2 / 5.84**0.5, rel=1e-5)
    assert change.error == pytest.approx(0.1 / 5.84**0.5, rel=1e-5) and Change().kept == 1


@pytest.mark.parametrize("granularity", [ROW, TENSOR, Granularity(16, 16), Granularity(1, 16)], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantized_to_a_scale_of_another_dtype(granularity: Granularity, scale_dtype: torch.dtype) -> None:
    """The scale that is stored is the one that was divided by: no code is further off than half a step."""
    weight = torch.randn(24, 40)
    weight[3] = 0
    for size in (1.0, 1e-3, 3e-5, 1e-6):
        fresh = torch.full_like(quantize_weight(weight, granularity)[1], 1e9).to(scale_dtype)
        codes, scale = quantize_weight(weight * size, granularity, FP8, fresh)
        assert scale.dtype == scale_dtype and bool((scale > 0).all())
        largest = numerics.dequantize(codes, scale, granularity).abs().amax()
        # float16 has steps of 6e-8: of the smallest, codes hold the largest at least.
        assert abs(float(largest / (weight * size).abs().amax()) - 1) < 0.07
    codes, scale = quantize_weight(weight, granularity, FP8, fresh)
    steps = numerics.quantize(weight, scale.float(), granularity)
    assert torch.equal(codes.view(torch.uint8), steps.view(torch.uint8))
