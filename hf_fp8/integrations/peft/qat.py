"""LoRA in quantization-aware training: the weight with its adapters merged is quantized in each forward, as it will be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedError
from ...nn.fake_quantized import FakeQuantizedLinear
from ...nn.fake_quantized_experts import prepared
from ...nn.swap import replace_module
from ..patches import bind_once, original


def is_prepared(model: nn.Module) -> bool:
    """Whether layers of `model` are prepared for quantization-aware training."""
    return bool(prepared(model))


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
    found: torch.Tensor = layer.base_layer.with_weight(x, merged_weight(layer))
    return found


def merged_weight(layer: Any) -> torch.Tensor:
    """The weight of a LoRA layer's base layer with its active adapters merged into it."""
    weight: torch.Tensor = layer.base_layer.weight
    if layer.merged:
        return weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight = (weight + layer.get_delta_weight(name)).to(weight.dtype)  # rounded once, as PEFT merges it
    return weight


def without_adapters(model: nn.Module) -> nn.Module:
    """`model` with its adapters merged: without PEFT's modules around it or in it, however they were added."""
    for name, module in list(model.named_modules()):
        if any(kind.__name__ in ("PeftModel", "PeftMixedModel") for kind in type(module).__mro__):
            model = replace_module(model, name, module.merge_and_unload())
    for name, module in list(model.named_modules()):  # of inject_adapter_in_model, or of a model's own add_adapter
        if hasattr(module, "unload_and_optionally_merge_module"):
            model = replace_module(model, name, module.unload_and_optionally_merge_module(True, False, None))
        elif hasattr(module, "base_layer"):
            module.merge()
            model = replace_module(model, name, module.get_base_layer())
        if getattr(module, "_hf_peft_config_loaded", False):  # transformers: save_pretrained would write adapters
            module._hf_peft_config_loaded = False
        vars(module).pop("peft_config", None)
    return model
