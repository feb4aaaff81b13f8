"""Excludes codes (stored 8-bit values) and scales from DistributedDataParallel: each process keeps its own.

DistributedDataParallel sends all parameters, frozen ones too, from the first process to the others, and neither gloo nor
NCCL (before compute capability 9.0) can send FP8.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..nn.base import QuantizedModule
from .patches import wrap

# The attribute in which DistributedDataParallel looks for the names of parameters to ignore.
IGNORED = "_ddp_params_and_buffers_to_ignore"


def install() -> None:
    """Wrap DistributedDataParallel. Harmless when repeated."""
    wrap(DistributedDataParallel, "__init__", _init)


def _init(host: Any, self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    names, before = quantized_names(module), vars(module).get(IGNORED)
    if not names:
        host(self, module, *args, **kwargs)
        return
    setattr(module, IGNORED, sorted({*getattr(module, IGNORED, ()), *names}))
    try:
        host(self, module, *args, **kwargs)  # it copies the list
    finally:  # the layers may be dense when the model is wrapped again
        delattr(module, IGNORED)
        if before is not None:
            setattr(module, IGNORED, before)


def quantized_names(model: nn.Module) -> list[str]:
    """Names of all codes and scales of `model`, as in `named_parameters`."""
    return [
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedModule)
        for leaf in module.quantized
        if getattr(module, leaf) is not None
    ]
