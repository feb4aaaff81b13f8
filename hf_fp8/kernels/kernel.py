"""What a kernel is, what it is asked, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..scheme import Scheme


class Input(NamedTuple):
    """An input as a kernel takes it.

    x: (M, K), codes or, where they have no scale, values. scale: in the layout that the kernel wants. columns, outliers:
    (R,) numbers of columns whose codes are 0, and (M, R) what stands in them, in float32, any strides.
    """

    x: torch.Tensor
    scale: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    outliers: torch.Tensor | None = None

    def rows(self, start: int, end: int) -> Input:
        """A part of the rows, for scales per row."""
        if start == 0 and end >= self.x.shape[0]:
            return self
        scale, outliers = (None if t is None else t[start:end] for t in (self.scale, self.outliers))
        return Input(self.x[start:end], scale, self.columns, outliers)


class Weight(NamedTuple):
    """A layer's own operands, as the checkpoint stores them: codes (N, K), scales, bias (N,), and what they mean."""

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    scheme: Scheme


# (x (M, K), input_scale or None, scheme)
Quantize = Callable[[torch.Tensor, "torch.Tensor | None", Scheme], Input]
# (input, weight, dtype of the output) -> (M, N)
Multiply = Callable[[Input, Weight, torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """All that the choice of a kernel depends on but M, which varies per call."""

    device: torch.device
    scheme: Scheme
    n: int
    k: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Kernel:
    """A way to multiply, in two steps: quantize the input (None: leave it as it is), then multiply.

    Between the two lies what layers with the same input can share. `wrong_scheme` and `wrong_device`
    answer with a reason to decline, or None.
    """

    name: str
    quantize: Quantize | None
    multiply: Multiply
    wrong_scheme: Callable[[Scheme], str | None]
    wrong_device: Callable[[Problem], str | None]
    sets_aside: bool = False  # some columns of an input come as outliers

    def run(self, x: torch.Tensor, input_scale: torch.Tensor | None, weight: Weight) -> torch.Tensor:
        """Both steps: x (M, K), M > 0, to (M, N) in the dtype of x."""
        given = Input(x) if self.quantize is None else self.quantize(x, input_scale, weight.scheme)
        return self.multiply(given, weight, x.dtype)


def add_bias(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`out`, changed in place."""
    return out if bias is None else out.add_(bias.to(out.dtype))
