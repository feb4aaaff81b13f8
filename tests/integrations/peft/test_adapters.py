"""PEFT over quantized layers: what is trained and saved beside adapters, where they load, and what is refused."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from support.build import IDS, error, load, logits, tiny_llama, write
from support.moe import mixtral
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

import hf_fp8
from hf_fp8 import FP8Config, QuantizedLinear, dequantize_model, merging, quantize_model
from hf_fp8.errors import UnsupportedError
from hf_fp8.formats.code_types import FP8

Q = LoraConfig(target_modules=["q_proj"], r=4)


def noisy(model: Any) -> Any:
    """With adapters that do something."""
    torch.manual_seed(3)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def dense(fp8: Path, tmp_path: Path) -> Path:
    """The same checkpoint, multiplied out."""
    dequantize_model(load(fp8), torch.float32).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.thinned(4)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"target_modules": "all-linear"}], ids=str)
@pytest.mark.parametrize("backend", ["weight_only", "scaled_mm", "int8"])
def test_saved_adapters_load_on_either_base(
    backend: str, options: dict[str, Any], fp8: Path, dense: Path, tmp_path: Path
) -> None:
    model = noisy(get_peft_model(load(fp8, FP8Config(backend=backend)), LoraConfig(**{"target_modules": ["q_proj"]} | options)))
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in held.values())
    again = PeftModel.from_pretrained(load(fp8, FP8Config(backend=backend)), tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)
    on_dense = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), tmp_path / "adapter")
    assert error(logits(on_dense), wanted) < {"weight_only": 1e-6, "scaled_mm": 0.15, "int8": 0.05}[backend]
    there = PeftModel.from_pretrained(load(fp8, FP8Config(backend=backend)), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(logits(there), wanted) and not any(p.is_meta for p in there.parameters())


def test_transformers_own_way(fp8: Path, dense: Path, tmp_path: Path) -> None:
    model = load(fp8)
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        # transformers 5.24 asks for a PEFT that is not published: `get_peft_model` does not ask.
        with pytest.raises(ValueError, match=MIN_PEFT_VERSION):
            model.add_adapter(LoraConfig(target_modules=["q_proj"]))
        pytest.skip(f"transformers {transformers.__version__} asks for PEFT {MIN_PEFT_VERSION}")
    model.add_adapter(LoraConfig(target_modules=["q_proj", "down_proj"]))
    wanted = logits(noisy(model))
    model.save_pretrained(tmp_path / "adapter")
    again, on_dense = load(fp8), AutoModelForCausalLM.from_pretrained(dense)
    again.load_adapter(tmp_path / "adapter")
    on_dense.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again), wanted) and error(logits(on_dense), wanted) < 1e-6
    # By the adapter's folder alone, which names its base.
    assert torch.equal(logits(load(tmp_path / "adapter")), wanted)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("backend", ["weight_only", "int8"])
def test_adapters_are_never_cast_to_the_dtype_of_codes(backend: str, autocast_adapter_dtype: bool, fp8: Path) -> None:
    """PEFT takes that of the weight, where it does not go to float32."""
    model = load(fp8, FP8Config(backend=backend), dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=autocast_adapter_dtype)
    adapter = model.base_model.model.model.layers[0].self_attn.q_proj
    assert adapter.lora_A["default"].weight.dtype == (torch.float32 if autocast_adapter_dtype else torch.bfloat16)
    values = adapter.lora_A["default"].weight.detach().float()
    assert not torch.equal(values, values.to(FP8).float())
    model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("backend", ["weight_only", "int8"])
@pytest.mark.parametrize("saved", ["lm_head", "mlp"])
def test_modules_to_save_are_float_copies(saved: str, backend: str, tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path / "fp8", quantized=lambda n: n.endswith(("_proj.weight", "head.weight")), ignore=[])
    config = FP8Config(backend=backend)
    model = get_peft_model(load(tmp_path / "fp8", config), LoraConfig(target_modules=["q_proj"], modules_to_save=[saved]))
    copies = [m for name, m in model.named_modules() if f"{saved}.modules_to_save" in name and isinstance(m, nn.Linear)]
    originals = [
        m for name, m in model.named_modules() if f"{saved}.original_module" in name and isinstance(m, QuantizedLinear)
    ]
    assert len(copies) == len(originals) and all(type(m) is nn.Linear for m in copies)
    assert not any(p.requires_grad for m in originals for p in m.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(tmp_path / "fp8", config), tmp_path / "adapter")), wanted)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    if backend == "weight_only":
        again = load(tmp_path / "merged")
        assert torch.equal(logits(again), logits(merged))
        assert [m for m in again.modules() if isinstance(m, QuantizedLinear)]


def test_several_adapters(fp8: Path) -> None:
    model = noisy(get_peft_model(load(fp8), Q))
    first = logits(model)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True))
    model.set_adapter("other")
    second = logits(noisy(model))
    assert error(first, second) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(fp8)))
    model.set_adapter("default")
    assert torch.equal(wanted := logits(model), first)
    mixed = noisy(get_peft_model(load(fp8), Q))
    first = logits(mixed)
    with torch.no_grad():
        rows = mixed.eval()(IDS, use_cache=False, adapter_names=["default", "__base__"]).logits
    assert error(rows[0], first[0]) < 1e-6 and error(rows[1], logits(load(fp8))[1]) < 1e-6
    model.delete_adapter("other")
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_prepared_as_other_quantized_models_are(reentrant: bool | None, fp8: Path) -> None:
    """Frozen, all but codes and scales in float32, checkpointed; and adapters learn then."""
    options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model = peft.prepare_model_for_kbit_training(load(fp8, FP8Config(backend="scaled_mm"), dtype=torch.bfloat16), **options)
    assert model.is_gradient_checkpointing and not any(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "is_loaded_in_8bit")
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.dtype == FP8 and layer.self_attn.q_proj.weight_scale.dtype == torch.bfloat16
    assert layer.input_layernorm.weight.dtype == model.lm_head.weight.dtype == torch.float32
    model = get_peft_model(model, Q).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_on_an_offloaded_base(fp8: Path) -> None:
    wanted = get_peft_model(load(fp8), Q)
    model = load(fp8)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="DoRA"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True))
    model = get_peft_model(model, Q)
    assert not any(p.is_meta for name, p in model.named_parameters() if "lora_" in name)
    assert torch.equal(logits(model), logits(wanted))
    with pytest.raises(UnsupportedError, match="offloaded"):
        noisy(model).merge_adapter()


@pytest.mark.parametrize("saved", [["lm_head"], ["mlp"]])
def test_prepared_with_float_copies_and_merged_dense(saved: list[str], tmp_path: Path) -> None:
    """All in one dtype, float32, after the model was loaded in bfloat16."""
    write(tiny_llama(), tmp_path, quantized=lambda n: n.endswith(("_proj.weight", "head.weight")), ignore=[])
    model = peft.prepare_model_for_kbit_training(load(tmp_path, dtype=torch.bfloat16))
    model = noisy(get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=saved)))
    model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = logits(model)
    with merging("dense"):
        model.merge_adapter()
    assert error(logits(model), wanted) < 1e-5


def test_float_copies_of_experts_have_the_dtype_of_the_model(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    config = FP8Config("FP8_DYNAMIC", backend="weight_only", experts="fp8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    in_place = quantize_model(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), experts="fp8")
    for model in (loaded, in_place):
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]))
        copied = model.base_model.model.model.layers[0].mlp.experts.modules_to_save["default"]
        assert {p.dtype for p in copied.parameters()} == {torch.float32}
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert copied.down_proj.grad is not None


def test_dora_starts_where_the_model_is_though_originals_were_kept() -> None:
    model = quantize_model(tiny_llama().float(), "FP8_WEIGHT_ONLY", originals="keep")
    before = logits(model)
    assert error(logits(get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True))), before) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.5}], ids=str)
def test_compiled_in_one_graph(options: dict[str, Any]) -> None:
    net = quantize_model(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), "FP8_WEIGHT_ONLY")
    model = get_peft_model(net, LoraConfig(target_modules=["0", "2"], init_lora_weights=False, **options))
    x, compiled = torch.randn(4, 32), torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    wanted = model(x)
    torch.manual_seed(0)
    assert error(compiled(x), wanted) < 1e-6


def test_a_parameter_of_a_linear_is_refused(fp8: Path) -> None:
    model = load(fp8)
    with pytest.raises(UnsupportedError, match=r"target_modules=\['q_proj'\]"):
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]))


def test_a_base_with_adapters_is_not_saved_as_a_checkpoint(fp8: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(fp8), Q)
    with pytest.raises(UnsupportedError, match="merge_and_unload"):
        model.get_base_model().save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    model.unload().save_pretrained(tmp_path / "base")
    assert torch.equal(logits(load(tmp_path / "base")), logits(load(fp8)))


@pytest.mark.parametrize("scheme", ["FP8_WEIGHT_ONLY", "INT8"])
def test_on_pointwise_convolutions(scheme: str) -> None:
    """Of any PyTorch model: PEFT takes them for the convolutions that they are."""
    torch.manual_seed(0)
    net = quantize_model(nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 8, 1, stride=2)), scheme, conv1x1=True)
    for module in net:
        if isinstance(module, QuantizedLinear):
            module.backend = "weight_only" if scheme != "INT8" else module.backend
    dense = dequantize_model(copy.deepcopy(net), torch.float32)
    x, found = torch.randn(2, 32, 32, 32), []
    for base in (net, dense):
        torch.manual_seed(1)
        model = noisy(get_peft_model(base, LoraConfig(target_modules=["0", "2"])))
        out = model(x)
        out.square().mean().backward()
        found.append((out, [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]))
    limit = 1e-6 if scheme != "INT8" else 0.02
    assert error(found[0][0], found[1][0]) < limit
    assert all(error(a, b) < 5 * limit for a, b in zip(found[0][1], found[1][1], strict=True))


def test_copies_and_pickles(fp8: Path, tmp_path: Path) -> None:
    model = noisy(get_peft_model(load(fp8), Q))
    wanted = logits(model)
    with merging():
        model.merge_adapter()
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(logits(twin), logits(model))
        twin.unmerge_adapter()
        assert torch.equal(logits(twin), wanted)


def test_dequantized_with_adapters_on(fp8: Path) -> None:
    model = noisy(get_peft_model(load(fp8), Q))
    wanted = logits(model)
    dequantize_model(model.get_base_model(), torch.float32)
    assert not [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert error(logits(model), wanted) < 1e-6
    merged = model.merge_and_unload()
    assert error(logits(merged), wanted) < 1e-6


def test_peft_gets_its_own_ways_back() -> None:
    def replaced() -> tuple[Any, ...]:
        return (
            BaseTuner.inject_adapter, ModulesToSaveWrapper.update, peft.prepare_model_for_kbit_training,
            peft.get_peft_model_state_dict, peft_model.get_peft_model_state_dict,
        )  # fmt: skip

    ours = replaced()
    hf_fp8.unregister()
    theirs = replaced()
    hf_fp8.register()
    hf_fp8.register()
    assert not any(f.__module__.startswith("hf_fp8") or "hf_fp8" in f.__code__.co_filename for f in theirs)
    assert all("hf_fp8" in f.__code__.co_filename for f in ours)
    assert all(a.__wrapped__ is b for a, b in zip(ours, theirs, strict=True))
    assert all(a.__wrapped__ is b for a, b in zip(replaced(), theirs, strict=True))


def test_adapters_on_dense_layers_are_not_touched(fp8: Path) -> None:
    """Beside those on quantized layers, which do all that they do when they are copied, or while hf_fp8 is not registered."""
    model = get_peft_model(load(fp8), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, use_dora=True))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    bound = {name for name, layer in layers.items() if any(isinstance(value, partial) for value in vars(layer).values())}
    assert bound == {name for name, layer in layers.items() if isinstance(layer.base_layer, QuantizedLinear)}
    assert 0 < len(bound) < len(layers)
    wanted, twin = logits(model), copy.deepcopy(model)
    hf_fp8.unregister()
    try:
        twin.merge_adapter()
    finally:
        hf_fp8.register()
    assert torch.equal(logits(model), wanted) and 0 < error(logits(twin), wanted) < 0.2
    twin.unmerge_adapter()
    assert error(logits(twin), wanted) < 1e-6  # PEFT takes an adapter out of a dense layer by subtracting it


@pytest.mark.parametrize("how", ["old", "unknown"])
def test_a_peft_that_is_not_known_is_refused(how: str, fp8: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too old, or built otherwise: importing hf_fp8 works, dense models do, and quantized ones are an error."""
    hf_fp8.unregister()
    with monkeypatch.context() as patch:
        if how == "old":
            patch.setattr(peft, "__version__", "0.18.1")
        else:
            patch.delattr("peft.tuners.lora.layer.ParamWrapper._activate_lora")
        hf_fp8.register()
        try:
            with pytest.raises(UnsupportedError, match=r"PEFT.*dequantize=True"):
                get_peft_model(load(fp8), Q)
            get_peft_model(AutoModelForCausalLM.from_pretrained(dense), Q)
        finally:
            hf_fp8.unregister()
    hf_fp8.register()
    get_peft_model(load(fp8), Q)


def test_dense_models_are_none_of_our_business(dense: Path) -> None:
    model = noisy(get_peft_model(AutoModelForCausalLM.from_pretrained(dense), Q))
    wanted = logits(model)
    model.merge_adapter()
    assert error(logits(model), wanted) < 1e-6
    model.unmerge_adapter()
    assert error(logits(model), wanted) < 1e-6
