"""Conversion of QuantizedExperts to the model family's float module and back, one expert at a time; and LoRA on experts.

A stack is one parameter with the weights of all experts, (E, N, K); "the host" is transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations import moe

from ..errors import ScaleError, UnsupportedError
from ..formats.storage import COLUMN_GROUPS, WEIGHT_SCALE, ZERO_POINT, format_of
from ..formats.weights import Change
from ..kernels import ExpertWeights, Routing
from ..kernels import torch_grouped as grouped_mm

# The row length of a grouped matmul must be a multiple of this: 16 bytes of 16-bit numbers.
ALIGNED = 8


def weights_of(experts: Any, projection: Any) -> ExpertWeights:
    """Codes and scales of a stack, as kernels need them."""
    scale, others = getattr(experts, projection.scale), (ZERO_POINT, COLUMN_GROUPS)
    beside = [experts._parameters.get(projection.parameter(role)) for role in others]
    return ExpertWeights(experts.held_codes(projection.name), scale, projection.scheme, projection.parts, *beside)


def is_interleaved(experts: Any, projection: Any) -> bool:
    """Whether the family interleaves gate and up rows where this module concatenates them."""
    return projection is experts.first and not experts.layout.is_concatenated and not experts.interleaved


def rebuilt(experts: Any, dtype: torch.dtype, *, empty: bool) -> nn.Module:
    """The family's float module, in its own layout, on the same device. empty: its weights take no memory and are NaN."""
    dense: nn.Module = experts.of_family()
    for name in experts._parameters:
        projection = next((p for p in experts.projections if p.name == name), None)
        if projection is not None:
            values = _empty(experts, projection, dtype) if empty else _dense(experts, projection, dtype)
            dense.register_parameter(projection.name, nn.Parameter(values))
        elif name not in experts.quantized:
            dense.register_parameter(name, nn.Parameter(getattr(experts, name).detach().to(dtype, copy=True)))
    return dense


