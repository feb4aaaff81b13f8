"""Gives float copies of quantized layers to methods that read weights outside of a forward (diffusers' `fuse_projections`).

Such methods create dense layers from the weights, in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..loading.model_code import read_by_methods
from ..nn.base import QuantizedModule
from .patches import wrap


def guard_readers(model: nn.Module) -> None:
    """Wrap such methods of `model` and its submodules, if they read a quantized layer, so that they get float copies."""
    for module in model.modules():
        for (cls, name), paths in read_by_methods(type(module)).items():  # type: ignore[arg-type]  # as in `reads`
            if any(_quantized(module, path) is not None for path in paths):
                wrap(cls, name, partial(_on_float_copies, paths), lasting=True)


def _on_float_copies(paths: frozenset[str], host: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    with _float_copies(self, paths):
        return host(self, *args, **kwargs)


@contextmanager
def _float_copies(model: nn.Module, paths: frozenset[str]) -> Iterator[None]:
    """Temporarily replace the quantized layers at `paths` by float copies.

    Raises UnsupportedError if a copy was changed, since the change is not in the layer.
    """
    copies: dict[str, tuple[QuantizedModule, nn.Module, dict[str, torch.Tensor]]] = {}
    for path in paths:
        if (layer := _quantized(model, path)) is not None:
            copy = layer.to_dense(layer.float_dtype)
            copies[path] = layer, copy, {name: tensor.detach().clone() for name, tensor in copy.named_parameters()}
            model.set_submodule(path, copy)
    try:
        yield
    finally:
        for path, (layer, copy, _) in copies.items():
            if _at(model, path) is copy:
                model.set_submodule(path, layer)
    for path, (layer, copy, before) in copies.items():
        if not all(torch.equal(tensor, before[name]) for name, tensor in copy.named_parameters()):
            raise UnsupportedError(
                f"{layer.called()} ({path} of a {type(model).__name__}) was changed by a method that computes with its weight. "
                "It is a quantized layer: the change is not kept. Call hf_fp8.dequantize_model(model) first"
            )


def _quantized(model: nn.Module, path: str) -> QuantizedModule | None:
    found = _at(model, path)
    return found if isinstance(found, QuantizedModule) and isinstance(getattr(found, "weight", None), torch.Tensor) else None


def _at(model: nn.Module, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(model, nn.Module) or name not in model._modules:
            return None
        model = model._modules[name]  # type: ignore[assignment]
    return model
