"""Converts quantized checkpoints to another dialect: scales are renamed and codes copied, or weights are quantized anew."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.config_groups import Group, groups_of
from ..checkpoint.dialects.base import CACHE, Target, Writer
from ..checkpoint.dialects.registry import WRITERS
from ..checkpoint.reader import DTYPE_NAMES, TORCH_DTYPES, Checkpoint, TensorInfo
from ..checkpoint.stored_weight import StoredWeight, companion
from ..errors import CalibrationError, ConfigError, UnsupportedError, UnusedTensorError, first
from ..formats.exponents import scale_values
from ..formats.scheme import TENSOR, Scheme
from ..formats.storage import INPUT_SCALE, SCALAR, SHAPE, WEIGHT, WEIGHT_SCALE, dequantize, format_of
from ..formats.weights import scale_dtype_of
from ..loading.ops import quantize_named, weight_from
from .files import ProgressCallback, Reading, Written, read_quantized, total_bytes, write_checkpoint
from .source import Source

# safetensors' names of the dtypes of scales that are exponents, and of the one in which MXFP8 checkpoints have them.
EXPONENT_DTYPES, MX_SCALES = ("F8_E8M0", "U8"), "U8"
# Names of the scales of the KV cache in other dialects -> the ends of their names in converted checkpoints.
_CACHE_NAMES = (
    (re.compile(r"(?<=\.)(?:[kv]|qkv)_proj\.([kv]_scale)$"), (r"\1",)),
    (re.compile(r"(?<=\.)([kv])_proj\.output_scale$"), (r"\1_scale",)),
    (re.compile(r"(?<=\.)kv_scale$"), ("k_scale", "v_scale")),
)


@dataclass
class WeightError:
    """What quantizing weights anew has changed: their error against the weights that the source stands for.

    sqnr: of all weights together, in dB; infinite if nothing has changed. worst, name: the lowest of a weight, and which.
    """

    worst: float = math.inf
    name: str = ""
    _signal: float = field(default=0.0, repr=False)
    _noise: float = field(default=0.0, repr=False)

    @property
    def sqnr(self) -> float:
        return _decibels(self._signal, self._noise)

    def __str__(self) -> str:
        if math.isinf(self.worst):
            return "the weights are the same numbers as before"
        return f"against the weights before: SQNR {self.sqnr:.1f} dB; the worst is {self.name} with {self.worst:.1f} dB"

    def add(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take in one weight, before and after."""
        signal, noise = float(before.double().square().sum()), float((before - after).double().square().sum())
        self._signal, self._noise = self._signal + signal, self._noise + noise
        if (sqnr := _decibels(signal, noise)) < self.worst:
            self.worst, self.name = sqnr, name


