"""Fine-tunes SmolLM2 over FP8 weights, `scripts/finetune`: LoRA with transformers' Trainer, on prose of the Python reference.

Leaves the adapter in DIR/adapter, and the model with the adapter merged, in FP8 again, in DIR/merged.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_fp8
from hf_fp8 import FP8Config

from . import CHECKPOINTS
from .common import smollm2

HELD_OUT = 2048  # tokens that the loss is taken on meanwhile; none of them is trained on
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}


class Evaluate(TrainerCallback):  # type: ignore[misc]
    """Notes the loss of each step, and now and then that on the text that was held out."""

    def __init__(self, ids: torch.Tensor, every: int) -> None:
        self.ids, self.every = ids, every
        self.losses: list[float] = []
        self.held_out: list[tuple[int, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._look(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self._look(state.global_step, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))

    def _look(self, step: int, model: Any) -> None:
        self.held_out.append((step, math.log(hf_fp8.perplexity(model, self.ids))))
        print(f"step {step}: loss {self.held_out[-1][1]:.4f} on the text held out", flush=True)


def texts(tokenizer: Any) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """(windows to train on, ids to look at meanwhile, ids to judge by in the end)."""
    ids = smollm2.prose(tokenizer)
    first = smollm2.CALIBRATION_TOKENS + smollm2.EVALUATION_TOKENS
    windows = [window[0] for window in smollm2.windows(ids[first + HELD_OUT :])]
    return [{"input_ids": w, "labels": w} for w in windows], ids[first : first + HELD_OUT], smollm2.evaluation(ids)


def finetune(model: Any, tokenizer: Any, steps: int, out: Path) -> tuple[Any, Evaluate]:
    """(model with a trained adapter, what it cost meanwhile). The same seed for the adapter, its dropout and the data."""
    train, meanwhile, _ = texts(tokenizer)
    set_seed(0)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    arguments = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=1, learning_rate=5e-4, lr_scheduler_type="cosine",
        warmup_steps=5, logging_steps=1, save_strategy="no", report_to=[], seed=0, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    seen = Evaluate(meanwhile, max(steps // 5, 1))
    trainer = Trainer(model=model, args=arguments, train_dataset=train, callbacks=[seen])
    trainer.pop_callback(next(type(c) for c in trainer.callback_handler.callbacks if "Print" in type(c).__name__))
    trainer.train()
    return model.eval(), seen


def load(path: Path, backend: str | None, dtype: torch.dtype = torch.bfloat16) -> Any:
    given = {} if backend is None else {"quantization_config": FP8Config(backend=backend)}
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **given)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["scaled_mm", "weight_only", "int8"], default="weight_only")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=CHECKPOINTS / "finetuned")
    return parser


def main() -> None:
    args = arguments().parse_args()
    dense = smollm2.write_dense(CHECKPOINTS / "dense")
    fp8 = smollm2.write_fp8(dense, CHECKPOINTS / "dynamic", "dynamic")
    tokenizer = AutoTokenizer.from_pretrained(fp8)
    judged = texts(tokenizer)[2]
    model = load(fp8, args.backend)
    print(f"perplexity before: {hf_fp8.perplexity(model, judged):.3f}", flush=True)
    shutil.rmtree(args.out, ignore_errors=True)
    model, _ = finetune(model, tokenizer, args.steps, args.out)
    print(f"perplexity after: {hf_fp8.perplexity(model, judged):.3f}", flush=True)
    model.save_pretrained(args.out / "adapter")
    with hf_fp8.merging() as report:
        merged = model.merge_and_unload()
    print(report)
    print(f"perplexity merged: {hf_fp8.perplexity(merged, judged):.3f}", flush=True)
    merged.save_pretrained(args.out / "merged")
    tokenizer.save_pretrained(args.out / "merged")


if __name__ == "__main__":
    main()
