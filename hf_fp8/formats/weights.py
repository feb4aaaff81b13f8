"""Quantization of float weights to codes (values of 8 or 4 bits) and scales in plain torch; and Change, which measures how much
of a change to a weight (for example a merged adapter) is left after it is quantized again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import ScaleError
from .code_types import CODE_TYPES, FP8
from .exponents import EXPONENTS, exponents_of, mx_exponents, scale_values
from .numerics import amax_of, chunk, compute_scale, dequantize, expand_scale, pieces, quantize, stochastic_round
from .scheme import ROW, Granularity, TensorScheme, scale_shape


def scale_dtype_of(dtype: torch.dtype, mx: bool = False) -> torch.dtype:
    """The dtype of the scale of a weight of `dtype`: the same, as in compressed-tensors; float32 for float64; bytes if `mx`."""
    if mx:
        return torch.uint8
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def weight_scale_of(amax: torch.Tensor, dtype: torch.dtype = FP8) -> torch.Tensor:
    """The scale of weights with the given `amax` (`amax_of`), computed and rounded in its dtype.

    This is compressed-tensors' arithmetic (quantization/utils/helpers.py, calculate_qparams), bit for bit: a block of zeros
    gets the dtype's eps. The only difference: if amax / `CodeType.weight_range` underflows, which compressed-tensors treats
    as zero, the scale is the smallest positive number, so that the block is not lost.
    """
    info = torch.finfo(amax.dtype)
    return torch.where(amax == 0, info.eps, (amax / CODE_TYPES[dtype].weight_range).clamp(min=least_scale(amax.dtype)))


def least_scale(dtype: torch.dtype) -> float:
    """The smallest positive scale in `dtype`: a subnormal in float16, as the range of its normal numbers is small."""
    info = torch.finfo(dtype)
    return float(info.tiny * info.eps if dtype == torch.float16 else info.tiny)


def quantize_weight(
    weight: torch.Tensor,
    granularity: Granularity,
    dtype: torch.dtype = FP8,
    held: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    checked: bool = True,
    mx: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a float weight (N, K): (codes (N, K), one in each element, scale in the shape of `scheme.scale_shape`).

    Scale and quotient are computed in the dtype of the weight and rounded to it, as compressed-tensors does in plain torch
    (quantization/lifecycle/forward_helpers.py, _quantize), so that the same weights give the same bytes. The weight is
    processed in pieces: temporary memory is of a fixed size.

    held: the scale of the weight before a small change. Blocks that it still fits keep it, as their unchanged values are
    exactly its codes; other blocks get a new scale of the same dtype. New scales that are stored as exponents (`EXPONENTS`) are
    rounded up to powers of two, so that nothing overflows. mx: scales are those of `mx_exponents`, in uint8 without `held`.
    generator: round up or down at random (`stochastic_round`) instead of to the nearest code.
    checked: look for NaN and infinity, which waits for a GPU; without it they become some codes, with NaN or infinite scales.

    Raises ScaleError for weights with NaN or infinity.
    """
    rows, cols = weight.shape
    kept_in = scale_dtype_of(weight.dtype, mx) if held is None else held.dtype
    # A power of two may be too small for 16 bits. Dividing by it is exact in float32, as compressed-tensors' division is.
    compute = torch.float32 if kept_in in EXPONENTS else scale_dtype_of(weight.dtype)
    code = CODE_TYPES[dtype]
    codes = torch.empty((rows, cols), dtype=code.storage, device=weight.device)
    shape = scale_shape(granularity, rows, cols)
    scale = torch.zeros(granularity.grid(rows, cols), dtype=compute, device=weight.device)
    elements = chunk(weight.device)
    for piece, part, _ in pieces(weight, scale, granularity, elements):
        if piece.numel():
            torch.maximum(part, amax_of(piece, granularity).to(compute), out=part)
    if checked:
        refuse_non_finite(scale, weight)
    of_mx = scale_values(mx_exponents(scale)) if mx else None
    scale.copy_(weight_scale_of(scale, dtype))
    if held is None and of_mx is not None:
        scale.copy_(of_mx)
    if held is not None:
        fresh = _rounded_to(scale, held.dtype) if of_mx is None else of_mx.to(compute)
        before = scale_values(held).reshape(scale.shape).to(compute)
        # Keep the held scale unless it is too small, or so large that integers would lose more than one bit.
        fits = scale <= before if code.is_float else _fits(weight, before, granularity, dtype)
        scale.copy_(torch.where(fits & (scale >= before / 2), before, fresh))
    for piece, part, start in pieces(weight, scale, granularity, elements):
        scaled = (piece.to(compute) / expand_scale(part, granularity, *piece.shape)).clamp_(code.least, code.largest)
        if generator is not None:
            scaled = stochastic_round(scaled.float(), dtype, generator)
        codes[start : start + len(piece)] = code.round(scaled)
    kept = exponents_of(scale, kept_in) if kept_in in EXPONENTS else scale.to(kept_in)
    return codes, kept.reshape(shape)


