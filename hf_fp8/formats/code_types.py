"""The types of codes: what their values are, how numbers are rounded to them, what files and messages call them.

A type of codes is one entry of `CODE_TYPES`. Except for kernels, which are made for one or two types, nothing else compares
dtypes to find out how codes are rounded or written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
# Dtypes of codes and scales that gloo, and NCCL before compute capability 9.0, cannot send: sent as bytes.
FLOATS_OF_A_BYTE = (FP8, E5M2, torch.float8_e8m0fnu)
INT8 = torch.int8
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # a name only: torch has no operations on it


@dataclass(frozen=True)
class CodeType:
    """A type of codes.

    dtype: the dtype by which schemes name it. storage: that of tensors with one code in each element. least, largest: the range
    of codes. weight_range: the code, not rounded, to which the amax of a weight is scaled. mantissa, least_exponent: of a
    floating-point type, the bits after
    the leading one and the exponent of the smallest normal number; None for integers. kind, bits, format: compressed-tensors'
    `type`, `num_bits` and `format` ("" if it has none). label: for messages. suffix: in `Scheme.text`.
    """

    dtype: torch.dtype
    storage: torch.dtype
    least: float
    largest: float
    weight_range: float
    kind: str
    bits: int
    format: str
    label: str
    suffix: str
    mantissa: int | None = None
    least_exponent: int | None = None

    @property
    def is_float(self) -> bool:
        """Whether codes are floating-point numbers, which can be NaN and are rounded by a cast."""
        return self.mantissa is not None

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """The codes nearest to x, which is in range; x may be overwritten."""
        return x.to(self.storage) if self.is_float else x.round_().to(self.storage)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """The distance between the codes around each value of x (float32), a power of two."""
        step = torch.ones_like(x)
        if self.mantissa is None or self.least_exponent is None:
            return step
        # frexp gives a fraction below one, hence one more; below the smallest normal number steps do not get smaller.
        exponent = torch.frexp(x).exponent.clamp_(min=self.least_exponent + 1) - 1 - self.mantissa
        return torch.ldexp(step, exponent)


_LARGEST, _LARGEST_E5M2 = float(torch.finfo(FP8).max), float(torch.finfo(E5M2).max)
CODE_TYPES = {
    found.dtype: found
    for found in (
        CodeType(
            FP8, FP8, -_LARGEST, _LARGEST, _LARGEST, kind="float", bits=8, format="float-quantized", label="FP8", suffix="",
            mantissa=3, least_exponent=-6,
        ),
        # A type of weights only. It has infinities. compressed-tensors has no name for it: 8-bit floats are E4M3 there.
        CodeType(
            E5M2, E5M2, -_LARGEST_E5M2, _LARGEST_E5M2, _LARGEST_E5M2, kind="float", bits=8, format="", label="E5M2", suffix="w",
            mantissa=2, least_exponent=-14,
        ),
        # compressed-tensors scales the amax of a weight to half of the range of codes (calculate_qparams), so that the largest
        # weights are rounded by half a step. Inputs are quantized to -127..127, as vLLM's kernels do.
        CodeType(INT8, INT8, -128.0, 127.0, 127.5, kind="int", bits=8, format="int-quantized", label="int8", suffix="i"),
        CodeType(INT4, INT8, -8.0, 7.0, 7.5, kind="int", bits=4, format="pack-quantized", label="int4", suffix="q"),
    )
}  # fmt: skip
