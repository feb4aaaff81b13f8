"""trl's trainers over quantized models: losses and gradients of the first step are those of the dequantized model.

Their fused heads multiply hidden states by `lm_head.weight` themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.build import load
from transformers import PreTrainedTokenizerFast, TrainerCallback

import hf_fp8
from hf_fp8 import FP8Config

pytest.importorskip("trl", reason="trl's trainers read heads themselves")
from datasets import Dataset
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import Whitespace
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

pytestmark = pytest.mark.hostless

WORDS = {"<pad>": 0, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 128)}}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def words(seed: int, count: int) -> str:
    ids = torch.randint(4, 120, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


def sft(model: Any, common: dict[str, Any], adapter: LoraConfig) -> Any:
    data = Dataset.from_list([{"text": words(i, 12)} for i in range(2)])
    return SFTTrainer(model, SFTConfig(**common), train_dataset=data, processing_class=tokenizer(), peft_config=adapter)


def dpo(model: Any, common: dict[str, Any], adapter: LoraConfig) -> Any:
    data = Dataset.from_list(
        [{"prompt": words(i, 5), "chosen": words(i + 9, 6), "rejected": words(i + 20, 6)} for i in range(2)]
    )
    return DPOTrainer(model, args=DPOConfig(**common), train_dataset=data, processing_class=tokenizer(), peft_config=adapter)


def dpo_precomputed(model: Any, common: dict[str, Any], adapter: LoraConfig) -> Any:
    return dpo(model, {**common, "precompute_ref_log_probs": True}, adapter)


def kto(model: Any, common: dict[str, Any], adapter: LoraConfig) -> Any:
    data = Dataset.from_list([{"prompt": words(i, 5), "completion": words(i + 9, 6), "label": i % 2 == 0} for i in range(2)])
    return KTOTrainer(model, args=KTOConfig(**common), train_dataset=data, processing_class=tokenizer(), peft_config=adapter)


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(i) for i in range(len(completions))]


def grpo(model: Any, common: dict[str, Any], adapter: LoraConfig, **more: Any) -> Any:
    data = Dataset.from_list([{"prompt": words(i, 5)} for i in range(2)])
    # From the word with the largest logit, which rounding seldom changes.
    config = GRPOConfig(
        **common, num_generations=2, max_completion_length=4, beta=0.1, generation_kwargs={"do_sample": False}, **more
    )
    return GRPOTrainer(model, rewards, config, train_dataset=data, processing_class=tokenizer(), peft_config=adapter)


def grpo_float32_head(model: Any, common: dict[str, Any], adapter: LoraConfig) -> Any:
    return grpo(model, common, adapter, cast_lm_head_to_fp32=True)


TRAINERS: dict[str, Callable[..., Any]] = {
    "SFT": sft, "DPO": dpo, "DPO, precomputed": dpo_precomputed, "KTO": kto, "GRPO": grpo,
    "GRPO, float32 head": grpo_float32_head,
}  # fmt: skip


class Gradients(TrainerCallback):
    """What the first step would have changed the adapters by."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_step(trainer: Callable[..., Any], model: Any, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    common = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 1, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "bf16": False, "learning_rate": 0.0, "disable_tqdm": True, "save_strategy": "no",
        "gradient_checkpointing": False, "seed": 3,
    }  # fmt: skip
    torch.manual_seed(1)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    made, seen = trainer(model, common, adapter), Gradients()
    made.add_callback(seen)
    made.train()
    return next(entry["loss"] for entry in made.state.log_history if "loss" in entry), seen.found


@pytest.mark.thinned(6)
@pytest.mark.parametrize("backend", ["weight_only", "int8"])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_first_step(fp8_head: Path, tmp_path: Path, name: str, backend: str) -> None:
    model = load(fp8_head, FP8Config(backend=backend), dtype=torch.float32)
    assert isinstance(model.lm_head, hf_fp8.QuantizedLinear)
    dense = hf_fp8.dequantize_model(copy.deepcopy(model))
    wanted, theirs = first_step(TRAINERS[name], dense, tmp_path)
    loss, ours = first_step(TRAINERS[name], model, tmp_path)
    # int8 rounds the inputs of every layer but the fused head.
    tolerance = 1e-4 if backend == "weight_only" else 0.03
    assert abs(loss - wanted) <= tolerance * max(abs(wanted), 0.01)
    assert ours.keys() == theirs.keys() and ours
    size = torch.stack([g.norm() for g in theirs.values()]).norm()
    off = torch.stack([(ours[n] - g).norm() for n, g in theirs.items()]).norm()
    assert off <= (1e-3 if backend == "weight_only" else 0.1) * size
