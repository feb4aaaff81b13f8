"""FP8Linear: an `nn.Linear` whose weight and scales are the checkpoint's own tensors.

The one exception is made by `requantize_int8`, for devices whose units are int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from . import numerics
from .errors import UnsupportedError
from .functional import scaled_linear
from .quantized_module import QuantizedModule
from .scheme import INT8, INT8_DYNAMIC, Scheme, scale_shape


class FP8Linear(QuantizedModule, nn.Linear):
    """Linear layer with `weight` (N, K) in E4M3, `weight_scale` and, for static schemes, `input_scale` (1,).

    With an int8 scheme, `weight` is int8.

    The parameters are the tensors of the file, so `state_dict` and `save_pretrained` need no code.
    Outputs have the dtype of the input. `.to(dtype)`, `.half()` and the like cast the bias alone.

    Args:
        in_features, out_features: K and N.
        scheme: how the weight is stored and the input quantized.
        bias: whether there is a bias, of dtype `bias_dtype`.
        scale_dtype, input_scale_dtype: dtypes in which the scales are held (bf16, fp16 or float32).
        backend: "auto", "scaled_mm", "weight_only" or, with an int8 scheme, "int8"; see `kernels.select`.
    """

    holds: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight": ("weight_scale", "input_scale")}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = False,
        bias_dtype: torch.dtype = torch.bfloat16,
        scale_dtype: torch.dtype = torch.float32,
        input_scale_dtype: torch.dtype | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would initialise the weight, which E4M3 cannot
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.backend = scheme, backend
        # The name of what this layer and its siblings are part of, if they may quantize a common input once.
        self.shares_input: str | None = None

        def frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = frozen((out_features, in_features), scheme.weight.dtype)
        self.weight_scale = frozen(scale_shape(scheme.weight.granularity, out_features, in_features), scale_dtype)
        if scheme.has_static_input:
            self.input_scale = frozen((1,), input_scale_dtype or scale_dtype)
        else:
            self.register_parameter("input_scale", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=bias_dtype, device=device))
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Nothing: FP8 weights come from a checkpoint."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., K) in bf16, fp16 or float32. Returns (..., N) in the same dtype (or autocast's)."""
        if not input.is_meta and torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return scaled_linear(
            input,
            self.weight,
            self.weight_scale,
            self.scheme,
            input_scale=self.input_scale,
            bias=self.bias,
            backend=self.backend,
            layer=self if self.shares_input is not None else None,
        )

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, K) multiplied out in float32 and rounded once to `dtype`."""
        return numerics.dequantize(self.weight, self.weight_scale, self.scheme.weight.granularity, dtype)

    @torch.no_grad()
    def requantize_int8(self) -> None:
        """Turn the weight into int8 with one float32 scale per row, in place; inputs become int8 per token.

        Codes of E4M3 have 4 significant bits and their own exponent, int8 has 8 bits below the largest of a row. On
        SmolLM2 int8 weights add 0.15% of perplexity, int8 inputs another 0.1 to 0.4% (docs/accuracy.md). An
        `input_scale` is dropped. Raises UnsupportedError for an offloaded layer.
        """
        if self.scheme.weight.dtype == INT8:
            return
        if self.weight.is_meta:
            raise UnsupportedError(
                "backend='int8' re-quantizes weights after loading, and an offloaded layer's weight is not here to be read: "
                "load onto one device, or with backend='weight_only'"
            )
        codes, scale = numerics.requantize(self.weight, self.weight_scale, self.scheme.weight.granularity, INT8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("input_scale", None)
        self.scheme, self.backend = INT8_DYNAMIC, "int8"

    def to_dense(self, dtype: torch.dtype) -> nn.Linear:
        """`to_linear`."""
        return self.to_linear(dtype)

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A plain `nn.Linear` with the dequantized weight, on the same device.

        Raises UnsupportedError for an offloaded layer, whose weight is not here to be read.
        """
        if self.weight.is_meta:
            raise UnsupportedError(
                "an offloaded FP8Linear cannot be dequantized in place: load the model with FP8Config(dequantize=True)"
            )
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(self.dequantized_weight(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme.describe()}, backend={self.backend}"
