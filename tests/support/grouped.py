"""Stacks of experts as operands, and which kernels take them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from support.kernels import SCHEMES as ALL

from hf_fp8 import kernels
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.scheme import Scheme
from hf_fp8.kernels.triton import granularity as tiling
from hf_fp8.kernels.triton import support as triton_support

SCHEMES = {name: scheme for name, scheme in ALL.items() if scheme.weight.dtype == FP8}
TRITON = {"triton_grouped_scaled_mm": tiling.why_not_scaled_mm, "triton_grouped_weight_only": tiling.why_not_weight_only}
INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    if kernel in TRITON:
        with triton_support.interpreted(), kernels.use(kernel):
            yield
    else:
        with kernels.use(kernel):
            yield


def grid(scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Scales of each expert, (E, rows, cols), in the shape that a module holds them in."""
    return scales.reshape(len(scales), 1) if scheme.weight.granularity.is_tensor else scales


IDS = {
    "mixed, with nobody's": (0, 2, 2, 3, 0, 2, 2, 4, 0, 5, 4, 4),
    "one expert": (3,) * 20,
    "all nobody's": (5, 5, 5, 5),
    "one row of each": (1, 4),
}
