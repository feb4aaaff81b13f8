"""The record that is kept of a quantized layer with adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...nn.base import QuantizedModule

# The attribute of the innermost adapter that holds the record.
RECORD = "_hf_fp8"


@dataclass
class Record:
    """State of a quantized layer with adapters.

    name: the layer's name in the model. layers: its adapters, several if they wrap each other (expert stacks). unmerged: the
    original layer while adapters are merged into it, else None. merged: the layer that replaces it meanwhile. open: whether
    a float copy replaces it at the moment, which PEFT's own methods may change.
    """

    name: str
    layers: list[Any] = field(default_factory=list)
    unmerged: QuantizedModule | None = None
    merged: nn.Module | None = None
    open: bool = False


def innermost(layer: Any) -> Any:
    """The adapter that directly wraps the base layer; None if `layer` is not an adapter."""
    holder = None
    while hasattr(layer, "base_layer"):
        holder, layer = layer, layer.base_layer
    return holder


def record_of(layer: Any) -> Record | None:
    """The record of the layer under the adapter `layer`; None if it is not quantized, or a float copy at the moment."""
    holder = innermost(layer)
    record: Record | None = vars(holder).get(RECORD)
    if record is None or record.open:
        return None
    return record if isinstance(holder.base_layer, QuantizedModule) or record.unmerged is not None else None


def adapters(model: nn.Module) -> str | None:
    """The name of a PEFT layer in `model`, None if there is none."""
    layers = (name for name, m in model.named_modules() if any(cls.__name__ == "BaseTunerLayer" for cls in type(m).__mro__))
    found: str | None = next(layers, None)
    return found
