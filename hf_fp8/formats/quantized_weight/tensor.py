"""QuantizedWeight: a parameter that stores codes (8-bit values) and is used in computations as the dequantized weight.

Functions that move a tensor (views, copies, `.to(device)`, pickling, safetensors) move its codes. All others get the
dequantized values, so that no code computes with codes by mistake; values cannot be written over codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import torch
from torch.multiprocessing.reductions import reduce_tensor

from ...errors import UnsupportedError
from .source import Decoder, Part, Source, rows_of


class QuantizedWeight(torch.Tensor):
    """Codes of a weight, E4M3 or int8, as a parameter of a `QuantizedModule`, which creates it from an assigned parameter.

    `dtype`, `shape` and memory are those of the codes, also in views, copies, pickles and safetensors files. As an operand
    it is the dequantized weight, in the original dtype of the layer or the one requested by `.to(dtype)`, `.float()`.
    Raises UnsupportedError if values are written into it (except its own values as `.to(dtype)` returns them, which changes
    nothing), for operands that were cast to the dtype of the codes, and if a gradient is requested.
    """

    handle: ClassVar[Callable[[Any, Any, Any], Any]]  # set by `functions`, which imports this class
    asks: ClassVar[frozenset[str]]  # names of functions that do not read values; set there, too
    codes: torch.Tensor  # a plain tensor in the same memory
    _part: Part
    _source: Source

    @staticmethod
    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> QuantizedWeight:
        found = whole(codes_of(data))
        if type(data) is QuantizedWeight:
            found._part, found._source = data._part, data._source
        return as_parameter(found, requires_grad)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            if name_of(func) not in cls.asks:
                return _uncompiled(func, args, kwargs or {})
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return cls.handle(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        if isinstance(self, torch.nn.Parameter):
            return torch._utils._rebuild_parameter, (self.codes, self.requires_grad, {})
        return self.codes.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        if id(self) not in memo:
            copied = moved_weight(self, self.codes.clone(memory_format=torch.preserve_format), None)
            memo[id(self)] = as_parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        found: QuantizedWeight = memo[id(self)]
        return found

    def __copy__(self) -> QuantizedWeight:
        found = _wrap(self.codes.detach(), self._part, self._source)
        return as_parameter(found, self.requires_grad) if isinstance(self, torch.nn.Parameter) else found

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"QuantizedWeight({self.codes!r})"

    def __format__(self, spec: str) -> str:
        return repr(self)


def name_of(func: Any) -> str:
    """The name of a torch function; for getters and setters the name of the property, with "=" appended for a setter."""
    name: str = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return str(func.__self__.__name__) + ("=" if name == "__set__" else "")
    return name


def _read_by_compiled_code(func: Any, args: Any, kwargs: Any) -> Any:
    return QuantizedWeight.handle(func, args, kwargs)


_uncompiled: Any = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _read_by_compiled_code, reason="reading the weight of a quantized layer as values cannot be compiled: call the layer"
)


def codes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The codes of a QuantizedWeight as a plain tensor in the same memory; other tensors are returned unchanged."""
    return tensor.codes if type(tensor) is QuantizedWeight else tensor


def whole(codes: torch.Tensor) -> QuantizedWeight:
    """A QuantizedWeight of plain codes that has no owner yet."""
    return _wrap(codes, Part.all_of(codes), Source())


def _wrap(codes: torch.Tensor, part: Part, source: Source) -> QuantizedWeight:
    with torch._C.DisableTorchFunctionSubclass():
        found: QuantizedWeight = torch.Tensor._make_subclass(QuantizedWeight, codes, False)
    found.codes, found._part, found._source = codes, part, source
    codes._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]  # else CUDA graphs copy it at each replay
    return found


def as_parameter(weight: QuantizedWeight, requires_grad: bool) -> QuantizedWeight:
    weight._is_param = True  # as nn.Parameter marks subclasses
    if requires_grad:
        weight.requires_grad_(True)
    return weight


