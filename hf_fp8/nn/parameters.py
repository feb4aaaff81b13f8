"""Parameters of quantized modules, made of what is assigned to them: QuantizedWeight and WeightScale."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import UnsupportedError
from ..formats.quantized_weight import functions as weight_functions  # noqa: F401  # what a QuantizedWeight does
from ..formats.quantized_weight.source import Decoder, Part, Source
from ..formats.quantized_weight.tensor import QuantizedWeight, as_parameter, whole

_twins: Any = WeakIdKeyDictionary()  # a plain parameter -> what was made of it


class WeightScale(torch.nn.Parameter):
    """A scale, as a parameter of a `QuantizedModule`: a cast of itself assigned to `.data` does not round it.

    plain: a tensor in the same memory that is no parameter, for kernels: tracing knows no subclasses.
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
    """`tensor`, a parameter called `leaf` of `module`, as a QuantizedWeight that belongs to it; other kinds as they are."""
    if type(tensor) is torch.nn.Parameter:
        tensor = _twin_of(tensor, _codes_parameter)
    if type(tensor) is QuantizedWeight:
        owners = [(ref, name) for ref, name in tensor._source.owners if ref() is not None and ref() is not module]
        tensor._source = Source([*owners, (weakref.ref(module), leaf)])
        tensor._part = Part.all_of(tensor.codes)
    let_gather(module, leaf, tensor)
    return tensor


def let_gather(module: Any, leaf: str, tensor: Any) -> None:
    """Of codes that FSDP2 has put in pieces, let `full_tensor` give a QuantizedWeight; it is a DTensor, and its own would
    give plain codes, or nothing where the backend cannot send FP8 (gloo; NCCL before compute capability 9.0)."""
    if type(tensor).__name__ == "DTensor":
        tensor.full_tensor = partial(_gathered, weakref.ref(module), leaf, weakref.ref(tensor))


def _gathered(module: weakref.ref[Any], leaf: str, pieces: weakref.ref[Any], **_: Any) -> QuantizedWeight:
    from torch.distributed.tensor import DTensor  # takes long to import, and is imported already

    layer, sharded = module(), pieces()
    if layer is None or sharded is None:
        raise UnsupportedError(f"{leaf} is to be gathered, and its layer is gone: keep the model")
    bits = sharded.to_local().view(torch.uint8)
    place = sharded.device_mesh, sharded.placements
    codes = DTensor.from_local(bits, *place, shape=sharded.shape, stride=sharded.stride()).full_tensor().view(sharded.dtype)
    decoder: Decoder = layer.decoder(leaf)
    scale: Any = decoder.scale
    found = whole(codes)
    found._source = Source(kept=decoder._replace(scale=scale.full_tensor() if isinstance(scale, DTensor) else scale))
    return found


def _twin_of(parameter: torch.nn.Parameter, make: Callable[[torch.nn.Parameter], Any]) -> Any:
    """What `make` gives for a plain parameter: the same one for all modules that share it."""
    known = _twins.get(parameter)
    found = None if known is None else known()
    if found is None or found.data_ptr() != parameter.data_ptr() or found.shape != parameter.shape:
        found = make(parameter)
        vars(found).update(vars(parameter))
        _twins[parameter] = weakref.ref(found)
    return found


def _codes_parameter(parameter: torch.nn.Parameter) -> QuantizedWeight:
    codes = parameter.detach()
    return as_parameter(whole(codes), parameter.requires_grad)


def scale_held(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, a scale that is a parameter of a module, as a WeightScale; other kinds as they are."""
    if type(tensor) is not torch.nn.Parameter:
        return tensor
    found: torch.Tensor = _twin_of(tensor, _scale_parameter)
    return found


def _scale_parameter(parameter: torch.nn.Parameter) -> WeightScale:
    return WeightScale(parameter.detach(), parameter.requires_grad)


def plain_scale(scale: Any) -> Any:
    """A scale as kernels take it; itself if it is to have a gradient, which they refuse."""
    return scale.plain if type(scale) is WeightScale and not scale.requires_grad else scale
