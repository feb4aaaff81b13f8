"""Parameters of which each process holds a part (torch's DTensor): their parts, and sharded codes, which are no values.

DTensor's own methods fail for codes where the backend cannot send FP8 (gloo; NCCL before compute capability 9.0), and return
plain codes, which casts would take for values: they are replaced on the object.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch

from ..errors import UnsupportedError
from ..formats.quantized_weight.source import Decoder, Source
from ..formats.quantized_weight.tensor import QuantizedWeight, whole


def is_dtensor(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor. Its class takes long to import, so that it is known by its name."""
    return type(tensor).__name__ == "DTensor"


def local(tensor: Any) -> Any:
    """What this process holds of a parameter: the local tensor of a DTensor; others unchanged."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def gathered(tensor: Any) -> Any:
    """The whole of a parameter, on every process: all of them must call it. Others than DTensors unchanged."""
    if not is_dtensor(tensor):
        return tensor
    if tensor.dtype == torch.float8_e8m0fnu:  # scales, which gloo cannot send
        return seen_as(tensor, torch.uint8).full_tensor().view(tensor.dtype)
    return tensor.full_tensor()


def sharded_like(tensor: torch.Tensor, other: Any) -> Any:
    """`tensor`, which every process has as a whole, sharded as `other` is; unchanged if that is no DTensor."""
    if not is_dtensor(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def let_gather(module: Any, leaf: str, tensor: Any) -> None:
    """If `tensor` is a DTensor (sharded codes), make it send bytes, its `full_tensor` return a QuantizedWeight, and its casts
    raise UnsupportedError, also after `detach`. Its `data`, which is no method, stays plain codes."""
    if is_dtensor(tensor):
        _replace_methods(tensor, weakref.ref(module), leaf, weakref.ref(tensor))


def _replace_methods(tensor: Any, *place: Any) -> None:
    tensor.full_tensor = partial(_gathered, *place)
    tensor.detach = partial(_detached, *place)
    tensor.redistribute = partial(_redistributed, *place[1:])
    tensor.__deepcopy__ = partial(_copied, *place[1:])
    tensor.__reduce_ex__ = partial(_reduced, *place[1:])
    for name in ("to", "type", "float", "double", "half", "bfloat16"):
        setattr(tensor, name, partial(_uncast, *place, name))


def seen_as(tensor: Any, dtype: torch.dtype) -> Any:
    """`tensor`, which may be a DTensor, in the same memory with another dtype of one byte."""
    if not is_dtensor(tensor):
        return tensor.view(dtype)
    return _like(tensor, tensor._local_tensor.view(dtype))


def _like(tensor: Any, local: torch.Tensor) -> Any:
    """A DTensor of `local`, sharded as the DTensor `tensor` is."""
    from torch.distributed.tensor import DTensor  # takes long to import, and is imported already

    place = tensor.device_mesh, tensor.placements
    return DTensor.from_local(local, *place, run_check=False, shape=tensor.shape, stride=tensor.stride())


def _uncast(module: Any, leaf: str, pieces: weakref.ref[Any], name: str, *args: Any, **kwargs: Any) -> Any:
    sharded = _alive(leaf, pieces)
    asked = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.dtype)]
    asked += [one.dtype for one in args if isinstance(one, torch.Tensor)]
    by_name = name == "type" and any(not isinstance(one, torch.dtype) for one in args)  # "torch.FloatTensor"
    if name not in ("to", "type") or by_name or any(dtype != sharded.dtype for dtype in asked):
        layer = module()
        raise UnsupportedError(
            f"{leaf if layer is None else layer.called(leaf)} holds codes in {sharded.dtype}, sharded over processes, and "
            f"{name}() would take them for values: call the layer, or read the whole weight with full_tensor()"
        )
    return getattr(type(sharded), name)(sharded, *args, **kwargs)


def _detached(module: weakref.ref[Any], leaf: str, pieces: weakref.ref[Any]) -> Any:
    sharded = _alive(leaf, pieces)
    found = type(sharded).detach(sharded)
    _replace_methods(found, module, leaf, pieces)  # of the parameter: `found` may live only until its method is called
    return found


def _copied(leaf: str, pieces: weakref.ref[Any], memo: dict[int, Any]) -> Any:
    sharded = _alive(leaf, pieces)
    memo[id(sharded)] = found = _plain(sharded, sharded._local_tensor.clone())
    return found


def _reduced(leaf: str, pieces: weakref.ref[Any], protocol: int) -> Any:
    sharded = _alive(leaf, pieces)
    return _plain(sharded, sharded._local_tensor).__reduce_ex__(protocol)


def _plain(sharded: Any, local: torch.Tensor) -> Any:
    """A DTensor, or parameter, like `sharded` without the methods that are replaced on it."""
    found = _like(sharded, local)
    return torch.nn.Parameter(found, requires_grad=False) if isinstance(sharded, torch.nn.Parameter) else found


def _redistributed(leaf: str, pieces: weakref.ref[Any], *args: Any, **kwargs: Any) -> Any:
    sharded = _alive(leaf, pieces)
    return seen_as(seen_as(sharded, torch.uint8).redistribute(*args, **kwargs), sharded.dtype)


def _gathered(module: weakref.ref[Any], leaf: str, pieces: weakref.ref[Any], **_: Any) -> QuantizedWeight:
    layer, sharded = _alive(leaf, module), _alive(leaf, pieces)
    codes = seen_as(sharded, torch.uint8).full_tensor().view(sharded.dtype)
    decoder: Decoder = layer.decoder(leaf)
    found = whole(codes)
    found._source = Source(kept=decoder._replace(scale=gathered(decoder.scale)))
    return found


def _alive(leaf: str, reference: weakref.ref[Any]) -> Any:
    found = reference()
    if found is None:
        raise UnsupportedError(f"{leaf} is of a layer that was deleted: keep a reference to the model")
    return found
