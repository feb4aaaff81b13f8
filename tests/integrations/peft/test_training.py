"""The Trainer and plain loops over quantized models: each way to train that the README names learns something."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from support.build import IDS, error, load, logits, tiny_llama, write
from support.moe import gpt_oss, llama4, mixtral, qwen3_moe
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_fp8 import FP8Config, QuantizedExperts, QuantizedLinear, dequantize_model
from hf_fp8.formats.scheme import Granularity

BACKENDS = ["weight_only", "scaled_mm", "int8"]
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "DoRA": {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_dora": True, "lora_dropout": 0.05},
    "rsLoRA": {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "all-linear": {"target_modules": "all-linear"},
}
DATA = [{"input_ids": row, "labels": row} for row in IDS.repeat(2, 1)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    usual = {
        "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 2e-2, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip
    return TrainingArguments(str(folder), **(usual | options))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def lora(model: Any, r: int = 4, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=r, task_type="CAUSAL_LM", **options))


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.thinned(7)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_learns(way: str, backend: str, fp8: Path, tmp_path: Path) -> None:
    """And leaves the base as it was; what was learnt is about what is learnt over the dequantized model."""
    model = lora(load(fp8, FP8Config(backend=backend)), **WAYS[way])
    before = frozen(model)
    trainer = Trainer(model=model, args=arguments(tmp_path / "run"), train_dataset=DATA)
    trainer.train()
    found = losses(trainer)
    assert len(found) == 8 and all(map(math.isfinite, found)) and found[-1] < 0.85 * found[0]
    for name, tensor in frozen(model).items():
        assert torch.equal(tensor.contiguous().view(torch.uint8), before[name].contiguous().view(torch.uint8)), name
    dense = lora(dequantize_model(load(fp8), torch.float32), **WAYS[way])
    reference = Trainer(model=dense, args=arguments(tmp_path / "dense"), train_dataset=DATA)
    reference.train()
    # Rounded inputs make another, as good, way down.
    limit = {"weight_only": 1e-3, "scaled_mm": 0.05, "int8": 0.03}[backend] if "dropout" not in str(WAYS[way]) else 0.1
    assert abs(losses(reference)[-1] / found[-1] - 1) < limit


@pytest.mark.thinned(5)
@pytest.mark.parametrize("options", [
    {"gradient_accumulation_steps": 2},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"bf16": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_its_options(backend: str, options: dict[str, Any], fp8: Path, tmp_path: Path) -> None:
    model = lora(load(fp8, FP8Config(backend=backend)), **WAYS["LoRA"])
    trainer = Trainer(model=model, args=arguments(tmp_path, **options), train_dataset=DATA)
    trainer.train()
    assert losses(trainer)[-1] < 0.85 * losses(trainer)[0]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_resumed(backend: str, fp8: Path, tmp_path: Path) -> None:
    """Stopped after 4 of 8 steps and taken up by another process, it ends where it would have ended."""

    def trainer(folder: str, **options: Any) -> Trainer:
        model = lora(load(fp8, FP8Config(backend=backend)), **WAYS["LoRA"])
        how = arguments(tmp_path / folder, save_strategy="steps", save_steps=4, **options)
        return Trainer(model=model, args=how, train_dataset=DATA)

    whole = trainer("whole")
    whole.train()
    trainer("parts", max_steps=4).train()
    rest = trainer("parts")
    rest.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert error(logits(rest.model), logits(whole.model)) < 1e-6
    held = {path.name for path in (tmp_path / "whole" / "checkpoint-8").iterdir()}
    assert "adapter_model.safetensors" in held and "model.safetensors" not in held
    again = PeftModel.from_pretrained(load(fp8, FP8Config(backend=backend)), tmp_path / "whole" / "checkpoint-8")
    assert torch.equal(logits(again), logits(whole.model.eval()))


def loop(model: Any, steps: int = 8, lr: float = 2e-2) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    found = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_prepared_for_kbit_training(backend: str, dtype: torch.dtype, fp8: Path) -> None:
    model = prepare_model_for_kbit_training(load(fp8, FP8Config(backend=backend), dtype=dtype))
    found = loop(lora(model, **WAYS["LoRA"]))
    assert found[-1] < 0.85 * found[0]


@pytest.mark.parametrize("weight", [Granularity(32, 32), Granularity(1, 32)], ids=str)
@pytest.mark.parametrize("backend", ["weight_only", "scaled_mm", "int8"])
def test_other_scales(backend: str, weight: Granularity, tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path, weight=weight)
    found = loop(lora(load(tmp_path, FP8Config(backend=backend, backward="quantized")), **WAYS["LoRA"]))
    assert found[-1] < 0.85 * found[0]


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("backend", "r"), [("weight_only", 4), ("scaled_mm", 8), ("weight_only", 1)])
@pytest.mark.parametrize("family", [mixtral, qwen3_moe, gpt_oss, llama4])
def test_experts_learn(family: Any, backend: str, r: int, tmp_path: Path) -> None:
    """PEFT's `target_parameters` on stacks of codes, where it would add to the codes and learn nothing; nothing else."""
    family().save_pretrained(tmp_path / "dense")
    config = FP8Config("FP8_DYNAMIC", backend=backend, experts="fp8")

    def base(dense: bool) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
        return dequantize_model(model) if dense else model

    targets = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    ours, dense = (lora(base(dense), r, **targets) for dense in (False, True))
    assert any(isinstance(m, QuantizedExperts) for m in ours.modules()) and not any(
        isinstance(m, QuantizedLinear) for m in dense.modules()
    )
    before, codes = logits(ours), frozen(ours)
    found, wanted = loop(ours), loop(dense)
    assert found[-1] < 0.9 * found[0]
    limit = 0.01 if backend == "weight_only" else 0.2  # rounded inputs make another, as good, way down
    assert abs((found[0] - found[-1]) / (wanted[0] - wanted[-1]) - 1) < limit
    ours.eval()
    assert error(logits(ours), before) > 0.05
    for name, tensor in frozen(ours).items():
        assert torch.equal(tensor.contiguous().view(torch.uint8), codes[name].contiguous().view(torch.uint8)), name
    ours.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(False), tmp_path / "adapter")
    assert error(logits(again), logits(ours)) < 1e-6
    if backend == "weight_only":  # rounded inputs send some tokens to other experts; how many depends on the CPU
        assert error(logits(PeftModel.from_pretrained(base(True), tmp_path / "adapter")), logits(ours)) < 1e-3


def test_all_linear_reaches_experts_that_are_linears(tmp_path: Path) -> None:
    """A base that holds each expert's projections as Linears of their own, and one that holds them in stacks."""
    mixtral().save_pretrained(tmp_path)
    config = FP8Config("FP8_DYNAMIC", backend="weight_only", experts="fp8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    found = loop(lora(model, target_modules="all-linear"))
    assert found[-1] < 0.95 * found[0]


@pytest.mark.slow
def test_compiled(fp8: Path) -> None:
    torch.compiler.reset()
    model = lora(load(fp8, FP8Config(backend="scaled_mm")), **WAYS["LoRA"])
    wanted = loop(lora(load(fp8, FP8Config(backend="scaled_mm")), **WAYS["LoRA"]), 4)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    found = loop(model, 4)
    torch.compiler.reset()
    assert max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True)) < 1e-3


def test_weights_of_a_quantized_model_are_not_trained(fp8: Path, tmp_path: Path) -> None:
    """The host says so before it starts."""
    with pytest.raises(ValueError, match="adapters"):
        Trainer(model=load(fp8), args=arguments(tmp_path), train_dataset=DATA)
