"""`scaled_grouped_linear`: each row times the weight of its expert, as one custom op; and the routing of tokens."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError
from ..formats.packing import words
from ..formats.quantized_weight.tensor import codes_of
from ..formats.scheme import Scheme, scale_shape
from ..formats.storage import stacked
from ..kernels import ExpertWeights, Input, Problem, Routing, native, select_grouped
from ..kernels import torch_grouped as grouped_mm
from ..kernels.base import GroupedKernel
from . import custom_op
from .across import reducer
from .functional import FLOATS, can_bypass_dispatcher, refuse_forward_mode


def route(ids: torch.Tensor, n_experts: int, *, sort: bool, expected: int | None = None) -> tuple[Routing, Routing]:
    """Routings of the first and the second linear of experts, from the experts that a router chose.

    ids: (T, k) int64, E for no expert (see `known`). The input of the first linear is the T tokens. Its S = T * k outputs,
    sorted by expert if `sort`, are the input of the second; the outputs of that are in the order of `ids`. expected: see
    `Routing`.
    """
    k, flat = ids.shape[1], ids.reshape(-1)
    if not sort:
        return Routing(flat, expected=expected, share=k), Routing(flat, expected=expected)
    expert, order = torch.sort(flat, stable=True)
    offsets = grouped_mm.offsets_of(expert, n_experts)
    return Routing(expert, order, offsets, None, expected, k), Routing(expert, None, offsets, order, expected)


def known(ids: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids as int64 with E for values outside 0..E-1, mask of the ids inside it)."""
    ids = ids.long()
    found = (ids >= 0) & (ids < n_experts)
    return torch.where(found, ids, n_experts), found


def scale_shape_of_experts(scheme: Scheme, n_experts: int, n: int, k: int, parts: int) -> tuple[int, ...]:
    """The scale shape of (E, N, K) weights: tensor (E, parts), channel (E, N, 1), else one grid for each part."""
    return stacked(scale_shape(scheme.weight.granularity, n // parts, k), n_experts, parts)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    experts: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor | None,
    slots: torch.Tensor | None,
    expected: int | None,
    share: int,
    parts: int,
    scheme: str,
    backend: str,
    across: str = "",
    zero_point: torch.Tensor | None = None,
    column_groups: torch.Tensor | None = None,
) -> torch.Tensor:
    held = ExpertWeights(weight, weight_scale, Scheme.parse(scheme), parts, zero_point, column_groups)
    return multiply(x, held, input_scale, Routing(experts, rows, offsets, slots, expected, share), backend, across)


def kernel_of(x: torch.Tensor, scheme: Scheme, n: int, n_experts: int, routing: Routing, backend: str) -> GroupedKernel:
    """The kernel that runs for inputs x (R, K)."""
    choice = select_grouped(Problem(x.device, scheme, n, x.shape[1], x.dtype), backend)
    return choice.at(routing.rows_each(n_experts))


def multiply(
    x: torch.Tensor, w: ExpertWeights, input_scale: torch.Tensor | None, routing: Routing, backend: str, across: str = ""
) -> torch.Tensor:
    """Each row of x (R, K) times the weight of its expert: `scaled_grouped_linear` without checks and gradients."""
    n_experts, n, _ = w.codes.shape
    s = routing.experts.shape[0]
    if s == 0:
        return x.new_zeros((0, n))
    kernel = kernel_of(x, w.scheme, n, n_experts, routing, backend)
    if not kernel.quantizes or w.scheme.input is None:
        return kernel.multiply(Input(x), w, routing, x.dtype)
    if input_scale is not None and w.parts > 1:
        # The parts (gate, up) may have different static scales.
        each = [multiply(x, w.part(i), input_scale[:, i : i + 1], routing, backend, across) for i in range(w.parts)]
        return torch.cat(each, 1)
    given, routing = grouped_mm.quantize(x, routing, w.scheme.input, input_scale, n_experts, reducer(across))
    return kernel.multiply(given, w, routing, x.dtype)


def _fake(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, input_scale: Any, experts: torch.Tensor, *_: Any
) -> torch.Tensor:
    return x.new_empty((experts.shape[0], weight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, weight_scale, _, experts, rows, offsets, slots, _, share, parts, scheme, _, _, *others = inputs
    ctx.save_for_backward(weight, weight_scale, experts, rows, offsets, slots, *others)  # references, no copies
    ctx.rest = (share, parts, scheme, *x.shape)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:4]):
        raise InputError(
            "FP8 experts and their scales have no gradient. Train adapters on the other layers, or load with "
            "FP8Config(experts='dequantize') to train the experts themselves."
        )
    grad_x = None
    if ctx.needs_input_grad[0]:
        *saved, zero_point, column_groups = ctx.saved_tensors
        grad_x = _scaled_grouped_linear_grad(grad, *saved, *ctx.rest, zero_point, column_groups)
    return grad_x, *[None] * 15


def _grad_x(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    experts: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor | None,
    slots: torch.Tensor | None,
    share: int,
    parts: int,
    scheme: str,
    n_rows: int,
    columns: int = 0,
    zero_point: torch.Tensor | None = None,
    column_groups: torch.Tensor | None = None,
) -> torch.Tensor:
    w = ExpertWeights(weight, weight_scale, Scheme.parse(scheme), parts, zero_point, column_groups)
    routing = Routing(experts, rows, offsets, slots, share=share)
    return gradient_of_input(grad, w, routing, n_rows, columns or weight.shape[2])


def gradient_of_input(grad: torch.Tensor, w: ExpertWeights, routing: Routing, n_rows: int, k: int) -> torch.Tensor:
    """The gradient of the input (n_rows, K), computed with the dequantized weights. k: K, which packed codes do not tell."""
    routing = routing if routing.offsets is not None else grouped_mm.sort(routing, w.codes.shape[0])
    grad = grad if routing.slots is None else grad[routing.slots]
    found = native.times_weights(grad, w, routing)
    if found is None:
        found = grouped_mm.times_weights(grad, w, k, routing)
    of_rows = routing.row_numbers()
    if of_rows is None:
        return found.to(grad.dtype)
    return found.new_zeros((n_rows, k)).index_add_(0, of_rows, found).to(grad.dtype)


def _fake_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    experts: torch.Tensor,
    rows: Any,
    offsets: Any,
    slots: Any,
    share: int,
    parts: int,
    scheme: str,
    n_rows: int,
    columns: int = 0,
    zero_point: torch.Tensor | None = None,
    column_groups: torch.Tensor | None = None,
) -> torch.Tensor:
    return grad.new_empty((n_rows, columns or weight.shape[2]))


