"""QuantizedConv1x1: a convolution with a kernel of one point, which is a linear layer over the channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..formats.scheme import Scheme
from .linear import QuantizedLinear

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class QuantizedConv1x1(QuantizedLinear):
    """A 1x1 convolution as an QuantizedLinear: `weight` (out_channels, in_channels), and the rest as there.

    Inputs are (B, C, *spatial) or (C, *spatial); inputs are quantized over the channels, so that "per-token" is per point.
    """

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, *, stride: tuple[int, ...] = (1,), **options: Any):
        super().__init__(in_features, out_features, scheme, **options)
        self.stride = tuple(stride)

    @staticmethod
    def why_not(conv: nn.Module) -> str | None:
        """Why a convolution is no linear layer over its channels; None if it is."""
        assert isinstance(conv, Convolution)
        if any(size != 1 for size in conv.kernel_size):
            return f"its kernel is {'x'.join(map(str, conv.kernel_size))}, and only one point is a linear layer"
        if conv.groups != 1:
            return f"it has {conv.groups} groups"
        if isinstance(conv.padding, str) or any(size != 0 for size in conv.padding):
            return None if conv.padding in ("same", "valid") else f"it pads by {conv.padding}"
        return None

    @classmethod
    def like(cls, linear: nn.Module, scheme: Scheme, *, backend: str = "auto") -> QuantizedConv1x1:
        """As QuantizedLinear's, for a 1x1 convolution."""
        assert isinstance(linear, Convolution)
        stride = tuple(linear.stride)
        new = cls(linear.in_channels, linear.out_channels, scheme, stride=stride, backend=backend, device="meta")
        new.remember(linear)
        return new

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, *spatial) or without B -> the same with out_channels, points `stride` apart."""
        channels = -1 - len(self.stride)
        if input.ndim not in (len(self.stride) + 1, len(self.stride) + 2):
            raise InputError(f"a convolution over {len(self.stride)} dimensions was given an input of shape {[*input.shape]}")
        last = not input.is_contiguous() and input.movedim(channels, -1).is_contiguous()
        if any(step != 1 for step in self.stride):
            for dim, step in enumerate(self.stride, -len(self.stride)):
                input = input[(slice(None),) * (input.ndim + dim) + (slice(None, None, step),)]
        out = super().forward(input.movedim(channels, -1)).movedim(-1, channels)
        # As a convolution does: channels last only if they came so. What follows may take a view.
        return out if last else out.contiguous()

    def to_dense(self, dtype: torch.dtype) -> Any:
        """The convolution, with the original weight if it was kept, else the dequantized one."""
        linear = self.to_linear(dtype)
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(self.stride)]
        stride: Any = self.stride
        conv: Any = kind(
            self.in_features, self.out_features, 1, stride=stride, bias=self.bias is not None, device="meta", dtype=dtype
        )
        weight = linear.weight.detach().view(*linear.weight.shape, *(1 for _ in self.stride))
        conv.weight = nn.Parameter(weight, requires_grad=self.trainable)
        conv.bias = linear.bias
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride={self.stride}"
