"""FakeQuantizedLinear: for quantization-aware training, a float Linear that computes as the quantized layer that it becomes.

Its weight is quantized anew in each forward, by the function that makes checkpoints, and multiplied by the kernel that the
quantized layer would use: so both give the same numbers. Gradients pass the rounding unchanged (straight-through).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..formats import fbgemm, numerics
from ..formats.scheme import FBGEMM, Scheme, TensorScheme
from ..formats.storage import WEIGHT_SCALE, ZERO_POINT, dequantize, format_of
from ..formats.weights import scale_dtype_of
from ..kernels import Weight, kernel_for
from ..kernels.torch_fp8 import fake_quantize
from . import custom_op
from .backward import times_weight
from .swap import copy_hooks

# The share of the amax of earlier inputs in the moving average; 0.99 is what torch.ao.quantization's observer has.
MOMENTUM = 0.99


def has_float_offsets(scheme: TensorScheme) -> bool:
    """Whether quantized weights of `scheme` have float offsets, which no file format has: they stay float weights."""
    return scheme.recipe == FBGEMM and scheme.has_zero_points


def fake_quantized(weight: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    """A float weight (N, K), quantized and dequantized, in its dtype: what the quantized layer's weight will be."""
    if has_float_offsets(scheme):
        codes, scale, offset = fbgemm.with_minimum(weight, scheme)
        return (codes * scale + offset).flatten(1).to(weight.dtype)
    return dequantize(format_of(scheme).quantize(weight, scheme), scheme, weight.shape[1], weight.dtype)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    scheme: str,
    backend: str,
) -> torch.Tensor:
    parsed = Scheme.parse(scheme)
    if x.shape[0] == 0:
        return x.new_zeros((0, weight.shape[0]))
    if has_float_offsets(parsed.weight):
        dense = fake_quantized(weight, parsed.weight).to(x.dtype)
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype))
    w = _quantized(weight, parsed, bias)
    return kernel_for(x, w.codes, scheme, backend).run(x, input_scale, w)


def _quantized(weight: torch.Tensor, scheme: Scheme, bias: torch.Tensor | None = None) -> Weight:
    stored = format_of(scheme.weight)
    made = stored.quantize(weight, scheme.weight, checked=weight.device.type == "cpu")  # elsewhere it would wait for the device
    return Weight(made[stored.codes], made[WEIGHT_SCALE], bias, scheme, made.get(ZERO_POINT))


