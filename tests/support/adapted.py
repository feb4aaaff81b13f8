"""Quantized models with adapters on them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from support.build import State
from torch import nn

from hf_fp8.nn.base import QuantizedModule


def adapted(model: Any, std: float = 0.05, **options: Any) -> Any:
    """With adapters that change weights by some percent (std 0.05) or far less than codes' steps (1e-4)."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**({"target_modules": "all-linear", "r": 4} | options)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=std)
    return model


def held(model: nn.Module) -> State:
    """All codes and scales, as bytes."""
    return {
        f"{name}.{part}": getattr(module, part).detach().contiguous().view(torch.uint8).clone()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for part in module.quantized
        if getattr(module, part) is not None
    }
