"""DistributedDataParallel over quantized layers: their codes and scales are every process's own.

It sends all parameters from the first process to the others, frozen ones too, and neither gloo nor NCCL (before compute
capability 9.0) can send FP8.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..nn.base import QuantizedModule
from .patches import patch

# Where DistributedDataParallel looks for names of parameters that it is to leave alone.
IGNORED = "_ddp_params_and_buffers_to_ignore"
_host: Any = DistributedDataParallel.__init__


def install() -> None:
    """Wrap DistributedDataParallel. Harmless when repeated."""
    patch(DistributedDataParallel, "__init__", _init)


@wraps(_host)
def _init(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    if names := quantized_names(module):
        setattr(module, IGNORED, sorted({*getattr(module, IGNORED, ()), *names}))
    _host(self, module, *args, **kwargs)


def quantized_names(model: nn.Module) -> list[str]:
    """Names of all codes and scales of `model`, as its parameters are called."""
    return [
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedModule)
        for leaf in module.quantized
        if getattr(module, leaf) is not None
    ]