def _decibels(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def convert_checkpoint(
    source: Source,
    destination: Path,
    to: str,
    *,
    scheme: Scheme | None = None,
    overwrite: bool = False,
    tick: ProgressCallback = lambda count: None,
) -> tuple[Written, WeightError | None]:
    """Write a quantized checkpoint in another dialect; `destination` is created when everything is written.

    to: "compressed-tensors" or "fp8" (`WRITERS`). Codes are copied byte for byte, and scales keep their values. scheme:
    quantize the quantized weights anew to it, from their dequantized values in float32; the second result then says what that
    changed.

    Raises ConfigError if the source is in that dialect already, or has a scheme that the dialect cannot describe;
    CalibrationError for a static scheme if the source has no input scales; and the errors of loading for a source that is
    malformed.
    """
    if to not in WRITERS:
        raise ConfigError(f"to={to!r}: a checkpoint can be converted to {' or '.join(WRITERS)}")
    reading, checkpoint = read_quantized(source), source.checkpoint
    if scheme is None:
        new: _Conversion = _Renamed(reading, WRITERS[to])
    else:
        new = _Requantized(reading, WRITERS[to], scheme)
    now = reading.spec.in_dialect
    if scheme is None and (now and now.dialect) is WRITERS[to].dialect and not new.renames:
        said = to if now is None else now.dialect.name
        raise ConfigError(f"{source.folder} is in the {said} format already: there is nothing to convert")
    config, written = new.config(), new.headers()
    write_checkpoint(source, destination, checkpoint, written, new.make, new.copied, config, overwrite, tick)
    return Written(len(new.weights), total_bytes(checkpoint), total_bytes(written)), new.error


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the source goes unchanged in value: its new names, dtype in safetensors and shape."""

    keys: list[str]
    dtype: str
    shape: tuple[int, ...]


class _Conversion:
    """The tensors and the config of a checkpoint in another dialect.

    weights: key of the codes -> the weight. moved: key of a tensor -> where it goes. copied: keys of tensors that are copied
    under their name. error: what quantizing anew has changed, None if codes are copied.
    """

    error: WeightError | None = None

    def __init__(self, reading: Reading, writer: Writer) -> None:
        self.reading, self.writer, self.checkpoint = reading, writer, reading.checkpoint
        scan = reading.layout.scan
        self.weights = {weight.keys[weight.primary]: weight for weight in [*scan.weights, *scan.host]}
        self.moved = {key: self._place(key, self._cache_keys(key), self._scalar(key)) for key in scan.cache}
        inside = {key for weight in self.weights.values() for key in weight.keys.values()}
        self.copied = {key for key in self.checkpoint.tensors if key not in inside and key not in self.moved}

    def groups(self) -> dict[str, Target]:
        """The groups of the new config."""
        raise NotImplementedError

    @property
    def _used(self) -> list[Group]:
        return [group for group in self.reading.spec.groups if group.name in self.reading.layout.scan.groups]

    @property
    def renames(self) -> bool:
        """Whether a tensor gets another name."""
        return any(place.keys != [key] for key, place in self.moved.items())

    def config(self) -> dict[str, Any]:
        """The new `quantization_config`. Raises ConfigError for schemes that the dialect cannot describe."""
        written = self.writer.write(self.groups(), list(dict.fromkeys([*self.reading.layout.scan.all_dense, *self._tied()])))
        if "kv_cache_scheme" in written:
            said, scales = self.reading.spec.kv_cache_scheme, self.reading.layout.scan.cache
            written["kv_cache_scheme"] = said.model_dump(mode="json") if said else CACHE if scales else None
        return written

    def _tied(self) -> list[str]:
        """Linears of the model that the files have no weight for, such as an output embedding that is tied: they are dense, and
        readers would take them for quantized."""
        there = {weight.module for weight in self.weights.values()}
        linears = [name for name, module in self.reading.model.modules.items() if issubclass(module.cls, nn.Linear)]
        return [name for name in linears if name not in there and groups_of(self.reading.spec.groups, (name,), ("Linear",))]

    def _cache_keys(self, key: str) -> list[str]:
        for pattern, ends in _CACHE_NAMES:
            if pattern.search(key):
                return [pattern.sub(end, key) for end in ends]
        return [key]

    def _place(self, key: str, keys: list[str], shape: tuple[int, ...], mx: bool = False) -> _Place:
        # Readers of other dialects have scales of one byte for MXFP8 only; float32 has their values.
        dtype = self.checkpoint.tensors[key].dtype
        return _Place(keys, dtype if dtype not in EXPONENT_DTYPES else MX_SCALES if mx else "F32", shape)

    def _scalar(self, key: str) -> tuple[int, ...]:
        """The shape of a scale with one value; others, of caches per head, are unchanged."""
        shape = self.checkpoint.tensors[key].shape
        if math.prod(shape) != 1:
            return shape
        return SCALAR if self.writer.is_scalar else (1,)

    def key_of(self, weight: StoredWeight, role: str) -> str:
        """The new name of a tensor of a weight."""
        primary = weight.keys[weight.primary]
        if primary == weight.name:  # a stack of experts
            return primary if role == WEIGHT else primary + self.writer.stack_suffixes[role]
        plain = primary.removesuffix(weight.primary) + WEIGHT
        return companion(plain, self.writer.scale_names.get(role, role))

    def headers(self) -> Checkpoint:
        """The tensors of the converted checkpoint. Raises UnusedTensorError for two that would have one name."""
        written, made_from = Checkpoint([]), dict[str, str]()
        for key, info in self.checkpoint.tensors.items():
            made = {}
            if key in self.copied:
                made = {key: info}
            elif key in self.moved:
                place = self.moved[key]
                made = {new: TensorInfo(place.dtype, place.shape, info.file) for new in place.keys}
            elif key in self.weights:
                made = self.made_of(self.weights[key], info.file)
            if twice := made.keys() & written.tensors.keys():
                name = min(twice)
                raise UnusedTensorError(
                    f"{made_from[name]} and {key} of the source would both be {name}: only one can be right"
                )
            written.tensors.update(made)
            made_from.update(dict.fromkeys(made, key))
        return written

    def made_of(self, weight: StoredWeight, file: str) -> dict[str, TensorInfo]:
        """The tensors that `make` makes of a weight whose codes are not copied."""
        return {}

    def make(self, key: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the new checkpoint that are made from the tensor `key` of the source, if it is not copied."""
        if key in self.moved:
            place = self.moved[key]
            tensor = self.checkpoint.load(key)
            tensor = (
                tensor.view(torch.uint8) if place.dtype == MX_SCALES else scale_values(tensor).to(TORCH_DTYPES[place.dtype])
            )
            tensor = tensor.reshape(place.shape)
            yield from ((new, tensor) for new in place.keys)


class _Renamed(_Conversion):
    """Codes are copied, and scales get the names and shapes of the dialect."""

    def __init__(self, reading: Reading, writer: Writer) -> None:
        super().__init__(reading, writer)
        if host := reading.layout.scan.host:
            raise UnsupportedError(
                f"{first([weight.name for weight in host])} are in formats that hf_fp8 does not convert "
                f"({host[0].group.format}): pass a scheme (--scheme) to quantize them anew"
            )
        for key, weight in self.weights.items():
            self.copied.add(key)
            for role in (role for role in weight.keys if role != weight.primary and role not in weight.zeros):
                old = weight.keys[role]
                mx = role == WEIGHT_SCALE and weight.scheme.weight.mx
                self.moved[old] = self._place(old, [self.key_of(weight, role)], self._shape(weight, role), mx)

    def groups(self) -> dict[str, Target]:
        return {group.name: Target(group.scheme, group.targets) for group in self._used if group.scheme is not None}

    def _shape(self, weight: StoredWeight, role: str) -> tuple[int, ...]:
        scheme, old = weight.scheme.weight, weight.keys[role]
        if role not in (WEIGHT_SCALE, INPUT_SCALE) or len(weight.shape) == 3:
            return self.checkpoint.tensors[old].shape
        if role == INPUT_SCALE or scheme.granularity == TENSOR:
            return self._scalar(old)
        n, k = weight.shape
        return format_of(scheme).forms(scheme, n, k, torch.float32)[role].shape


class _Requantized(_Conversion):
    """Weights are dequantized in float32, and quantized to another scheme."""

    error: WeightError

    def __init__(self, reading: Reading, writer: Writer, scheme: Scheme) -> None:
        super().__init__(reading, writer)
        self.scheme, self.error = scheme, WeightError()
        self._refuse_impossible()
        if scheme.has_static_input:
            for weight in self.weights.values():
                old = weight.keys[INPUT_SCALE]
                self.moved[old] = self._place(old, [self.key_of(weight, INPUT_SCALE)], self._scalar(old))

    def _refuse_impossible(self) -> None:
        lacking = [weight.name for weight in self.weights.values() if INPUT_SCALE not in weight.keys]
        if self.scheme.has_static_input and lacking:
            raise CalibrationError(
                f"{self.scheme.describe()} has static input scales, and the checkpoint has none for {first(lacking)}: choose a "
                "scheme with dynamic inputs; or run `hf-fp8 dequantize`, and then `hf-fp8 quantize --calibrate`"
            )
        stacks = [weight.name for weight in self.weights.values() if len(self._shape(weight)) == 3]
        if self.scheme.weight.packed and stacks:
            raise UnsupportedError(f"{first(stacks)} are stacks of experts, which cannot be quantized to packed codes here")

    def groups(self) -> dict[str, Target]:
        return {"group_0": Target(self.scheme, list(dict.fromkeys(target for group in self._used for target in group.targets)))}

    def _shape(self, weight: StoredWeight) -> tuple[int, ...]:
        """The shape of the dequantized weight."""
        if weight.primary == WEIGHT or SHAPE not in weight.keys:
            return weight.shape
        return tuple(self.checkpoint.load(weight.keys[SHAPE]).tolist())

    def made_of(self, weight: StoredWeight, file: str) -> dict[str, TensorInfo]:
        scheme, shape = self.scheme.weight, self._shape(weight)
        n, k = shape[-2:] if not weight.transposed else shape[:-3:-1]
        found = {}
        for role, form in format_of(scheme).forms(scheme, n, k, scale_dtype_of(torch.float32, scheme.mx)).items():
            one = SCALAR if form.shape == (1,) and self.writer.is_scalar and len(shape) == 2 else form.shape
            if len(shape) == 3:
                one = (shape[0], *(form.shape[::-1] if weight.transposed else form.shape))
            found[self.key_of(weight, role)] = TensorInfo(DTYPE_NAMES[form.dtype], one, file)
        return found

    def make(self, key: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().make(key)
        if key in self.weights:
            weight = self.weights[key]
            shapes = self.made_of(weight, "")
            for role, tensor in self._quantized(weight).items():
                new = self.key_of(weight, role)
                yield new, tensor.reshape(shapes[new].shape)

    def _quantized(self, weight: StoredWeight) -> dict[str, torch.Tensor]:
        """A weight quantized anew, by role; a stack of experts matrix by matrix."""
        scheme, keys = self.scheme.weight, weight.keys
        before = weight_from(weight, {role: self.checkpoint.load(key) for role, key in keys.items()}, torch.float32)
        each = [before] if before.ndim == 2 else [one[WEIGHT] for one in weight.matrices({WEIGHT: before})]
        made = [quantize_named(weight.name, one.contiguous(), scheme) for one in each]
        for one, tensors in zip(each, made, strict=True):
            self.error.add(weight.name, one, dequantize(tensors, scheme, one.shape[1], torch.float32))
        if before.ndim == 2:
            return made[0]
        stacks = {role: torch.stack([one[role] for one in made]) for role in made[0]}
        return {role: stack.mT if weight.transposed and stack.ndim == 3 else stack for role, stack in stacks.items()}
