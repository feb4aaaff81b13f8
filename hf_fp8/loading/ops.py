"""Weight-conversion ops for the loader and saver of transformers ("the host" in comments): dequantize, quantize, reshape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from zlib import crc32

import torch
from compressed_tensors.compressors import BaseCompressor
from transformers.core_model_loading import ConversionOps
from transformers.utils import logging

from ..checkpoint.quantization_spec import plain
from ..checkpoint.reader import TORCH_DTYPES, Checkpoint
from ..checkpoint.stored_weight import DenseTensor, StoredWeight, companion
from ..errors import FP8Error, ScaleError, UnsupportedError
from ..formats.scheme import TensorScheme
from ..formats.storage import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, dequantize, format_of
from . import options as load_options
from .key_map import plain_weight
from .layout import Parameter

logger = logging.get_logger(__name__)
_HALVES = (torch.bfloat16, torch.float16)


class SharedOp(ConversionOps):  # type: ignore[misc]
    """An op whose state does not depend on the tensor, so that copies of a converter share it."""

    supports_many_to_many = True

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedOp:
        return self


def is_widened(held: torch.dtype, read: torch.dtype, beyond: torch.dtype | None = None) -> bool:
    """Whether a tensor that was read in one dtype is held in a wider one: a float in more bits than `read` (and `beyond`), or
    an integer, such as a batch counter, as a float."""
    if not held.is_floating_point:
        return False
    least = 0 if beyond is None else beyond.itemsize
    return not read.is_floating_point or held.itemsize > max(read.itemsize, least)


def as_read(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`, that of the file it was read from, if this is lossless; otherwise `tensor` unchanged."""
    if not is_widened(tensor.dtype, dtype):
        return tensor
    if not dtype.is_floating_point and (tensor.abs() >= 1 / torch.finfo(tensor.dtype).eps).any():
        return tensor  # larger integers are not all exact as floats
    narrow = tensor.to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return narrow if torch.equal(narrow.to(tensor.dtype).view(bits), tensor.contiguous().view(bits)) else tensor


def only(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor


class Reshape(SharedOp):
    """Gives each scale its planned shape: the module's on loading, the file's on saving. Others stay unchanged."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)

    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        scale = only(next(iter(input_dict.values())))
        return {full_layer_name: scale.reshape(self.shapes.get(full_layer_name, scale.shape))}


class Dequantize(SharedOp):
    """Dequantizes weights to the dtype of the parameter that they fill.

    Per-expert weights are written one by one into one stacked tensor, which the merge of transformers passes through, so that
    no expert is held twice.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = parameters

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, **kwargs: Any) -> dict[str, Any]:
        parameter = self.parameters[full_layer_name]
        converted: dict[str, Any] = {}
        for pattern, stored in parameter.sources.items():
            roles = {role for weight in stored if isinstance(weight, StoredWeight) for role in weight.keys}
            # The host's pattern may also match a bias, and may not end in ".weight".
            tensors = {role: input_dict.pop(companion(pattern, role), []) for role in roles - {WEIGHT}}
            tensors[WEIGHT] = input_dict.pop(pattern, [])
            first = stored[0]
            arrived = len(tensors[first.primary if isinstance(first, StoredWeight) else WEIGHT])
            if arrived != len(stored):
                raise RuntimeError(
                    f"{full_layer_name}: {arrived} tensors arrived for {pattern}, {len(stored)} are in the files"
                )
            converted[pattern] = self._stack(stored, tensors, parameter.dtype, apart=bool(parameter.others))
        if set(converted) == {WEIGHT}:
            return {full_layer_name: only(converted[WEIGHT])}
        return converted

    def _stack(
        self,
        stored: list[StoredWeight | DenseTensor],
        tensors: dict[str, list[torch.Tensor]],
        dtype: torch.dtype,
        *,
        apart: bool,
    ) -> list[torch.Tensor] | torch.Tensor:
        """Dequantize and stack tensors. apart: return a list instead, as they fill several parameters of different shapes."""
        found: list[torch.Tensor] = []
        out: torch.Tensor | None = None
        taken = dict.fromkeys(tensors, 0)
        for index, weight in enumerate(stored):
            parts: dict[str, torch.Tensor] = {}
            for role in weight.keys if isinstance(weight, StoredWeight) else (WEIGHT,):
                parts[role] = tensors[role][taken[role]]
                tensors[role][taken[role]] = torch.empty(0)  # free it before the next one is dequantized
                taken[role] += 1
            dense = _unpacked(weight, parts, dtype) if isinstance(weight, StoredWeight) else parts[WEIGHT].to(dtype)
            if apart or len(stored) == 1:
                found.append(dense)
                continue
            if out is None:
                out = torch.empty((len(stored), *dense.shape), dtype=dtype, device=dense.device)
            out[index].copy_(dense)
        return found if out is None else out


