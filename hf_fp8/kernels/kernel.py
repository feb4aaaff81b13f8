"""What a kernel is, and what it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..scheme import Scheme

# (x (M, K), input_scale or None, scheme) -> (codes (M, K), their scale in the layout that the kernel wants)
Quantize = Callable[[torch.Tensor, "torch.Tensor | None", Scheme], tuple[torch.Tensor, torch.Tensor]]
# (codes or x, their scale or None, weight (N, K), weight_scale, bias or None, scheme, dtype of the output) -> (M, N)
Multiply = Callable[
    [torch.Tensor, "torch.Tensor | None", torch.Tensor, torch.Tensor, "torch.Tensor | None", Scheme, torch.dtype],
    torch.Tensor,
]


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

    def run(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        scheme: Scheme,
    ) -> torch.Tensor:
        """Both steps: x (M, K), M > 0, to (M, N) in the dtype of x."""
        if self.quantize is None:
            return self.multiply(x, None, weight, weight_scale, bias, scheme, x.dtype)
        codes, scale = self.quantize(x, input_scale, scheme)
        return self.multiply(codes, scale, weight, weight_scale, bias, scheme, x.dtype)


def add_bias(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`out`, changed in place."""
    return out if bias is None else out.add_(bias.to(out.dtype))
