"""Reads and writes the `config_groups` of a `quantization_config`: which modules are quantized with which scheme.

compressed-tensors parses them (`QuantizationConfig`, pydantic). This module gives precise errors, decides which groups hf_fp8
runs, and matches names as compressed-tensors does (utils/match.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from time import thread_time
from typing import Any

import compressed_tensors
import regex  # type: ignore[import-untyped]
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    preset_name_to_scheme,
)
from pydantic import ValidationError

from ..errors import ConfigError, FP8Error, UnsupportedError
from ..formats.code_types import FP8, INT4, INT8
from ..formats.scheme import ROW, TENSOR, Granularity, Scheme, TensorScheme, scheme_named

# Formats that store E4M3 codes (8-bit numbers) unpacked, under "weight": int-quantized differs from the others in name only
# (compressors/naive_quantized), and old writers fell back to it.
FP8_FORMATS = (None, "float-quantized", "naive-quantized", "int-quantized", "mixed-precision", "dense", "fakequant")
KNOWN_FORMATS = {*FP8_FORMATS, *(member.value for member in CompressionFormat)}
# Formats of integers: packed into int32, or one in each element. naive-quantized: as llm-compressor wrote without inputs.
PACKED_FORMAT = CompressionFormat.pack_quantized.value
_INTEGER_FORMATS = (CompressionFormat.int_quantized.value, CompressionFormat.naive_quantized.value)
# Maximum seconds to match one pattern of a config with one name. Usual ones take microseconds.
PATTERN_SECONDS = 0.3
# Syntax that `regex`, used here for its timeout, reads differently from `re`, used by compressed-tensors: POSIX classes and
# fuzzy-matching braces.
_READ_OTHERWISE = re.compile(r"\[:\^?\w+:\]|\{[^{}]*[A-Za-z][^{}]*\}")


@dataclass(frozen=True)
class Group:
    """One entry of `config_groups`. `scheme` is None for a group that hf_fp8 does not run: transformers does.

    parsed: has no `weights` for a group for attention (query, keys and values), which has scales only. format:
    compressed-tensors' name of the storage format, of the group or else of the whole checkpoint.
    """

    name: str
    targets: tuple[str, ...]
    scheme: Scheme | None
    parsed: QuantizationScheme
    format: str


def classes_of(cls: type) -> tuple[str, ...]:
    """The names of a class and its base classes, any of which a target may be."""
    return tuple(base.__name__ for base in cls.__mro__)


def match(names: Iterable[str], classes: Iterable[str], targets: Iterable[str]) -> str | None:
    """The first of `targets` that matches, in compressed-tensors' order: exact name, ``re:`` regex, class."""
    return next(matching(names, classes, targets), None)


def matching(names: Iterable[str], classes: Iterable[str], targets: Iterable[str]) -> Iterator[str]:
    """All of `targets` that match, in the order of `match`."""
    ordered = sorted(targets, key=lambda target: ("re:" in target, target))
    names, classes = tuple(names), set(classes)
    for target in ordered:
        if any(fits(target.removeprefix("re:"), name) if target.startswith("re:") else target == name for name in names):
            yield target
    yield from (target for target in ordered if target in classes)


def groups_of(groups: Iterable[Group], names: Iterable[str], classes: Iterable[str]) -> list[Group]:
    """The groups whose targets match a module, the most specific match first."""
    by_target: dict[str, list[Group]] = {}
    for group in reversed([*groups]):  # of two groups with one target the last is meant, as in compressed-tensors
        for target in group.targets:
            by_target.setdefault(target, []).append(group)
    found = (group for target in matching(names, classes, by_target) for group in by_target[target])
    return list({group.name: group for group in found}.values())


def weight_name(group: Group) -> str | None:
    """The name of a weight of a group in files, after the module's name; None if the group's format does not define it."""
    if group.format not in BaseCompressor.registered_names():
        return None
    names = BaseCompressor.get_value_from_registry(group.format).compression_param_names(group.parsed)
    return "weight_packed" if "weight_packed" in names else "weight"


