"""LoRA over FP8 weights under DeepSpeed: the losses of the dense model under it. For machines that have DeepSpeed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from support.ranks import load, make, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


CASES = [(stage, config) for stage in (2, 3) for config in ("weight_only", "dequantize")]


def work(name: str, folder: Path) -> dict[tuple[int, str], tuple[list[float], int]]:
    """All cases together, as DeepSpeed keeps the process groups that it finds first."""
    return {(stage, config): trained(stage, config, folder) for stage, config in CASES}


def trained(stage: int, config: str, folder: Path) -> tuple[list[float], int]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.manual_seed(0)
    model = get_peft_model(
        load(folder / "llama.channel", "one", config), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    import deepspeed  # after the model: its function is wrapped when it is imported

    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    options: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config={**options, "zero_allow_untested_optimizer": True}
    )
    losses = []
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 120, (4, 16), generator=generator)[2 * dist.get_rank() : 2 * dist.get_rank() + 2]
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, sum(p.nbytes for n, p in model.named_parameters() if n.endswith("base_layer.weight"))


def test_losses(tmp_path: Path) -> None:
    make("llama", "channel", tmp_path / "llama.channel")
    for found in run(2, work, ["all"], tmp_path)["all"]:
        for stage in (2, 3):
            (losses, held), (wanted, _) = (found[stage, config] for config in ("weight_only", "dequantize"))
            assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) <= 1e-4
            assert (held == 0) is (stage == 3)  # between two calls each process holds only its part
