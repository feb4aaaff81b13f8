"""Linears that are not quantized (`lm_head`, layers that a checkpoint ignores) on CPUs without units for 16-bit floats.

torch multiplies bfloat16 and float16 there one number after the other as soon as an input has more than a few rows. The library
of CPU kernels widens the weights to float32 while it multiplies, so sums are float32 and rounded once.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn

from ..kernels import native
from ..kernels.thresholds import native_limit
from .functional import is_plain_call


class DenseLinear(nn.Linear):
    """`nn.Linear` with the same parameters, that asks the library of CPU kernels for products of 16 bits on the CPU.

    Everything else is left to `nn.Linear`: other devices and dtypes, autocast, compiled code.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., K). Returns (..., N) in the dtype of the input."""
        weight, bias = self.weight, self.bias
        if not _is_for_library(input, weight, bias):
            return super().forward(input)
        rows = input.reshape(-1, input.shape[-1])
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
            out: torch.Tensor = _Product.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
        else:
            out = native.times_dense(rows, weight, bias)
        return out.view(*input.shape[:-1], weight.shape[0])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, products in float32 on CPUs"


def _is_for_library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the library multiplies these: plain tensors on the CPU."""
    return (
        is_plain_call(x, weight)
        and type(weight) in (nn.Parameter, torch.Tensor)
        and x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype
        and native.why_not_dense(x.dtype) is None
        and 0 < x.numel() <= native_limit(x.dtype) * x.shape[-1]
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (bias.is_cpu and bias.dtype == x.dtype))
        and not torch.is_autocast_enabled("cpu")
    )


class _Product(torch.autograd.Function):
    """x (M, K) times the transpose of a weight (N, K); gradients are summed in float32, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return native.times_dense(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_x = grad_weight = None
        if of_x and torch.is_grad_enabled():  # it will be differentiated again
            grad_x = grad @ weight
        elif of_x:
            grad_x = native.times_dense(grad, weight, transposed=True)
        if of_weight:
            grad_weight = (grad.float().t() @ x.float()).to(weight.dtype)
        return grad_x, grad_weight, grad.sum(0) if of_bias else None


def adopt(model: nn.Module) -> None:
    """Make DenseLinears of the `nn.Linear`s of `model` for which torch has no fast matmul on this CPU, in place."""
    for module in model.modules():
        if _is_plain(module) and module.weight.is_cpu and native.why_not_dense(module.weight.dtype) is None:
            module.__class__ = DenseLinear


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it computes what its class says: other libraries give theirs other parameters, and a forward of their own."""
    return (
        type(module) is nn.Linear
        and set(module._parameters) == {"weight", "bias"}
        and module._parameters["weight"] is not None
        and not module._buffers
        and "forward" not in vars(module)
    )


def release(model: nn.Module) -> None:
    """Make plain `nn.Linear`s of the DenseLinears of `model` again, in place."""
    for module in model.modules():
        if type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