def _fake(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, input_scale, bias, ctx.scheme, ctx.backend = inputs
    ctx.save_for_backward(x, weight, input_scale)  # references: the quantized ones are computed again
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, input_scale = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = gradient_of_input(grad, x, weight, input_scale, ctx.scheme, ctx.backend)
    if ctx.needs_input_grad[1]:
        grad_weight = gradient_of_weight(grad, x, weight, input_scale, ctx.scheme, ctx.backend)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum(0).to(ctx.bias_dtype)
    return grad_x, grad_weight, None, grad_bias, None, None


def _of_input(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, input_scale: torch.Tensor | None, scheme: str, backend: str
) -> torch.Tensor:
    """grad (M, N) times the quantized weight; 0 where a static scale has clipped the input."""
    parsed = Scheme.parse(scheme)
    if has_float_offsets(parsed.weight):
        found = grad @ fake_quantized(weight, parsed.weight).to(grad.dtype)
    else:
        w = _quantized(weight, parsed)
        found = times_weight(grad, w.codes, w.scale, scheme, False, "exact", weight.shape[1], w.zero_point, None)
    if _quantizes(x, weight, scheme, backend) and parsed.has_static_input and input_scale is not None:
        assert parsed.input is not None
        found = found.masked_fill(x.abs() > input_scale.to(x.dtype) * parsed.input.code.largest, 0.0)
    return found


def _of_weight(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, input_scale: torch.Tensor | None, scheme: str, backend: str
) -> torch.Tensor:
    """The transpose of grad (M, N) times the quantized input (M, K)."""
    parsed = Scheme.parse(scheme)
    if _quantizes(x, weight, scheme, backend):
        x = fake_quantize(x, input_scale, parsed).x
    return (grad.t() @ x).to(weight.dtype)


def _quantizes(x: torch.Tensor, weight: torch.Tensor, scheme: str, backend: str) -> bool:
    """Whether the forward quantizes its input: as the scheme says, unless the kernel does not."""
    parsed = Scheme.parse(scheme)
    return (
        x.shape[0] > 0
        and parsed.input is not None
        and not has_float_offsets(parsed.weight)
        and kernel_for(x, weight, scheme, backend).quantize is not None
    )


def _refuse_second(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
    raise InputError("gradients of gradients are not supported in quantization-aware training")


def _fake_of_input(grad: torch.Tensor, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, dtype=grad.dtype)


def _fake_of_weight(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(weight)


# Ops of their own, so that a traced backward does not depend on which kernel runs.
gradient_of_input = custom_op.define("fake_quantized_input_grad", _of_input, fake=_fake_of_input, backward=_refuse_second)
gradient_of_weight = custom_op.define("fake_quantized_weight_grad", _of_weight, fake=_fake_of_weight, backward=_refuse_second)
_fake_quantized_linear = custom_op.define(
    "fake_quantized_linear", _run, fake=_fake, backward=_backward, setup_context=_setup_context
)


class FakeQuantizedLinear(nn.Linear):
    """A Linear whose float weight (N, K) is quantized and dequantized in each forward, as inputs are if its scheme says so.

    Outputs are those of the QuantizedLinear, or PackedLinear, that `hf_fp8.convert_qat` makes of it. `weight` and `bias` are
    the parameters of the Linear that it replaces, under the same names.

    Attributes:
        scheme: how weight and input are quantized. backend: of the quantized layer; "scaled_mm" quantizes inputs as the scheme
            says, "weight_only" does not, "auto" as it is fastest on the device.
        input_amax: for static input scales, a buffer, always float32: the moving average of the amax of inputs seen in
            training, 0 before the first.
        name_in_model: its name in the model, for error messages.
    """

    input_amax: torch.Tensor | None
    request: Any = None  # of `quantization.qat`
    foreign: tuple[str, ...] = ()  # as in QuantizedModule

    def __init__(self, linear: nn.Linear, scheme: Scheme, *, backend: str = "scaled_mm", name: str = "") -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.scheme, self.backend, self.name_in_model = scheme, backend, name
        amax = torch.zeros((), dtype=torch.float32, device=linear.weight.device) if scheme.has_static_input else None
        self.register_buffer("input_amax", amax)
        self.train(linear.training)

    def forward(self, input: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """input: (..., K) in bf16, fp16, float32 or float64. Returns (..., N) in the same dtype (or autocast's).

        weight: a float weight (N, K) to use in place of its own, such as one with adapters merged into it. Raises ScaleError on
        a CPU if the weight has NaN or infinity: training has diverged. Elsewhere outputs are NaN.
        """
        weight = self.weight if weight is None else weight
        if not input.is_meta and input.dtype != torch.float64 and torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        rows = input.reshape(-1, input.shape[-1])
        scale = self._static_scale(rows)
        out: torch.Tensor = _fake_quantized_linear(rows, weight, scale, self.bias, self.scheme.text, self.backend)
        return out.view(*input.shape[:-1], weight.shape[0])

    @torch.no_grad()
    def _static_scale(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The static input scale (1,), after the average has taken in this input, if it is a new one in training."""
        if self.input_amax is None:
            return None
        # Gradient checkpointing computes a forward again within a backward.
        amax = rows.abs().amax().float() if rows.numel() else self.input_amax
        if self.training and torch._C._current_graph_task_id() == -1:
            average = torch.where(self.input_amax == 0, amax, self.input_amax * MOMENTUM + amax * (1 - MOMENTUM))
            self.input_amax.copy_(torch.where(average.isfinite(), average, self.input_amax))
        # Before any training: as the first input is.
        return self._scale_of(torch.where(self.input_amax == 0, amax, self.input_amax))

    def _scale_of(self, amax: torch.Tensor) -> torch.Tensor:
        assert self.scheme.input is not None
        return numerics.scale_of(amax.reshape(1).clone(), self.scheme.input.dtype).to(scale_dtype_of(self.weight.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> FakeQuantizedLinear:
        before = self.input_amax
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.input_amax is not None and self.input_amax.dtype != before.dtype:
            self.input_amax = before.to(self.input_amax.device)  # in 16 bits, a step of the average would be rounded away
        return self

    def input_scale(self) -> torch.Tensor | None:
        """The static input scale (1,), in the dtype in which checkpoints have it; None if no input was seen in training."""
        if self.input_amax is None or not bool(self.input_amax > 0):
            return None
        return self._scale_of(self.input_amax)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes of its weights: one."""
        return (self.scheme,)

    def refuse_non_finite(self, weights: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
        """Raise ScaleError if its weight, or that in `weights`, has NaN or infinity."""
        fake_quantized(weights.get("weight", self.weight), self.scheme.weight)

    def to_float(self, weights: Mapping[str, torch.Tensor] = MappingProxyType({})) -> nn.Linear:
        """The Linear that it replaces, with the same parameters, or those in `weights` by name, and the same hooks."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        for name, weight in weights.items():
            setattr(linear, name, nn.Parameter(weight, requires_grad=getattr(self, name).requires_grad))
        copy_hooks(self, linear)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fake-quantized: {self.scheme.describe()}, backend={self.backend}"
