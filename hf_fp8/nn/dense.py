"""Linears that are not quantized (`lm_head`, layers that a checkpoint ignores) on CPUs without units for 16-bit floats.

torch's matmul of bfloat16 is slow there for any number of rows: 1024x1024 by 1, 4 and 16 rows, one thread of a busy AMD EPYC
7003, 4 billion products a second each time; in the library of CPU kernels 6, 15 and 16. The library widens weights to float32
as it multiplies, so sums are float32 and rounded once.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn

from ..kernels import native
from ..kernels.thresholds import native_limit
from . import custom_op
from .custom_op import is_traced_without_gradients
from .functional import is_plain_call


class DenseLinear(nn.Linear):
    """`nn.Linear` with the same parameters, that asks the library of CPU kernels for products of 16 bits on the CPU.

    Everything else is left to `nn.Linear`: other devices, dtypes and layouts, autocast, compiled code with gradients.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., K). Returns (..., N) in the dtype of the input."""
        weight, bias = self.weight, self.bias
        if is_traced_without_gradients() and _is_for_op(input, weight, bias):
            compiled: torch.Tensor = _dense_linear(input, weight, bias)
            return compiled
        if not _is_for_library(input, weight, bias):
            # Not `super()`: others may hold this method when the class of the module is changed back.
            return nn.Linear.forward(self, input)
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))):
            return _product(input, weight, bias)
        out: torch.Tensor = _Product.apply(input.reshape(-1, input.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
        return out.view(*input.shape[:-1], weight.shape[0])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, products in float32 on CPUs"


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = native.times_dense(x.reshape(-1, x.shape[-1]), weight, bias)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], weight.shape[0])


def _run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _product(x, weight, bias) if _is_for_library(x, weight, bias) else _fake(x, weight, bias)


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return nn.functional.linear(x, weight, bias).contiguous()


# Compiled code calls it where it has no gradients. It is opaque: what multiplies is chosen when it runs.
_dense_linear = custom_op.define("dense_linear", _run, fake=_fake)
_TYPES = (torch.bfloat16, torch.float16)


def _is_for_op(x: torch.Tensor, *held: torch.Tensor | None) -> bool:
    """Whether compiled code calls the op: plain tensors on the CPU, in 16 bits; subclasses have ops of their own."""
    return (
        x.dtype in _TYPES
        and not x.is_nested
        and all(t is None or (type(t) in (nn.Parameter, torch.Tensor) and t.is_cpu) for t in (x, *held))
        and not torch.is_autocast_enabled("cpu")
    )


def _is_for_library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the library computes this forward."""
    return (
        _is_plain_product(x, weight)
        and x.ndim > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (_is_plain_tensor(bias) and bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
        and not torch.is_autocast_enabled("cpu")
    )


def _is_plain_product(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x and the weight are plain tensors on the CPU, of a dtype and with a number of rows for the library."""
    return (
        is_plain_call(x, weight)
        and _is_plain_tensor(x)
        and _is_plain_tensor(weight)
        and x.dtype == weight.dtype
        and native.why_not_dense(x.dtype) is None
        and 0 < x.numel() <= native_limit(x.dtype) * x.shape[-1]
    )


def _is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether its elements are in memory, where its strides say."""
    if type(tensor) not in (nn.Parameter, torch.Tensor) or not tensor.is_cpu or tensor.is_nested:
        return False
    if tensor.layout is not torch.strided:
        return False
    try:
        return tensor.untyped_storage().nbytes() > 0  # FSDP frees the memory of parameters between uses
    except NotImplementedError:  # one of the older vmap, which batched gradients use
        return False


class _Product(torch.autograd.Function):
    """x (M, K) times the transpose of a weight (N, K); gradients are summed in float32, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return native.times_dense(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_x = grad_weight = None
        if of_x and not torch.is_grad_enabled() and _is_plain_product(grad, weight):
            grad_x = native.times_dense(grad, weight, transposed=True)
        elif of_x:  # it will be differentiated again, or is traced or batched
            grad_x = grad @ weight
        if of_weight:
            grad_weight = (grad.float().t() @ x.float()).to(x.dtype)
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
