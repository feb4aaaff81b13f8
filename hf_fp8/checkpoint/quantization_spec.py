"""QuantizationSpec: which modules are quantized with which scheme, from `config.json` or from user arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig

from ..errors import ConfigError
from ..formats.scheme import INT8_DYNAMIC, Scheme, scheme_named
from .config_groups import (
    Group,
    asked_groups,
    concerns_fp8,
    groups_of,
    match,
    parse,
    read_groups,
    runs_here,
    with_presets,
    written_config,
)
from .dialects.base import Dialect
from .dialects.registry import dialect_of
from .group_schemes import write_group
from .reader import DTYPE_NAMES

LINEARS = ["Linear"]  # the targets of a scheme without any
METHOD = "compressed-tensors"
METHODS = (METHOD, "sparseml")  # the second is the method's name in old files
# Keys of config.json that hold a quantization config; writers used the second in 2024.
CONFIG_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class DialectConfig:
    """The config of a checkpoint that is in another dialect than compressed-tensors.

    written: as it is in the files. listed: the modules that it says are dense, in its own words. file: the contents of another
    file that says the same (`Dialect.file`), None if there is none. known_dense: the spec's `ignore` when the checkpoint was
    read; what has been added since is written, too.
    """

    dialect: Dialect
    written: Mapping[str, Any]
    listed: tuple[str, ...] = ()
    file: Mapping[str, Any] | None = None
    known_dense: frozenset[str] = frozenset()

    def updated(self, config: Mapping[str, Any], ignore: Sequence[str]) -> dict[str, Any]:
        """`config`, in this dialect, with the modules that have become dense since. ignore: that of the spec now."""
        new = [name for name in ignore if name not in self.known_dense]
        every = [name for name in ignore if not name.startswith("re:")]
        return self.dialect.ignoring(plain(config), new, every) if new else plain(config)


@dataclass(frozen=True)
class QuantizationSpec:
    """An immutable quantization config. Without arguments it has no groups.

    parsed: the config as parsed by compressed-tensors. json: the whole `quantization_config` of a checkpoint, translated from
    its dialect; None for a user's request to quantize a dense one. dense_by_default: whether output embeddings and routers are
    quantized only if a target matches nothing else. origin: the spec of the files, if this one describes a model that has
    changed since it was loaded. in_dialect: the config in its own dialect, None for compressed-tensors.
    """

    parsed: QuantizationConfig | None = None
    groups: tuple[Group, ...] = ()
    json: Mapping[str, Any] | None = None
    dense_by_default: bool = True
    origin: QuantizationSpec | None = None
    in_dialect: DialectConfig | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> QuantizationSpec:
        """The spec of a checkpoint's `quantization_config`, in any dialect. Raises ConfigError or UnsupportedError, naming the
        key."""
        written = plain(config)
        dialect = dialect_of(written)
        if dialect is None:
            parsed = parse(written)
            return cls(parsed, read_groups(written, parsed), written)
        translation = dialect.read(written)
        translated = translation.as_compressed_tensors()
        parsed = parse(translated)
        groups = (replace(group, scheme=translation.groups[group.name].scheme) for group in read_groups(translated, parsed))
        return cls(parsed, tuple(groups), translated, in_dialect=DialectConfig(dialect, written, tuple(translation.listed)))

    @classmethod
    def asked(
        cls, scheme: str | Scheme | Mapping[Any, Any], targets: str | Sequence[str], ignore: str | Sequence[str] | None
    ) -> QuantizationSpec:
        """The spec of a user's request (see the arguments of FP8Config). Raises ConfigError."""
        refuse_two_targets(scheme, targets)
        listed = [] if ignore is None else names("ignore", ignore)
        parsed, groups = asked_groups(given_scheme(scheme), names("targets", targets), listed)
        return cls(parsed, groups, dense_by_default=ignore is None or len(listed) > 0)

    @property
    def ignore(self) -> tuple[str, ...]:
        return () if self.parsed is None else tuple(self.parsed.ignore or ())

    @property
    def kv_cache_scheme(self) -> Any:
        return None if self.parsed is None else self.parsed.kv_cache_scheme

    @property
    def our_groups(self) -> tuple[Group, ...]:
        """The groups whose weights hf_fp8 runs."""
        return tuple(group for group in self.groups if group.scheme is not None)

    @property
    def storages(self) -> set[str]:
        """safetensors' names of the dtypes in which the codes of these are stored."""
        return {DTYPE_NAMES[group.scheme.weight.storage] for group in self.groups if group.scheme is not None}

    @property
    def host_groups(self) -> tuple[Group, ...]:
        """The groups whose weights transformers runs: in other formats, and not for attention only."""
        return tuple(group for group in self.groups if group.scheme is None and group.parsed.weights is not None)

    def group_of(self, called: Iterable[str], classes: Iterable[str]) -> Group | None:
        """The group of a module that has any of these names and classes, None if it is dense."""
        called, classes = tuple(called), tuple(classes)
        if match(called, classes, self.ignore):
            return None
        return next(iter(groups_of(self.groups, called, classes)), None)

    def unmatched_ignore(self, linears: Sequence[tuple[str, ...]]) -> list[str]:
        """The entries of `ignore` that match nothing, usually typing errors. linears: the names of each Linear."""
        return [entry for entry in self.ignore if not any(match(called, ("Linear",), [entry]) for called in linears)]

    @property
    def written(self) -> Mapping[str, Any] | None:
        """The `quantization_config` as it is in the files, in their dialect; None for a request."""
        return self.json if self.in_dialect is None else self.in_dialect.written

    @property
    def files_decide(self) -> bool:
        """Whether a weight may be dense although a group matches it: in other dialects than compressed-tensors, configs need
        not name all of them."""
        return self.in_dialect is not None

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` for `config.json`, in the dialect of the files."""
        if self.in_dialect is None:
            return self.as_compressed_tensors()
        return self.in_dialect.updated(self.in_dialect.written, self.ignore)

    def file_beside(self) -> tuple[str, dict[str, Any]] | None:
        """(name, contents) of the other file that the dialect has for the config, if it was read; None without one."""
        if self.in_dialect is None or self.in_dialect.file is None or self.in_dialect.dialect.file is None:
            return None
        method = {"quant_method": self.in_dialect.dialect.methods[0]}
        content = self.in_dialect.updated({**self.in_dialect.file, **method}, self.ignore)
        return self.in_dialect.dialect.file.name, {key: part for key, part in content.items() if key not in method}

    def with_file(self, content: Mapping[str, Any] | None) -> QuantizationSpec:
        """The spec of a checkpoint that has `content` in the other file of its dialect."""
        return self if self.in_dialect is None else replace(self, in_dialect=replace(self.in_dialect, file=content))

    def as_compressed_tensors(self) -> dict[str, Any]:
        """The `quantization_config` in the format of compressed-tensors.

        Its status is always "compressed", as the files are: with another status, or none, readers would load the codes (stored
        8-bit numbers) as plain weights.
        """
        assert self.json is not None, "only a checkpoint's spec is written"
        return {**plain(self.json), "quant_method": METHOD, "quantization_status": "compressed"}

    def settled(self, used: Iterable[str], dense: Iterable[str]) -> QuantizationSpec:
        """The spec after the files of a checkpoint in another dialect have been seen: with the groups in `used`, and the
        modules `dense` of the files ignored, which its config need not say.
        """
        if self.in_dialect is None:
            return self
        new = self.ignoring(dense, without={group.name for group in self.groups} - set(used))
        return replace(new, in_dialect=replace(self.in_dialect, known_dense=frozenset(new.ignore)))

    def restricted_to(self, used: Iterable[str], dense: Iterable[str]) -> QuantizationSpec:
        """The spec of the checkpoint that this request produces: the groups in `used`, with the modules `dense` ignored."""
        used = set(used)
        schemes = {group.name: group.scheme for group in self.groups if group.name in used and group.scheme is not None}
        targets = {group.name: group.targets for group in self.groups}
        written = {name: write_group(scheme, targets[name]) for name, scheme in schemes.items()}
        new = self._saying(written_config(written, dense))
        # The written ones lack the recipe.
        return replace(new, groups=tuple(replace(group, scheme=schemes[group.name]) for group in new.groups))

    def ignoring(self, dense: Iterable[str], without: Iterable[str] = ()) -> QuantizationSpec:
        """The spec with the modules `dense` ignored and without the groups `without`."""
        assert self.json is not None
        gone = set(without)
        groups = {name: group for name, group in self.json["config_groups"].items() if name not in gone}
        ignore = list(dict.fromkeys([*self.ignore, *dense]))
        new = self._saying({**self.json, "config_groups": groups, "ignore": ignore})
        return replace(new, groups=tuple(group for group in self.groups if group.name not in gone))

    def _saying(self, written: Mapping[str, Any]) -> QuantizationSpec:
        new = self.read(written)
        return replace(self, parsed=new.parsed, groups=new.groups, json=new.json)

    def as_int8(self, dense: Iterable[str]) -> QuantizationSpec:
        """The spec for the same model with its FP8 Linears re-quantized to int8, and with the modules `dense` ignored."""
        written = self.as_compressed_tensors()
        written["config_groups"] = with_presets(written["config_groups"])
        for group in self.groups:
            if group.scheme is not None and group.scheme.weight.code.is_float:
                written["config_groups"][group.name] = write_group(INT8_DYNAMIC, group.targets)
            elif group.parsed.weights is not None:
                written["config_groups"][group.name]["format"] = group.format
        formats = {group.get("format") for group in written["config_groups"].values()} - {None}
        written["format"] = formats.pop() if len(formats) == 1 else "mixed-precision"
        written["ignore"] = list(dict.fromkeys([*self.ignore, *dense]))
        return replace(self._saying(written), origin=self, in_dialect=None)

    def host_part(self, dense: Iterable[str] = ()) -> dict[str, Any]:
        """The config, as JSON, of a model whose FP8 modules, named `dense`, have been dequantized: its other groups."""
        written = self.as_compressed_tensors()
        left = {group.name for group in self.host_groups}
        written["config_groups"] = {name: group for name, group in written["config_groups"].items() if name in left}
        written["ignore"] = list(dict.fromkeys([*self.ignore, *dense]))
        formats = {group.format for group in self.host_groups}
        if len(formats) == 1:
            written["format"] = formats.pop()
        return written

    def for_host(self, modules: Mapping[str, Sequence[str]], compressed: bool) -> dict[str, Any]:
        """The groups that are not FP8, as JSON for transformers' quantizer.

        modules: name of a group -> its modules in the files. compressed: whether the files have packed weights, whatever the
        status says.
        """
        written = self.host_part()
        groups = with_presets(written["config_groups"])
        # One pattern per group: compressed-tensors compares every module with every target.
        exactly = {name: f"re:(?:{'|'.join(map(re.escape, found))})$" for name, found in modules.items()}
        written["config_groups"] = {name: {**groups[name], "targets": [target]} for name, target in exactly.items()}
        written["ignore"] = []
        written["kv_cache_scheme"] = None  # handled by hf_fp8: the hooks of transformers would quantize the cache differently
        if not compressed:
            written["quantization_status"] = plain(self.parsed and self.parsed.quantization_status)
        return written


def is_ours(config: Mapping[str, Any], *, asked: bool = False) -> bool:
    """Whether hf_fp8 reads a `quantization_config` in place of transformers; asked: if an FP8Config was passed."""
    dialect = dialect_of(config)
    if dialect is not None:
        return asked or dialect.by_default
    return _is_compressed_tensors(config) and (concerns_fp8(dict(config)) or (asked and runs_here(config)))


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is in a dialect that hf_fp8 reads."""
    return dialect_of(config) is not None or _is_compressed_tensors(config)


def _is_compressed_tensors(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method", METHOD if "config_groups" in config else None) in METHODS


def refuse_others(asked: QuantizationSpec) -> None:
    """Raise ConfigError for a request to quantize to a format that hf_fp8 does not write."""
    for group in asked.host_groups:
        weights = group.parsed.weights
        raise ConfigError(
            f"config group {group.name!r} asks for {weights.num_bits}-bit {weights.type} weights ({weights.strategy}, "
            f"{group.format}): hf_fp8 quantizes to FP8, int8 and int4, with 8-bit symmetric inputs or none"
        )


def refuse_two_targets(scheme: Any, targets: str | Sequence[str]) -> None:
    """Raise ConfigError for targets in addition to a scheme that has its own."""
    if isinstance(scheme, Mapping) and names("targets", targets) != LINEARS:
        raise ConfigError(f"targets={targets!r}: with several groups each has its own targets, as in {{scheme: targets, ...}}")


def names(option: str, given: Any) -> list[str]:
    """A list of names, patterns and classes, from one string or a sequence. Raises ConfigError."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence | set | frozenset) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"{option}={given!r}: it must be a list of names, classes and re: patterns")
    return list(given)


def given_scheme(given: Any) -> str | Scheme | dict[Any, Any]:
    """Normalize a scheme passed by a user, or written by `plain`.

    It is a name of SCHEMES, a Scheme, or a dict from either to its targets, or from the name of a group to that group in the
    format of compressed-tensors (JSON, or the library's class). Raises ConfigError for anything else.
    """
    if not isinstance(given, Mapping):
        return _one_scheme(given)
    if "config_groups" in given or "quant_method" in given:
        raise ConfigError("scheme is a whole quantization_config: pass its config_groups, or pass all as quantization_config")
    found: dict[Any, Any] = {}
    for key, value in given.items():
        if isinstance(value, Mapping) or hasattr(value, "model_dump_json"):
            found[str(plain(key))] = plain(value)
        else:
            found.setdefault(_one_scheme(key), []).extend(names(f"scheme[{str(key)!r}]", value))
    return found


def _one_scheme(given: Any) -> str | Scheme:
    if isinstance(given, str) and "|" in given:
        try:
            return Scheme.parse(given)
        except (ValueError, IndexError):
            pass  # scheme_named raises an error that lists the schemes
    found = scheme_named(given)
    if isinstance(given, str):
        return given.upper()
    return found


def plain(value: Any) -> Any:
    """A copy of `value` for JSON: enums as their values, a Scheme as its `text`, the library's classes as dicts."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Scheme | torch.dtype):
        return str(value)
    if hasattr(value, "model_dump_json"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {plain(key): plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value))
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value
