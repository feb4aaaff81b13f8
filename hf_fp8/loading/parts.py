"""The parameters of a model as lazy tensors, of which each process reads its part (tensor, expert parallelism, FSDP).

transformers ("the host") cuts a tensor of the files as it cuts the parameter that it fills. Scales have other shapes than
weights, and experts are single tensors in the files and stacks in the model: so the lazy tensors here have the shapes of
parameters, and read from the files what a part of them needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import gcd

import torch

from ..checkpoint.lazy import LazyCheckpoint, LazyTensor, Ranges, cut, reshaped
from ..checkpoint.reader import TORCH_DTYPES
from ..checkpoint.stored_weight import StoredWeight, TensorSlice
from ..formats import numerics
from ..formats.code_types import INT8
from ..formats.cuts import blocks_of
from ..formats.scheme import Granularity
from ..formats.storage import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, format_of
from ..formats.weights import requantize, scale_dtype_of
from .expert_ops import from_stack
from .layout import Layout, Stack
from .ops import quantize_or_note, weight_from


@dataclass
class Parts:
    """What fills a model: parameters that are read in parts, by name; dequantized weights, by their key in the files without
    "_packed", for transformers' own conversions; and the keys of the files that these read."""

    parameters: dict[str, LazyTensor] = field(default_factory=dict)
    dense: dict[str, LazyTensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def parts_of(
    layout: Layout,
    files: LazyCheckpoint,
    dtype: torch.dtype,
    original: Mapping[str, str],
    shapes: Mapping[str, torch.Size],
    *,
    as_int8: bool,
) -> Parts:
    """The lazy tensors of a layout.

    dtype: the model's, to which weights are cast before they are quantized. original: key after renamings -> key in the files.
    shapes: of the model's parameters, as wholes. as_int8: whether Linears are re-quantized to int8.
    """
    found = Parts()
    for module, weight in layout.kept.items():
        fresh = None if weight.part is None else _Quantizing([weight], files, dtype, original, layout.broken)
        found.used.update(weight.keys.values() if fresh is None else fresh.keys)
        anew = _Requantizing(weight, files) if as_int8 else None
        for role in (WEIGHT, WEIGHT_SCALE, INPUT_SCALE):
            name = f"{module}.{role}"
            if name not in shapes:
                continue
            if anew is not None:
                found.parameters[name] = anew.tensor(role)
            elif fresh is not None:
                found.parameters[name] = fresh.of_linear(role, tuple(shapes[name]))
            elif role in weight.keys:
                found.parameters[name] = reshaped(files.tensor(weight.keys[role]), tuple(shapes[name]))
    for plan in layout.experts.values():
        for stack in plan.stacks:
            _add_stack(found, stack, files, dtype, original, layout.broken, shapes)
    for parameter in layout.dense.values():
        for weight in parameter.weights:
            key = weight.keys[weight.primary]
            found.dense[key.removesuffix("_packed")] = dequantized(weight, files, parameter.dtype)
            found.used.update(weight.keys.values())
    return found


def _add_stack(
    found: Parts,
    stack: Stack,
    files: LazyCheckpoint,
    dtype: torch.dtype,
    original: Mapping[str, str],
    broken: list[str],
    shapes: Mapping[str, torch.Size],
) -> None:
    fresh = None
    if stack.weights[0].part is not None:
        fresh = _Quantizing(stack.weights, files, dtype, original, broken, n_experts=len(stack.sources[0]))
    for role in (WEIGHT, WEIGHT_SCALE, INPUT_SCALE):
        name = stack.name_of(role)
        if name not in shapes:
            continue
        shape = tuple(shapes[name])
        if fresh is not None:
            found.parameters[name] = _stacked(stack, shape, fresh.dtype(role), partial(fresh.matrix, role))
            found.used.update(fresh.keys)
            continue
        found.used.update(weight.keys[role] for weight in stack.weights if role in weight.keys)
        held = next((weight.dtypes[role] for weight in stack.weights if role in weight.keys), None)
        if held is None:
            continue
        if stack.is_stacked:
            found.parameters[name] = _from_stack(stack, role, shape, files)
        else:
            found.parameters[name] = _stacked(stack, shape, TORCH_DTYPES[held], partial(_of_expert, stack, role, files))


def _from_stack(stack: Stack, role: str, shape: tuple[int, ...], files: LazyCheckpoint) -> LazyTensor:
    """A stack that is one tensor in the files: codes are read in parts, scales as a whole."""
    tensor = files.tensor(stack.weights[0].keys[role])

    def read(ranges: Ranges) -> torch.Tensor:
        if role != WEIGHT:
            return cut(from_stack(stack, role, tensor[...]), ranges)
        experts, rows, cols = ranges
        if not stack.transposed:
            return tensor.read(ranges)
        return tensor.read((experts, cols, rows)).transpose(1, 2).contiguous()

    return LazyTensor(shape, tensor.dtype, read)


# (part, expert, rows, columns of it) -> the tensor
ReadMatrix = Callable[[int, int, range, "range | None"], "torch.Tensor | None"]


def _stacked(stack: Stack, shape: tuple[int, ...], dtype: torch.dtype, matrix: ReadMatrix) -> LazyTensor:
    """A parameter of a stack of single experts: (E, parts * rows, cols), or (E, parts). Parts that `matrix` lacks are NaN."""
    height = shape[1] // len(stack.sources)

    def read(ranges: Ranges) -> torch.Tensor:
        experts, rows, *cols = ranges
        out = torch.empty([len(one) for one in ranges], dtype=dtype)
        for place, expert in enumerate(experts):
            for part in range(len(stack.sources)):
                base = part * height
                first, last = max(rows.start, base), min(rows.stop, base + height)
                if first < last:
                    inside = range(first - base, last - base)
                    tensor = matrix(part, expert, inside, cols[0] if cols else None)
                    rows_of_out = out[place, first - rows.start : last - rows.start]
                    if tensor is None:
                        rows_of_out.fill_(torch.nan)
                    else:
                        rows_of_out.copy_(tensor.reshape(rows_of_out.shape))
        return out

    return LazyTensor(shape, dtype, read)


def _of_expert(
    stack: Stack, role: str, files: LazyCheckpoint, part: int, expert: int, rows: range, cols: range | None
) -> torch.Tensor | None:
    weight = stack.sources[part][expert]
    if role not in weight.keys:
        return None  # an expert that was not calibrated
    tensor = files.tensor(weight.keys[role])
    if cols is None:
        return tensor[...]
    shape = stack.projection.forms()[role].shape
    return reshaped(tensor, (shape[1] // len(stack.sources), shape[2])).read((rows, cols))


def dequantized(weight: StoredWeight, files: LazyCheckpoint, dtype: torch.dtype) -> LazyTensor:
    """The dense weight, in the shape that it has in the files (unpacked)."""
    tensors = {role: files.tensor(key) for role, key in weight.keys.items()}

    def whole(ranges: Ranges) -> torch.Tensor:
        return cut(weight_from(weight, {role: tensor[...] for role, tensor in tensors.items()}, dtype), ranges)

    if weight.group.scheme is None:  # formats of compressed-tensors, which unpacks whole weights
        return LazyTensor(_unpacked_shape(weight, tensors), dtype, whole)
    if weight.scheme.weight.packed:  # a word has codes, or zero points, of several columns or rows
        return LazyTensor(weight.shape, dtype, whole)
    if len(weight.shape) != 2:
        return LazyTensor(weight.shape, dtype, lambda ranges: _of_stack(weight, tensors, dtype, ranges))

    def read(ranges: Ranges) -> torch.Tensor:
        codes, scale, granularity = _codes_and_scale(weight, tensors, ranges)
        return numerics.dequantize(codes, scale, granularity, dtype)

    return LazyTensor(weight.shape, dtype, read)


def _codes_and_scale(
    weight: StoredWeight, tensors: Mapping[str, LazyTensor], ranges: Ranges
) -> tuple[torch.Tensor, torch.Tensor, Granularity]:
    """(codes, scales, their granularity) of a part of a matrix."""
    whole = weight.scheme.weight.granularity
    scale, units = tensors[WEIGHT_SCALE][...].reshape(whole.grid(*weight.shape)), []
    for dim, (one, extent) in enumerate(zip(ranges, (whole.rows, whole.cols), strict=True)):
        units.append(extent if extent == -1 else gcd(extent, one.start))  # the start may be in the middle of a block
        if extent != -1:
            scale = scale.index_select(dim, blocks_of([one], extent, units[dim]))
    return tensors[WEIGHT].read(ranges), scale, Granularity(*units)


def _of_stack(weight: StoredWeight, tensors: Mapping[str, LazyTensor], dtype: torch.dtype, ranges: Ranges) -> torch.Tensor:
    """A part of a stack: its experts are read as wholes."""
    experts, *others = ranges
    n_experts = weight.shape[0]
    held = {
        role: tensor[experts.start : experts.stop] if tensor.shape and tensor.shape[0] == n_experts else tensor[...]
        for role, tensor in tensors.items()
    }
    some = replace(weight, shapes={**weight.shapes, WEIGHT: (len(experts), *weight.shape[1:])})
    return cut(weight_from(some, held, dtype), (range(len(experts)), *others))


def _unpacked_shape(weight: StoredWeight, tensors: Mapping[str, LazyTensor]) -> tuple[int, ...]:
    if WEIGHT in weight.keys:
        return weight.shape
    if "weight_shape" in tensors:
        return tuple(tensors["weight_shape"][...].tolist())
    rows, cols = weight.shapes[weight.primary]
    return rows, 2 * cols  # two numbers of four bits in a byte


class _Requantizing:
    """A weight in FP8 that is re-quantized to int8 as it is read, in whole rows: a scale depends on all columns of its row."""

    def __init__(self, weight: StoredWeight, files: LazyCheckpoint) -> None:
        self._weight = weight
        self._tensors = {role: files.tensor(weight.keys[role]) for role in (WEIGHT, WEIGHT_SCALE)}
        self._scales: dict[range, torch.Tensor] = {}  # made with the codes, until they are asked for

    def _made(self, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale, granularity = _codes_and_scale(self._weight, self._tensors, (rows, range(self._weight.shape[1])))
        return requantize(codes, scale, granularity, INT8)

    def tensor(self, role: str) -> LazyTensor:
        """The codes (N, K), or the scales (N, 1)."""
        n, k = self._weight.shape
        if role == WEIGHT:
            return LazyTensor((n, k), INT8, self._codes)
        return LazyTensor((n, 1), torch.float32, self._scale)

    def _codes(self, ranges: Ranges) -> torch.Tensor:
        codes, self._scales[ranges[0]] = self._made(ranges[0])
        return cut(codes, (range(len(ranges[0])), ranges[1]))

    def _scale(self, ranges: Ranges) -> torch.Tensor:
        kept = self._scales.pop(ranges[0], None)  # in one step, as the host reads tensors in several threads
        return self._made(ranges[0])[1] if kept is None else kept


class _Quantizing:
    """Weights that are quantized as they are read. Each is read as a whole, as its scales may depend on all of it."""

    def __init__(
        self,
        weights: list[StoredWeight],
        files: LazyCheckpoint,
        dtype: torch.dtype,
        original: Mapping[str, str],
        broken: list[str],
        n_experts: int = 1,
    ) -> None:
        self._n_experts = n_experts
        self._weights, self._files, self._dtype, self._original, self._broken = weights, files, dtype, original, broken
        self._scales: dict[int, torch.Tensor] = {}  # made with the codes, until they are asked for

    @property
    def keys(self) -> list[str]:
        return [self._original[self._slice(weight).key] for weight in self._weights]

    @staticmethod
    def _slice(weight: StoredWeight) -> TensorSlice:
        assert weight.part is not None
        return weight.part

    def dtype(self, role: str) -> torch.dtype:
        scheme = self._weights[0].scheme.weight
        forms = format_of(scheme).forms(scheme, 1, 1, scale_dtype_of(self._dtype, scheme.mx))
        return self._input_scale_dtype if role == INPUT_SCALE else forms[role].dtype

    @property
    def _input_scale_dtype(self) -> torch.dtype:
        return scale_dtype_of(self._dtype)

    def _made(self, index: int, role: str) -> torch.Tensor:
        if role == WEIGHT_SCALE and (kept := self._scales.pop(index, None)) is not None:
            return kept
        weight = self._weights[index]
        source = self._slice(weight)
        tensor = self._files.tensor(self._original[source.key])
        if source.expert is None:
            dense = tensor[...]
        else:
            one = range(source.expert, source.expert + 1)
            dense = TensorSlice.take(_first(source), tensor.read((one, *(range(size) for size in tensor.shape[1:]))))
        made = quantize_or_note(weight.name, dense.to(self._dtype), weight.scheme.weight, self._broken)
        if role == WEIGHT:
            self._scales[index] = made[WEIGHT_SCALE]
        return made[role]

    def of_linear(self, role: str, shape: tuple[int, ...]) -> LazyTensor:
        def read(ranges: Ranges) -> torch.Tensor:
            if role == INPUT_SCALE:
                return torch.full([len(one) for one in ranges], torch.nan, dtype=self._input_scale_dtype)
            return cut(self._made(0, role).reshape(shape), ranges)

        return LazyTensor(shape, self.dtype(role), read)

    def matrix(self, role: str, part: int, expert: int, rows: range, cols: range | None) -> torch.Tensor | None:
        if role == INPUT_SCALE:
            return None
        made = self._made(part * self._n_experts + expert, role)
        if cols is None:
            return made
        return made.reshape(-1, made.shape[-1])[rows.start : rows.stop, cols.start : cols.stop]


def _first(source: TensorSlice) -> TensorSlice:
    """`source` in a stack of which only its expert was read."""
    return TensorSlice(source.key, 0, source.index, source.of, source.transposed, source.interleaved)
