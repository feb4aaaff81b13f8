"""PackedLinear: a QuantizedLinear with several codes in each element; and which of the two stores weights of a scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..errors import StateDictError
from ..formats.scheme import Scheme
from ..formats.storage import COLUMN_GROUPS, PACKED, SHAPE, ZERO_POINT
from .linear import QuantizedLinear


class PackedLinear(QuantizedLinear):
    """A QuantizedLinear with several codes in each element of `weight_packed` (N, words), int32 (`formats.packing`).

    Its parameters are those of compressed-tensors' `pack-quantized`: `weight_scale`, `weight_shape`, and, if the scheme has
    them, `weight_zero_point` and `weight_g_idx` (`formats.storage.PackedCodes`). It has no `weight`, which could only be a
    copy: `dequantized_weight()` is one.
    """

    codes_name: ClassVar[str] = PACKED
    holds: ClassVar[Mapping[str, tuple[str, ...]]] = {PACKED: ("weight_scale", "input_scale")}

    @property
    def beside(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        return {PACKED: tuple(name for name in (SHAPE, ZERO_POINT, COLUMN_GROUPS) if name in self._parameters)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        shape = state_dict.get(prefix + SHAPE)
        if shape is not None and not shape.is_meta and shape.tolist() != [self.out_features, self.in_features]:
            raise StateDictError(  # another K may take as many elements
                f"{prefix}{SHAPE} says {shape.tolist()}, but the weight of {prefix.removesuffix('.') or 'this layer'} has "
                f"shape {[self.out_features, self.in_features]}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def linear_of(scheme: Scheme) -> type[QuantizedLinear]:
    """The class of layers whose weights are stored as `scheme` says."""
    return PackedLinear if scheme.weight.packed else QuantizedLinear