def values(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The dequantized weight, or the same part of it for a view. dtype: by default the original dtype of the layer.

    Raises UnsupportedError if the weight requires a gradient, or no module holds the codes any more.
    """
    decoder = weight._source.decoder(weight._part.whole)
    if weight.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            f"{decoder.name} holds codes in {weight.codes.dtype}, which have no gradient, and requires_grad is set: freeze it "
            "and train adapters (LoRA), or load with FP8Config(dequantize=True) to train the weights themselves"
        )
    with torch.no_grad():
        found = decoder.decode(weight._part.whole, decoder.scale, weight._part.rows, dtype or decoder.dtype)
        for step in weight._part.steps:
            found = step(found)
    return found


def called(weight: QuantizedWeight) -> str:
    try:
        return weight._source.decoder(weight._part.whole).name
    except UnsupportedError:
        return "a quantized weight"


def is_copy(codes: torch.Tensor, of: torch.Tensor) -> bool:
    return bool(codes.untyped_storage()._cdata != of.untyped_storage()._cdata)


def is_whole(weight: QuantizedWeight) -> bool:
    """Whether it is the whole weight, in the original order."""
    part = weight._part
    return not part.steps and part.rows == slice(0, len(part.whole)) and weight.codes.shape == part.whole.shape


def moved_weight(
    weight: QuantizedWeight, codes: torch.Tensor, step: Callable[[torch.Tensor], torch.Tensor] | None
) -> QuantizedWeight:
    """The QuantizedWeight of `codes`, the result of applying `step` to the codes of `weight`. step: None for a plain copy."""
    part, source = weight._part, weight._source
    copied = is_copy(codes, weight.codes)
    if copied and (source.kept is not None or source.owner(part.whole) is not None):
        kept = source.decoder(part.whole)  # the present one: the layer may get other codes and scales later
        source = Source(kept=kept._replace(scale=kept.scale.detach().clone().to(codes.device)), exported=source.exported)
    same_place = step is None or copied or codes.stride() == part.whole.stride()
    if is_whole(weight) and codes.shape == part.whole.shape and same_place:
        return _wrap(codes, Part.all_of(codes), source)
    whole = part.whole.to(codes.device, copy=True) if copied else part.whole
    rows = None if copied or part.steps else rows_of(codes, whole)
    if rows is not None:
        is_one = codes.ndim < whole.ndim
        return _wrap(codes, Part(whole, rows, (lambda found: found[0],) if is_one else ()), source)
    steps = part.steps if step is None else (*part.steps, step)
    return _wrap(codes, replace(part, whole=whole, steps=steps), source)


def values_dtype(weight: QuantizedWeight) -> torch.dtype:
    """The default dtype of its values."""
    return weight._source.decoder(weight._part.whole).dtype


def is_cast_of(weight: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether `given`, a float tensor, equals the dequantized weight in its dtype."""
    if type(weight) is not QuantizedWeight or not given.is_floating_point() or given.itemsize < 2:
        return False
    if given.shape != weight.codes.shape:
        return False
    if given.is_meta:
        return True
    try:
        with torch.no_grad():
            return torch.equal(given, values(weight, given.dtype).to(given.device))
    except UnsupportedError:  # the values cannot have been read before either
        return False


def _reduce_shared(weight: QuantizedWeight) -> Any:
    """Reducer for `torch.multiprocessing` (shared memory)."""
    if isinstance(weight, torch.nn.Parameter):
        return torch._utils._rebuild_parameter, (weight.codes, weight.requires_grad, {})
    return reduce_tensor(weight.codes)  # type: ignore[no-untyped-call]


ForkingPickler.register(QuantizedWeight, _reduce_shared)


def export(weight: torch.Tensor, decoder: Decoder) -> None:
    """Mark `weight` as an entry of a state dict, which may outlive its layer.

    The decoder has the layer's own scale tensor, so that loading into the state dict changes codes and scale together.
    """
    if type(weight) is QuantizedWeight:
        weight._source = Source(kept=decoder, exported=True)
