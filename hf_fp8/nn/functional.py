"""`scaled_linear`: quantize the input as the scheme says, multiply, add the bias; one custom op.

The op is opaque, so kernel selection is not traced: `torch.compile(fullgraph=True)` sees a single node, and the kernel is
selected at run time from the real device and M.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from ..errors import InputError
from ..formats.packing import words
from ..formats.quantized_weight.tensor import codes_of
from ..formats.scheme import Scheme
from ..kernels import Input, Weight, kernel_for
from ..kernels.prepared import prepared
from . import custom_op
from .across import reducer
from .backward import times_weight
from .originals import refuse_changed
from .shared_input import quantize_once

# Supported dtypes of inputs.
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    scheme: str,
    backend: str,
    backward: str,
    original: torch.Tensor | None = None,
    made_of: torch.Tensor | None = None,  # this name stays: what inductor has in its cache calls the op by it
    across: str = "",
    zero_point: torch.Tensor | None = None,
    column_groups: torch.Tensor | None = None,
) -> torch.Tensor:
    if original is not None:
        refuse_changed(original, made_of, f"a linear layer of {x.shape[1]} to {weight.shape[0]} features")
    return _run_inference(x, weight, weight_scale, input_scale, bias, scheme, backend, across, zero_point, column_groups)


def _run_inference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    scheme: str,
    backend: str,
    across: str = "",
    zero_point: torch.Tensor | None = None,
    column_groups: torch.Tensor | None = None,
) -> torch.Tensor:
    if x.shape[0] == 0:
        return x.new_zeros((0, weight.shape[0]))
    w = Weight(weight, weight_scale, bias, Scheme.parse(scheme), zero_point, column_groups)
    call = prepared(x, w, scheme, backend)
    if call is not None and call.takes(x):
        return call.run(x)
    return kernel_for(x, weight, scheme, backend).run(x, input_scale, w, reducer(across))


def _fake(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, weight_scale, _, bias, ctx.scheme, _, ctx.backward, _, _, _, zero_point, column_groups = inputs
    # References: no new tensor of size (N, K) or (M, K).
    ctx.save_for_backward(weight, weight_scale, zero_point, column_groups)
    ctx.columns = x.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:4]):
        raise InputError(
            "FP8 weights and their scales have no gradient. Train adapters (LoRA) on top of them, or load with "
            "FP8Config(dequantize=True) to train the weights themselves."
        )
    weight, weight_scale, *rest = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = times_weight(grad, weight, weight_scale, ctx.scheme, False, ctx.backward, ctx.columns, *rest)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, *[None] * 8


_scaled_linear = custom_op.define("scaled_linear", _run, fake=_fake, backward=_backward, setup_context=_setup_context)
_scaled_linear_inference = custom_op.define("scaled_linear_inference", _run_inference, fake=_fake)


def scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    scheme: Scheme,
    *,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
    backward: str = "exact",
    layer: Any = None,
    kept: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    across: str = "",
    zero_point: torch.Tensor | None = None,
    column_groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ (weight * weight_scale).T + bias`` with the input quantized as `scheme` says.

    x: (..., K) in bf16, fp16, float32 or float64, any strides, M = 0 allowed; per-token scales are one per
    row of the last dimension. weight: (N, K), E4M3 or int8; packed codes (N, words), int32 (`formats.packing`), with their
    zero_point and column_groups as stored, if the scheme has them. weight_scale: `scale_shape` elements in bf16, fp16 or
    float32. input_scale: one element, for static schemes; None if it is not known. bias: (N,). Returns (..., N) in
    the dtype of x. Gradients flow to x (through the dequantized weight) and to bias. backward: "exact", or "quantized" to
    round the gradient to 8 bits and multiply it with the codes. layer: the calling QuantizedLinear, if siblings share its
    quantized input (`shared_input`). kept: the original float weight and its snapshot (`originals`), compared when compiled
    code runs. across: an `Across.text`, if other processes have the other columns of x; "" if x has all of them.

    Raises InputError for an x of another dtype or last dimension; KernelError for a forced kernel
    that cannot run; CalibrationError if the kernel quantizes x, the scheme is static and there is no input scale; StaleError
    if the original in `kept` was changed.
    """
    weight = codes_of(weight)
    _refuse_what_does_not_fit(x, weight, scheme)
    # Reshaped outside of the op: under autograd, a view returned by an op cannot be changed in place.
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] and can_bypass_dispatcher(x, weight, weight_scale, bias):
        kernel = kernel_for(rows, weight, scheme.text, backend)
        given = Input(rows) if kernel.quantize is None else quantize_once(kernel, x, rows, input_scale, scheme, layer, across)
        out = kernel.multiply(given, Weight(weight, weight_scale, bias, scheme, zero_point, column_groups), x.dtype)
    elif kept[0] is None and custom_op.is_traced_without_gradients():
        out = _scaled_linear_inference(
            rows, weight, weight_scale, input_scale, bias, scheme.text, backend, across, zero_point, column_groups
        )
    else:
        out = _scaled_linear(
            rows,
            weight,
            weight_scale,
            input_scale,
            bias,
            scheme.text,
            backend,
            backward,
            *kept,
            across,
            zero_point,
            column_groups,
        )
    return out if x.ndim == 2 else out.view(*x.shape[:-1], weight.shape[0])


