"""Quantization schemes of weights and inputs: Granularity, TensorScheme, Scheme, and their names.

A scale is always the factor by which a code (a stored 8-bit value) is multiplied: ``real = stored * scale``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache

import torch

from ..errors import ConfigError
from .code_types import CODE_TYPES, FP8, INT8, CodeType

# The largest magnitude of a code, by the dtype of its type.
CODE_MAX = {dtype: code.largest for dtype, code in CODE_TYPES.items()}


@dataclass(frozen=True)
class Granularity:
    """The block of a matrix that one scale covers; -1 stands for the full extent.

    tensor (-1, -1), channel or token (1, -1), group of 128 along K (1, 128), block (128, 128).
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        for extent in (self.rows, self.cols):
            if extent != -1 and extent < 1:
                raise ConfigError(f"an extent of a Granularity is -1 or positive, got ({self.rows}, {self.cols})")

    def grid(self, n_rows: int, n_cols: int) -> tuple[int, int]:
        """How many scales an (n_rows, n_cols) matrix has along each axis; the last block may be partial."""
        return (
            1 if self.rows == -1 else math.ceil(n_rows / self.rows),
            1 if self.cols == -1 else math.ceil(n_cols / self.cols),
        )

    @property
    def is_tensor(self) -> bool:
        return self == TENSOR

    @property
    def is_row(self) -> bool:
        return self == ROW

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


_BY_SUFFIX = {code.suffix: dtype for dtype, code in CODE_TYPES.items()}

TENSOR = Granularity(-1, -1)
ROW = Granularity(1, -1)


@dataclass(frozen=True)
class TensorScheme:
    """One operand: codes of `dtype` (E4M3 or int8) with scales of one granularity.

    `dynamic` scales are computed from each input.
    """

    granularity: Granularity
    dynamic: bool = False
    dtype: torch.dtype = FP8

    def __post_init__(self) -> None:
        if self.dtype not in CODE_TYPES:
            raise ConfigError(f"codes are {' or '.join(map(str, CODE_TYPES))}, got {self.dtype}")

    @property
    def code(self) -> CodeType:
        """The type of the codes."""
        return CODE_TYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.granularity}{'d' if self.dynamic else 's'}{self.code.suffix}"


@dataclass(frozen=True)
class Scheme:
    """The scheme of a linear layer: 8-bit weights (N, K) and, unless `input` is None (weight-only), 8-bit inputs (M, K).

    ``Scheme.parse(scheme.text)`` returns the scheme, so that a scheme can be passed to a custom op as a string.
    """

    weight: TensorScheme
    input: TensorScheme | None = None
    text: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.weight.dynamic:
            raise ConfigError("the TensorScheme of a weight cannot be dynamic: weights are quantized ahead of time")
        rows, cols = self.weight.granularity.rows, self.weight.granularity.cols
        if not self.weight.granularity.is_row and (cols == 1 or (rows == -1) != (cols == -1)):
            raise ConfigError(f"weights have scales per tensor, channel, group or block, not {self.weight.granularity}")
        if self.input is not None and not self.input.dynamic and not self.input.granularity.is_tensor:
            raise ConfigError(f"static inputs have one scale per tensor, not one per {self.input.granularity}")
        object.__setattr__(self, "text", f"{self.weight}|{self.input if self.input else '-'}")

    def __str__(self) -> str:
        return self.text

    @staticmethod
    @cache
    def parse(text: str) -> Scheme:
        """The scheme whose ``text`` is `text`, e.g. ``1x-1s|1x-1d`` (channel weights, per-token inputs)."""

        def operand(part: str) -> TensorScheme:
            extents, scales, suffix = re.split("([ds])", part)
            rows, cols = extents.split("x")
            return TensorScheme(Granularity(int(rows), int(cols)), dynamic=scales == "d", dtype=_BY_SUFFIX[suffix])

        weight, activation = text.split("|")
        return Scheme(operand(weight), None if activation == "-" else operand(activation))

    @property
    def has_static_input(self) -> bool:
        return self.input is not None and not self.input.dynamic

    def describe(self) -> str:
        """A readable description, e.g. ``channel x token (dynamic)``."""
        weight = {"-1x-1": "tensor", "1x-1": "channel"}.get(str(self.weight.granularity))
        if weight is None:
            weight = ("group " if self.weight.granularity.rows == 1 else "block ") + (
                str(self.weight.granularity.cols) if self.weight.granularity.rows == 1 else str(self.weight.granularity)
            )
        if not self.weight.code.is_float:
            weight = f"{self.weight.code.label} {weight}"
        if self.input is None:
            return f"{weight} weights, inputs not quantized"
        kind = {"-1x-1": "tensor", "1x-1": "token"}.get(str(self.input.granularity), f"group {self.input.granularity.cols}")
        if not self.input.code.is_float:
            kind = f"{self.input.code.label} {kind}"
        return f"{weight} x {kind} ({'dynamic' if self.input.dynamic else 'static'})"


def scale_shape(granularity: Granularity, n_rows: int, n_cols: int) -> tuple[int, ...]:
    """The shape of the scale parameter of an (n_rows, n_cols) matrix.

    tensor (1,), channel (N, 1), group (N, ceil(K/g)), block (ceil(N/bn), ceil(K/bk)).
    """
    return (1,) if granularity.is_tensor else granularity.grid(n_rows, n_cols)


_DYNAMIC_TOKEN = TensorScheme(ROW, dynamic=True)

# compressed-tensors' names where it has one (quantization/quant_scheme.py)
FP8_DYNAMIC = Scheme(TensorScheme(ROW), _DYNAMIC_TOKEN)
FP8_STATIC = Scheme(TensorScheme(TENSOR), TensorScheme(TENSOR))
FP8_BLOCK = Scheme(TensorScheme(Granularity(128, 128)), TensorScheme(Granularity(1, 128), dynamic=True))
FP8_WEIGHT_ONLY = Scheme(TensorScheme(ROW))
FP8_TENSOR = Scheme(TensorScheme(TENSOR), TensorScheme(TENSOR, dynamic=True))
# backend="int8" re-quantizes FP8 layers to this; compressed-tensors calls it W8A8 or INT8.
INT8_DYNAMIC = Scheme(TensorScheme(ROW, dtype=INT8), TensorScheme(ROW, dynamic=True, dtype=INT8))
INT8_WEIGHT_ONLY = Scheme(TensorScheme(ROW, dtype=INT8))

# Names of schemes in arguments, with aliases.
SCHEMES = {
    "FP8_DYNAMIC": FP8_DYNAMIC,
    "FP8": FP8_STATIC,
    "FP8_STATIC": FP8_STATIC,
    "FP8_BLOCK": FP8_BLOCK,
    "FP8_WEIGHT_ONLY": FP8_WEIGHT_ONLY,
    "FP8_TENSOR": FP8_TENSOR,
    "INT8": INT8_DYNAMIC,
    "W8A8": INT8_DYNAMIC,
    "INT8_WEIGHT_ONLY": INT8_WEIGHT_ONLY,
    "W8A16": INT8_WEIGHT_ONLY,
}


def scheme_named(scheme: str | Scheme) -> Scheme:
    """The scheme with a name of `SCHEMES` (case-insensitive); a Scheme is returned unchanged. Raises ConfigError."""
    if isinstance(scheme, Scheme):
        return scheme
    found = SCHEMES.get(scheme.upper()) if isinstance(scheme, str) else None
    if found is None:
        near = get_close_matches(str(scheme).upper(), SCHEMES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"scheme={scheme!r} is not known; use a Scheme or one of {', '.join(SCHEMES)}{hint}")
    return found
