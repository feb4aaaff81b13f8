"""QuantizedWeight: a parameter of codes that computes as the weight it stands for, whoever reads it.

What moves a tensor (views, copies, `.to(device)`, pickling, safetensors) moves its codes. Everything else is done with the
dequantized values, so that nothing can compute with codes by mistake; and nothing can write values over them.
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
    """Codes of a weight, E4M3 or int8, as a parameter of a `QuantizedModule`, which makes it of what is assigned to it.

    `dtype`, `shape` and memory are those of the codes; so are views, copies, pickles and what safetensors writes. As an operand
    it is the dequantized weight, in the dtype that the layer was made of or, with `.to(dtype)`, `.float()`, in that one.
    Raises UnsupportedError where values would be written into it (but for what `.to(dtype)` gives of itself, which changes
    nothing), for operands that were cast to the dtype of the codes, and where a gradient is asked for.
    """

    handle: ClassVar[Callable[[Any, Any, Any], Any]]  # of `weight_functions`, which needs this class
    asks: ClassVar[frozenset[str]]  # names of functions that do not ask for values, of `weight_functions`, too
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
        if is_parameter(self):
            return torch._utils._rebuild_parameter, (self.codes, self.requires_grad, {})
        return self.codes.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        if id(self) not in memo:
            copied = moved_weight(self, self.codes.clone(memory_format=torch.preserve_format), None)
            memo[id(self)] = as_parameter(copied, self.requires_grad) if is_parameter(self) else copied
        found: QuantizedWeight = memo[id(self)]
        return found

    def __copy__(self) -> QuantizedWeight:
        found = _wrap(self.codes.detach(), self._part, self._source)
        return as_parameter(found, self.requires_grad) if is_parameter(self) else found

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"QuantizedWeight({self.codes!r})"

    def __format__(self, spec: str) -> str:
        return repr(self)


def name_of(func: Any) -> str:
    """Of a function of torch; of the getter or setter of a property the property's, with "=" for a setter."""
    name: str = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return str(func.__self__.__name__) + ("=" if name == "__set__" else "")
    return name


def _read_by_compiled_code(func: Any, args: Any, kwargs: Any) -> Any:
    return QuantizedWeight.handle(func, args, kwargs)


_uncompiled: Any = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _read_by_compiled_code, reason="the weight of a quantized layer is read as values, which graphs do not hold: call the layer"
)


def codes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The plain codes of a QuantizedWeight, in its memory; any other tensor itself."""
    return tensor.codes if type(tensor) is QuantizedWeight else tensor


def is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def whole(codes: torch.Tensor) -> QuantizedWeight:
    """Plain codes that are to become the parameter of some module."""
    return _wrap(codes, Part.all_of(codes), Source())


def _wrap(codes: torch.Tensor, part: Part, source: Source) -> QuantizedWeight:
    with torch._C.DisableTorchFunctionSubclass():
        found: QuantizedWeight = torch.Tensor._make_subclass(QuantizedWeight, codes, False)
    found.codes, found._part, found._source = codes, part, source
    codes._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]  # else CUDA graphs copy it in each replay
    return found


def as_parameter(weight: QuantizedWeight, requires_grad: bool) -> QuantizedWeight:
    weight._is_param = True  # as nn.Parameter marks subclasses
    if requires_grad:
        weight.requires_grad_(True)
    return weight


def values(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The dequantized weight, or of a view of it the same part. dtype: by default what the layer was made of.

    Raises UnsupportedError if the weight is to have a gradient, or nothing says what the codes mean.
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
    """Whether it is all of its weight, nothing of which was moved to another place."""
    part = weight._part
    return not part.steps and part.rows == slice(0, len(part.whole)) and weight.codes.shape == part.whole.shape


def moved_weight(
    weight: QuantizedWeight, codes: torch.Tensor, step: Callable[[torch.Tensor], torch.Tensor] | None
) -> QuantizedWeight:
    """What `step` makes of a weight, `codes` of its codes. step: None for a copy as it is."""
    part, source = weight._part, weight._source
    copied = is_copy(codes, weight.codes)
    if copied and (source.kept is not None or source.owner(part.whole) is not None):
        kept = source.decoder(part.whole)  # as it is now: the layer may get other codes and scales
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
    """The dtype of its values where nobody asks for another."""
    return weight._source.decoder(weight._part.whole).dtype


def is_cast_of(weight: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether floats are what a weight stands for, in their dtype."""
    if type(weight) is not QuantizedWeight or not given.is_floating_point() or given.itemsize < 2:
        return False
    if given.shape != weight.codes.shape:
        return False
    if given.is_meta:
        return True
    try:
        with torch.no_grad():
            return torch.equal(given, values(weight, given.dtype).to(given.device))
    except UnsupportedError:  # nobody can have read it
        return False


def _reduce_shared(weight: QuantizedWeight) -> Any:
    """For processes that share memory."""
    if is_parameter(weight):
        return torch._utils._rebuild_parameter, (weight.codes, weight.requires_grad, {})
    return reduce_tensor(weight.codes)  # type: ignore[no-untyped-call]


ForkingPickler.register(QuantizedWeight, _reduce_shared)


def export(weight: torch.Tensor, decoder: Decoder) -> None:
    """Make `weight` an entry of a state dict, which may outlive its layer: by the layer's own scale, into which others are
    loaded as into the codes."""
    if type(weight) is QuantizedWeight:
        weight._source = Source(kept=decoder, exported=True)