def fits(pattern: str, name: str, *, anywhere: bool = False) -> bool:
    """Whether a regular expression of a config matches the start of `name`, or (anywhere) any part of it.

    Raises ConfigError if matching takes longer than `PATTERN_SECONDS`: for some patterns the time doubles with each letter of a
    name.
    """
    compiled = _compiled(pattern)
    match, limit = compiled.search if anywhere else compiled.match, PATTERN_SECONDS
    while True:
        before = thread_time()
        try:
            return match(name, timeout=limit) is not None
        except TimeoutError:
            # The limit is one of the clock, which runs on while a busy machine runs other programs.
            if thread_time() - before > PATTERN_SECONDS / 2:
                raise ConfigError(
                    f"the regular expression {pattern!r} in quantization_config takes more than {PATTERN_SECONDS} s on the "
                    f"name {name!r}: write it without repetitions inside repetitions"
                ) from None
            limit *= 2


@cache
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def is_fp8(weights: Any) -> bool:
    """Whether a group's `weights`, as JSON, are E4M3 codes with float scales (microscaling formats are not)."""
    if not isinstance(weights, dict) or str(weights.get("type")).lower() != "float" or weights.get("num_bits") not in (8, "8"):
        return False
    return "uint8" not in str(weights.get("scale_dtype"))


def concerns_fp8(checkpoint: dict[str, Any]) -> bool:
    """Whether a compressed-tensors config has an FP8 group, or is broken in a way that may hide one."""
    groups = with_presets(checkpoint.get("config_groups"))
    if any(isinstance(g, dict) and is_fp8(g.get("weights")) and _is_plain(g.get("format")) for g in groups.values()):
        return True
    if groups and all(isinstance(g, dict) and _is_about_attention(g) for g in groups.values()):
        return False  # the weights are dense
    if groups and not _is_readable({}, groups):
        return True  # compressed-tensors cannot read it: hf_fp8 raises its own error
    no_weights = not groups or not all(isinstance(g.get("weights"), dict) for g in groups.values())
    return checkpoint.get("format") == "float-quantized" and (no_weights or not _is_readable(checkpoint, groups))


def _is_plain(fmt: Any) -> bool:
    return not (isinstance(fmt, str) and fmt.startswith("mx"))


def with_presets(groups: Any) -> dict[str, Any]:
    """`config_groups` with preset entries like ``"FP8_DYNAMIC": ["Linear"]`` expanded."""
    if not isinstance(groups, dict):
        return {}
    spelled = {}
    for name, group in groups.items():
        if isinstance(group, list):
            try:
                group = preset_name_to_scheme(name, group).model_dump(mode="json")
            except KeyError:
                raise ConfigError(f"quantization_config.config_groups[{name!r}]: no preset has that name") from None
            except ValueError as error:
                raise ConfigError(f"quantization_config.config_groups[{name!r}] is not a list of targets ({error})") from error
        spelled[name] = group
    return spelled


def parse(checkpoint: dict[str, Any]) -> QuantizationConfig:
    """Parse a `quantization_config` with compressed-tensors.

    Raises ConfigError or UnsupportedError, naming the key, for values that it cannot read or would silently ignore.
    """
    groups = with_presets(checkpoint.get("config_groups"))
    if not groups:
        raise ConfigError(
            "quantization_config.config_groups is missing or empty, but the format is "
            f"{checkpoint.get('format')!r}: it must say how the weights are quantized"
        )
    for name, group in groups.items():
        if not isinstance(group, dict) or not (isinstance(group.get("weights"), dict) or _is_about_attention(group)):
            raise ConfigError(
                f"quantization_config.config_groups[{name!r}] has no `weights`: "
                "hf_fp8 supports groups that define how weights are quantized"
            )
        if not group.get("targets"):
            raise ConfigError(f"quantization_config.config_groups[{name!r}] has no `targets`")
        _check_patterns(f"config_groups[{name!r}].targets", group["targets"])
    _check_patterns("ignore", checkpoint.get("ignore") or [])
    if checkpoint.get("transform_config"):
        raise UnsupportedError(
            "quantization_config.transform_config requires run-time transforms (such as rotations), which "
            "transformers does not apply: the outputs would be wrong. hf_fp8 supports checkpoints without them."
        )
    sparsity = checkpoint.get("sparsity_config") or {}
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if sparse != "dense":
        raise UnsupportedError(f"quantization_config.sparsity_config is {sparse!r}: hf_fp8 reads dense weights only")
    only_fp8 = all(is_fp8(group.get("weights")) for group in groups.values())
    if checkpoint.get("format") not in tuple(FP8_FORMATS if only_fp8 else KNOWN_FORMATS):
        raise ConfigError(
            f"quantization_config.format is {checkpoint['format']!r}: FP8 weights come as float-quantized or naive-quantized"
        )
    return _validate(checkpoint, groups)


