"""QuantizedConv1x1: a 1x1 convolution, computed as a linear layer over the channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..formats.scheme import Scheme
from .linear import QuantizedLinear

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class QuantizedConv1x1(QuantizedLinear):
    """A 1x1 convolution as a QuantizedLinear, with `weight` (out_channels, in_channels).

    Inputs are (B, C, *spatial) or (C, *spatial). They are quantized over the channels: "per-token" means per spatial point.
    """

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, *, stride: tuple[int, ...] = (1,), **options: Any):
        super().__init__(in_features, out_features, scheme, **options)
        self.stride = tuple(stride)

    @staticmethod
    def why_not(conv: nn.Module) -> str | None:
        """The reason why a convolution is not a linear layer over its channels; None if it is one."""
        assert isinstance(conv, Convolution)
        if any(size != 1 for size in conv.kernel_size):
            return f"its kernel is {'x'.join(map(str, conv.kernel_size))}, and only 1x1 kernels are linear layers"
        if conv.groups != 1:
            return f"it has {conv.groups} groups"
        if isinstance(conv.padding, str) or any(size != 0 for size in conv.padding):
            return None if conv.padding in ("same", "valid") else f"it pads by {conv.padding}"
        return None

    @classmethod
    def like(cls, linear: nn.Module, scheme: Scheme, *, backend: str = "auto") -> QuantizedConv1x1:
        """As `QuantizedLinear.like`, for a 1x1 convolution."""
        assert isinstance(linear, Convolution)
        stride = tuple(linear.stride)
        new = cls(linear.in_channels, linear.out_channels, scheme, stride=stride, backend=backend, device="meta")
        new.remember(linear)
        return new

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (B, in_channels, *spatial) or (in_channels, *spatial). Returns out_channels at every `stride`-th point."""
        channels = -1 - len(self.stride)
        if input.ndim not in (len(self.stride) + 1, len(self.stride) + 2):
            raise InputError(f"a {len(self.stride)}d convolution got an input of shape {[*input.shape]}")
        last = not input.is_contiguous() and input.movedim(channels, -1).is_contiguous()
        if any(step != 1 for step in self.stride):
            for dim, step in enumerate(self.stride, -len(self.stride)):
                input = input[(slice(None),) * (input.ndim + dim) + (slice(None, None, step),)]
        out = super().forward(input.movedim(channels, -1)).movedim(-1, channels)
        # Channels-last output only for channels-last input, as in a convolution. The next module may call `.view`.
        return out if last else out.contiguous()

    def to_dense(self, dtype: torch.dtype) -> Any:
        """The float convolution, with `original` if it was kept, else the dequantized weight."""
        linear = super().to_dense(dtype)
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
