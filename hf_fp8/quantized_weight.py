"""QuantizedWeight: a parameter of codes that computes as the weight it stands for, whoever reads it.

What moves a tensor (views, copies, `.to(device)`, pickling, safetensors) moves its codes. Everything else is done with the
dequantized values, so that nothing can compute with codes by mistake; and nothing can write values over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map_only

from .cast_values import refuse_own_values
from .errors import UnsupportedError
from .weight_source import Decoder, Part, Source, rows_of

# Functions of torch by name, as `__torch_function__` is told of them. A property is called by its own name.
# Those that ask what a tensor is, not for its values; or that make a new one like it.
_ASKS = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "data_ptr", "storage",
        "untyped_storage", "_typed_storage", "is_contiguous", "is_pinned", "is_floating_point", "is_complex", "is_signed",
        "is_shared", "is_inference", "is_conj", "is_neg", "is_same_size", "is_set_to", "get_device", "dim_order", "has_names",
        "__len__", "__hash__", "__dir__", "detach_", "share_memory_", "register_hook",
        "register_post_accumulate_grad_hook", "retain_grad", "_is_view", "_has_compatible_shallow_copy_type",
        "_backward_hooks", "names", "requires_grad", "is_leaf", "grad", "grad_fn", "output_nr", "device", "dtype", "layout",
        "shape", "ndim", "itemsize", "nbytes", "name", "volatile", "retains_grad", "_version", "_cdata", "_base", "_grad",
        "_post_accumulate_grad_hooks", "is_cuda", "is_cpu", "is_meta", "is_xpu", "is_mps", "is_sparse", "is_sparse_csr",
        "is_quantized", "is_nested", "is_mkldnn", "is_xla", "is_hpu", "is_mtia", "is_ipu", "is_maia", "is_vulkan",
        "is_ort", "_has_symbolic_sizes_strides", "empty_like", "new_empty", "new_zeros", "new_empty_strided",
        "__dlpack_device__",
    }
)  # fmt: skip
# Those that give the same numbers in another place or shape.
_MOVES = frozenset(
    {
        "detach", "data", "alias", "clone", "contiguous", "cpu", "cuda", "xpu", "pin_memory", "view_as", "reshape", "flatten",
        "unflatten", "squeeze", "unsqueeze", "transpose", "swapaxes", "swapdims", "movedim", "permute", "t", "T", "mT", "chunk",
        "split", "tensor_split", "narrow", "select", "unbind", "expand", "expand_as", "unsafe_chunk", "unsafe_split",
        "split_with_sizes", "__getitem__", "view", "to",
    }
)  # fmt: skip
# Those that ask whether two tensors are the same: of codes, if the other one holds such.
_COMPARES = frozenset({"equal", "eq", "ne", "__eq__", "__ne__"})
_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


class QuantizedWeight(torch.Tensor):
    """Codes of a weight, E4M3 or int8, as a parameter of a `QuantizedModule`, which makes it of what is assigned to it.

    `dtype`, `shape` and memory are those of the codes; so are views, copies, pickles and what safetensors writes. As an operand
    it is the dequantized weight, in the dtype that the layer was made of or, with `.to(dtype)`, `.float()`, in that one.
    Raises UnsupportedError where values would be written into it (but for what `.to(dtype)` gives of itself, which changes
    nothing), for operands that were cast to the dtype of the codes, and where a gradient is asked for.
    """

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
        kwargs = kwargs or {}
        name = _name(func)
        if name in _ASKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and str(func).startswith("hf_fp8."):
            args, kwargs = tree_map_only(QuantizedWeight, codes_of, (args, kwargs))
            return func(*args, **kwargs)  # our own kernels
        return _handle(func, name, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if is_parameter(self):
            return torch._utils._rebuild_parameter, (self.codes, self.requires_grad, {})
        return self.codes.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        if id(self) not in memo:
            copied = _moved(self, self.codes.clone(memory_format=torch.preserve_format), None)
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


def _name(func: Any) -> str:
    """Of a function of torch; of the getter or setter of a property the property's, with "=" for a setter."""
    name: str = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return str(func.__self__.__name__) + ("=" if name == "__set__" else "")
    return name


