"""The two adapters that do more in a forward than call the layer: those on stacks of experts, and DoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...nn.expert_weights import LowRank
from ...nn.experts import FP8Experts
from ...nn.linear import FP8Linear
from .state import innermost


def activate_lora(host: Any) -> Any:
    @contextmanager
    def activate(self: Any, active_adapters: list[str]) -> Iterator[None]:
        """Adapters on a stack of experts, which PEFT would add to its codes."""
        base = self.get_base_layer()
        names = [name for name in active_adapters if name in self.lora_A]
        how = host(self, active_adapters)
        if isinstance(base, FP8Experts):
            how = base.adapted(self.parameter_name, [_factors(self, base, name) for name in names])
        with how:
            yield

    return activate


def _factors(layer: Any, base: FP8Experts, name: str) -> LowRank:
    """The matrices of an adapter on a stack, as PEFT's `ParamWrapper.get_delta_factors` reads them.

    It multiplies them in the family's layout, (E, N, K) or its transpose, and takes Llama-4's for the other one.
    """
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    a = a.reshape(layer.num_experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)
    if layer._did_swap_in_out_features == base.layout.is_transposed:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return LowRank(a, b, layer.scaling[name])


def move_adapter(host: Any) -> Any:
    def _move_adapter_to_device_of_base_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
        """PEFT casts adapters to the dtype of the stack that they are on."""
        holder = innermost(self)
        base = holder.base_layer
        if not isinstance(base, FP8Experts):
            return host(self, *args, **kwargs)
        holder.base_layer = base.outline(base.made_of or torch.bfloat16)
        try:
            return host(self, *args, **kwargs)
        finally:
            holder.base_layer = base

    return _move_adapter_to_device_of_base_layer


def float_weight(host: Any) -> Any:
    def dequantize_module_weight(module: nn.Module) -> Any:
        if isinstance(module, FP8Linear):
            return module.restored_weight(module.made_of or torch.bfloat16)
        return host(module)

    return dequantize_module_weight


def dora_forward(host: Any) -> Any:
    def forward(self: Any, x: torch.Tensor, *, base_layer: Any, base_result: torch.Tensor | None = None, **rest: Any) -> Any:
        if base_result is None and isinstance(base_layer, FP8Linear):
            base_result = base_layer(x)  # else the dequantized weight would be kept for the backward pass
        return host(self, x, base_layer=base_layer, base_result=base_result, **rest)

    return forward