def _rounded_to(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` rounded to what `dtype` can hold, in its own dtype."""
    if dtype in EXPONENTS:
        return scale_values(exponents_of(scale, dtype)).to(scale.dtype)
    rounded = scale.to(dtype)
    # Near the smallest numbers of a dtype, rounding down may lower the scale a lot, which would clip the largest weight.
    low = rounded.to(scale.dtype) < scale * (1 - 2**-7)
    return torch.where(low, rounded + least_scale(dtype), rounded).to(scale.dtype)


def _fits(weight: torch.Tensor, scale: torch.Tensor, granularity: Granularity, dtype: torch.dtype) -> torch.Tensor:
    """For each scale, whether all values of its block are between the least and the largest code, which differ in magnitude."""
    code, found = CODE_TYPES[dtype], torch.ones_like(scale, dtype=torch.bool)
    for (piece, part, _), (_, fits, _) in zip(
        pieces(weight, scale, granularity, chunk(weight.device)),
        pieces(weight, found, granularity, chunk(weight.device)),
        strict=True,
    ):
        if piece.numel():
            high, low = (amax_of(half.clamp(min=0).to(scale.dtype), granularity) for half in (piece, -piece))
            fits &= (high <= part * code.largest) & (low <= part * -code.least)
    return found


def refuse_non_finite(scale: torch.Tensor, weight: torch.Tensor) -> None:
    if not bool(scale.isfinite().all()):
        raise ScaleError(f"a weight of shape {(*weight.shape,)} has values that are NaN or infinite: it cannot be quantized")


def quantize_with_zero_points(
    weight: torch.Tensor,
    scheme: TensorScheme,
    held: tuple[torch.Tensor, torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
    checked: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a float weight (N, K) asymmetrically: (codes (N, K), scale, zero points, both (N, groups)); int8 but for scales.

    compressed-tensors' arithmetic, as in `quantize_weight`: the range of a group, which always contains 0, is mapped to that of
    the codes. held: scale and zero points before a small change, which groups keep that they still fit. generator, checked:
    as in `quantize_weight`. Raises ScaleError for weights with NaN or infinity, and for a range that overflows.
    """
    cols = weight.shape[1]
    code, granularity, compute = scheme.code, scheme.granularity, scale_dtype_of(weight.dtype)
    width = cols if granularity.cols == -1 else granularity.cols
    padded = F.pad(weight.to(compute), (0, -cols % width))  # the last group may be partial; zeros are in every range
    grouped = padded.view(len(weight), -1, width)
    low, high = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
    if checked:
        refuse_non_finite(low, weight)
        refuse_non_finite(high, weight)
        if not bool((high - low).isfinite().all()):
            raise ScaleError(
                f"a weight of shape {(*weight.shape,)} has a group whose range, from its least to its largest value, is more "
                f"than {compute} can hold: use symmetric codes (W4A16), or a float32 weight"
            )
    scale = (high - low) / (code.largest - code.least)
    point = (code.least - low / scale).clamp_(code.least, code.largest).nan_to_num_(0.0).round_()
    scale = torch.where(high == low, torch.finfo(compute).eps, scale.clamp(min=least_scale(compute)))
    if held is not None:
        before, of_before = held[0].reshape(scale.shape).to(compute), held[1].to(compute)
        fits = ((code.least - of_before) * before <= low) & ((code.largest - of_before) * before >= high)
        fits &= scale >= before / 2
        scale, point = torch.where(fits, before, scale.to(held[0].dtype).to(compute)), torch.where(fits, of_before, point)
    scaled = (grouped / scale.unsqueeze(2)).add_(point.unsqueeze(2)).clamp_(code.least, code.largest).flatten(1)[:, :cols]
    if generator is not None:
        scaled = stochastic_round(scaled.float(), scheme.dtype, generator)
    return code.round(scaled), scale.to(compute if held is None else held[0].dtype), point.to(code.storage)


def nearest_codes(weight: torch.Tensor, scale: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    """The codes of a float weight (N, K) for a given scale, one in each element. NaN and infinity are NaN in floats."""
    if scheme.code.is_float:
        return quantize(weight, scale, scheme.granularity, scheme.dtype)
    scaled = weight.float() / expand_scale(scale_values(scale).float(), scheme.granularity, *weight.shape)
    return scheme.code.round(scaled.clamp_(scheme.code.least, scheme.code.largest).nan_to_num_(0.0))


def requantize(
    q: torch.Tensor, scale: torch.Tensor, granularity: Granularity, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize q (N, K) and quantize it again: (codes of `dtype`, float32 scales (N, 1) per row).

    Processed in pieces, without a float32 copy of the whole weight.
    """
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
    """Sums over a layer's weights, in float64: W before the change, M the exact result, Q the stored (quantized) result.

    Weights that changed little keep their codes: rounding does not blur a small change but drops it. So `kept` tells more
    than `error`.
    """

    delta: float = 0.0  # |M - W|^2
    found: float = 0.0  # (Q - W) . (M - W)
    missed: float = 0.0  # |Q - M|^2
    norm: float = 0.0  # |M|^2

    def add(self, before: torch.Tensor, wanted: torch.Tensor, after: torch.Tensor) -> None:
        """Add a piece: W, M and Q in float32, of the same shape."""
        delta, missed = wanted - before, after - wanted
        self.delta += float(delta.square().sum(dtype=torch.float64))
        self.found += float(((after - before) * delta).sum(dtype=torch.float64))
        self.missed += float(missed.square().sum(dtype=torch.float64))
        self.norm += float(wanted.square().sum(dtype=torch.float64))

    @property
    def kept(self) -> float:
        """The share of the change that is in Q, projected on the direction of the change: 1 is all, 0 is nothing."""
        return self.found / self.delta if self.delta else 1.0

    @property
    def size(self) -> float:
        """||M - W|| / ||M||: the relative size of the change."""
        return (self.delta / self.norm) ** 0.5 if self.norm else 0.0

    @property
    def noise(self) -> float:
        """||Q - M|| / ||M - W||: the rounding error relative to the change. It has no preferred direction."""
        return (self.missed / self.delta) ** 0.5 if self.delta else 0.0

    @property
    def error(self) -> float:
        """||Q - M|| / ||M||: the relative error of the stored result."""
        return (self.missed / self.norm) ** 0.5 if self.norm else 0.0
