"""Small quantized layers for tests of what becomes of their codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import hf_fp8

SCHEMES = ("FP8_DYNAMIC", "FP8_BLOCK", "FP8_TENSOR", "INT8")
N, K = 150, 70  # multiples of nothing
X, INDEX, OTHER = torch.randn(5, K), torch.tensor([3, 140, 3]), torch.randn(N, K)


def linear(scheme: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(K, N, dtype=dtype)
    return hf_fp8.quantize_model(layer, scheme, backend="int8" if scheme == "INT8" else "weight_only")


def net(scheme: str = "FP8_DYNAMIC", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, dtype=dtype), nn.ReLU(), nn.Linear(N, K, dtype=dtype))
    return hf_fp8.quantize_model(model, scheme, backend="int8" if scheme == "INT8" else "weight_only")
