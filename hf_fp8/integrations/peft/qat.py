"""LoRA in quantization-aware training: the weight with its adapters merged is quantized in each forward, as it will be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedError
from ...nn.fake_quantized import FakeQuantizedLinear
from ...nn.fake_quantized_experts import FakeQuantizedExperts, prepared
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
        if _is_a(module, "BaseTunerLayer") and isinstance(module.base_layer, FakeQuantizedLinear):
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
    found: torch.Tensor = layer.base_layer(x, weight=_merged(layer))
    return found


def _merged(layer: Any) -> torch.Tensor:
    """The weight of a LoRA layer's base layer with its active adapters merged into it."""
    weight: torch.Tensor = layer.base_layer.weight
    with torch.autocast(weight.device.type, enabled=False):  # in it, the merged weight would be another than after it
        for name in layer.active_adapters:
            if name in layer.lora_A:
                weight = (weight + layer.get_delta_weight(name)).to(weight.dtype)
    return weight


def with_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that are prepared, under each of their names; those with adapters as the outermost of them."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        is_prepared = isinstance(base_of(module), FakeQuantizedLinear | FakeQuantizedExperts)
        if is_prepared and not any(outer in found for outer in _parents(name)):
            found[name] = module
    return found


@torch.no_grad()
def trained_weights(layer: Any) -> dict[str, torch.Tensor]:
    """Name -> weights of a prepared layer, as its forward computes with them: with active adapters. Empty without adapters."""
    base, found = base_of(layer), dict[str, torch.Tensor]()
    names: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(next(base.parameters()).device.type, enabled=False))
        while layer is not base:
            if layer.disable_adapters and layer.merged:
                layer.unmerge()  # as PEFT's forward does it
            elif not layer.disable_adapters and not layer.merged:
                if isinstance(layer.base_layer, FakeQuantizedLinear):  # its forward is ours; on what those around it make
                    found["weight"] = _merged(layer).detach().clone()
                else:
                    stack.enter_context(layer._activate_lora(layer.active_adapters))
                    names.add(layer.parameter_name)
            layer = layer.base_layer
        return {**{name: getattr(base, name).detach().clone() for name in names}, **found}


def base_of(layer: Any) -> Any:
    """The layer inside of adapters."""
    while _is_a(layer, "BaseTunerLayer"):
        layer = layer.base_layer
    return layer


def _is_a(module: nn.Module, *names: str) -> bool:
    """Whether it is of one of these classes of PEFT, which may not be installed."""
    return any(kind.__name__ in names and kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def _parents(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def refuse_what_cannot_be_merged(model: nn.Module) -> None:
    """Raise UnsupportedError for a PeftModel that has no merged form, such as prompt tuning."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if _is_peft_model(module) and not hasattr(module.base_model, "merge_and_unload"):
            raise UnsupportedError(
                f"the adapters of {type(module).__name__} ({', '.join(module.peft_config)}) cannot be merged into the model: "
                "convert the model without them (get_base_model()), and add them to the quantized one"
            )


def _is_peft_model(module: nn.Module) -> bool:
    return _is_a(module, "PeftModel", "PeftMixedModel")


def without_adapters(model: nn.Module) -> nn.Module:
    """`model` with its adapters merged, or without those that are disabled: no modules of PEFT are around it or in it then."""
    while (found := _first(model, _is_peft_model)) is not None:
        name, module = found
        disabled = any(_is_a(part, "BaseTunerLayer") and part.disable_adapters for part in module.modules())
        model = replace_module(model, name, module.unload() if disabled else module.merge_and_unload())
    # Of inject_adapter_in_model, or of a model's own add_adapter.
    while (found := _first(model, lambda m: _is_a(m, "BaseTunerLayer", "AuxiliaryTrainingWrapper"))) is not None:
        name, module = found
        if hasattr(module, "unload_and_optionally_merge_module"):  # no plain adapter
            model = replace_module(model, name, module.unload_and_optionally_merge_module(True, False, None))
        else:
            module.merge()
            model = replace_module(model, name, module.get_base_layer())
    for module in model.modules():
        if "_hf_peft_config_loaded" in vars(module):  # transformers: save_pretrained would write adapters
            del module._hf_peft_config_loaded
        vars(module).pop("peft_config", None)
    return model


def _first(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> tuple[str, Any] | None:
    """The outermost module that is wanted, which changes as modules are replaced."""
    return next(((name, module) for name, module in model.named_modules() if wanted(module)), None)
