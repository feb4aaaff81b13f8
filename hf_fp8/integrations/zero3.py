"""DeepSpeed's ZeRO-3, which gathers a parameter when it is used: lets it send codes (stored 8-bit values) as bytes.

Neither gloo nor NCCL (before compute capability 9.0) can send FP8.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..formats.code_types import FLOATS_OF_A_BYTE
from .import_hook import after_import, cancel
from .patches import wrap


def install() -> None:
    """Wrap DeepSpeed's function once DeepSpeed is imported. Harmless when repeated."""
    after_import("deepspeed", _wrap)


def uninstall() -> None:
    """Undo `install`, if DeepSpeed has not been imported; else `patches.restore` does."""
    cancel("deepspeed")


def _wrap() -> None:
    module = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if module is not None and "_dist_allgather_fn" in vars(module):
        wrap(module, "_dist_allgather_fn", _gather)


def _gather(host: Any, part: torch.Tensor, whole: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if part.dtype in FLOATS_OF_A_BYTE:
        part, whole = part.view(torch.uint8), whole.view(torch.uint8)
    return host(part, whole, *args, **kwargs)
