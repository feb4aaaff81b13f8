"""Reads the `config_groups` of a `quantization_config`, or of a request: which modules are quantized with which scheme.

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
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    preset_name_to_scheme,
)
from pydantic import ValidationError

from ..errors import ConfigError, FP8Error, UnsupportedError
from ..formats.code_types import FP8
from ..formats.scheme import Scheme, scheme_named
from .group_schemes import FP8_FORMATS, is_fp8, is_plain, scheme_of, value_of, with_format, write_group

KNOWN_FORMATS = {*FP8_FORMATS, *(member.value for member in CompressionFormat)}
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


def concerns_fp8(checkpoint: dict[str, Any]) -> bool:
    """Whether a compressed-tensors config has an FP8 group, or is broken in a way that may hide one."""
    groups = with_presets(checkpoint.get("config_groups"))
    if any(isinstance(g, dict) and is_fp8(g.get("weights")) and is_plain(g.get("format")) for g in groups.values()):
        return True
    if groups and all(isinstance(g, dict) and _is_about_attention(g) for g in groups.values()):
        return False  # the weights are dense
    if groups and not _is_readable({}, groups):
        return True  # compressed-tensors cannot read it: hf_fp8 raises its own error
    no_weights = not groups or not all(isinstance(g.get("weights"), dict) for g in groups.values())
    return checkpoint.get("format") == "float-quantized" and (no_weights or not _is_readable(checkpoint, groups))


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
            f"quantization_config.format is {checkpoint['format']!r}: FP8 weights come as float-quantized, naive-quantized or "
            "mxfp8-quantized"
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


def read_groups(written: Mapping[str, Any], parsed: QuantizationConfig) -> tuple[Group, ...]:
    """The groups of a `quantization_config`, as JSON and as compressed-tensors has parsed it."""
    spelled = with_presets(written.get("config_groups"))
    found = []
    for name, group in parsed.config_groups.items():
        fmt = value_of(group.format) or value_of(parsed.format)
        found.append(Group(name, tuple(group.targets), scheme_of(name, group, fmt, is_ordered(spelled.get(name))), group, fmt))
    return tuple(found)


def runs_here(checkpoint: Mapping[str, Any]) -> bool:
    """Whether hf_fp8 can run a group of a compressed-tensors config, FP8 or not. A config that cannot be read has none."""
    try:
        return any(group.scheme is not None for group in read_groups(checkpoint, parse(dict(checkpoint))))
    except FP8Error:
        return False


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
        written[group] = write_group(described(found), [value] if isinstance(value, str) else list(value))
    request = {"config_groups": {name: with_format(group) for name, group in written.items()}, "ignore": list(ignore)}
    parsed = parse(request)
    groups = read_groups(request, parsed)
    return parsed, tuple(replace(group, scheme=schemes.get(group.name, group.scheme)) for group in groups)


def described(scheme: Scheme) -> Scheme:
    """The scheme for which a request is parsed. Codes that no group describes, which no config is written for, stand in it as
    E4M3."""
    return scheme if scheme.weight.code.format else replace(scheme, weight=replace(scheme.weight, dtype=FP8))


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
