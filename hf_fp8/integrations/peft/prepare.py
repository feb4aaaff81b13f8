"""Wraps functions of PEFT that use base weights outside of adapters: `modules_to_save`, casts, analyses, saved embeddings."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from ...formats.quantized_weight.tensor import QuantizedWeight, values
from ...nn.base import QuantizedModule, holds_codes
from ...nn.linear import QuantizedLinear
from ...nn.swap import swap_back


def update_copy(host: Any, self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """`modules_to_save` trains a copy of a module: a float copy if the module is quantized."""
    module = self.original_module
    if adapter_name in self.modules_to_save or not holds_codes(module):
        return host(self, adapter_name, *args, **kwargs)
    self.original_module = swap_back(copy.deepcopy(module))
    try:
        return host(self, adapter_name, *args, **kwargs)
    finally:
        self.original_module = module.requires_grad_(False)


def reduce_intruders(host: Any, peft_model: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's function, which compares adapters with base weights; it gets float copies, one at a time."""
    layers = [module for module in peft_model.modules() if isinstance(getattr(module, "base_layer", None), QuantizedLinear)]
    for layer in layers:
        layer.get_base_layer = partial(_float_copy, layer.base_layer)
    try:
        return host(peft_model, *args, **kwargs)
    finally:
        for layer in layers:
            del layer.get_base_layer


def _float_copy(base: QuantizedLinear) -> nn.Module:
    return base.to_dense(base.float_dtype)


def with_float_heads(host: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's function, which can include embeddings (`save_embedding_layers`). They are dequantized, because adapter
    files cannot describe codes (stored 8-bit values)."""
    found = host(*args, **kwargs)
    for name, tensor in list(found.items()):
        if type(tensor) is QuantizedWeight:
            found[name] = values(tensor)
            for scale in (f"{name}_scale", f"{name.rpartition('.')[0]}.input_scale"):
                found.pop(scale, None)
    return found


def prepare(host: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's function, which recognises quantized models by this attribute. It casts all 16-bit parameters to float32,
    except scales, which `WeightScale` keeps in their dtype."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    if not layers or getattr(model, "is_loaded_in_8bit", False):
        return host(model, *args, **kwargs)
    model.is_loaded_in_8bit = True
    try:
        return host(model, *args, **kwargs)
    finally:
        del model.is_loaded_in_8bit
        for layer in layers:
            layer.original_dtype = torch.float32
