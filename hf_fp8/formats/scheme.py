"""Quantization schemes of weights and inputs: Granularity, TensorScheme, Scheme, and their names.

A scale is always the factor by which a code (a stored value of 8 or 4 bits) is multiplied: ``real = stored * scale``, or, with
zero points, ``real = (stored - zero_point) * scale``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType

import torch

from ..errors import ConfigError
from .code_types import CODE_TYPES, FP8, INT4, INT8, CodeType

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

# The recipe of FBGEMM's kernels for int4 weights (`fbgemm`).
FBGEMM = "fbgemm"
TENSOR = Granularity(-1, -1)
ROW = Granularity(1, -1)


@dataclass(frozen=True)
class TensorScheme:
    """One operand: codes of `dtype` (E4M3, E5M2, int8 or int4) with scales of one granularity.

    mx: scales are powers of two (`exponents.mx_exponents`), which weights store as their exponents, one byte each: the MX
    formats (OCP Microscaling Formats specification 1.0), as compressed-tensors computes and stores them.
    dynamic: scales are computed from each input. packed: several codes lie in each int32 (always for int4). has_zero_points:
    each scale has a zero point, which is subtracted from codes. is_ordered: the columns of a group need not lie next to each
    other; the group of each column is stored (`weight_g_idx`). recipe: how scales and codes are computed from weights, "" as
    compressed-tensors does, or FBGEMM (`fbgemm`); files do not tell. The last four are for weights only.
    """

    granularity: Granularity
    dynamic: bool = False
    dtype: torch.dtype = FP8
    packed: bool = False
    has_zero_points: bool = False
    is_ordered: bool = False
    recipe: str = field(default="", compare=False)
    mx: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in CODE_TYPES:
            raise ConfigError(f"codes are {' or '.join(map(str, CODE_TYPES))}, got {self.dtype}")
        if self.dtype == INT4 and not self.packed:
            object.__setattr__(self, "packed", True)
        if self.packed and (self.code.is_float or self.granularity.rows != 1 or self.dynamic):
            raise ConfigError(f"packed codes are int4 or int8 weights with scales per channel or group, not {self}")
        if not self.packed and (self.has_zero_points or self.is_ordered):
            raise ConfigError("zero points, and groups of columns in any order, are supported for packed codes only")
        if self.is_ordered and self.granularity.cols == -1:
            raise ConfigError("the columns of a channel are one group: there is nothing to order")
        if self.mx and (self.dtype != FP8 or self.granularity.rows != 1 or self.granularity.cols == -1):
            raise ConfigError(f"MX scales are of groups of E4M3 codes, not of {self.code.label} per {self.granularity}")
        if self.recipe and (self.recipe != FBGEMM or self.dtype != INT4 or self.is_ordered):
            raise ConfigError(f"recipe={self.recipe!r} is not known for {self.code.label} weights; int4 has {FBGEMM!r}")

    @property
    def code(self) -> CodeType:
        """The type of the codes."""
        return CODE_TYPES[self.dtype]

    @property
    def storage(self) -> torch.dtype:
        """The dtype of the tensor with the codes."""
        return torch.int32 if self.packed else self.code.storage

    @property
    def per_element(self) -> int:
        """How many codes are in an element of that tensor."""
        return 32 // self.code.bits if self.packed else 1

    def __str__(self) -> str:
        # int4 is packed anyway
        flags = {
            "p": self.packed and self.dtype != INT4,
            "z": self.has_zero_points,
            "o": self.is_ordered,
            "f": self.recipe,
            "m": self.mx,
        }
        marks = "".join(letter for letter, is_set in flags.items() if is_set)
        return f"{self.granularity}{'d' if self.dynamic else 's'}{self.code.suffix}{marks}"

    @staticmethod
    def parse(text: str) -> TensorScheme:
        """The TensorScheme that is written as `text`. Raises ValueError."""
        found = _WRITTEN.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not a TensorScheme")
        rows, cols, scales, suffix, marks = found.groups()
        return TensorScheme(
            Granularity(int(rows), int(cols)), scales == "d", _BY_SUFFIX[suffix],
            packed="p" in marks, has_zero_points="z" in marks, is_ordered="o" in marks, recipe=FBGEMM if "f" in marks else "",
            mx="m" in marks,
        )  # fmt: skip

    @property
    def kind(self) -> str:
        """A readable description of codes and scales of a weight, e.g. ``int4 group 128``."""
        granularity = self.granularity
        found = {TENSOR: "tensor", ROW: "channel"}.get(granularity)
        if found is None:
            found = f"group {granularity.cols}" if granularity.rows == 1 else f"block {granularity}"
        found = found if self.dtype == FP8 else f"{self.code.label} {found}"
        extra = ", ".join(
            said
            for said, is_so in (
                ("packed", self.packed and self.dtype != INT4),
                ("zero points", self.has_zero_points),
                ("columns in the order of weight_g_idx", self.is_ordered),
                ("as FBGEMM quantizes them", bool(self.recipe)),
                ("MX scales", self.mx),
            )
            if is_so
        )
        return f"{found} ({extra})" if extra else found


_WRITTEN = re.compile(r"(-?\d+)x(-?\d+)([ds])([iqw]?)([pzofm]*)")


@dataclass(frozen=True)
class Scheme:
    """The scheme of a linear layer: weights (N, K) of 8 or 4 bits; inputs (M, K) of 8 bits, or not quantized (`input` is None).

    ``Scheme.parse(scheme.text)`` returns the scheme, so that a scheme can be passed to a custom op as a string.
    """

    weight: TensorScheme
    input: TensorScheme | None = None
    text: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for operand in (self.weight,) if self.input is None else (self.weight, self.input):
            if not isinstance(operand, TensorScheme):
                raise ConfigError(
                    f"a Scheme is made of TensorSchemes, not of {operand!r}; functions that take a scheme take its name, "
                    "too, and hf_fp8.SCHEMES has the Scheme of each name"
                )
        if self.weight.dynamic:
            raise ConfigError("the TensorScheme of a weight cannot be dynamic: weights are quantized ahead of time")
        rows, cols = self.weight.granularity.rows, self.weight.granularity.cols
        if not self.weight.granularity.is_row and (cols == 1 or (rows == -1) != (cols == -1)):
            raise ConfigError(f"weights have scales per tensor, channel, group or block, not {self.weight.granularity}")
        if self.input is not None and not self.input.dynamic and not self.input.granularity.is_tensor:
            raise ConfigError(f"static inputs have one scale per tensor, not one per {self.input.granularity}")
        if self.weight.mx and self.has_static_input:
            raise ConfigError("weights with MX scales go with inputs that are quantized dynamically, or not at all")
        if self.input is not None and self.input.storage not in (FP8, INT8):
            raise ConfigError(f"inputs are quantized to E4M3 or int8, not to {self.input.code.label}")
        object.__setattr__(self, "text", f"{self.weight}|{self.input if self.input else '-'}")

    def __str__(self) -> str:
        return self.text

    @staticmethod
    @cache
    def parse(text: str) -> Scheme:
        """The scheme whose ``text`` is `text`, e.g. ``1x-1s|1x-1d`` (channel weights, per-token inputs)."""
        weight, activation = text.split("|")
        return Scheme(TensorScheme.parse(weight), None if activation == "-" else TensorScheme.parse(activation))

    @property
    def has_static_input(self) -> bool:
        return self.input is not None and not self.input.dynamic

    def describe(self) -> str:
        """A readable description, e.g. ``channel x token (dynamic)``."""
        weight = self.weight.kind
        if self.input is None:
            return f"{weight} weights, inputs not quantized"
        granularity = self.input.granularity
        kind = {TENSOR: "tensor", ROW: "token"}.get(granularity, f"group {granularity.cols}{' (MX scales)' * self.input.mx}")
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
# compressed-tensors' MXFP8 and MXFP8A16.
MXFP8_WEIGHT_ONLY = Scheme(TensorScheme(Granularity(1, 32), mx=True))
MXFP8 = Scheme(MXFP8_WEIGHT_ONLY.weight, TensorScheme(Granularity(1, 32), dynamic=True, mx=True))
# backend="int8" re-quantizes FP8 layers to this; compressed-tensors calls it W8A8 or INT8.
INT8_DYNAMIC = Scheme(TensorScheme(ROW, dtype=INT8), TensorScheme(ROW, dynamic=True, dtype=INT8))
INT8_WEIGHT_ONLY = Scheme(TensorScheme(ROW, dtype=INT8))
_GROUP = Granularity(1, 128)
W4A16 = Scheme(TensorScheme(_GROUP, dtype=INT4))
W4A16_ASYM = Scheme(TensorScheme(_GROUP, dtype=INT4, has_zero_points=True))
W4A8 = Scheme(TensorScheme(_GROUP, dtype=INT4), TensorScheme(ROW, dynamic=True, dtype=INT8))
W4AFP8 = Scheme(TensorScheme(_GROUP, dtype=INT4), _DYNAMIC_TOKEN)
W8A16 = Scheme(TensorScheme(_GROUP, dtype=INT8, packed=True))
# With the numerics of FBGEMM's (now MSLK's) kernels f8i4bf16 and bf16i4bf16. The second has a float instead of a zero point,
# which no file can hold: it is for training only (`quantization.qat`).
W4AFP8_FBGEMM = Scheme(TensorScheme(_GROUP, dtype=INT4, recipe=FBGEMM), _DYNAMIC_TOKEN)
W4A16_FBGEMM = Scheme(TensorScheme(_GROUP, dtype=INT4, has_zero_points=True, recipe=FBGEMM))

# Names of schemes in arguments, with aliases.
SCHEMES = {
    "FP8_DYNAMIC": FP8_DYNAMIC,
    "FP8": FP8_STATIC,
    "FP8_STATIC": FP8_STATIC,
    "FP8_BLOCK": FP8_BLOCK,
    "FP8_WEIGHT_ONLY": FP8_WEIGHT_ONLY,
    "FP8_TENSOR": FP8_TENSOR,
    "MXFP8": MXFP8,
    "MXFP8A16": MXFP8_WEIGHT_ONLY,
    "INT8": INT8_DYNAMIC,
    "W8A8": INT8_DYNAMIC,
    "INT8_WEIGHT_ONLY": INT8_WEIGHT_ONLY,
    "W8A16": W8A16,
    "W4A16": W4A16,
    "W4A16_ASYM": W4A16_ASYM,
    "W4A8": W4A8,
    "W4AFP8": W4AFP8,
    "W4AFP8_FBGEMM": W4AFP8_FBGEMM,
}


def scheme_named(scheme: str | Scheme, known: Mapping[str, Scheme] = MappingProxyType(SCHEMES)) -> Scheme:
    """The scheme with a name of `known` (case-insensitive); a Scheme is returned unchanged. Raises ConfigError."""
    if isinstance(scheme, Scheme):
        return scheme
    found = known.get(scheme.upper()) if isinstance(scheme, str) else None
    if found is None:
        near = get_close_matches(str(scheme).upper(), known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"scheme={scheme!r} is not known; use a Scheme or one of {', '.join(known)}{hint}")
    return found
