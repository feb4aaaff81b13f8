"""`save_pretrained` of other libraries' models (diffusers, huggingface_hub's mixin) writes a state dict and says nothing of
codes in it: what loads it takes them for weights. A model with such layers is refused.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from ..nn.base import QuantizedModule
from .patches import is_patched, patch

_METHOD = "save_pretrained"


def guard_savers(model: nn.Module) -> None:
    """See to it that what `model` and its parts are saved with refuses codes. Transformers models write them themselves."""
    for module in model.modules():
        for cls in type(module).__mro__:
            # transformers' own is wrapped in `pretrained`.
            if _METHOD in vars(cls) and not is_patched(cls, _METHOD) and cls.__module__.partition(".")[0] != "transformers":
                patch(cls, _METHOD, _refusing(vars(cls)[_METHOD]))


def _refusing(method: Any) -> Any:
    @wraps(method)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = _unspoken_for(self) if isinstance(self, nn.Module) else None
        if name is not None:
            raise UnsupportedError(
                f"{name} of {type(self).__name__} is a quantized layer, of which {type(self).__name__}.{_METHOD} would write "
                "the codes alone: whoever loads them takes them for weights. hf_fp8.save_quantized(model, folder) and "
                "load_quantized keep what they mean; hf_fp8.dequantize_model(model) first saves a dense model"
            )
        return method(self, *args, **kwargs)

    return save_pretrained


def _unspoken_for(model: nn.Module) -> str | None:
    """The name of a quantized layer in `model` that is in no transformers model which knows of it; None if there is none."""
    knowing = [name for name, module in model.named_modules() if getattr(module, "hf_quantizer", None) is not None]
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule) and not any(not part or name.startswith(f"{part}.") for part in knowing):
            return str(name)
    return None
