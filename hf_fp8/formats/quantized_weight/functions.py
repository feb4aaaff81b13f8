"""Dispatch of torch functions on a QuantizedWeight.

Functions that query or move the tensor get its codes; functions that write to it are refused; all others get the dequantized
values.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map_only

from ...errors import UnsupportedError
from .casts import is_certain, refuse_own_values
from .source import Part
from .tensor import (
    QuantizedWeight,
    called,
    codes_of,
    is_cast_of,
    is_copy,
    is_whole,
    moved_weight,
    name_of,
    values,
    values_dtype,
)

# Names of torch functions as `__torch_function__` gets them; a property has its own name.
# Functions that query metadata or memory, not values (a pointer to temporary values would point to freed memory), or that
# create a new tensor like this one.
_ASKS = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "data_ptr",
        "const_data_ptr", "__cuda_array_interface__", "record_stream", "storage", "storage_type", "untyped_storage",
        "_typed_storage", "is_contiguous", "is_pinned", "is_floating_point", "is_complex", "is_signed",
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
# Of these, functions whose result has no values yet; and the attribute that says so of it.
_EMPTY, _UNFILLED = frozenset({"empty_like", "new_empty", "new_empty_strided"}), "_hf_fp8_unfilled"
# Functions that return the same numbers on another device or in another shape.
_MOVES = frozenset(
    {
        "detach", "data", "alias", "clone", "contiguous", "cpu", "cuda", "xpu", "pin_memory", "view_as", "reshape", "flatten",
        "unflatten", "squeeze", "unsqueeze", "transpose", "swapaxes", "swapdims", "movedim", "permute", "t", "T", "mT", "chunk",
        "split", "tensor_split", "narrow", "select", "unbind", "expand", "expand_as", "unsafe_chunk", "unsafe_split",
        "split_with_sizes", "__getitem__", "view", "to",
    }
)  # fmt: skip
# Functions that compare two tensors: they compare codes if the other tensor has the dtype of codes.
_COMPARES = frozenset({"equal", "eq", "ne", "__eq__", "__ne__"})
# Functions of torch.distributed that get codes as bytes: gloo, and NCCL before compute capability 9.0, cannot send FP8.
_SENDS_ONE = frozenset({"broadcast", "send", "recv", "isend", "irecv"})
_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_IN_PLACE = ["add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul"]
_WRITING_OPERATORS = frozenset({"__setitem__", *(f"__i{op}__" for op in _IN_PLACE)})


def handle(func: Any, args: Any, kwargs: Any) -> Any:
    name = name_of(func)
    if name in _ASKS:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        return _marked_empty(found) if name in _EMPTY else found
    first: Any = args[0] if args else None
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and str(func).startswith("hf_fp8."):
        args, kwargs = tree_map_only(QuantizedWeight, codes_of, (args, kwargs))
        return func(*args, **kwargs)  # ops of hf_fp8
    if getattr(func, "__module__", "").startswith("torch.distributed"):
        return _communicate(func, name, args, kwargs)
    if name == "data=":
        return _set_data(first, args[1])
    if name.endswith("=") or name == "requires_grad_":  # requires_grad, grad, names
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if "requires_grad" in name:  # so that the ops, which get the codes, can refuse a gradient
            first.codes.requires_grad_(first.requires_grad)
        return found
    if name == "copy_":
        return _copy(first, *args[1:], **kwargs)
    if name in ("to", "type_as", "type"):
        return _cast(name, args, kwargs)
    if type(first) is QuantizedWeight and name in _MOVES and not (name == "view" and _is_dtype(args, kwargs)):
        return _move(func, first, args[1:], kwargs)
    if name == "view":  # as another dtype: the bits
        return first.codes.view(*args[1:], **kwargs)
    _refuse_writing(func, name, args, kwargs)
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
            f"{called(held[0])} holds codes in {held[0].codes.dtype}, and {name} was called with it and another tensor of that "
            "dtype. Do not cast inputs to the dtype of the weight; to compute with codes, use `weight.codes`"
        )
    # Two weights are equal if their float32 values are equal, whatever dtype they have by default.
    read = partial(values, dtype=torch.float32) if name in _COMPARES and not others else values
    args, kwargs = tree_map_only(QuantizedWeight, read, (args, kwargs))
    return func(*args, **kwargs)


def _marked_empty(found: Any) -> Any:
    """A new tensor without values, marked as such: with one, memory of a weight is freed (``p.data = torch.empty_like(p)``)."""
    if not torch.compiler.is_compiling():
        setattr(found, _UNFILLED, True)
    return found


def _is_unfilled(tensor: torch.Tensor) -> bool:
    """Whether nothing has been written to a tensor of `_marked_empty`: what is in it may look like anything."""
    return getattr(tensor, _UNFILLED, False) and not tensor.is_inference() and tensor._version == 0


def _is_dtype(args: Any, kwargs: Any) -> bool:
    return "dtype" in kwargs or (len(args) == 2 and isinstance(args[1], torch.dtype))


def _move(func: Any, weight: QuantizedWeight, rest: Any, kwargs: Any) -> Any:
    """Apply `func` to the codes; returns a QuantizedWeight, or several if `func` returns several tensors."""
    if any(isinstance(t, torch.Tensor) for t in tree_iter((rest, kwargs))):  # indexed by other tensors: not a view
        rest, kwargs = tree_map_only(QuantizedWeight, values, (rest, kwargs))
        return func(values(weight), *rest, **kwargs)
    moved = func(weight.codes, *rest, **kwargs)
    first = moved if isinstance(moved, torch.Tensor) else moved[0] if len(moved) else weight.codes
    if is_copy(first, weight.codes):
        if name_of(func) == "__getitem__":  # indexed by lists: rows in another order, or some of them
            return func(values(weight), *rest, **kwargs)
        is_part = not (is_whole(weight) and first.shape == weight.codes.shape)
        if is_part and not weight._source.exported:
            return func(values(weight), *rest, **kwargs)  # a copied part is only useful as values, except in a state dict
    if isinstance(moved, torch.Tensor):
        found = moved_weight(weight, moved, lambda found: func(found, *rest, **kwargs))
        if weight.requires_grad and moved.requires_grad:  # `values` refuses it
            found.requires_grad_(True)
        return found

    def piece(index: int) -> QuantizedWeight:
        return moved_weight(weight, moved[index], lambda found: func(found, *rest, **kwargs)[index])

    return type(moved)(piece(index) for index in range(len(moved)))


def _communicate(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """torch.distributed: codes are sent, as bytes by functions that send one tensor; reductions are refused."""
    if "reduce" in name:
        for weight in _weights((args, kwargs)):
            raise UnsupportedError(
                f"{called(weight)} holds codes in {weight.codes.dtype}: {name} would compute with codes instead of the weight. "
                "Use `layer.dequantized_weight()`, or leave out frozen weights"
            )
    plain = (lambda weight: weight.codes.view(torch.uint8)) if name in _SENDS_ONE else codes_of
    args, kwargs = tree_map_only(QuantizedWeight, plain, (args, kwargs))
    return func(*args, **kwargs)


def _cast(name: str, args: Any, kwargs: Any) -> Any:
    """`.to`, `.type`, `.type_as`.

    Of a weight: values if the dtype changes, else moved codes. Of another tensor: a cast to the dtype of the weight's values.
    """
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
        return moved_weight(first, moved, lambda found: found.to(device or found.device))
    found = values(first, dtype)
    return found if device is None else found.to(device, non_blocking=non_blocking)


def _set_data(weight: Any, new: torch.Tensor) -> None:
    """``weight.data = new``: new codes, or the weight in another float dtype, which only changes the dtype of its values."""
    if type(weight) is not QuantizedWeight:  # a plain tensor
        weight.data = values(new)  # type: ignore[arg-type]
        return
    if codes_of(new).dtype != weight.codes.dtype:
        _accept_cast(weight, new, "data")
        found = weight._source.owner(weight._part.whole)
        if found is not None:
            found[0].original_dtype = new.dtype
        return
    _accept_codes(weight, new, "data")
    with torch._C.DisableTorchFunctionSubclass():
        weight.data = codes_of(new)
    was_whole = weight._part.whole is weight.codes
    weight.codes = codes_of(new).detach()
    if was_whole:
        weight._part = Part.all_of(weight.codes)


def _copy(into: Any, of: Any, *rest: Any, **kwargs: Any) -> Any:
    """``into.copy_(of)``: copies codes if both have the dtype of codes, else values; never values over codes."""
    if type(into) is not QuantizedWeight:
        into.copy_(of.codes if into.dtype == of.codes.dtype else values(of, into.dtype), *rest, **kwargs)
    elif codes_of(of).dtype != into.codes.dtype:
        _accept_cast(into, of, "copy_")
    else:
        _accept_codes(into, of, "copy_")
        into.codes.copy_(codes_of(of), *rest, **kwargs)
    return into


def _accept_codes(weight: QuantizedWeight, new: torch.Tensor, how: str) -> None:
    """Check codes that replace those of `weight`, and take over their scale if they belong to another weight.

    Raises UnsupportedError for codes whose scale cannot be taken over, and for values that were cast to the dtype of codes.
    """
    if is_certain() or _is_unfilled(new):
        return
    if type(new) is not QuantizedWeight and (weight._source.exported or is_whole(weight)):
        if not weight._source.exported:  # data loaded into a state dict comes with scales
            refuse_own_values(new, weight.codes, weight._part, weight._source)
        return
    found = weight._source.owner(weight._part.whole)
    if found is None or codes_of(new).data_ptr() == weight.codes.data_ptr():
        return
    layer, leaf = found
    if is_whole(weight) and type(new) is QuantizedWeight and is_whole(new):
        try:
            layer.take_scale(leaf, new._source.decoder(new._part.whole).scale)
            return
        except UnsupportedError:
            pass
    raise UnsupportedError(
        f"{called(weight)} holds codes in {weight.codes.dtype}: `{how}` would copy codes of another weight, of a part of one "
        "or in another order, but not their scales. Call hf_fp8.dequantize_model(model) before changing weights, and "
        "hf_fp8.quantize_model(model) to quantize them again; to compute with codes, use `weight.codes`"
    )


def _accept_cast(weight: QuantizedWeight, new: torch.Tensor, how: str) -> None:
    """Raise UnsupportedError, naming the layer, unless `new` is the dequantized weight in a float dtype."""
    if new.device == weight.codes.device and is_cast_of(weight, new):
        return
    raise UnsupportedError(
        f"{called(weight)} holds {[*weight.codes.shape]} codes in {weight.codes.dtype}: `{how}` would write values of "
        f"{new.dtype} {[*new.shape]} over them, without a scale. Call hf_fp8.dequantize_model(model) before changing weights, "
        "and hf_fp8.quantize_model(model) to quantize them again"
    )


def _refuse_writing(func: Any, name: str, args: Any, kwargs: Any) -> None:
    written = [kwargs["out"]] if kwargs.get("out") is not None else []
    if (name.endswith("_") and not name.endswith("__")) or name in _WRITING_OPERATORS or kwargs.get("inplace"):
        written.append(args[0] if args else next(iter(kwargs.values())))  # torch.nn.init functions pass a keyword
    if isinstance(func, torch._ops.OpOverload):
        takes = zip(func._schema.arguments, args, strict=False)
        written += [given for taken, given in takes if taken.alias_info is not None and taken.alias_info.is_write]
    if name in ("embedding", "embedding_bag") and kwargs.get("max_norm") is not None:
        written.append((args, kwargs))
    for weight in _weights(written):
        if weight.codes.is_meta:  # transformers initialises offloaded weights in place
            continue
        raise UnsupportedError(
            f"{called(weight)} holds codes in {weight.codes.dtype}: {name} would change them in place, as if they were the "
            "weight. Call hf_fp8.dequantize_model(model) before changing weights, and hf_fp8.quantize_model(model) to quantize "
            "them again"
        )


def _weights(tree: Any) -> Iterator[QuantizedWeight]:
    return (t for t in tree_iter(tree) if type(t) is QuantizedWeight)


QuantizedWeight.handle, QuantizedWeight.asks = staticmethod(handle), _ASKS