def _handle(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    first: Any = args[0] if args else None
    if name == "data=":
        return _set_data(first, args[1])
    if name.endswith("=") or name == "requires_grad_":  # requires_grad, grad, names
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if "requires_grad" in name:  # kernels, which are given the codes, refuse to have one
            first.codes.requires_grad_(first.requires_grad)
        return found
    if name == "copy_":
        return _copy(func, first, *args[1:], **kwargs)
    if name in ("to", "type_as", "type"):
        return _cast(func, name, args, kwargs)
    if type(first) is QuantizedWeight and name in _MOVES and not (name == "view" and _is_dtype(args, kwargs)):
        return _move(func, first, args[1:], kwargs)
    if name == "view":  # as another dtype: the bits
        return first.codes.view(*args[1:], **kwargs)
    _refuse_writing(name, first, kwargs)
    if name in _CASTS:
        return values(first, _CASTS[name])
    if name in ("numpy", "__array__") and first._source.exported:
        return func(first.codes, *args[1:], **kwargs)
    held = [t for t in tree_iter((args, kwargs)) if type(t) is QuantizedWeight]
    others = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor) and type(t) is not QuantizedWeight]
    if any(other.dtype == weight.codes.dtype for other in others for weight in held):
        if name in _COMPARES:
            args, kwargs = tree_map_only(QuantizedWeight, codes_of, (args, kwargs))
            return func(*args, **kwargs)
        raise UnsupportedError(
            f"{_called(held[0])} holds codes in {held[0].codes.dtype}, and {name} was given it with another tensor of that "
            "dtype. Cast inputs to their own dtype instead of the weight's; codes themselves are `weight.codes`"
        )
    # Two weights are the same if their values are, whatever these are computed in.
    read = partial(values, dtype=torch.float32) if name in _COMPARES and not others else values
    args, kwargs = tree_map_only(QuantizedWeight, read, (args, kwargs))
    return func(*args, **kwargs)


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


def _called(weight: QuantizedWeight) -> str:
    try:
        return weight._source.decoder(weight._part.whole).name
    except UnsupportedError:
        return "a quantized weight"


def _is_dtype(args: Any, kwargs: Any) -> bool:
    return "dtype" in kwargs or (len(args) == 2 and isinstance(args[1], torch.dtype))


def _move(func: Any, weight: QuantizedWeight, rest: Any, kwargs: Any) -> Any:
    """The same for codes, in the form in which `func` gives it: a tensor or several."""
    if any(isinstance(t, torch.Tensor) for t in tree_iter((rest, kwargs))):  # chosen by other tensors: no view
        rest, kwargs = tree_map_only(QuantizedWeight, values, (rest, kwargs))
        return func(values(weight), *rest, **kwargs)
    moved = func(weight.codes, *rest, **kwargs)
    if isinstance(moved, torch.Tensor):
        found = _moved(weight, moved, lambda found: func(found, *rest, **kwargs))
        if weight.requires_grad and moved.requires_grad:  # `values` refuses it
            found.requires_grad_(True)
        return found
    return type(moved)(_moved(weight, piece, partial(_piece, func, rest, kwargs, i)) for i, piece in enumerate(moved))


def _piece(func: Any, rest: Any, kwargs: Any, index: int, found: torch.Tensor) -> torch.Tensor:
    piece: torch.Tensor = func(found, *rest, **kwargs)[index]
    return piece


def _moved(
    weight: QuantizedWeight, codes: torch.Tensor, step: Callable[[torch.Tensor], torch.Tensor] | None
) -> QuantizedWeight:
    """What `step` makes of a weight, `codes` of its codes. step: None for a copy as it is."""
    part, source = weight._part, weight._source
    copied = codes.untyped_storage()._cdata != weight.codes.untyped_storage()._cdata
    if copied and source.kept is None and (source.owner(part.whole) is not None):
        kept = source.decoder(part.whole)
        source = Source(kept=kept._replace(scale=kept.scale.detach().clone().to(codes.device)))
    if (
        not part.steps
        and part.rows == slice(0, len(part.whole))
        and codes.shape == part.whole.shape
        and (step is None or copied or codes.stride() == part.whole.stride())
    ):
        return _wrap(codes, Part(codes, part.rows), source)
    whole = part.whole.to(codes.device) if copied else part.whole
    rows = None if copied or part.steps else rows_of(codes, whole)
    if rows is not None:
        is_one = codes.ndim < whole.ndim
        return _wrap(codes, Part(whole, rows, (lambda found: found[0],) if is_one else ()), source)
    steps = part.steps if step is None else (*part.steps, step)
    return _wrap(codes, replace(part, whole=whole, steps=steps), source)


def _cast(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """`.to`, `.type`, `.type_as`: of a weight, values where the dtype is another one, else a move; of another tensor, a cast to
    the dtype of a weight's values."""
    first, rest = args[0], args[1:]
    if type(first) is not QuantizedWeight:  # x.to(weight), x.type_as(weight)
        like = rest[0] if rest else kwargs.pop("other")
        return (
            first.to(values_dtype(like))
            if name == "type_as"
            else first.to(like.device, values_dtype(like), *rest[1:], **kwargs)
        )
    if name == "type_as":
        name, rest = "to", (values_dtype(rest[0]) if type(rest[0]) is QuantizedWeight else rest[0].dtype,)
    if name == "type":
        if not rest and not kwargs:
            return first.codes.type()
        asked = rest[0] if rest else kwargs["dtype"]
        name, rest = "to", (torch.empty(0).type(asked).dtype,)
        kwargs = {}
    others: Any = tuple(t.codes if type(t) is QuantizedWeight else t for t in rest)
    copy = kwargs.get("copy", False)
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*others, **{k: v for k, v in kwargs.items() if k != "copy"})
    if dtype is None or dtype == first.codes.dtype:
        how = {"non_blocking": non_blocking, "copy": copy, "memory_format": layout or torch.preserve_format}
        moved = first.codes.to(device or first.codes.device, **how)
        if moved is first.codes:
            return first
        return _moved(first, moved, lambda found: found.to(device or found.device))
    found = values(first, dtype)
    return found if device is None else found.to(device, non_blocking=non_blocking)