def is_ordered(group: Any) -> bool:
    """Whether a group, as JSON, has its columns grouped in the order in which GPTQ took them. Earlier versions of
    compressed-tensors wrote that (`actorder`), with the group of each column in `weight_g_idx`."""
    weights = group.get("weights") if isinstance(group, dict) else None
    order = weights.get("actorder") if isinstance(weights, dict) else None
    return order is True or str(order).lower() == "group"


def _validate(checkpoint: dict[str, Any], groups: dict[str, Any]) -> QuantizationConfig:
    # Present versions of compressed-tensors refuse `actorder: group`.
    groups = {
        name: {**group, "weights": {**group["weights"], "actorder": None}} if is_ordered(group) else group
        for name, group in groups.items()
    }
    try:
        return QuantizationConfig.model_validate({**checkpoint, "config_groups": groups})
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic puts the names of validators between the keys
        where = "".join(f".{part}" for part in first["loc"] if "[" not in str(part))
        message = first["msg"].split("\n")[0].removeprefix("Value error, ")
        if where.endswith("strategy"):
            message += f"; supported are {', '.join(member.value for member in QuantizationStrategy)}"
        raise ConfigError(f"quantization_config{where}: {message} (found {str(first['input'])[:120]})") from error
    except (TypeError, NotImplementedError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # compressed-tensors' validators raise these for some values.
        raise ConfigError(f"quantization_config cannot be read by compressed-tensors: {error}") from error


def _is_readable(checkpoint: dict[str, Any], groups: dict[str, Any]) -> bool:
    try:
        _validate(checkpoint, groups)
    except ConfigError:
        return False
    return True


def _is_about_attention(group: dict[str, Any]) -> bool:
    """Whether a group quantizes inputs of attention and no weights: all its targets name attention modules."""
    targets = group.get("targets")
    return (
        group.get("weights") is None
        and isinstance(targets, list)
        and all(isinstance(t, str) and re.search(r"attn|attention", t.lower()) for t in targets)
    )


def _check_patterns(key: str, targets: Any) -> None:
    for target in targets if isinstance(targets, list) else [targets]:
        if not isinstance(target, str):
            raise ConfigError(f"quantization_config.{key} is {targets!r}: it must be a list of names, classes and re: patterns")
        try:
            pattern = target.removeprefix("re:") if target.startswith("re:") else ""
            re.compile(pattern)
            _compiled(pattern)
            if found := _READ_OTHERWISE.search(pattern):
                raise ConfigError(
                    f"quantization_config.{key}: {target!r} contains {found.group()!r}, which other readers interpret "
                    "differently: write the pattern without it"
                )
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"quantization_config.{key}: {target!r} is not a valid regular expression ({error})") from None


def _value(x: Any) -> Any:
    """The value of `x` if it is an enum member: pydantic returns some enums as members, some as values."""
    return getattr(x, "value", x)


def read_groups(written: Mapping[str, Any], parsed: QuantizationConfig) -> tuple[Group, ...]:
    """The groups of a `quantization_config`, as JSON and as compressed-tensors has parsed it."""
    spelled = with_presets(written.get("config_groups"))
    found = []
    for name, group in parsed.config_groups.items():
        fmt = _value(group.format) or _value(parsed.format)
        found.append(Group(name, tuple(group.targets), _scheme(name, group, fmt, is_ordered(spelled.get(name))), group, fmt))
    return tuple(found)


