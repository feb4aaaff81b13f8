"""Stacks of experts (QuantizedExperts) from codes to the family's own layout and back, one expert at a time; and LoRA on them:
rows times the two small matrices of the expert that they were routed to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations import moe

from ..errors import ScaleError, UnsupportedError
from ..formats.weights import Change, quantize_weight
from ..kernels import ExpertWeights, Routing
from ..kernels import torch_grouped as grouped_mm

# Elements of a row that a grouped matmul wants to be a multiple of: 16 bytes of 16-bit numbers.
ALIGNED = 8


def weights_of(experts: Any, projection: Any) -> ExpertWeights:
    """A stack as kernels take it."""
    scale = getattr(experts, projection.scale)
    return ExpertWeights(experts.held_codes(projection.name), scale, projection.scheme, projection.parts)


def is_interleaved(experts: Any, projection: Any) -> bool:
    """Whether the family's rows of gate and up take turns where this module's lie over each other."""
    return projection is experts.first and not experts.layout.is_concatenated and not experts.interleaved


def rebuilt(experts: Any, dtype: torch.dtype, *, empty: bool) -> nn.Module:
    """The family's own module, in its own layout, on the same device. empty: its weights take no memory and say nothing."""
    dense: nn.Module = experts.family.__new__(experts.family)
    nn.Module.__init__(dense)
    vars(dense).update({name: getattr(experts, name) for name in experts.attributes})
    for name, child in experts.named_children():
        dense.add_module(name, child)
    for name, buffer in experts.named_buffers(recurse=False):
        dense.register_buffer(name, buffer, persistent=name not in experts._non_persistent_buffers_set)
    for name in experts._parameters:
        projection = next((p for p in experts.projections if p.name == name), None)
        if projection is not None:
            values = _empty(experts, projection, dtype) if empty else _dense(experts, projection, dtype)
            dense.register_parameter(name, nn.Parameter(values))
        elif name not in experts.quantized:
            dense.register_parameter(name, nn.Parameter(getattr(experts, name).detach().to(dtype, copy=True)))
    dense.train(experts.training)
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
    """Some experts of a stack multiplied out, (E, N, K), for whoever reads it as values.

    Raises UnsupportedError for families that hold their stacks otherwise: what their code computes with it would be wrong.
    """
    if layout.is_transposed or turns:
        how = "transposed" if layout.is_transposed else "rows of gate and up taking turns"
        raise UnsupportedError(
            f"{projection.name} is read as values, and {family.__name__} would hold it {how}, unlike its codes "
            f"({[*codes.shape]} in {codes.dtype}): experts.to_dense(dtype) gives the family's own module, and "
            "FP8Config(experts='dequantize') loads it so"
        )
    w = ExpertWeights(codes[rows], scale[rows], projection.scheme, projection.parts)
    out = torch.empty(w.codes.shape, dtype=dtype, device=codes.device)
    for expert in range(len(out)):
        for piece, first, last in grouped_mm.pieces(w, expert, dtype):
            out[expert, first:last] = piece
    return out


def _shape(experts: Any, projection: Any) -> tuple[int, int, int]:
    n_experts, n, k = projection.shape
    return (n_experts, k, n) if experts.layout.is_transposed else (n_experts, n, k)


def _empty(experts: Any, projection: Any, dtype: torch.dtype) -> torch.Tensor:
    device = getattr(experts, projection.name).device
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(_shape(experts, projection))


def _dense(experts: Any, projection: Any, dtype: torch.dtype) -> torch.Tensor:
    """A stack as the family holds it."""
    w = weights_of(experts, projection)
    out = torch.empty(_shape(experts, projection), dtype=dtype, device=w.codes.device)
    for expert, rows in enumerate(_rows(experts, out)):
        if is_interleaved(experts, projection):
            whole = torch.cat([piece for piece, _, _ in grouped_mm.pieces(w, expert, dtype)])
            rows[::2], rows[1::2] = whole.chunk(2)
        else:
            for piece, first, last in grouped_mm.pieces(w, expert, dtype):
                rows[first:last] = piece
    return out


