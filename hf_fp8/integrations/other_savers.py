"""Makes `save_pretrained` of other libraries' models (huggingface_hub's mixin) raise if there are quantized layers.

They write a state dict without saying that it contains codes (stored 8-bit values), so it would be loaded as weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedError
from ..nn.base import QuantizedModule
from .diffusers import is_described
from .patches import wrap

_METHOD = "save_pretrained"


def guard_savers(model: nn.Module) -> None:
    """Make `save_pretrained` of `model` and its submodules raise for codes, except in transformers models, which save them.

    Also except in PEFT's, which save adapters only. The method of diffusers' models describes codes (`diffusers`).
    """
    for module in model.modules():
        for cls in type(module).__mro__:
            # The method of transformers is wrapped in `pretrained`.
            if _METHOD in vars(cls) and cls.__module__.partition(".")[0] not in ("transformers", "peft"):
                wrap(cls, _METHOD, _save_pretrained, lasting=True)


def _save_pretrained(host: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    name = _unspoken_for(self) if isinstance(self, nn.Module) else None
    if name is not None:
        raise UnsupportedError(
            f"{name} of {type(self).__name__} is a quantized layer: {type(self).__name__}.{_METHOD} would write its codes "
            "without their scheme, and they would be loaded as weights. Save with hf_fp8.save_quantized(model, folder) and "
            "load with hf_fp8.load_quantized, or call hf_fp8.dequantize_model(model) first to save a dense model"
        )
    return host(self, *args, **kwargs)


def _unspoken_for(model: nn.Module) -> str | None:
    """Name of a quantized layer that is in no model whose own method describes it: of transformers, with an `hf_quantizer`, or
    of diffusers. None if there is none."""
    knowing = [
        name
        for name, module in model.named_modules()
        if getattr(module, "hf_quantizer", None) is not None or is_described(module)
    ]
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule) and not any(not part or name.startswith(f"{part}.") for part in knowing):
            return str(name)
    return None