def decode(
    family: type,
    layout: Any,
    projection: Any,
    turns: bool,
    codes: torch.Tensor,
    scale: torch.Tensor,
    rows: slice,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dequantize the experts `rows` of a stack: (len(rows), N, K), for code that reads the parameter as values.

    Raises UnsupportedError for families with another layout, as their code would compute wrong results with these values.
    """
    if layout.is_transposed or turns:
        how = "transposed" if layout.is_transposed else "with gate and up rows interleaved"
        raise UnsupportedError(
            f"{projection.name} is read as values, and {family.__name__} would hold it {how}, unlike its codes "
            f"({[*codes.shape]} in {codes.dtype}): use the module of experts.to_dense(dtype), or load with "
            "FP8Config(experts='dequantize')"
        )
    w = ExpertWeights(codes[rows], scale[rows], projection.scheme, projection.parts)
    out = torch.empty(w.codes.shape, dtype=dtype, device=codes.device)
    for expert in range(len(out)):
        for piece, first, last in grouped_mm.pieces(w, expert, projection.shape[2], dtype):
            out[expert, first:last] = piece
    return out


def _shape(experts: Any, projection: Any) -> tuple[int, int, int]:
    n_experts, n, k = projection.shape
    return (n_experts, k, n) if experts.layout.is_transposed else (n_experts, n, k)


def _empty(experts: Any, projection: Any, dtype: torch.dtype) -> torch.Tensor:
    device = getattr(experts, projection.name).device
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(_shape(experts, projection))


def _dense(experts: Any, projection: Any, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized stack in the family's layout."""
    w, k = weights_of(experts, projection), projection.shape[2]
    out = torch.empty(_shape(experts, projection), dtype=dtype, device=w.codes.device)
    for expert, rows in enumerate(_rows(experts, out)):
        if is_interleaved(experts, projection):
            whole = torch.cat([piece for piece, _, _ in grouped_mm.pieces(w, expert, k, dtype)])
            rows[::2], rows[1::2] = whole.chunk(2)
        else:
            for piece, first, last in grouped_mm.pieces(w, expert, k, dtype):
                rows[first:last] = piece
    return out


def _rows(experts: Any, values: torch.Tensor) -> Iterator[torch.Tensor]:
    """A view (N, K) of each expert of `values`, a stack in the family's layout."""
    yield from values.transpose(1, 2) if experts.layout.is_transposed else values


def rows_as_held(experts: Any, projection: Any, values: torch.Tensor) -> Iterator[torch.Tensor]:
    """(N, K) of each expert of `values`, a stack in the family's layout, with rows in the order of the codes."""
    for rows in _rows(experts, values):
        yield torch.cat([rows[::2], rows[1::2]]) if is_interleaved(experts, projection) else rows


def _is_unchanged(experts: Any, projection: Any, values: torch.Tensor) -> bool:
    """Whether a stack is what `rebuilt` returned: no adapter was merged into it."""
    w, k = weights_of(experts, projection), projection.shape[2]
    for expert, rows in enumerate(rows_as_held(experts, projection, values)):
        if not all(torch.equal(rows[a:b], piece) for piece, a, b in grouped_mm.pieces(w, expert, k, values.dtype)):
            return False
    return True


@torch.no_grad()
def requantized(experts: Any, dense: nn.Module, generator: torch.Generator | None) -> tuple[dict[str, nn.Parameter], Change]:
    """Quantize the changed stacks of `dense`, the family's module: new parameters for `experts`, and the effect of rounding."""
    found: dict[str, nn.Parameter] = {}
    change = Change()
    for projection in experts.projections:
        held = weights_of(experts, projection)
        values: Any = getattr(dense, projection.name).detach()
        if _is_unchanged(experts, projection, values):
            continue
        scheme, k, stored = projection.scheme.weight, projection.shape[2], format_of(projection.scheme.weight)
        roles = {stored.codes: held.codes, WEIGHT_SCALE: held.scale, ZERO_POINT: held.zero_point}
        tensors = {role: torch.empty_like(tensor) for role, tensor in roles.items() if tensor is not None}
        new = held._replace(codes=tensors[stored.codes], scale=tensors[WEIGHT_SCALE], zero_point=tensors.get(ZERO_POINT))
        for expert, rows in enumerate(rows_as_held(experts, projection, values)):
            for part, wanted in enumerate(rows.chunk(projection.parts)):
                place, was = (w.part(part).matrix(expert) if projection.parts > 1 else w.matrix(expert) for w in (new, held))
                try:
                    made = stored.quantize(wanted.float(), scheme, was.tensors(), generator)
                except ScaleError as error:
                    raise ScaleError(f"{projection.name} of expert {expert}: {error}") from None
                for role, into in place.tensors().items():
                    if role in tensors:
                        into.copy_(made[role].reshape(into.shape))
            before = grouped_mm.pieces(held, expert, k, torch.float32)
            after = grouped_mm.pieces(new, expert, k, torch.float32)
            for (old, first, last), (made_of, _, _) in zip(before, after, strict=True):
                change.add(old, rows[first:last].float(), made_of)
        for role, tensor in tensors.items():
            found[projection.parameter(role)] = nn.Parameter(tensor, requires_grad=False)
    for name in experts._parameters:
        if name not in experts.quantized:
            parameter = getattr(experts, name)
            moved = getattr(dense, name).detach().to(parameter.dtype, copy=True)
            found[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
    return found, change


class LowRank(NamedTuple):
    """A low-rank update of a stack (E, N, K): ``scaling * b @ a``. a: (E, r, K), b: (E, N, r), rows ordered as the stack's."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def product(x: torch.Tensor, factors: LowRank, routing: Routing) -> torch.Tensor:
    """x times a and b of the expert of each row: (S, N) in the dtype of x (R, K); 0 for outputs without an expert.

    Gradients flow to x, a and b. Saved for backward: the sorted rows and a tensor of shape (S, r).
    """
    n_experts, rank, _ = factors.a.shape
    routing = routing if routing.offsets is not None else grouped_mm.sort(routing, n_experts)
    assert routing.offsets is not None
    a, b = factors.a.to(x.dtype), (factors.b * factors.scaling).to(x.dtype)
    if fill := -rank % ALIGNED:
        a, b = F.pad(a, (0, 0, 0, fill)), F.pad(b, (0, fill))
    a, b = a.contiguous(), b.contiguous()  # grouped matmuls refuse PEFT's strided views
    # Rows without an expert come last and would not be written, in the backward pass neither: the last expert computes them.
    offsets = routing.offsets.clone()
    offsets[-1:] = routing.experts.shape[0]
    out = _grouped_linear(_grouped_linear(routing.gather(x), a, offsets), b, offsets)
    out = torch.where((routing.experts < n_experts).unsqueeze(1), out, 0.0)
    return out if routing.slots is None else torch.zeros_like(out).index_copy(0, routing.slots, out)


def _grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The host's grouped linear; in float64, for which torch has no grouped matmul, one expert after the other."""
    if x.dtype == torch.float64:
        out: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight.transpose(1, 2), offsets)
    else:
        out = moe._grouped_linear(x, weight, offsets)
    return out
