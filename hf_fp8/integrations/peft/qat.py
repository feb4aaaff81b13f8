"""LoRA in quantization-aware training: the weight with its adapters merged is quantized in each forward, as it will be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedError
from ...nn.fake_quantized import FakeQuantizedLinear
from ..patches import bind_once, original


def is_prepared(model: nn.Module) -> bool:
    """Whether layers of `model` are prepared for quantization-aware training."""
    return any(isinstance(module, FakeQuantizedLinear) for module in model.modules())


def refuse(config: Any) -> None:
    """Raise UnsupportedError for adapters that cannot be merged into a weight in each forward, from their config."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    wrong = {
        f"kind {kind}": kind != "LORA",
        "use_dora=True": getattr(config, "use_dora", False),
        "lora_bias=True": getattr(config, "lora_bias", False),
        "lora_dropout": getattr(config, "lora_dropout", 0.0),
    }
    if found := [name for name, is_set in wrong.items() if is_set]:
        raise UnsupportedError(
            f"adapters with {', '.join(found)} on layers that are prepared for quantization-aware training: the weight with "
            "adapters merged into it is quantized, which takes plain LoRA without dropout. Use LoraConfig(lora_dropout=0.0), "
            "or train the weights themselves"
        )


def merge_in_forward(model: nn.Module) -> None:
    """Make the LoRA layers on prepared layers compute with the merged weight. Harmless when repeated."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), FakeQuantizedLinear):
            if not hasattr(module, "get_delta_weight") or getattr(module, "lora_variant", None):
                raise UnsupportedError(
                    f"{name} is a {type(module).__name__}, which has no plain merged weight: use plain LoRA on layers that are "
                    "prepared for quantization-aware training"
                )
            bind_once(module, "forward", forward)


def forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The output of a LoRA layer; PEFT would add the adapter's product to that of the quantized weight without it."""
    if layer.disable_adapters or layer.merged:
        plain: torch.Tensor = original(layer, "forward")(x, *args, **kwargs)
        return plain
    if kwargs.get("adapter_names") is not None:
        raise UnsupportedError("adapter_names: one batch with several adapters has no one weight to quantize")
    weight = layer.base_layer.weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight = (weight + layer.get_delta_weight(name)).to(weight.dtype)  # rounded once, as PEFT merges it
    found: torch.Tensor = layer.base_layer.with_weight(x, weight)
    return found
