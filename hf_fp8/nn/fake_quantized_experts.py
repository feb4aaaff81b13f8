"""FakeQuantizedExperts: for quantization-aware training, float experts that compute as the quantized ones that they become.

As `fake_quantized` does it for Linears: stacks are quantized anew in each forward, and gradients pass the rounding unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..formats.scheme import Scheme
from ..formats.storage import WEIGHT_SCALE, ZERO_POINT, format_of, forms_of_stack
from ..formats.weights import scale_dtype_of
from ..kernels import ExpertWeights, Routing
from ..kernels import torch_grouped as grouped_mm
from . import custom_op, grouped
from .experts_layout import Projection
from .fake_quantized import FakeQuantizedLinear, has_float_offsets
from .routed_experts import RoutedExperts
from .swap import share_hooks


def why_not(scheme: Scheme) -> str | None:
    """The reason why experts cannot be trained for `scheme`; None if they can."""
    if scheme.has_static_input:
        return "experts are not trained for static input scales, as some may see no token: use a scheme with dynamic ones"
    return "no kernel of experts has float offsets" if has_float_offsets(scheme.weight) else None


def quantized_stack(weight: torch.Tensor, scheme: Scheme, parts: int) -> ExpertWeights:
    """The codes and scales of float weights (E, N, K), each of whose matrices is `parts` matrices above each other."""
    stored = format_of(scheme.weight)
    n_experts, n, k = weight.shape
    forms = forms_of_stack(scheme.weight, (n_experts, n, k), parts, scale_dtype_of(weight.dtype, scheme.weight.mx))
    made = {role: torch.empty(form.shape, dtype=form.dtype, device=weight.device) for role, form in forms.items()}
    whole = ExpertWeights(made[stored.codes], made[WEIGHT_SCALE], scheme, parts, made.get(ZERO_POINT))
    checked = weight.device.type == "cpu"  # elsewhere it would wait for the device
    for expert in range(n_experts):
        for part, matrix in enumerate(weight[expert].chunk(parts)):
            tensors = stored.quantize(matrix, scheme.weight, checked=checked)
            for role, place in whole.part(part).matrix(expert).tensors().items():
                place.copy_(tensors[role].reshape(place.shape))
    return whole


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    experts: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor | None,
    slots: torch.Tensor | None,
    expected: int | None,
    share: int,
    parts: int,
    scheme: str,
    backend: str,
) -> torch.Tensor:
    w = quantized_stack(weight, Scheme.parse(scheme), parts)
    return grouped.multiply(x, w, None, Routing(experts, rows, offsets, slots, expected, share), backend)


def _fake(x: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((experts.shape[0], weight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    tensors, ctx.rest = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors)  # references: the quantized ones are computed again


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: gradient checkpointing frees them
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = gradient_of_input(grad, *saved, *ctx.rest)
    if ctx.needs_input_grad[1]:
        grad_weight = gradient_of_weight(grad, *saved, *ctx.rest)
    return grad_x, grad_weight, *[None] * 9


def _of_input(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    experts: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor | None,
    slots: torch.Tensor | None,
    expected: int | None,
    share: int,
    parts: int,
    scheme: str,
    backend: str,
) -> torch.Tensor:
    """grad (S, N) times the quantized weights, summed over the outputs of each row of x."""
    w = quantized_stack(weight, Scheme.parse(scheme), parts)
    routing = Routing(experts, rows, offsets, slots, expected, share)
    return grouped.gradient_of_input(grad, w, routing, x.shape[0], x.shape[1])


def _of_weight(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    experts: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor | None,
    slots: torch.Tensor | None,
    expected: int | None,
    share: int,
    parts: int,
    scheme: str,
    backend: str,
) -> torch.Tensor:
    """For each expert, the transpose of its rows of grad (S, N) times its rows of the quantized input."""
    parsed, routing, (n_experts, n, _) = (
        Scheme.parse(scheme),
        Routing(experts, rows, offsets, slots, expected, share),
        weight.shape,
    )
    if len(experts) and parsed.input is not None and grouped.kernel_of(x, parsed, n, n_experts, routing, backend).quantizes:
        given, routing = grouped_mm.quantize(x, routing, parsed.input, None, n_experts)
        x = grouped_mm.floats_of(given, parsed, x.dtype)
    routing = routing if routing.offsets is not None else grouped_mm.sort(routing, n_experts)
    out = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    for expert, of_input, of_output in grouped_mm.by_expert(routing):
        out[expert] = grad[of_output].t() @ x[of_input]
    return out


def _fake_of_input(grad: torch.Tensor, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, dtype=grad.dtype)


def _fake_of_weight(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _refuse_second(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
    raise InputError("gradients of gradients are not supported in quantization-aware training")


# Ops of their own, so that a traced backward does not depend on the number of rows of each expert.
gradient_of_input = custom_op.define(
    "fake_quantized_experts_input_grad", _of_input, fake=_fake_of_input, backward=_refuse_second
)
gradient_of_weight = custom_op.define(
    "fake_quantized_experts_weight_grad", _of_weight, fake=_fake_of_weight, backward=_refuse_second
)
_multiplied = custom_op.define("fake_quantized_experts", _run, fake=_fake, backward=_backward, setup_context=_setup_context)


class FakeQuantizedExperts(RoutedExperts):
    """Merged experts whose float stacks are quantized and dequantized in each forward, as inputs are if the scheme says so.

    Outputs are those of the QuantizedExperts that `hf_fp8.convert_qat` makes of it. Parameters are those of the host's module,
    under the same names and in its layout.

    Attributes:
        backend: of the quantized experts; as in `FakeQuantizedLinear`.
        name_in_model: its name in the model, for error messages.
    """

    request: Any = None  # of `quantization.qat`
    foreign: tuple[str, ...] = ()  # as in QuantizedModule

    def __init__(
        self, experts: nn.Module, first: Projection, second: Projection, *, interleaved: bool, backend: str, name: str = ""
    ) -> None:
        super().__init__()
        self._stand_in_for(experts, first, second, interleaved)
        self.backend, self.name_in_model = backend, name
        self._take_over(experts)
        share_hooks(experts, self)

    def rows(self, projection: Projection, values: torch.Tensor | None = None) -> torch.Tensor:
        """The weights (E, N, K) of a stack, or of `values` in its place, with rows in the order in which they are quantized."""
        values = getattr(self, projection.name) if values is None else values
        assert values is not None
        if self.layout.is_transposed:
            values = values.transpose(1, 2)
        if projection is self.first and not self.layout.is_concatenated and not self.interleaved:
            values = torch.cat([values[:, ::2], values[:, 1::2]], 1)
        return values

    def _multiply(self, projection: Projection, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        out: torch.Tensor = _multiplied(
            x, self.rows(projection), routing.experts, routing.rows, routing.offsets, routing.slots, routing.expected,
            routing.share, projection.parts, projection.scheme.text, self.backend,
        )  # fmt: skip
        return out

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes of its stacks."""
        return self.first.scheme, self.second.scheme

    def refuse_non_finite(self, weights: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
        """Raise ScaleError if a stack, or one in `weights` by its name, has NaN or infinity."""
        for projection in self.projections:
            quantized_stack(self.rows(projection, weights.get(projection.name)), projection.scheme, projection.parts)

    def to_float(self, weights: Mapping[str, torch.Tensor] = MappingProxyType({})) -> nn.Module:
        """The host's module, with the same parameters, or those in `weights` by name, and the same hooks."""
        dense = self.of_family()
        for name, parameter in self._parameters.items():
            requires_grad = parameter is not None and parameter.requires_grad
            made = nn.Parameter(weights[name], requires_grad=requires_grad) if name in weights else parameter
            dense.register_parameter(name, made)
        share_hooks(self, dense)
        return dense

    def extra_repr(self) -> str:
        stacks = ", ".join(f"{p.name}={tuple(p.shape)} {p.scheme.describe()}" for p in self.projections)
        return f"{self.family.__name__}, {stacks}, fake-quantized, backend={self.backend}"


Prepared = FakeQuantizedLinear | FakeQuantizedExperts


def prepared(model: nn.Module) -> dict[str, Prepared]:
    """The layers of `model` that are prepared for quantization-aware training, under each of their names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, FakeQuantizedLinear | FakeQuantizedExperts)}
