"""What is remembered of a quantized layer with adapters on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...nn.base import QuantizedModule

# The attribute of the innermost adapter.
RECORD = "_hf_fp8"


@dataclass
class Record:
    """What is kept of a quantized layer with adapters on it.

    name: of the layer in the model. layers: the adapters on it, several where they wrap each other (stacks of experts).
    unmerged: the layer as it was before adapters were merged into it; None while none is. merged: what stands in its place
    then. open: whether a float copy stands there just now, which PEFT's own methods may change.
    """

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
    if record is None or record.open:
        return None
    return record if isinstance(holder.base_layer, QuantizedModule) or record.unmerged is not None else None


def has_offload_hook(base: nn.Module) -> bool:
    """Whether accelerate brings the weights only for the length of a call."""
    return bool(getattr(getattr(base, "_hf_hook", None), "offload", False))


def adapters(model: nn.Module) -> str | None:
    """The name of a layer of PEFT's in `model`, None if there is none."""
    layers = (name for name, m in model.named_modules() if any(cls.__name__ == "BaseTunerLayer" for cls in type(m).__mro__))
    found: str | None = next(layers, None)
    return found
