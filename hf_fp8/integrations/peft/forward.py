"""The two adapters that do more in a forward than call the layer: those on stacks of experts, and DoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ...nn.expert_weights import LowRank
from ...nn.experts import QuantizedExperts
from ...nn.linear import QuantizedLinear
from ..patches import original
from .state import innermost


@contextmanager
def activate_lora(layer: Any, active_adapters: list[str]) -> Iterator[None]:
    """`ParamWrapper._activate_lora`: QuantizedExperts multiply with adapters themselves; PEFT would add them to the codes."""
    base = layer.get_base_layer()
    if isinstance(base, QuantizedExperts):
        names = [name for name in active_adapters if name in layer.lora_A]
        how = base.adapted(layer.parameter_name, [_factors(layer, base, name) for name in names])
    else:
        how = original(layer, "_activate_lora")(active_adapters)
    with how:
        yield


def _factors(layer: Any, base: QuantizedExperts, name: str) -> LowRank:
    """The matrices of an adapter on a stack, as PEFT's `ParamWrapper.get_delta_factors` reads them.

    It multiplies them in the family's layout, (E, N, K) or its transpose, and takes Llama-4's for the other one.
    """
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    a = a.reshape(layer.num_experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)
    if layer._did_swap_in_out_features == base.layout.is_transposed:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return LowRank(a, b, layer.scaling[name])


def move_adapter(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """`ParamWrapper._move_adapter_to_device_of_base_layer`, which casts adapters to the dtype of the stack that they are on."""
    move = original(layer, "_move_adapter_to_device_of_base_layer")
    holder = innermost(layer)
    base = holder.base_layer
    if not isinstance(base, QuantizedExperts):
        return move(*args, **kwargs)
    holder.base_layer = base.outline(base.original_dtype or torch.bfloat16)
    try:
        return move(*args, **kwargs)
    finally:
        holder.base_layer = base


class _FloatLayer(NamedTuple):
    """What DoRA reads of a layer."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def dora_forward(
    dora: Any, x: torch.Tensor, *, base_layer: Any, base_result: torch.Tensor | None = None, **rest: Any
) -> torch.Tensor:
    """`DoraLinearLayer.forward`, which takes the norms of the float weight that adapters are made on.

    With dropout it would compute the base layer's part with it, too, and keep it for the backward pass: the layer does that.
    """
    if isinstance(base_layer, QuantizedLinear):
        base_result = base_layer(x) if base_result is None else base_result
        base_layer = _FloatLayer(base_layer.restored_weight(base_layer.original_dtype or torch.bfloat16), base_layer.bias)
    found: torch.Tensor = original(dora, "forward")(x, base_layer=base_layer, base_result=base_result, **rest)
    return found
