"""Float weights to codes and scales, in plain torch, and what becomes of a change to a weight, such as a merged adapter, when
the result is rounded to codes again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ScaleError
from .numerics import amax_of, broadcast_scale, chunk, compute_scale, dequantize, pieces, quantize, stochastic_round
from .quantized_weight.tensor import codes_of
from .scheme import CODE_MAX, FP8, ROW, Granularity, scale_shape


def scale_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the scale of a weight of `dtype` is made: its own, as in compressed-tensors; float32 of float64."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def weight_scale_of(amax: torch.Tensor, dtype: torch.dtype = FP8) -> torch.Tensor:
    """The scale of weights whose largest magnitude is `amax` (`amax_of`), computed and rounded in its dtype.

    That is compressed-tensors' arithmetic (quantization/utils/helpers.py, calculate_qparams) to the bit: a block of zeros
    gets the dtype's eps. Only where amax / 448 underflows, which there is taken for zero, it is the smallest positive
    number instead, so that the block is kept.
    """
    info = torch.finfo(amax.dtype)
    return torch.where(amax == 0, info.eps, (amax / CODE_MAX[dtype]).clamp(min=least_scale(amax.dtype)))


def least_scale(dtype: torch.dtype) -> float:
    """The smallest positive number of `dtype` that scales may have: in float16 a subnormal, as its normal ones end early."""
    info = torch.finfo(dtype)
    return float(info.tiny * info.eps if dtype == torch.float16 else info.tiny)


def quantize_weight(
    weight: torch.Tensor,
    granularity: Granularity,
    dtype: torch.dtype = FP8,
    held: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A float weight (N, K) -> (codes (N, K) of `dtype`, scale in the shape of `scheme.scale_shape`).

    Scale and quotient are computed in the dtype of the weight and rounded to it, as compressed-tensors does in plain torch
    (quantization/lifecycle/forward_helpers.py, _quantize), so that the same weights give the same bytes. In pieces: what is
    held beside weight and codes is of a fixed size.

    held: the scale that the weight had before somebody changed it a little. Blocks for which it still does keep it, as
    their values lie on its codes; others get one of its dtype.
    generator: round up or down at random (`stochastic_round`) instead of to the nearest code.

    Raises ScaleError for weights with NaN or infinity.
    """
    rows, cols = weight.shape
    compute = scale_dtype_of(weight.dtype)
    codes = torch.empty((rows, cols), dtype=dtype, device=weight.device)
    shape = scale_shape(granularity, rows, cols)
    scale = torch.zeros(granularity.grid(rows, cols), dtype=compute, device=weight.device)
    elements = chunk(weight.device)
    for piece, part, _ in pieces(weight, scale, granularity, elements):
        if piece.numel():
            torch.maximum(part, amax_of(piece, granularity).to(compute), out=part)
    if not bool(scale.isfinite().all()):
        raise ScaleError(f"a weight of shape {(rows, cols)} has values that are NaN or infinite: it cannot be quantized")
    scale.copy_(weight_scale_of(scale, dtype))
    if held is not None:
        fresh = scale.to(held.dtype)
        # Among the smallest numbers of a dtype the next lower one may be far below: the largest weight would be cut.
        low = fresh.to(compute) < scale * (1 - 2**-7)
        fresh = torch.where(low, fresh + least_scale(held.dtype), fresh).to(compute)
        before = held.reshape(scale.shape).to(compute)
        # Not smaller than needed, and not so large that int8 would lose more than one bit.
        scale.copy_(torch.where((scale <= before) & (scale >= before / 2), before, fresh))
    largest = CODE_MAX[dtype]
    for piece, part, start in pieces(weight, scale, granularity, elements):
        scaled = (piece.to(compute) / broadcast_scale(part, granularity, *piece.shape)).clamp_(-largest, largest)
        if generator is not None:
            scaled = stochastic_round(scaled.float(), dtype, generator).clamp_(-largest, largest)
        codes[start : start + len(piece)] = scaled.to(dtype) if dtype == FP8 else scaled.round_().to(dtype)
    return codes, scale.reshape(shape).to(compute if held is None else held.dtype)


def requantize(
    q: torch.Tensor, scale: torch.Tensor, granularity: Granularity, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (N, K) times its scales, quantized anew: (codes of `dtype`, float32 scales (N, 1) per row).

    In pieces: a float32 copy of the whole is never held.
    """
    q = codes_of(q)
    rows, cols = q.shape
    codes = torch.empty((rows, cols), dtype=dtype, device=q.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=q.device)
    for piece, part, start in pieces(q, scale, granularity, chunk(q.device)):
        dense = dequantize(piece, part, granularity)
        end = start + len(piece)
        scales[start:end] = compute_scale(dense, ROW, dtype)
        codes[start:end] = quantize(dense, scales[start:end], ROW, dtype)
    return codes, scales


@dataclass
class Change:
    """Sums over a layer's weights, in float64: W before, M as it should be, Q as it is stored.

    Codes of a weight that hardly changed are the codes it had: rounding does not blur a small change, it drops it. So `kept`
    says more than the error does.
    """

    delta: float = 0.0  # |M - W|^2
    found: float = 0.0  # (Q - W) . (M - W)
    missed: float = 0.0  # |Q - M|^2
    norm: float = 0.0  # |M|^2

    def add(self, before: torch.Tensor, wanted: torch.Tensor, after: torch.Tensor) -> None:
        """Count in a piece: W, M and Q, float32 of one shape."""
        delta, missed = wanted - before, after - wanted
        self.delta += float(delta.square().sum(dtype=torch.float64))
        self.found += float(((after - before) * delta).sum(dtype=torch.float64))
        self.missed += float(missed.square().sum(dtype=torch.float64))
        self.norm += float(wanted.square().sum(dtype=torch.float64))

    @property
    def kept(self) -> float:
        """The share of the change that is there, along its own direction: 1 is all, 0 none."""
        return self.found / self.delta if self.delta else 1.0

    @property
    def size(self) -> float:
        """||M - W|| / ||M||: how much was to change."""
        return (self.delta / self.norm) ** 0.5 if self.norm else 0.0

    @property
    def noise(self) -> float:
        """||Q - M|| / ||M - W||: how large what rounding adds is beside the change. It points nowhere in particular."""
        return (self.missed / self.delta) ** 0.5 if self.delta else 0.0

    @property
    def error(self) -> float:
        """||Q - M|| / ||M||: how far what is stored is from what it should be."""
        return (self.missed / self.norm) ** 0.5 if self.norm else 0.0