def _refuse_what_does_not_fit(x: torch.Tensor, weight: torch.Tensor, scheme: Scheme) -> None:
    """Raise InputError for an x that a weight of `scheme` does not take."""
    refuse_layout(x)
    if x.dtype not in FLOATS:
        hint = " The model's code cast it to the dtype of the layer's weight." if x.dtype == weight.dtype else ""
        raise InputError(
            f"an FP8 linear takes inputs in bfloat16, float16, float32 or float64, got {x.dtype}.{hint} "
            "If the model's code cannot be changed, load with FP8Config(dequantize=True)."
        )
    if words(x.shape[-1], 32 // scheme.weight.per_element) != weight.shape[1]:
        taken = f"{weight.shape[1]}" if not scheme.weight.packed else f"up to {weight.shape[1] * scheme.weight.per_element}"
        raise InputError(f"the input has {x.shape[-1]} columns, a weight {tuple(weight.shape)} takes {taken}")
    refuse_forward_mode(x)


def refuse_layout(x: torch.Tensor) -> None:
    """Raise InputError if x is not an array of at least one dimension: nested, sparse, of MKL-DNN, or a single number."""
    if x.layout is not torch.strided or x.is_nested or not x.ndim:
        found = "a nested tensor" if x.is_nested else f"a tensor of {x.ndim} dimensions and layout {x.layout}"
        raise InputError(
            f"a quantized layer takes dense tensors of at least one dimension, got {found}: pass padded sequences "
            "(torch.nested.to_padded_tensor, x.to_dense()), or load with FP8Config(dequantize=True)"
        )


def refuse_forward_mode(x: torch.Tensor) -> None:
    """Raise InputError if x has a forward-mode tangent, which the op would drop."""
    if forward_ad._current_level < 0:
        return
    # Tangents cannot be seen while compiling.
    seen = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)
    if seen or forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        raise InputError(
            "forward-mode gradients (torch.func.jvp, dual numbers) are not supported by quantized layers: use backward(), or "
            "load with FP8Config(dequantize=True)"
        )


def can_bypass_dispatcher(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """True if no autograd, tracing, functorch or dispatch mode is active, so a plain function can replace the op.

    Calling the op through the dispatcher takes 15 us, more than some of the kernels, and a small model calls 200 of them
    for each token.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or any(other is not None and other.requires_grad for other in others)
    ):
        return False
    return is_plain_call(x, weight)


def is_plain_call(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """True if no tracing, functorch or dispatch mode is active, and x is a plain tensor with memory."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and x.layout is torch.strided
        and not (x.is_nested or x.is_meta or weight.is_meta or x._is_zerotensor())
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._get_tracing_state() is None
    )
