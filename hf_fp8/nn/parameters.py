"""Parameters of quantized modules: QuantizedWeight and WeightScale, created from assigned plain parameters."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import UnsupportedError
from ..formats.quantized_weight import functions as weight_functions  # noqa: F401  # registers its functions
from ..formats.quantized_weight.source import Decoder, Part, Source
from ..formats.quantized_weight.tensor import QuantizedWeight, whole

_twins: Any = WeakIdKeyDictionary()  # plain parameter -> QuantizedWeight or WeightScale (weak reference)


class WeightScale(torch.nn.Parameter):
    """A scale parameter of a `QuantizedModule`: assigning a cast of itself to `.data` does not round it.

    plain: a plain tensor in the same memory, for kernels, as tracing does not support subclasses.
    """

    plain: torch.Tensor

    def __new__(cls, data: torch.Tensor, requires_grad: bool = True) -> WeightScale:
        found: WeightScale = super().__new__(cls, data.plain if isinstance(data, WeightScale) else data, requires_grad)
        found.plain = found.detach()
        return found

    @property
    def data(self) -> torch.Tensor:
        return super().data

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        held = super().data
        is_like = new.dtype != held.dtype and new.shape == held.shape and new.device == held.device
        if not is_like or not (new.is_meta or torch.equal(new, held.to(new.dtype))):
            torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
            self.plain = self.detach()


def held_by(module: Any, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, a parameter called `leaf` of `module`, as a QuantizedWeight of that module; other types unchanged."""
    if type(tensor) is torch.nn.Parameter:
        tensor = _twin_of(tensor, QuantizedWeight)
    if type(tensor) is QuantizedWeight:
        owners = [(ref, name) for ref, name in tensor._source.owners if ref() is not None and ref() is not module]
        tensor._source = Source([*owners, (weakref.ref(module), leaf)])
        tensor._part = Part.all_of(tensor.codes)
    let_gather(module, leaf, tensor)
    return tensor


def let_gather(module: Any, leaf: str, tensor: Any) -> None:
    """If `tensor` is a DTensor (sharded codes), make it send bytes, its `full_tensor` return a QuantizedWeight, and its casts
    raise UnsupportedError.

    DTensor's own methods fail where the backend cannot send FP8 (gloo; NCCL before compute capability 9.0), and return plain
    codes, which casts would take for values.
    """
    if type(tensor).__name__ == "DTensor":
        place = weakref.ref(module), leaf, weakref.ref(tensor)
        tensor.full_tensor = partial(_gathered, *place)
        tensor.redistribute = partial(_redistributed, place[2])
        for name in ("to", "type", "float", "double", "half", "bfloat16"):
            setattr(tensor, name, partial(_uncast, *place, name))


def seen_as(tensor: Any, dtype: torch.dtype) -> Any:
    """`tensor`, which may be a DTensor, in the same memory with another dtype of one byte."""
    if type(tensor).__name__ != "DTensor":
        return tensor.view(dtype)
    from torch.distributed.tensor import DTensor  # takes long to import, and is imported already

    place = tensor.device_mesh, tensor.placements
    return DTensor.from_local(
        tensor._local_tensor.view(dtype), *place, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _uncast(module: Any, leaf: str, pieces: weakref.ref[Any], name: str, *args: Any, **kwargs: Any) -> Any:
    sharded: Any = pieces()
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


def _redistributed(pieces: weakref.ref[Any], *args: Any, **kwargs: Any) -> Any:
    sharded: Any = pieces()
    return seen_as(seen_as(sharded, torch.uint8).redistribute(*args, **kwargs), sharded.dtype)


def _gathered(module: weakref.ref[Any], leaf: str, pieces: weakref.ref[Any], **_: Any) -> QuantizedWeight:
    from torch.distributed.tensor import DTensor  # takes long to import, and is imported already

    layer, sharded = module(), pieces()
    if layer is None or sharded is None:
        raise UnsupportedError(f"{leaf} cannot be gathered, as its layer was deleted: keep a reference to the model")
    codes = seen_as(sharded, torch.uint8).full_tensor().view(sharded.dtype)
    decoder: Decoder = layer.decoder(leaf)
    scale: Any = decoder.scale
    found = whole(codes)
    found._source = Source(kept=decoder._replace(scale=scale.full_tensor() if isinstance(scale, DTensor) else scale))
    return found


def _twin_of(parameter: torch.nn.Parameter, kind: type[torch.Tensor]) -> Any:
    """`parameter` as a `kind`, cached, so that all modules that share a plain parameter get the same object."""
    known = _twins.get(parameter)
    found = None if known is None else known()
    if found is None or found.data_ptr() != parameter.data_ptr() or found.shape != parameter.shape:
        found = kind(parameter.detach(), parameter.requires_grad)
        vars(found).update(vars(parameter))
        _twins[parameter] = weakref.ref(found)
    return found


def scale_held(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, a scale parameter, as a WeightScale; other types unchanged."""
    if type(tensor) is torch.nn.Parameter:
        tensor = _twin_of(tensor, WeightScale)
    return tensor


def plain_scale(scale: Any) -> Any:
    """The plain tensor of a scale, for kernels; `scale` itself if it requires a gradient, so that the op can refuse it."""
    return scale.plain if type(scale) is WeightScale and not scale.requires_grad else scale