def _no_second(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
    raise InputError("gradients of gradients are not supported by FP8 experts: load with FP8Config(experts='dequantize')")


# A separate op, so that a traced backward does not depend on the number of rows of each expert.
_scaled_grouped_linear_grad = custom_op.define("scaled_grouped_linear_grad", _grad_x, fake=_fake_grad, backward=_no_second)
_scaled_grouped_linear = custom_op.define(
    "scaled_grouped_linear", _run, fake=_fake, backward=_backward, setup_context=_setup_context
)


def scaled_grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    scheme: Scheme,
    groups: Routing | torch.Tensor,
    *,
    input_scale: torch.Tensor | None = None,
    parts: int = 1,
    backend: str = "auto",
    across: str = "",
    zero_point: torch.Tensor | None = None,
    column_groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row of x times the weight of its expert, inputs quantized as `scheme` says.

    x: (R, K) in bf16, fp16, float32 or float64. weight: (E, N, K) in E4M3 or int8; packed codes (E, N, words), int32, with
    their zero_point and column_groups as stored, if the scheme has them. weight_scale: per tensor (E, parts), per channel
    (E, N, 1), else (E, parts * ceil(N / parts / rows), ceil(K / cols)); parts: number of matrices concatenated along N, each
    with a separate grid of scales (2 for gate and up). input_scale: (E, parts), for static schemes. groups: (R,)
    integers, the expert of each row (outside 0..E-1: no expert); or an `hf_fp8.kernels.Routing`, which says how rows
    are gathered, sorted and scattered. across: as in `scaled_linear`. Returns (R, N), or (S, N) for S outputs of `Routing`, in
    the dtype of x, 0 where there is no expert. Gradients flow to x, through the dequantized weights.

    Raises InputError for operands of the wrong dtype or shape, KernelError for a forced kernel that cannot run.
    """
    weight = codes_of(weight)
    if isinstance(groups, torch.Tensor):
        if groups.ndim != 1 or groups.shape[0] != x.shape[0]:
            raise InputError(f"groups has shape {tuple(groups.shape)} for {x.shape[0]} rows; it needs one expert for each row")
        first, second = route(known(groups, weight.shape[0])[0].unsqueeze(1), weight.shape[0], sort=True)
        groups = first._replace(slots=second.slots)
    n_experts, n, columns = weight.shape
    k = x.shape[-1]
    if words(k, 32 // scheme.weight.per_element) != columns or x.ndim != 2:
        taken = f"{columns}" if not scheme.weight.packed else f"up to {columns * scheme.weight.per_element}"
        raise InputError(f"the input has shape {tuple(x.shape)}, experts of shape {tuple(weight.shape)} take (R, {taken})")
    expected = scale_shape_of_experts(scheme, n_experts, n, k, parts)
    if weight_scale.shape != expected:
        raise InputError(
            f"weight_scale has shape {tuple(weight_scale.shape)}; for experts of shape {tuple(weight.shape)}, {parts} part(s) "
            f"and {scheme.describe()} it is {expected}"
        )
    if x.dtype not in FLOATS:
        raise InputError(f"FP8 experts take inputs in bfloat16, float16, float32 or float64, got {x.dtype}")
    refuse_forward_mode(x)
    if can_bypass_dispatcher(x, weight, weight_scale):
        w = ExpertWeights(weight, weight_scale, scheme, parts, zero_point, column_groups)
        return multiply(x, w, input_scale, groups, backend, across)
    found: torch.Tensor = _scaled_grouped_linear(
        x, weight, weight_scale, input_scale, groups.experts, groups.rows, groups.offsets, groups.slots, groups.expected,
        groups.share, parts, scheme.text, backend, across, zero_point, column_groups,
    )  # fmt: skip
    return found
