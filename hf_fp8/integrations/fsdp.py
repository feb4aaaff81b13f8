"""FSDP2 of torch and accelerate: codes (stored 8-bit values) and scales are gathered as they are, and loaded as bytes.

FSDP casts parameters to the dtype of its mixed precision when it gathers them: codes would become numbers without their scale,
and scales would be rounded. accelerate, and torch's `set_model_state_dict`, send parameters from the first process to the
others, but neither gloo nor NCCL (before compute capability 9.0) can send FP8.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import fsdp_utils

from ..formats.code_types import FLOATS_OF_A_BYTE
from ..formats.quantized_weight.tensor import codes_of
from ..nn.base import QuantizedModule
from ..nn.dtensors import seen_as
from .patches import wrap


def install() -> None:
    """Wrap functions of accelerate and torch. Harmless when repeated."""
    wrap(fsdp_utils, "fsdp2_load_full_state_dict", _load_full_state_dict)
    if torch.distributed.is_available():  # some builds of torch have no processes
        from torch.distributed.checkpoint import state_dict
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

        wrap(FSDPParam, "init_dtype_attrs", _init_dtypes)
        for name in ("_broadcast_state_dict", "_distribute_state_dict"):
            wrap(state_dict, name, _fill)


def _init_dtypes(host: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    host(self, *args, **kwargs)
    module, name = self._module_info.module, self._module_info.param_name
    if isinstance(module, QuantizedModule) and name in module.quantized:
        self.param_dtype = self.reduce_dtype = None  # no cast


def _load_full_state_dict(host: Any, accelerator: Any, model: Any, full_sd: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    given = {name: _as_bytes(tensor) for name, tensor in full_sd.items()}
    host(accelerator, _OfBytes(model), given, *args, **kwargs)
    return model


def _fill(host: Any, full: dict[str, Any], local: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """The functions with which `set_model_state_dict` fills `local`, which has sharded tensors, from whole ones, `full`."""
    codes = {n: t.dtype for n, t in local.items() if isinstance(t, torch.Tensor) and t.dtype in FLOATS_OF_A_BYTE}
    found = {name: _as_bytes(tensor) for name, tensor in local.items()}
    host({name: _as_bytes(tensor) for name, tensor in full.items()}, found, *args, **kwargs)
    local.clear()
    local.update({name: seen_as(tensor, codes[name]) if name in codes else tensor for name, tensor in found.items()})


def _as_bytes(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return tensor
    plain = codes_of(tensor)
    return seen_as(plain.detach(), torch.uint8) if plain.dtype in FLOATS_OF_A_BYTE else plain


class _OfBytes:
    """A model whose state dicts have bytes instead of codes and scales in floats of 8 bits."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, Any]:
        return {name: _as_bytes(tensor) for name, tensor in self._model.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any], **kwargs: Any) -> Any:
        codes = {name: t.dtype for name, t in self._model.state_dict().items() if t.dtype in FLOATS_OF_A_BYTE}
        found = {name: seen_as(tensor, codes[name]) if name in codes else tensor for name, tensor in state.items()}
        return self._model.load_state_dict(found, **kwargs)
