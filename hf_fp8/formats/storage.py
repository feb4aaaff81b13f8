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


class TensorForm(NamedTuple):
    """The dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightFormat(Protocol):
    """How weights (N, K) of a scheme are stored. Tensors are named by their role: "weight", "weight_scale", ..."""

    def forms(self, scheme: TensorScheme, n: int, k: int, scale_dtype: torch.dtype) -> dict[str, TensorForm]:
        """Role -> dtype and shape of each tensor."""

    def quantize(self, weight: torch.Tensor, scheme: TensorScheme) -> dict[str, torch.Tensor]:
        """Role -> tensor, of a float weight (N, K). Raises ScaleError for NaN or infinity."""

    def dequantize(self, tensors: Mapping[str, torch.Tensor], scheme: TensorScheme, dtype: torch.dtype) -> torch.Tensor:
        """The weight (N, K), computed in float32 (float64 for such scales) and rounded once to `dtype`."""


class OneByteCodes:
    """One code in each element of `weight`, and its scales in `weight_scale` (`scale_shape`): E4M3 and int8."""

    def forms(self, scheme: TensorScheme, n: int, k: int, scale_dtype: torch.dtype) -> dict[str, TensorForm]:
        return {
            "weight": TensorForm(scheme.code.storage, (n, k)),
            "weight_scale": TensorForm(scale_dtype, scale_shape(scheme.granularity, n, k)),
        }

    def quantize(self, weight: torch.Tensor, scheme: TensorScheme) -> dict[str, torch.Tensor]:
        codes, scale = quantize_weight(weight, scheme.granularity, scheme.dtype)
        return {"weight": codes, "weight_scale": scale}

    def dequantize(self, tensors: Mapping[str, torch.Tensor], scheme: TensorScheme, dtype: torch.dtype) -> torch.Tensor:
        return numerics.dequantize(tensors["weight"], tensors["weight_scale"], scheme.granularity, dtype)


ONE_BYTE = OneByteCodes()


def format_of(scheme: TensorScheme) -> WeightFormat:
    """The format in which weights of `scheme` are stored."""
    assert scheme.code.per_element == 1, f"{scheme.code.label} has no WeightFormat yet"
    return ONE_BYTE
