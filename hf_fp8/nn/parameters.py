"""Parameters of quantized modules: QuantizedWeight and WeightScale, created from assigned plain parameters."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..formats.quantized_weight import functions as weight_functions  # noqa: F401  # registers its functions
from ..formats.quantized_weight.source import Part, Source
from ..formats.quantized_weight.tensor import QuantizedWeight
from .dtensors import let_gather

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
        if not is_like or not (new.is_meta or torch.equal(new.float(), held.to(new.dtype).float())):
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
