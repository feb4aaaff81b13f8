"""Layers that receive the same input (q, k and v; gate and up) quantize it once.

One slot per thread holds the codes of the last input. They are reused only by a sibling (`let_siblings_share`) that
has not used them yet, for the same tensor object with the same memory, shape and version. So a result never depends on an
earlier call of the same layer, and the codes are freed together with the input. An input that is overwritten between q and k
through `.data`, numpy or an external kernel is not detected, as in torch: `layer.shares_input = None` disables sharing for a
layer.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from ..formats.scheme import Scheme
from ..kernels import Input, Kernel
from .across import reducer


@dataclass
class _Quantized:
    x: weakref.ref[torch.Tensor]
    how: tuple[object, ...]
    codes: Input
    users: set[int] = field(default_factory=set)


class _Slot(threading.local):
    held: _Quantized | None = None


_slot = _Slot()


def quantize_once(
    kernel: Kernel,
    x: torch.Tensor,
    rows: torch.Tensor,
    input_scale: torch.Tensor | None,
    scheme: Scheme,
    layer: Any,
    across: str = "",
) -> Input:
    """``kernel.quantize(rows, input_scale, scheme, reducer(across))``, or the result that another layer got for the same x.

    x: the tensor that the layer was called with; rows: x as (M, K). layer: the calling QuantizedLinear; None disables
    sharing. across: as in `scaled_linear`.
    """
    assert kernel.quantize is not None
    reduce = reducer(across)
    if layer is None or x.is_inference():  # inference tensors have no version counter
        return kernel.quantize(rows, input_scale, scheme, reduce)
    # A CUDA graph must not use codes computed before its recording, nor may later calls use codes of the recording.
    recording = x.is_cuda and torch.cuda.is_current_stream_capturing()
    static = None if input_scale is None else (id(input_scale), input_scale._version)
    memory = (x._version, x.data_ptr(), x.shape, x.stride())
    how = (memory, kernel.quantize, scheme.input, static, layer.shares_input, recording, across)
    held = _slot.held
    if held is not None and held.x() is x and held.how == how and id(layer) not in held.users:
        held.users.add(id(layer))
        return held.codes
    codes = kernel.quantize(rows, input_scale, scheme, reduce)
    slot = _slot.__dict__
    _slot.held = _Quantized(weakref.ref(x, lambda gone: _forget(slot, gone)), how, codes, {id(layer)})
    return codes


def _forget(slot: dict[str, _Quantized | None], gone: weakref.ref[torch.Tensor]) -> None:
    held = slot.get("held")
    if held is not None and held.x is gone:
        slot["held"] = None
