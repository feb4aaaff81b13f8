"""What PEFT does to a model before training: copies of modules to train, casts."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..convert import swap_back
from ..quantized_module import QuantizedModule


def update_copy(host: Any) -> Any:
    def update(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """`modules_to_save` trains a copy of a module: of a quantized one a float copy."""
        module = self.original_module
        if adapter_name in self.modules_to_save or not any(isinstance(part, QuantizedModule) for part in module.modules()):
            return host(self, adapter_name, *args, **kwargs)
        self.original_module = swap_back(copy.deepcopy(module))
        try:
            return host(self, adapter_name, *args, **kwargs)
        finally:
            self.original_module = module.requires_grad_(False)

    return update


def prepare(host: Any) -> Any:
    def prepare_model_for_kbit_training(model: Any, *args: Any, **kwargs: Any) -> Any:
        """PEFT's, which knows quantized models by such an attribute; scales stay in their dtype."""
        layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
        if not layers or getattr(model, "is_loaded_in_8bit", False):
            return host(model, *args, **kwargs)
        held = [getattr(layer, name) for layer in layers for name in layer.quantized]
        dtypes = [(parameter, parameter.dtype) for parameter in held if parameter is not None]
        model.is_loaded_in_8bit = True
        try:
            return host(model, *args, **kwargs)
        finally:
            del model.is_loaded_in_8bit
            for parameter, dtype in dtypes:
                parameter.data = parameter.data.to(dtype)
            for layer in layers:
                layer.made_of = torch.float32  # as all that is not in 8 bits is now

    return prepare_model_for_kbit_training
