"""How a quantized weight is stored: the tensors that stand for it in modules and files, made and read.

A way to store weights is one WeightFormat; layers, conversion ops, plans and files ask it for names, dtypes and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch

from . import numerics
from .scheme import TensorScheme, scale_shape
from .weights import quantize_weight

# Roles of tensors: what the modules of compressed-tensors call them.
WEIGHT, WEIGHT_SCALE, INPUT_SCALE = "weight", "weight_scale", "input_scale"
# A shape, and that of a tensor without dimensions.
Shape = tuple[int, ...]
SCALAR: Shape = ()


class TensorForm(NamedTuple):
    """The dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: Shape


class WeightFormat(Protocol):
    """How weights (N, K) of a scheme are stored. Tensors are named by their role: "weight", "weight_scale", ..."""

    def forms(self, scheme: TensorScheme, n: int, k: int, scale_dtype: torch.dtype) -> dict[str, TensorForm]:
        """Role -> dtype and shape of each tensor of a module."""

    def accepted(self, scheme: TensorScheme, role: str, n: int, k: int) -> list[Shape]:
        """The shapes that the tensor `role` may have in files; that of `forms` is the first."""

    def quantize(self, weight: torch.Tensor, scheme: TensorScheme) -> dict[str, torch.Tensor]:
        """Role -> tensor, of a float weight (N, K). Raises ScaleError for NaN or infinity."""

    def dequantize(self, tensors: Mapping[str, torch.Tensor], scheme: TensorScheme, dtype: torch.dtype) -> torch.Tensor:
        """The weight (N, K), computed in float32 (float64 for such scales) and rounded once to `dtype`."""


class OneByteCodes:
    """One code in each element of `weight`, and its scales in `weight_scale` (`scale_shape`): E4M3 and int8."""

    def forms(self, scheme: TensorScheme, n: int, k: int, scale_dtype: torch.dtype) -> dict[str, TensorForm]:
        return {
            WEIGHT: TensorForm(scheme.code.storage, (n, k)),
            WEIGHT_SCALE: TensorForm(scale_dtype, scale_shape(scheme.granularity, n, k)),
        }

    def accepted(self, scheme: TensorScheme, role: str, n: int, k: int) -> list[Shape]:
        if role == WEIGHT:
            return [(n, k)]
        own = scale_shape(scheme.granularity, n, k)
        if scheme.granularity.is_tensor:
            return [own, SCALAR, (1, 1)]
        if scheme.granularity.is_row:
            return [own, (n,)]
        # Per group, files may have a last dimension to broadcast over the group.
        return [own, (*own, 1)] if scheme.granularity.rows == 1 else [own]

    def quantize(self, weight: torch.Tensor, scheme: TensorScheme) -> dict[str, torch.Tensor]:
        codes, scale = quantize_weight(weight, scheme.granularity, scheme.dtype)
        return {WEIGHT: codes, WEIGHT_SCALE: scale}

    def dequantize(self, tensors: Mapping[str, torch.Tensor], scheme: TensorScheme, dtype: torch.dtype) -> torch.Tensor:
        return numerics.dequantize(tensors[WEIGHT], tensors[WEIGHT_SCALE], scheme.granularity, dtype)


ONE_BYTE = OneByteCodes()


def format_of(scheme: TensorScheme) -> WeightFormat:
    """The format in which weights of `scheme` are stored."""
    assert scheme.code.per_element == 1, f"{scheme.code.label} has no WeightFormat yet"
    return ONE_BYTE


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
