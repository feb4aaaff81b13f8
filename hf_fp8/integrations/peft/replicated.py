"""Adapters on a model that FSDP2 has sharded: every process holds all of them, and their gradients are averaged.

FSDP manages only the parameters that a module had when it was wrapped. transformers' Trainer does the same for such adapters;
other training loops would train another adapter in each process.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from ...nn.base import QuantizedModule
from ...nn.dtensors import is_dtensor

# The mark that transformers' Trainer leaves on parameters whose gradients are averaged.
_MARK = "_replicated_grad_hook_registered"


def mesh_of(model: nn.Module) -> Any:
    """The mesh over which FSDP2 has sharded the codes of `model`; None if it has not."""
    for module in model.modules():
        for codes in module.holds if isinstance(module, QuantizedModule) else ():
            parameter: Any = module._parameters.get(codes)
            if is_dtensor(parameter) and not module.shards:
                return parameter.device_mesh
    return None


def keep_alike(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Make new parameters the same in all processes that train `model`: their values now, and their gradients from now on."""
    mesh = mesh_of(model)
    if mesh is None:
        return
    for parameter in parameters:
        if is_dtensor(parameter) or getattr(parameter, _MARK, False):
            continue
        for group in mesh.get_all_groups():
            torch.distributed.broadcast(parameter.detach(), group=group, group_src=0)
        parameter.register_post_accumulate_grad_hook(partial(_average, mesh))  # type: ignore[no-untyped-call]
        setattr(parameter, _MARK, True)


def _average(mesh: Any, parameter: torch.Tensor) -> None:
    # Also right while gradients are accumulated: those of earlier batches are the same in all processes already.
    assert parameter.grad is not None
    for group in mesh.get_all_groups():
        torch.distributed.all_reduce(parameter.grad, group=group)
    parameter.grad.div_(mesh.size())
