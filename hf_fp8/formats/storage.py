"""How a quantized weight is stored: the tensors that stand for it in modules and files, made and read.

A way to store weights is one WeightFormat; layers, conversion ops, plans and files ask it for names, dtypes and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch

from . import fbgemm, numerics, packing
from .scheme import Granularity, TensorScheme, scale_shape
from .weights import nearest_codes, quantize_weight, quantize_with_zero_points

# Roles of tensors: what the modules of compressed-tensors call them.
WEIGHT, WEIGHT_SCALE, INPUT_SCALE = "weight", "weight_scale", "input_scale"
PACKED, SHAPE, ZERO_POINT, COLUMN_GROUPS = "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"
# A shape, and that of a tensor without dimensions.
Shape = tuple[int, ...]
SCALAR: Shape = ()
Tensors = Mapping[str, torch.Tensor]  # by their role


class TensorForm(NamedTuple):
    """The dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: Shape


class WeightFormat(Protocol):
    """How weights (N, K) of a scheme are stored. Tensors are named by their role: "weight", "weight_scale", ...

    codes: the role of the tensor with the codes.
    """

    codes: str

    def forms(self, scheme: TensorScheme, n: int, k: int, scale_dtype: torch.dtype) -> dict[str, TensorForm]:
        """Role -> dtype and shape of each tensor of a module."""

    def accepted(self, scheme: TensorScheme, role: str, n: int, k: int) -> list[Shape]:
        """The shapes that the tensor `role` may have in files; that of `forms` is the first."""

    def quantize(
        self,
        weight: torch.Tensor,
        scheme: TensorScheme,
        held: Tensors | None = None,
        generator: torch.Generator | None = None,
        checked: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Role -> tensor, of a float weight (N, K). Raises ScaleError for NaN or infinity, if `checked`.

        held, generator, checked: as in `quantize_weight`; held has the tensors of the weight before a small change.
        """

    def encode(self, weight: torch.Tensor, scheme: TensorScheme, held: Tensors) -> torch.Tensor:
        """The tensor of codes of a float weight (N, K) for the scales, and zero points, in `held`."""

    def pieces(
        self, tensors: Tensors, scheme: TensorScheme, k: int, dtype: torch.dtype, elements: int
    ) -> Iterator[tuple[torch.Tensor, int]]:
        """Yield (some rows of the dequantized weight (N, K), number of the first), about `elements` at a time.

        Computed in float32 (float64 for such scales) and rounded once to `dtype`.
        """


def dequantize(tensors: Tensors, scheme: TensorScheme, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) that `tensors` stand for, computed in float32 (float64 for such scales) and rounded once to `dtype`."""
    stored = format_of(scheme)
    codes = tensors[stored.codes]
    if isinstance(stored, OneByteCodes):
        return numerics.dequantize(codes, tensors[WEIGHT_SCALE], scheme.granularity, dtype)
    out = torch.empty((codes.shape[0], k), dtype=dtype, device=codes.device)
    for piece, start in stored.pieces(tensors, scheme, k, dtype, numerics.chunk(codes.device)):
        out[start : start + len(piece)] = piece
    return out


class OneByteCodes:
    """One code in each element of `weight`, and its scales in `weight_scale` (`scale_shape`): E4M3, E5M2 and int8."""

    codes = WEIGHT

    def forms(self, scheme: TensorScheme, n: int, k: int, scale_dtype: torch.dtype) -> dict[str, TensorForm]:
        return {
            WEIGHT: TensorForm(scheme.storage, (n, k)),
            WEIGHT_SCALE: TensorForm(scale_dtype, scale_shape(scheme.granularity, n, k)),
        }

    def accepted(self, scheme: TensorScheme, role: str, n: int, k: int) -> list[Shape]:
        return [(n, k)] if role == WEIGHT else _accepted_scales(scheme.granularity, n, k)

    def quantize(
        self,
        weight: torch.Tensor,
        scheme: TensorScheme,
        held: Tensors | None = None,
        generator: torch.Generator | None = None,
        checked: bool = True,
    ) -> dict[str, torch.Tensor]:
        before = None if held is None else held[WEIGHT_SCALE]
        codes, scale = quantize_weight(weight, scheme.granularity, scheme.dtype, before, generator, checked, scheme.mx)
        return {WEIGHT: codes, WEIGHT_SCALE: scale}

    def encode(self, weight: torch.Tensor, scheme: TensorScheme, held: Tensors) -> torch.Tensor:
        return nearest_codes(weight, held[WEIGHT_SCALE], scheme)

    def pieces(
        self, tensors: Tensors, scheme: TensorScheme, k: int, dtype: torch.dtype, elements: int
    ) -> Iterator[tuple[torch.Tensor, int]]:
        for codes, scale, start in numerics.pieces(tensors[WEIGHT], tensors[WEIGHT_SCALE], scheme.granularity, elements):
            yield numerics.dequantize(codes, scale, scheme.granularity, dtype), start


class PackedCodes:
    """compressed-tensors' `pack-quantized` (`packing`): integers in `weight_packed` (N, words), scales in `weight_scale`, N and
    K in `weight_shape`.

    With zero points also `weight_zero_point` (words, groups), packed along N; with groups of columns that do not lie next to
    each other `weight_g_idx` (K,), the group of each column.
    """

    codes = PACKED

    def forms(self, scheme: TensorScheme, n: int, k: int, scale_dtype: torch.dtype) -> dict[str, TensorForm]:
        bits, scales = scheme.code.bits, scale_shape(scheme.granularity, n, k)
        forms = {
            PACKED: TensorForm(torch.int32, (n, packing.words(k, bits))),
            WEIGHT_SCALE: TensorForm(scale_dtype, scales),
            SHAPE: TensorForm(torch.int64, (2,)),
        }
        if scheme.has_zero_points:
            forms[ZERO_POINT] = TensorForm(torch.int32, (packing.words(n, bits), scales[1]))
        if scheme.is_ordered:
            forms[COLUMN_GROUPS] = TensorForm(torch.int32, (k,))
        return forms

    def accepted(self, scheme: TensorScheme, role: str, n: int, k: int) -> list[Shape]:
        if role == WEIGHT_SCALE:
            return _accepted_scales(scheme.granularity, n, k)
        return [self.forms(scheme, n, k, torch.float32)[role].shape]

    def quantize(
        self,
        weight: torch.Tensor,
        scheme: TensorScheme,
        held: Tensors | None = None,
        generator: torch.Generator | None = None,
        checked: bool = True,
    ) -> dict[str, torch.Tensor]:
        bits, (n, k) = scheme.code.bits, weight.shape
        made = {SHAPE: torch.tensor([n, k], device=weight.device)}
        if scheme.is_ordered:
            assert held is not None, "the order of columns comes from a checkpoint"
            made[COLUMN_GROUPS] = held[COLUMN_GROUPS]
            weight = weight[:, held[COLUMN_GROUPS].long().argsort(stable=True)]
        if scheme.recipe:
            codes, made[WEIGHT_SCALE] = fbgemm.quantize(weight, scheme, checked)
        elif scheme.has_zero_points:
            before = None if held is None else (held[WEIGHT_SCALE], packing.unpack_rows(held[ZERO_POINT], bits, n))
            codes, made[WEIGHT_SCALE], points = quantize_with_zero_points(weight, scheme, before, generator, checked)
            made[ZERO_POINT] = packing.pack_rows(points, bits)
        else:
            scale = None if held is None else held[WEIGHT_SCALE]
            codes, made[WEIGHT_SCALE] = quantize_weight(weight, scheme.granularity, scheme.dtype, scale, generator, checked)
        if scheme.is_ordered:
            codes = torch.empty_like(codes).index_copy_(1, made[COLUMN_GROUPS].long().argsort(stable=True), codes)
        return {PACKED: packing.pack(codes, bits), **made}

    def encode(self, weight: torch.Tensor, scheme: TensorScheme, held: Tensors) -> torch.Tensor:
        code, (n, k) = scheme.code, weight.shape
        scaled = weight.float() / self._expanded(held[WEIGHT_SCALE].float(), scheme, n, k, held)
        if scheme.has_zero_points:
            scaled += self._expanded(packing.unpack_rows(held[ZERO_POINT], code.bits, n).float(), scheme, n, k, held)
        return packing.pack(code.round(scaled.clamp_(code.least, code.largest).nan_to_num_(0.0)), code.bits)

    def _expanded(self, grid: torch.Tensor, scheme: TensorScheme, n: int, k: int, tensors: Tensors) -> torch.Tensor:
        """A number for each group of columns, for each column, or broadcastable to that."""
        if scheme.is_ordered:
            return grid.reshape(n, -1)[:, tensors[COLUMN_GROUPS].long()]
        return numerics.expand_scale(grid, scheme.granularity, n, k)

    def pieces(
        self, tensors: Tensors, scheme: TensorScheme, k: int, dtype: torch.dtype, elements: int
    ) -> Iterator[tuple[torch.Tensor, int]]:
        packed, bits = tensors[PACKED], scheme.code.bits
        rows, group = packed.shape[0], scheme.granularity.cols
        scale, points = tensors[WEIGHT_SCALE].reshape(rows, -1), tensors.get(ZERO_POINT)
        order = tensors[COLUMN_GROUPS].long() if scheme.is_ordered else None
        if order is not None and points is not None:  # one for each column, as with scales below
            points = packing.pack_rows(packing.unpack_rows(points, bits, rows)[:, order], bits)
        step = max(elements // max(k, 1) // 8, 1) * 8  # zero points of eight rows are in a word
        for start in range(0, rows, step):
            some = slice(start, start + step)
            codes = packing.differences(packed, points, bits, k, group if order is None else 1, some)
            if order is None:
                yield numerics.dequantize(codes, scale[some], scheme.granularity, dtype), start
            else:
                wide = numerics.wide(scale.dtype)
                yield (codes.to(wide) * scale[some].to(wide)[:, order]).to(dtype), start


ONE_BYTE, SEVERAL = OneByteCodes(), PackedCodes()


def format_of(scheme: TensorScheme) -> WeightFormat:
    """The format in which weights of `scheme` are stored."""
    return SEVERAL if scheme.packed else ONE_BYTE


def _accepted_scales(granularity: Granularity, n: int, k: int) -> list[Shape]:
    own = scale_shape(granularity, n, k)
    if granularity.is_tensor:
        return [own, SCALAR, (1, 1)]
    if granularity.is_row:
        return [own, (n,)]
    # Files may have dimensions to broadcast over a group (the last), and over a block (one after each: ModelOpt).
    return [own, (*own, 1)] if granularity.rows == 1 else [own, (own[0], 1, own[1], 1)]


def stacked(shape: Shape, n_experts: int, parts: int) -> Shape:
    """The shape of a stack of E tensors, each of which is `parts` tensors of shape `shape`, concatenated."""
    return (n_experts, parts * shape[0], *shape[1:])


def forms_of_stack(
    scheme: TensorScheme, shape: tuple[int, int, int], parts: int, scale_dtype: torch.dtype
) -> dict[str, TensorForm]:
    """Role -> dtype and shape of the tensors of a stack (E, N, K). parts: matrices along N, each with separate scales."""
    n_experts, n, k = shape
    one = format_of(scheme).forms(scheme, n // parts, k, scale_dtype)
    return {role: TensorForm(form.dtype, stacked(form.shape, n_experts, parts)) for role, form in one.items()}


def accepted_of_stack(scheme: TensorScheme, role: str, shape: tuple[int, int, int], transposed: bool) -> list[Shape]:
    """`WeightFormat.accepted` of a stack in one tensor: (E, N, K), or if `transposed` (E, K, N) with transposed scales."""
    n_experts, n, k = (shape[0], shape[2], shape[1]) if transposed else shape
    each = [one for one in format_of(scheme).accepted(scheme, role, n, k) if len(one) <= 2]
    shared = [SCALAR, (1,)] if SCALAR in each else []  # one for all experts
    return shared + [(n_experts, *(one[::-1] if transposed else one)) for one in each]
