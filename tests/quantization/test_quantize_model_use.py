"""What is done to models that quantize_model has changed: originals, hooks, casts, training, parts of transformers models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.build import IDS, differing, error, load, logits, sqnr, tensors, tiny_llama
from support.moe import MOE, causal
from torch import nn
from transformers import AutoModelForCausalLM

import hf_fp8
from hf_fp8 import (
    FP8Config,
    QuantizedExperts,
    QuantizedLinear,
    dequantize_model,
    load_quantized,
    quantize_model,
    requantize_model,
    save_quantized,
)
from hf_fp8.errors import ScaleError, StaleError, UnsupportedError
from hf_fp8.formats.code_types import FP8

ROTARY = 0.02  # the models of build.py have frequencies in bfloat16, loaded ones in float32
NO_CONFIG = "codes are saved without a quantization_config, and stock and we load them as values"
SCALED = FP8Config(backend="scaled_mm")
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8, bias=False)).to(dtype)


class Outer(nn.Module):
    """A transformers model as a part of one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = tiny_llama()
        torch.manual_seed(0)
        self.head = nn.Linear(64, 8, dtype=torch.bfloat16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.lm.model(ids).last_hidden_state)
        return out


def run(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(x)
    return out


@pytest.mark.parametrize("originals", ["keep", "offload"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_originals_come_back_to_the_bit(originals: str, dtype: torch.dtype) -> None:
    model = mlp(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = run(model, X.to(dtype))
    quantize_model(model, originals=originals)
    assert not [name for name in model.state_dict() if "original" in name] and model[0].original is not None
    twin = copy.deepcopy(model)
    assert twin[0].original.data_ptr() != model[0].original.data_ptr() and torch.equal(twin[0].original, model[0].original)
    for each in (model, twin):
        assert differing(before, dict(dequantize_model(each).state_dict())) == []
        assert torch.equal(run(each, X.to(dtype)), wanted)


@pytest.mark.parametrize("originals", ["keep", "offload"])
def test_codes_are_made_anew(originals: str) -> None:
    model = quantize_model(mlp(), originals=originals)
    old = run(model)
    with torch.no_grad():
        model[0].original[2].mul_(5)
    with pytest.raises(StaleError):
        run(model)
    requantize_model(model)
    fresh = mlp()
    fresh[0].weight.data[2].mul_(5)
    assert torch.equal(run(model), run(quantize_model(fresh))) and not torch.equal(run(model), old)
    model.load_state_dict(quantize_model(mlp()).state_dict())
    assert torch.equal(run(model), old) and model[0].original is None
    with pytest.raises(UnsupportedError, match="not kept"):
        requantize_model(model)
    mixed = quantize_model(mlp(), originals="keep")
    mixed[3].original, codes = None, mixed[0].weight
    with pytest.raises(UnsupportedError):
        requantize_model(mixed)
    assert mixed[0].weight is codes
    mixed[3].original = torch.full((8, 32), torch.nan)
    with pytest.raises(ScaleError):
        requantize_model(mixed)


def test_shared_weights_stay_shared_when_made_anew() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    quantize_model(model, originals="keep")
    requantize_model(model)
    assert model[0].weight is model[1].weight


def test_restored_after_casts() -> None:
    model = mlp()
    weight = model[0].weight.detach().clone()
    quantize_model(model, originals="keep").half()
    assert model[0].weight.dtype == FP8 and model[0].weight_scale.dtype == torch.float32
    assert model[0].bias.dtype == torch.float16 and run(model, X.half()).dtype == torch.float16
    model.double()
    assert run(model, X.double()).dtype == torch.float64
    assert torch.equal(dequantize_model(model)[0].weight, weight)


def test_dtype_of_what_is_dequantized() -> None:
    assert {p.dtype for p in dequantize_model(quantize_model(mlp())).parameters()} == {torch.float32}
    assert {p.dtype for p in dequantize_model(quantize_model(mlp()), torch.float16)[0].parameters()} == {torch.float16}


def test_dtype_of_linears_alone() -> None:
    model = quantize_model(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)))
    assert dequantize_model(model)(X).dtype == torch.float32


def test_frozen_layers_come_back_frozen() -> None:
    model = dequantize_model(quantize_model(mlp().requires_grad_(False), originals="keep"))
    assert not any(p.requires_grad for p in model.parameters())


def test_training_flags_and_gradients() -> None:
    model = mlp()
    model[0].eval()
    model[3].train()
    model[0].bias.requires_grad_(False)
    quantize_model(model, "FP8_WEIGHT_ONLY")
    assert not model[0].training and model[3].training and not model[0].bias.requires_grad
    assert not any(p.requires_grad for layer in (model[0], model[3]) for p in layer.parameters())
    dense = dequantize_model(copy.deepcopy(model))
    grads = []
    for each in (model, dense):
        x = X.clone().requires_grad_()
        each(x).square().sum().backward()
        grads += [x.grad, each[1].weight.grad]
    assert error(grads[0], grads[2]) < 1e-5 and error(grads[1], grads[3]) < 1e-5
    assert not dense[0].training and dense[3].training


@pytest.mark.parametrize("inplace", [True, False])
def test_hooks_are_taken_along(inplace: bool) -> None:
    model, seen = mlp(), list[str]()
    model[0].register_forward_pre_hook(lambda m, args: seen.append("pre"))
    model[0].register_forward_hook(lambda m, args, kwargs, out: seen.append("post"), with_kwargs=True)
    model[0].register_forward_hook(lambda m, args, out: out * 0)
    model[0].register_full_backward_pre_hook(lambda m, grad: seen.append("back pre"))
    model.register_forward_hook(lambda m, args, out: seen.append("whole"))
    new = quantize_model(model, inplace=inplace)
    new(X.clone().requires_grad_()).sum().backward()
    assert seen == ["pre", "post", "whole", "back pre"]
    seen.clear()
    run(dequantize_model(new))
    assert seen == ["pre", "post", "whole"]


def test_full_backward_hooks() -> None:
    model, seen = mlp(), list[str]()
    model[0].register_full_backward_hook(lambda m, grad_in, grad_out: seen.append("back"))
    quantize_model(model)(X.clone().requires_grad_()).sum().backward()
    assert seen == ["back"]


def test_handles_of_hooks_still_remove_them() -> None:
    model, seen = mlp(), list[str]()
    handle = model[0].register_forward_hook(lambda *_: seen.append("post"))
    quantize_model(model)
    handle.remove()
    run(model)
    assert seen == []


@pytest.mark.parametrize("originals", ["discard", "keep"])
def test_a_copy_has_tensors_of_its_own(originals: str) -> None:
    model = mlp()
    wanted = run(model)
    new = quantize_model(model, inplace=False, originals=originals)
    with torch.no_grad():
        for tensor in (*new.state_dict().values(), *(layer.original for layer in (new[0], new[3]) if originals == "keep")):
            if tensor.dtype != FP8:
                tensor.add_(1)
    assert torch.equal(run(model), wanted)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_copy_leaves_a_transformers_model_as_it_is(kind: str, tmp_path: Path) -> None:
    model, call = (tiny_llama(), logits) if kind == "llama" else (MOE[kind](), causal)
    wanted = call(model)
    new = quantize_model(model, "FP8_WEIGHT_ONLY", inplace=False)
    assert torch.equal(call(model), wanted) and sqnr(call(new), wanted) > 9
    assert getattr(model, "hf_quantizer", None) is None and "quantization_config" not in model.config.to_dict()
    assert not any(isinstance(m, QuantizedLinear | QuantizedExperts) for m in model.modules())
    model.save_pretrained(tmp_path)
    assert not [name for name, tensor in tensors(tmp_path).items() if tensor.dtype == FP8]


def test_compiled_exported_and_mapped() -> None:
    model = quantize_model(mlp(), "FP8_WEIGHT_ONLY")
    wanted = run(model)
    assert error(run(torch.compile(model, fullgraph=True, backend="aot_eager")), wanted) < 1e-6
    assert error(run(torch.export.export(model, (X,)).module()), wanted) < 1e-6
    assert error(torch.vmap(model)(X), wanted) < 1e-5


def test_dtypes_of_computing() -> None:
    model = quantize_model(mlp())
    with torch.autocast("cpu", torch.bfloat16):
        assert run(model).dtype == torch.bfloat16
    for cast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        layer = quantize_model(nn.Linear(16, 8), "FP8_WEIGHT_ONLY", compute_dtype=torch.bfloat16, cast_output=cast)
        plain = quantize_model(nn.Linear(16, 8), "FP8_WEIGHT_ONLY")
        plain.load_state_dict(layer.state_dict())
        assert run(layer).dtype == dtype and error(run(layer), run(plain, X.bfloat16())) < 5e-3
        assert copy.deepcopy(layer).compute_dtype == torch.bfloat16


def test_a_filter_that_raises_changes_nothing() -> None:
    def fails(name: str, module: nn.Module) -> bool:
        if name == "3":
            raise ZeroDivisionError
        return True

    model = mlp()
    with pytest.raises(ZeroDivisionError):
        quantize_model(model, filter_fn=fails)
    assert type(model[0]) is nn.Linear
    experts = MOE["mixtral"]()
    experts.model.layers[1].mlp.experts.down_proj.data[2, 3, 3] = torch.nan
    with pytest.raises(ScaleError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        quantize_model(experts)
    assert (
        not any(isinstance(m, QuantizedLinear) for m in experts.modules())
        and "quantization_config" not in experts.config.to_dict()
    )


# -- transformers models in others, and parts of them --


def saved_and_loaded(model: Any, path: Path) -> torch.Tensor:
    model.save_pretrained(path)
    return logits(load(path, SCALED, dtype=torch.bfloat16))


@pytest.mark.parametrize("scheme", ["FP8_WEIGHT_ONLY", "INT8_WEIGHT_ONLY"])
def test_a_transformers_model_in_another(scheme: str, tmp_path: Path) -> None:
    model = Outer()
    dense, plain = run(model, IDS), logits(model.lm)
    quantize_model(model, scheme)
    assert type(model.head) is QuantizedLinear and not isinstance(model.lm.lm_head, QuantizedLinear)
    assert sqnr(run(model, IDS), dense) > 12
    model.lm.save_pretrained(tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    options = {} if scheme.startswith("INT8") else {"quantization_config": SCALED}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", **options)
    assert error(logits(again), logits(model.lm)) < ROTARY and sqnr(logits(again), plain) > 12
    wanted = run(model, IDS)
    assert error(run(dequantize_model(model), IDS), wanted) < 0.02
    model.lm.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_transformers_model_in_another_that_was_loaded(tmp_path: Path) -> None:
    model = quantize_model(Outer(), "FP8_WEIGHT_ONLY")
    save_quantized(model, tmp_path / "outer")
    again = load_quantized(Outer(), tmp_path / "outer")
    assert torch.equal(run(again, IDS), run(model, IDS))
    with pytest.raises(UnsupportedError, match="does not describe"):  # nothing in the files says how to save it
        again.lm.save_pretrained(tmp_path / "lm")


@pytest.mark.parametrize("part", [
    "model.layers",
    "model.layers.0.mlp",
    "model",
])  # fmt: skip
def test_a_part_of_a_transformers_model(part: str, tmp_path: Path) -> None:
    """Right when it is saved as a whole, or refused."""
    model = tiny_llama()
    try:
        quantize_model(model.get_submodule(part), "FP8_WEIGHT_ONLY")
        model.save_pretrained(tmp_path / "saved")
    except hf_fp8.FP8Error:
        return
    assert error(logits(load(tmp_path / "saved", SCALED, dtype=torch.bfloat16)), logits(model)) < ROTARY


def test_filtered_edited_and_saved(tmp_path: Path) -> None:
    model = quantize_model(tiny_llama(), "FP8_WEIGHT_ONLY", filter_fn=lambda name, module: "mlp" in name, originals="keep")
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 6
    assert error(saved_and_loaded(model, tmp_path / "1"), logits(model)) < ROTARY
    model.model.layers[0].mlp.up_proj.original.mul_(2)
    requantize_model(model)
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
    assert error(saved_and_loaded(model, tmp_path / "2"), logits(model)) < ROTARY


def test_an_adapter_on_a_quantized_model() -> None:
    model = quantize_model(tiny_llama(), "FP8_WEIGHT_ONLY")
    wanted = logits(model)
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=4))
    assert error(logits(peft), wanted) < 1e-6
    peft(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in peft.named_parameters() if "lora_" in name)


def test_a_model_with_an_adapter(tmp_path: Path) -> None:
    peft = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=4))
    with pytest.raises(UnsupportedError, match="adapter"):
        quantize_model(peft, "FP8_WEIGHT_ONLY")
    assert not [m for m in peft.modules() if isinstance(m, QuantizedLinear)]