class AsInBase(SharedOp):
    """An operation of transformers' converter, called with the patterns of that converter only, without those of scales."""

    def __init__(self, operation: ConversionOps, source_patterns: list[str]) -> None:
        self.operation, self.source_patterns = operation, source_patterns

    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], **kwargs: Any) -> Any:
        return self.operation.convert(input_dict, source_patterns=self.source_patterns, **kwargs)


def plain_pattern(pattern: str) -> str:
    """The name of a converter's pattern in its reverse: without escapes and groups, which transformers would read as a regular
    expression again."""
    return "hf_fp8." + re.sub(r"[^\w.*]", "", pattern).lstrip(".")


class Requantize(SharedOp):
    """Writes dequantized weights back in FP8 with their original scales: bit for bit what was read.

    A weight that differs from its dequantized codes (it was trained or edited) is rounded stochastically and named in
    `changed`; it gets new scales of the same granularity where the old ones do not fit.

    Merged weights arrive split, under their `plain_pattern` with a number instead of the asterisk. Saved names are those stored
    for each tensor (`StoredWeight.saved`), never built from patterns.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        scales: Mapping[str, dict[str, torch.Tensor]],
        source: Checkpoint | None = None,
    ) -> None:
        self.parameters, self.scales, self.source = parameters, scales, source
        self.changed: list[str] = []

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        parameter = self.parameters.get(full_layer_name)
        if parameter is None:  # made permanently dense after loading
            return {full_layer_name: only(next(iter(input_dict.values())))}
        out: dict[str, torch.Tensor] = {}
        start = len(self.changed)
        for pattern, sources in parameter.sources.items():
            for index, source in enumerate(sources):
                key = WEIGHT if pattern == WEIGHT else plain_pattern(pattern).replace("*", str(index))
                dense = only(input_dict.pop(key))
                if isinstance(source, DenseTensor):
                    out[source.saved] = as_read(dense, TORCH_DTYPES[source.dtype])
                else:
                    lies = source.shape
                    if len(lies) == 3 and dense.shape != lies:  # the host transposes only if the shape does not fit the model
                        dense = dense.transpose(1, 2)
                    out.update(self._codes(dense, source, parameter.dtype))
        self._tell(start)
        return out

    def _tell(self, start: int) -> None:
        if names := self.changed[start:]:
            logger.warning(
                f"hf_fp8: {', '.join(names)}: changed since loading, rounded to FP8 again; scales that no longer fit are "
                "replaced"
            )

    def _codes(self, dense: torch.Tensor, weight: StoredWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        if (held := unchanged(weight, dense, dtype, self.source)) is not None:
            return {name: held[role] for role, name in weight.saved.items()}
        scales = self.scales[weight.name]
        if weight.group.scheme is None:
            packed = packed_again(weight.name, {WEIGHT: dense, **scales}, weight.group.parsed, weight.group.format, dtype)
            parts = {**scales, **{role: packed[role] for role in weight.keys if role in packed and role not in scales}}
        else:
            parts = {weight.primary: codes_from(weight, dense, scales), **scales}
            # Via the dtype it was loaded in, in case the model has been cast since.
            if not torch.equal(weight_from(weight, parts, dtype).to(dense), dense):
                self.changed.append(weight.name)
                parts |= changed_from(weight, dense, parts, dtype)
        return {name: parts[role] for role, name in weight.saved.items()}


def _generator(name: str, dense: torch.Tensor) -> torch.Generator:
    """A generator seeded by name and values.

    Saving the same values gives the same files. Other values give other draws, or rounding errors of repeated training, saving
    and loading would add up.
    """
    content = int(dense.contiguous().view(torch.uint8).sum(dtype=torch.int64))
    return torch.Generator(dense.device).manual_seed(crc32(name.encode(), content & 0xFFFFFFFF))


class QuantizeWeights(SharedOp):
    """Quantizes the weights of Linears as they arrive: codes, scale, and NaN for an input scale that is not calibrated yet.

    weights: name of a parameter with codes -> the weight that fills it. broken: errors are appended to it.
    """

    def __init__(self, weights: Mapping[str, StoredWeight], broken: list[str]) -> None:
        self.weights, self.broken = weights, broken

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, **kwargs: Any) -> dict[str, Any]:
        stored = self.weights[full_layer_name]
        made = quantize_or_note(stored.name, only(input_dict.pop(WEIGHT)), stored.scheme.weight, self.broken)
        full_layer_name = plain_weight(full_layer_name)
        found = {companion(full_layer_name, role): tensor for role, tensor in made.items()}
        if stored.scheme.has_static_input:
            scale = made["weight_scale"]
            unknown = torch.full((1,), torch.nan, dtype=scale.dtype, device=scale.device)
            found[companion(full_layer_name, "input_scale")] = unknown
        return found


class NoOp(SharedOp):
    """The op that transformers runs after the converters when quantizing: does nothing, as they have quantized already."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