def runs_here(checkpoint: Mapping[str, Any]) -> bool:
    """Whether hf_fp8 can run a group of a compressed-tensors config, FP8 or not. A config that cannot be read has none."""
    try:
        return any(group.scheme is not None for group in read_groups(checkpoint, parse(dict(checkpoint))))
    except FP8Error:
        return False


def _scheme(name: str, group: QuantizationScheme, fmt: Any, ordered: bool) -> Scheme | None:
    """The scheme of a group; None if transformers runs it. Raises UnsupportedError for FP8 that hf_fp8 does not run."""
    weights = None if group.weights is None else group.weights.model_dump(mode="json")
    if is_fp8(weights) and _is_plain(_value(group.format)):
        return _fp8_scheme(name, group)
    return None if weights is None else _integer_scheme(group, fmt, ordered)


def _integer_scheme(group: QuantizationScheme, fmt: Any, ordered: bool) -> Scheme | None:
    """The scheme of a group of int4 or int8 weights; None for kinds of them that hf_fp8 does not run."""
    weights, inputs = group.weights, group.input_activations
    packed = fmt == PACKED_FORMAT
    strategy = _value(weights.strategy)
    dtype = {(4, True): INT4, (8, True): INT8, (8, False): INT8}.get((weights.num_bits, packed))
    if weights.type != "int" or dtype is None or weights.dynamic or group.output_activations is not None:
        return None
    if not packed and (fmt not in _INTEGER_FORMATS or not weights.symmetric or ordered):
        return None
    granularities = {"channel": ROW, "group": Granularity(1, weights.group_size or -1), "tensor": TENSOR}
    if strategy not in granularities or (packed and strategy == "tensor") or (ordered and strategy != "group"):
        return None
    input_scheme = None if inputs is None else _input_scheme(inputs)
    if inputs is not None and input_scheme is None:
        return None
    stored = TensorScheme(
        granularities[strategy], dtype=dtype, packed=packed, has_zero_points=not weights.symmetric, is_ordered=ordered
    )
    return Scheme(stored, input_scheme)


def _input_scheme(inputs: QuantizationArgs) -> TensorScheme | None:
    """How inputs are quantized; None for a way that hf_fp8 does not run."""
    dtype = {"float": FP8, "int": INT8}.get(_value(inputs.type))
    kinds = {
        ("tensor", True): TENSOR,
        ("tensor", False): TENSOR,
        ("token", True): ROW,
        ("group", True): Granularity(1, inputs.group_size or -1),
    }
    kind = kinds.get((_value(inputs.strategy), inputs.dynamic))
    if dtype is None or inputs.num_bits != 8 or not inputs.symmetric or kind is None:
        return None
    return TensorScheme(kind, dynamic=bool(inputs.dynamic), dtype=dtype)


def _fp8_scheme(name: str, group: QuantizationScheme) -> Scheme:
    """The scheme of an FP8 group. Raises UnsupportedError, naming the key, for FP8 that hf_fp8 does not run."""
    where = f"quantization_config.config_groups[{name!r}]"

    def refuse(key: str, value: Any, supported: str) -> UnsupportedError:
        return UnsupportedError(f"{where}.{key} is {_value(value)!r}; hf_fp8 supports {supported}")

    fmt = _value(group.format)
    if fmt not in FP8_FORMATS:
        raise ConfigError(f"{where}.format is {fmt!r}: FP8 weights come as float-quantized or naive-quantized")
    weights, inputs = group.weights, group.input_activations
    if not weights.symmetric:
        raise refuse("weights.symmetric", False, "symmetric FP8 weights (no zero points)")
    if weights.dynamic:
        raise refuse("weights.dynamic", weights.dynamic, "weights quantized ahead of time")
    if group.output_activations is not None:
        raise refuse("output_activations", "set", "schemes that quantize weights and inputs only")
    weight = {
        "tensor": lambda: TENSOR,
        "channel": lambda: ROW,
        "group": lambda: Granularity(1, weights.group_size),
        "block": lambda: Granularity(*weights.block_structure),
    }.get(_value(weights.strategy))
    if weight is None:
        raise refuse("weights.strategy", weights.strategy, "tensor, channel, group and block")
    stored = TensorScheme(weight())
    if inputs is None:
        return Scheme(stored)
    if inputs.type != "float" or inputs.num_bits != 8:
        raise refuse("input_activations", f"{inputs.num_bits}-bit {inputs.type}", "8-bit float inputs, or none")
    if not inputs.symmetric:
        raise refuse("input_activations.symmetric", False, "symmetric inputs (no zero points)")
    found = _input_scheme(inputs)
    if found is None:
        how = "dynamic" if inputs.dynamic is True else _value(inputs.dynamic) or "static"
        raise refuse(
            "input_activations.strategy",
            f"{_value(inputs.strategy)} ({how})",
            "tensor (static or dynamic), token and group (dynamic)",
        )
    return Scheme(stored, found)


