"""What is remembered of a quantized layer with adapters on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...nn.base import QuantizedModule

RECORD = "_hf_fp8"


@dataclass
class Record:
    """Of a quantized layer with adapters on it, kept by the innermost of them. name: its own in the model. layers: its
    adapters, which for experts wrap each other. unmerged: what it was before adapters were merged into it, None if it is;
    merged: what was put in its place then. open: whether a float copy stands in its place."""

    name: str
    layers: list[Any] = field(default_factory=list)
    unmerged: QuantizedModule | None = None
    merged: nn.Module | None = None
    open: bool = False


def innermost(layer: Any) -> Any:
    """The adapter that holds the base layer itself; None if `layer` is no adapter."""
    holder = None
    while hasattr(layer, "base_layer"):
        holder, layer = layer, layer.base_layer
    return holder


def record_of(layer: Any) -> Record | None:
    """The record of the layer that `layer` is an adapter on; None if it is not quantized, or a float copy just now."""
    holder = innermost(layer)
    record: Record | None = vars(holder).get(RECORD)
    is_quantized = isinstance(holder.base_layer, QuantizedModule)
    if record is None and is_quantized:
        record = vars(holder)[RECORD] = Record(type(holder.base_layer).__name__)  # made without `install`
    if record is None or record.open or not (is_quantized or record.unmerged is not None):
        return None
    if not any(layer is known for known in record.layers):
        record.layers.append(layer)
    return record


def has_offload_hook(base: nn.Module) -> bool:
    """Whether accelerate brings the weights only for the length of a call."""
    return bool(getattr(getattr(base, "_hf_hook", None), "offload", False))


def adapters(model: nn.Module) -> str | None:
    """The name of a layer of PEFT's in `model`, None if there is none."""
    layers = (name for name, m in model.named_modules() if any(cls.__name__ == "BaseTunerLayer" for cls in type(m).__mro__))
    found: str | None = next(layers, None)
    return found