def quantize_or_note(name: str, weight: torch.Tensor, scheme: TensorScheme, broken: list[str]) -> dict[str, torch.Tensor]:
    """`quantize_named`, but an error is appended to `broken` (transformers would hide it) and quantized zeros are returned."""
    try:
        return quantize_named(name, weight, scheme)
    except ScaleError as error:
        broken.append(str(error))
        return format_of(scheme).quantize(torch.zeros_like(weight), scheme)


def quantize_named(name: str, weight: torch.Tensor, scheme: TensorScheme) -> dict[str, torch.Tensor]:
    """Role -> tensor of a float weight (`WeightFormat.quantize`), with the name of the weight in errors."""
    try:
        return format_of(scheme).quantize(weight, scheme)
    except ScaleError as error:
        raise ScaleError(f"{name}: {error}. Add it to `ignore`, or repair the checkpoint") from None


def compressor(weight: StoredWeight) -> Any:
    """compressed-tensors' compressor of a weight that is not FP8."""
    return BaseCompressor.get_value_from_registry(weight.group.format)


def weight_from(weight: StoredWeight, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The dense weight, dequantized in float32 and rounded once to `dtype`."""
    if weight.group.scheme is None:
        dense: torch.Tensor = compressor(weight).decompress(dict(parts), weight.group.parsed)[WEIGHT]
        return dense.to(dtype)
    home, scheme, k = parts[weight.primary].device, weight.scheme.weight, weight.shape[-1]
    each = weight.matrices({role: tensor.to(home) for role, tensor in parts.items()})
    if len(weight.shape) == 2:
        return dequantize(next(each), scheme, k, dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=home)
    for place, tensors in zip(weight.matrices({WEIGHT: out}), each, strict=True):
        place[WEIGHT].copy_(dequantize(tensors, scheme, k, dtype))
    return out


def _unpacked(weight: StoredWeight, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """`weight_from`; records an error of compressed-tensors in the load options, as transformers drops it."""
    try:
        return weight_from(weight, parts, dtype)
    except Exception as error:
        load_options.current().broken.append(f"{weight.name} cannot be unpacked as {weight.group.format}: {error}")
        raise


def unchanged(
    weight: StoredWeight, dense: torch.Tensor, dtype: torch.dtype, source: Checkpoint | None
) -> dict[str, torch.Tensor] | None:
    """The tensors of a weight in the files, by role, if `dense` is what they were dequantized to.

    To compute them from `dense` is not always exact: several codes may be one number in 16 bits, and formats of four bits lose
    the sign of a zero. None if the weight was changed, or the files were (or `source` is None). dtype: as in `weight_from`.
    """
    if source is None:
        return None
    try:
        found = source.read(list(weight.keys.values()))
    except (FP8Error, OSError, KeyError):
        return None
    held = {role: found[key] for role, key in weight.keys.items()}
    back = weight_from(weight, {role: tensor.to(dense.device) for role, tensor in held.items()}, dtype)
    return held if torch.equal(back.to(dense), dense) else None


def packed_again(
    name: str, own: Mapping[str, torch.Tensor], scheme: Any, fmt: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A dense weight as compressed-tensors stores it. own: by role, the weight and the scales that it was unpacked with.

    scheme, fmt: its classes of them. dtype: that in which the weight was unpacked. Raises UnsupportedError if the weight was
    changed since then.
    """
    compressor = BaseCompressor.get_value_from_registry(fmt)
    # In float32: a quotient rounded to 16 bits may give a neighbour of the original code.
    wide = {role: tensor.float() if tensor.dtype in _HALVES else tensor for role, tensor in own.items()}
    same = False
    try:
        packed: dict[str, torch.Tensor] = compressor.compress(wide, scheme)
        packed |= {role: t for role, t in own.items() if role in packed and role != WEIGHT and packed[role].dtype.itemsize > 1}
        back = compressor.decompress(dict(packed), scheme)[WEIGHT].to(dtype)
        same = torch.equal(back.to(own[WEIGHT]), own[WEIGHT])
    except (RuntimeError, ValueError, KeyError) as error:  # compressors do not take all that they return
        logger.debug(f"hf_fp8: {name}: {error}")
    if not same:
        raise UnsupportedError(
            f"{name} was changed since loading (or its files were), and its {plain(fmt)} codes and scales cannot represent the "
            "change: saving would lose it. Load with FP8Config(dequantize=True) to edit and save such a model."
        )
    return packed


def changed_from(
    weight: StoredWeight, dense: torch.Tensor, before: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Codes and scales, shaped as in the files, of a weight that was changed since it was dequantized to `dtype`.

    before: codes and scales that it had. Unchanged experts of a stack keep theirs. Raises ScaleError for NaN or infinity.
    """
    scheme, scale = weight.scheme.weight, before[WEIGHT_SCALE]
    old = {role: tensor.to(dense.device) for role, tensor in before.items() if role != INPUT_SCALE}
    new = {role: tensor.clone() for role, tensor in old.items()}
    generator = _generator(weight.name, dense)
    if len(weight.shape) == 3 and scale.numel() == 1:  # shared by all experts
        flat = ([{**each, WEIGHT: each[WEIGHT].flatten(0, 1)}] for each in (new, old, {WEIGHT: dense}))
        stacks = zip(*flat, strict=True)
    else:
        stacks = zip(*(weight.matrices(each) for each in (new, old, {WEIGHT: dense})), strict=True)
    for place, was, wanted in stacks:
        if torch.equal(dequantize(was, scheme, wanted[WEIGHT].shape[-1], dtype).to(dense), wanted[WEIGHT]):
            continue
        try:
            made = format_of(scheme).quantize(wanted[WEIGHT].float(), scheme, was, generator)
        except ScaleError as error:
            raise ScaleError(f"{weight.name} was changed since loading: {error}") from None
        for role, tensor in made.items():
            place[role].copy_(tensor.reshape(place[role].shape))
    return {role: tensor.to(before[role].device) for role, tensor in new.items()}


def codes_from(weight: StoredWeight, dense: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The nearest codes of a dense weight, shaped as in the files, for the scale in `parts`."""
    scheme, stored = weight.scheme.weight, format_of(weight.scheme.weight)
    held = {role: tensor.to(dense.device) for role, tensor in parts.items()}
    if len(weight.shape) == 2:
        return stored.encode(dense, scheme, held)
    out = torch.empty(dense.shape, dtype=scheme.storage, device=dense.device)
    for place, each in zip(weight.matrices({WEIGHT: out}), weight.matrices({**held, WEIGHT: dense}), strict=True):
        place[WEIGHT].copy_(stored.encode(each[WEIGHT], scheme, each))
    return out
