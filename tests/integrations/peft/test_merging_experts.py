"""Merging adapters into stacks of experts, in every family's layout; and experts beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from support.adapted import adapted, held
from support.build import error, load, logits
from support.moe import deepseek_v3, gpt_oss, llama4, mixtral, qwen3_moe
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_fp8 import FP8Config, QuantizedExperts, dequantize_model, merging
from hf_fp8.formats.weights import Change

FAMILIES = [mixtral, qwen3_moe, gpt_oss, llama4, deepseek_v3]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts(family: Any, tmp_path: Path) -> None:
    """Adapters on stacks: what they give is what they give on the dense family, in every layout; merged and back, saved."""
    family().save_pretrained(tmp_path / "dense")
    config = FP8Config("FP8_DYNAMIC", backend="weight_only", experts="fp8")
    made: list[PreTrainedModel] = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
        for _ in range(2)
    ]
    dequantize_model(made[1], torch.float32)
    ours, dense = (adapted(model, target_modules=["q_proj"], target_parameters=EXPERTS) for model in made)
    # bfloat16 biases of gpt-oss and the like are the same in both
    found, plain = logits(ours), None
    with ours.disable_adapter():
        plain = logits(ours)
    assert error(found, logits(dense)) < 1e-5 and error(found, plain) > 0.01
    base = held(ours)
    with merging() as report:
        ours.merge_adapter()
    assert error(logits(ours), found) < 0.25 and 0.95 < report.kept < 1.05
    assert any(isinstance(module, QuantizedExperts) for module in ours.modules())
    ours.unmerge_adapter()
    assert all(torch.equal(tensor, base[name]) for name, tensor in held(ours).items()) and torch.equal(logits(ours), found)
    merged = ours.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    keep = FP8Config(backend="weight_only", experts="fp8")
    assert torch.equal(logits(load(tmp_path / "merged", keep)), logits(merged))


@pytest.mark.parametrize("family", [qwen3_moe, gpt_oss])
def test_experts_left_dense(family: Any, tmp_path: Path) -> None:
    family().save_pretrained(tmp_path / "dense")
    config = FP8Config("FP8_DYNAMIC", backend="weight_only", experts="fp8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
    model = adapted(model, target_modules=["q_proj"], target_parameters=EXPERTS)
    before = logits(model)
    with merging("dense"):
        model.merge_adapter()
        assert error(logits(model), before) < 1e-5
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)
        merged = model.merge_and_unload()
    assert not any(isinstance(module, QuantizedExperts) for module in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    assert error(logits(load(tmp_path / "merged")), before) < 1e-5


def test_one_stack_of_two(tmp_path: Path) -> None:
    """The other one is not touched; and PEFT, which looks at the base before it merges, gives back what was merged."""
    mixtral().save_pretrained(tmp_path)
    for name in EXPERTS:
        config = FP8Config("FP8_DYNAMIC", backend="weight_only", experts="fp8")
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
        model = adapted(model, target_modules=[], target_parameters=[name])
        before, base = logits(model), held(model)
        with merging() as report:
            model.merge_adapter()
        other = next(part for part in EXPERTS if part != name).rpartition(".")[2]
        assert all(torch.equal(tensor, base[leaf]) for leaf, tensor in held(model).items() if f".{other}" in leaf)
        assert any(not torch.equal(tensor, base[leaf]) for leaf, tensor in held(model).items())
        assert 0.95 < report.kept < 1.05 and all(layer.endswith("experts") for layer in report.layers)
        model.unmerge_adapter()
        with merging("dense"):
            assert error(logits(model.merge_and_unload()), before) < 1e-5


def test_a_second_adapter_on_experts(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "base")
    config = FP8Config("FP8_DYNAMIC", backend="weight_only", experts="fp8")

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)

    model = adapted(base(), target_modules=["q_proj"], target_parameters=EXPERTS)
    first, codes = logits(model), held(model)
    model.save_pretrained(tmp_path / "first")
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], target_parameters=EXPERTS, r=4, init_lora_weights=False))
    model.set_adapter("other")
    second = logits(model)
    assert error(first, second) > 0.01
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    with merging("dense"):
        model.merge_adapter()
        assert error(logits(model), both) < 1e-5
        model.unmerge_adapter()
    assert all(torch.equal(tensor, codes[name]) for name, tensor in held(model).items())
    # Loaded on the meta device first, adapters are not cast to the dtype of codes either.
    again = PeftModel.from_pretrained(base(), tmp_path / "first", low_cpu_mem_usage=True)
    assert torch.equal(logits(again), first)


@pytest.mark.usefixtures("no_native")
def test_experts_that_were_dense_keep_what_was_merged(tmp_path: Path) -> None:
    """Under "auto" a CPU holds a mixture's experts dense and writes them back in FP8: by chance, too."""
    mixtral().save_pretrained(tmp_path / "base")
    config = FP8Config("FP8_DYNAMIC", backend="weight_only", experts="fp8")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    made.save_pretrained(tmp_path / "fp8")
    base = load(tmp_path / "fp8")
    assert not [m for m in base.modules() if isinstance(m, QuantizedExperts)]
    model = adapted(load(tmp_path / "fp8"), std=1e-3, target_modules=[], target_parameters=EXPERTS)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    was, wanted, found = (m.get_parameter(name).detach() for m in (base, merged, again))
    change = Change()
    change.add(was, wanted, found)
    assert 0.8 < change.kept < 1.2
