"""The two kinds of adapters whose forward needs more than a call of the layer: those on expert stacks, and DoRA."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from ...nn.expert_weights import LowRank
from ...nn.experts import QuantizedExperts
from ...nn.linear import QuantizedLinear
from ..patches import original
from .state import innermost


def activate_lora(layer: Any, active_adapters: list[str]) -> AbstractContextManager[None]:
    """`ParamWrapper._activate_lora`: QuantizedExperts apply adapters themselves; PEFT would add them to the codes."""
    base = layer.get_base_layer()
    if not isinstance(base, QuantizedExperts):
        found: AbstractContextManager[None] = original(layer, "_activate_lora")(active_adapters)
        return found
    names = [name for name in active_adapters if name in layer.lora_A]
    return base.adapted(layer.parameter_name, [_factors(layer, base, name) for name in names])


def _factors(layer: Any, base: QuantizedExperts, name: str) -> LowRank:
    """The matrices of an adapter on a stack, as PEFT's `ParamWrapper.get_delta_factors` reads them.

    PEFT multiplies them in the layout of the model family, (E, N, K) or its transpose; it mistakes Llama-4's for the other.
    """
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    a = a.reshape(layer.num_experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)
    if layer._did_swap_in_out_features == base.layout.is_transposed:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return LowRank(a, b, layer.scaling[name])


def move_adapter(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """`ParamWrapper._move_adapter_to_device_of_base_layer`, which casts adapters to the stack's dtype: here a float one."""
    move = original(layer, "_move_adapter_to_device_of_base_layer")
    holder = innermost(layer)
    base = holder.base_layer
    if not isinstance(base, QuantizedExperts):
        return move(*args, **kwargs)
    holder.base_layer = base.outline(base.float_dtype)
    try:
        return move(*args, **kwargs)
    finally:
        holder.base_layer = base


class _FloatLayer(NamedTuple):
    """The attributes of a layer that DoRA reads."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def dora_forward(
    dora: Any, x: torch.Tensor, *, base_layer: Any, base_result: torch.Tensor | None = None, **rest: Any
) -> torch.Tensor:
    """`DoraLinearLayer.forward`, which gets the float weight to compute its norms.

    With dropout DoRA would also compute the base layer's output from that weight, and keep it for the backward pass; so the
    quantized layer computes the output.
    """
    if isinstance(base_layer, QuantizedLinear):
        base_result = base_layer(x) if base_result is None else base_result
        base_layer = _FloatLayer(base_layer.restored_weight(base_layer.float_dtype), base_layer.bias)
    found: torch.Tensor = original(dora, "forward")(x, base_layer=base_layer, base_result=base_result, **rest)
    return found