# -- what comes back --


@pytest.mark.parametrize("originals", ["discard", "keep"])
def test_each_layer_is_dense_again_in_its_own_dtype(originals: str) -> None:
    """Not in that of another layer; and its bias is the parameter that it was, whoever shares it."""

    def build() -> nn.Module:
        parts = nn.ModuleDict({"e": nn.Embedding(10, 16).half(), "a": nn.Linear(16, 16), "b": nn.Linear(16, 16).bfloat16()})
        parts["norm"] = nn.LayerNorm(16)
        parts["norm"].bias = parts["a"].bias
        parts["a"].bias.data[0] = 1e5  # beyond float16
        return parts

    model = build()
    bias = model["a"].bias
    hf_fp8.quantize_model(model, "FP8_WEIGHT_ONLY", originals=originals)
    hf_fp8.dequantize_model(model)
    assert {name: model[name].weight.dtype for name in ("a", "b")} == {"a": torch.float32, "b": torch.bfloat16}
    assert model["a"].bias is bias is model["norm"].bias and float(bias[0]) == 1e5
    assert hf_fp8.dequantize_model(hf_fp8.quantize_model(build()), torch.bfloat16)["a"].bias.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [
    {"filter_fn": lambda name, module: name == "enc"}, {"targets": ["enc"]}, {"ignore": ["dec"]}, {},
], ids=["filter_fn", "targets", "ignore", "all"])  # fmt: skip
def test_a_layer_with_two_names_is_one_layer(options: dict[str, Any]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc = self.dec = nn.Linear(16, 16)
            self.other = nn.Linear(16, 16)

    model = hf_fp8.quantize_model(Twice(), **options)
    assert model.enc is model.dec
    assert isinstance(model.enc, QuantizedLinear) == ("ignore" not in options)


def test_float64_inputs_under_autocast_stay_float64() -> None:
    layer = hf_fp8.quantize_model(nn.Sequential(nn.Linear(16, 16)).double(), backend="weight_only")
    dense = hf_fp8.dequantize_model(copy.deepcopy(layer))
    x = torch.randn(3, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == dense(x).dtype == torch.float64
        assert error(layer(x), dense(x)) < 1e-6


def test_quantizing_originals_again_changes_all_or_nothing() -> None:
    model = hf_fp8.quantize_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), originals="keep")
    before = model[0].dequantized_weight()
    for original, kind, words in (
        (torch.full((16, 16), torch.nan), ScaleError, "original of 1 has values"),
        (torch.zeros(8, 8), UnsupportedError, r"original of 1 has shape \[8, 8\]"),
    ):
        model[0].original, model[1].original = torch.ones(16, 16), original
        with pytest.raises(kind, match=words):
            hf_fp8.requantize_model(model)
        assert torch.equal(model[0].dequantized_weight(), before)


def test_biases_that_were_created_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        model = hf_fp8.dequantize_model(hf_fp8.quantize_model(nn.Sequential(nn.Linear(16, 16))))
    model(X).sum().backward()
    assert model[0].bias.grad is not None and model[0].weight.grad is not None