def _rows(experts: Any, values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views (N, K) of each expert of a stack in the family's layout."""
    yield from values.transpose(1, 2) if experts.layout.is_transposed else values


def rows_as_held(experts: Any, projection: Any, values: torch.Tensor) -> Iterator[torch.Tensor]:
    """(N, K) of each expert of a stack in the family's layout, its rows in the order of the codes."""
    for rows in _rows(experts, values):
        yield torch.cat([rows[::2], rows[1::2]]) if is_interleaved(experts, projection) else rows


def _is_unchanged(experts: Any, projection: Any, values: torch.Tensor) -> bool:
    """Whether a stack is what `rebuilt` gave: no adapter is on it."""
    w = weights_of(experts, projection)
    for expert, rows in enumerate(rows_as_held(experts, projection, values)):
        if not all(torch.equal(rows[a:b], piece) for piece, a, b in grouped_mm.pieces(w, expert, values.dtype)):
            return False
    return True


@torch.no_grad()
def requantized(experts: Any, dense: nn.Module, generator: torch.Generator | None) -> tuple[dict[str, nn.Parameter], Change]:
    """Parameters of `experts` made of those of `dense`, the family's module, and what rounding makes of the change."""
    found: dict[str, nn.Parameter] = {}
    change = Change()
    for projection in experts.projections:
        held = weights_of(experts, projection)
        values: Any = getattr(dense, projection.name).detach()
        if _is_unchanged(experts, projection, values):
            continue
        codes, scales = torch.empty_like(held.codes), torch.empty_like(held.scale)
        new = ExpertWeights(codes, scales, projection.scheme, projection.parts)
        for expert, rows in enumerate(rows_as_held(experts, projection, values)):
            for part, wanted in enumerate(rows.chunk(projection.parts)):
                place, was = (w.part(part) if projection.parts > 1 else w for w in (new, held))
                try:
                    made = quantize_weight(
                        wanted.float(), projection.scheme.weight.granularity, codes.dtype, was.scale[expert], generator
                    )
                except ScaleError as error:
                    raise ScaleError(f"{projection.name} of expert {expert}: {error}") from None
                place.codes[expert], place.scale[expert] = made[0], made[1].reshape(place.scale[expert].shape)
            before = grouped_mm.pieces(held, expert, torch.float32)
            after = grouped_mm.pieces(new, expert, torch.float32)
            for (old, first, last), (made_of, _, _) in zip(before, after, strict=True):
                change.add(old, rows[first:last].float(), made_of)
        for name, tensor in ((projection.name, codes), (projection.scale, scales)):
            found[name] = nn.Parameter(tensor, requires_grad=False)
    for name in experts._parameters:
        if name not in experts.quantized:
            parameter = getattr(experts, name)
            moved = getattr(dense, name).detach().to(parameter.dtype, copy=True)
            found[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
    return found, change


class LowRank(NamedTuple):
    """What is added to a stack (E, N, K): ``scaling * b @ a``. a: (E, r, K), b: (E, N, r), rows as the stack's."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def product(x: torch.Tensor, factors: LowRank, routing: Routing) -> torch.Tensor:
    """(S, N) in the dtype of x (R, K): for each output of `routing` its row times its expert's a and b; 0 where there is none.

    Gradients flow to x, a and b. What is kept for them is the rows, sorted, and (S, r).
    """
    n_experts, rank, _ = factors.a.shape
    routing = routing if routing.offsets is not None else grouped_mm.sort(routing, n_experts)
    assert routing.offsets is not None
    a, b = factors.a.to(x.dtype), (factors.b * factors.scaling).to(x.dtype)
    if fill := -rank % ALIGNED:
        a, b = F.pad(a, (0, 0, 0, fill)), F.pad(b, (0, fill))
    a, b = a.contiguous(), b.contiguous()  # PEFT's are views that grouped matmuls refuse
    # Behind the last expert's rows nothing would be written, nor in the backward pass: it takes those of nobody, too.
    offsets = routing.offsets.clone()
    offsets[-1:] = routing.experts.shape[0]
    out = _grouped_linear(_grouped_linear(routing.gather(x), a, offsets), b, offsets)
    out = torch.where((routing.experts < n_experts).unsqueeze(1), out, 0.0)
    return out if routing.slots is None else torch.zeros_like(out).index_copy(0, routing.slots, out)


def _grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The host's; one expert after the other in float64, for which torch has no grouped matmul."""
    if x.dtype == torch.float64:
        out: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight.transpose(1, 2), offsets)
    else:
        out = moe._grouped_linear(x, weight, offsets)
    return out