def values_dtype(weight: QuantizedWeight) -> torch.dtype:
    """The dtype of its values where nobody asks for another."""
    return weight._source.decoder(weight._part.whole).dtype


def _set_data(weight: Any, new: torch.Tensor) -> None:
    """``weight.data = new``: other codes, or what a cast of itself gave, which changes nothing but the dtype of its values."""
    if type(weight) is not QuantizedWeight:  # of a plain tensor
        weight.data = values(new)  # type: ignore[arg-type]
        return
    codes = codes_of(new)
    if codes.dtype != weight.codes.dtype:
        _accept_cast(weight, codes, "data")
        return
    if type(new) is not QuantizedWeight:
        refuse_own_values(codes, weight.codes, weight._part, weight._source)
    with torch._C.DisableTorchFunctionSubclass():
        weight.data = codes
    is_whole = weight._part.whole is weight.codes
    weight.codes = codes.detach()
    if is_whole:
        weight._part = Part.all_of(weight.codes)


def _copy(func: Any, into: Any, of: Any, *rest: Any, **kwargs: Any) -> Any:
    """``into.copy_(of)``: codes where both are of their dtype, else values, and never values over codes."""
    if type(into) is not QuantizedWeight:
        into.copy_(of.codes if into.dtype == of.codes.dtype else values(of, into.dtype), *rest, **kwargs)
        return into
    codes = codes_of(of)
    if codes.dtype != into.codes.dtype:
        _accept_cast(into, codes, "copy_")
        return into
    if type(of) is not QuantizedWeight:
        refuse_own_values(codes, into.codes, into._part, into._source)
    into.codes.copy_(codes, *rest, **kwargs)
    return into


def _accept_cast(weight: QuantizedWeight, new: torch.Tensor, how: str) -> None:
    """Nothing, if `new` is what the weight is in another dtype, which its values are in from now on.

    Raises UnsupportedError for other values, naming the layer.
    """
    found = weight._source.owner(weight._part.whole)
    if found is not None and new.device == weight.codes.device and is_cast_of(weight, new):
        found[0].made_of = new.dtype
        return
    raise UnsupportedError(
        f"{_called(weight)} holds {[*weight.codes.shape]} codes in {weight.codes.dtype}: `{how}` would write values of "
        f"{new.dtype} {[*new.shape]} over them, without a scale. hf_fp8.dequantize_model(model) gives a model with weights "
        "that can be changed, hf_fp8.quantize_model(model) makes codes of them again"
    )


def is_cast_of(weight: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether floats are what a weight stands for, in their dtype."""
    if type(weight) is not QuantizedWeight or not given.is_floating_point() or given.itemsize < 2:
        return False
    if given.shape != weight.codes.shape:
        return False
    with torch.no_grad():
        return given.is_meta or torch.equal(given, values(weight, given.dtype).to(given.device))


def _refuse_writing(name: str, first: Any, kwargs: Any) -> None:
    written = [kwargs["out"]] if kwargs.get("out") is not None else []
    if (name.endswith("_") and not name.endswith("__")) or name in _WRITING_OPERATORS:
        written.append(first if first is not None else next(iter(kwargs.values())))  # torch.nn.init's pass a keyword
    for weight in _weights(written):
        if weight.codes.is_meta:  # as transformers initialises what is offloaded
            continue
        raise UnsupportedError(
            f"{_called(weight)} holds codes in {weight.codes.dtype}: {name} would change them in place, as if they were the "
            "weight. hf_fp8.dequantize_model(model) gives a model with weights that can be changed, "
            "hf_fp8.quantize_model(model) makes codes of them again"
        )


_IN_PLACE = ["add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul"]
_WRITING_OPERATORS = frozenset({"__setitem__", *(f"__i{op}__" for op in _IN_PLACE)})


def _weights(tree: Any) -> Iterator[QuantizedWeight]:
    return (t for t in tree_iter(tree) if type(t) is QuantizedWeight)


def export(weight: torch.Tensor, decoder: Decoder) -> None:
    """Make `weight` an entry of a state dict, which may outlive its layer: by the layer's own scale, into which others are
    loaded as into the codes."""
    if type(weight) is QuantizedWeight:
        weight._source = Source(kept=decoder, exported=True)