def asked_groups(
    scheme: str | Scheme | Mapping[Any, Any], targets: str | Sequence[str], ignore: Sequence[str]
) -> tuple[QuantizationConfig, tuple[Group, ...]]:
    """Parse a user's request: one scheme for `targets`, several schemes with their targets, or `config_groups`.

    Raises ConfigError for unknown schemes.
    """
    if not isinstance(scheme, Mapping):
        scheme = {scheme: targets}
    written: dict[str, Any] = {}
    schemes: dict[str, Scheme] = {}
    for name, value in scheme.items():
        if isinstance(value, Mapping):
            written[str(name)] = dict(value)
            continue
        found = scheme_named(name)
        group = next(name for name in map("group_{}".format, count()) if name not in written and name not in scheme)
        schemes[group] = found
        written[group] = write_group(found, [value] if isinstance(value, str) else list(value))
    request = {"config_groups": {name: _with_format(group) for name, group in written.items()}, "ignore": list(ignore)}
    parsed = parse(request)
    groups = read_groups(request, parsed)
    return parsed, tuple(replace(group, scheme=schemes.get(group.name, group.scheme)) for group in groups)


def _with_format(group: Mapping[str, Any]) -> dict[str, Any]:
    """A requested group, as JSON, with the format in which llm-compressor would store it, if it has none."""
    weights = group.get("weights")
    if group.get("format") or not isinstance(weights, Mapping) or weights.get("type", "int") != "int":
        return dict(group)
    one_byte = weights.get("num_bits") in (8, "8") and group.get("input_activations")
    return {**group, "format": CompressionFormat.int_quantized.value if one_byte else PACKED_FORMAT}


def write_group(scheme: Scheme, targets: Iterable[str]) -> dict[str, Any]:
    """A group of `scheme` as JSON, in the format of compressed-tensors, which `read_groups` reads."""
    fmt = CompressionFormat.naive_quantized.value if scheme.input is None else scheme.weight.code.format
    if scheme.weight.packed:
        fmt = PACKED_FORMAT
    group = QuantizationScheme(
        targets=list(targets),
        weights=_arguments(scheme.weight, "channel"),
        input_activations=None if scheme.input is None else _arguments(scheme.input, "token"),
        format=fmt,
    )
    written: dict[str, Any] = group.model_dump(mode="json")
    return written


def _arguments(operand: TensorScheme, row: str) -> QuantizationArgs:
    granularity = operand.granularity
    options: dict[str, Any] = {"strategy": {TENSOR: "tensor", ROW: row}.get(granularity, "group")}
    if granularity.rows > 1:
        options = {"strategy": "block", "block_structure": [granularity.rows, granularity.cols]}
    elif options["strategy"] == "group":
        options["group_size"] = granularity.cols
    code = operand.code
    return QuantizationArgs(
        num_bits=code.bits, type=code.kind, symmetric=not operand.has_zero_points, dynamic=operand.dynamic, **options
    )


def written_config(groups: Mapping[str, dict[str, Any]], ignore: Iterable[str]) -> dict[str, Any]:
    """A whole `quantization_config`, as llm-compressor writes it. ignore: names of the modules that are dense."""
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
        "format": formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision.value,
        "quantization_status": "compressed",
        "config_groups": dict(groups),
        "ignore": list(dict.fromkeys(ignore)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }
