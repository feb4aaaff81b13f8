"""Layers that are given the same input (q, k and v; gate and up) quantize it once.

One slot per thread holds the codes of the last input. They are used again only by another layer than those that
have used them, for the same tensor object, unchanged by its version counter. So what a layer computes never
depends on an earlier call of itself, and the codes go when the input goes.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field

import torch

from .kernels import Kernel
from .scheme import Scheme


@dataclass
class _Quantized:
    x: weakref.ref[torch.Tensor]
    version: int
    how: tuple[object, ...]
    codes: tuple[torch.Tensor, torch.Tensor]
    users: set[int] = field(default_factory=set)


class _Slot(threading.local):
    held: _Quantized | None = None


_slot = _Slot()


def quantize_once(
    kernel: Kernel, x: torch.Tensor, rows: torch.Tensor, input_scale: torch.Tensor | None, scheme: Scheme, layer: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """``kernel.quantize(rows, input_scale, scheme)``, or what it gave another layer for the same x.

    x: the tensor that the layer was called with; rows: x as (M, K). layer: whom the codes are for; None
    shares nothing.
    """
    assert kernel.quantize is not None
    if layer is None or x.is_inference():  # inference tensors have no version counter
        return kernel.quantize(rows, input_scale, scheme)
    # What a CUDA graph records, and what ran before, are two worlds.
    recording = x.is_cuda and torch.cuda.is_current_stream_capturing()
    how = (kernel.quantize, scheme.input, None if input_scale is None else id(input_scale), recording)
    held = _slot.held
    if held is not None and held.x() is x and held.version == x._version and held.how == how and id(layer) not in held.users:
        held.users.add(id(layer))
        return held.codes
    codes = kernel.quantize(rows, input_scale, scheme)
    slot = _slot.__dict__
    _slot.held = _Quantized(weakref.ref(x, lambda gone: _forget(slot, gone)), x._version, how, codes, {id(layer)})
    return codes


def _forget(slot: dict[str, _Quantized | None], gone: weakref.ref[torch.Tensor]) -> None:
    held = slot.get("held")
    if held is not None and held.x is gone:
        slot["held"] = None
