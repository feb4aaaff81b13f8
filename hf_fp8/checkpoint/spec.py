"""QuantizationSpec: which modules are quantized, and how, as `config.json` says it or as a user asks for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig

from ..errors import ConfigError
from ..formats.scheme import INT8_DYNAMIC, SCHEMES, Scheme, scheme_named
from .config_groups import Group, asked_groups, match, parse, read_group, with_presets, write_group, written_config

LINEARS = ["Linear"]  # the targets of a scheme without any
METHOD = "compressed-tensors"


@dataclass(frozen=True)
class QuantizationSpec:
    """Never changed: what says something else is another one. Empty, it says nothing.

    parsed: compressed-tensors' own reading. json: the whole `quantization_config` of a checkpoint; None for what a user
    asks of a dense one. dense_by_default: whether output embeddings and routers are quantized only if a target is about them
    alone. origin: what the files said, where this says what has become of the model since.
    """

    parsed: QuantizationConfig | None = None
    groups: tuple[Group, ...] = ()
    json: Mapping[str, Any] | None = None
    dense_by_default: bool = True
    origin: QuantizationSpec | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> QuantizationSpec:
        """The spec of a checkpoint's `quantization_config`. Raises ConfigError or UnsupportedError, naming the key."""
        written = plain(config)
        parsed = parse(written)
        groups = (read_group(name, group, parsed) for name, group in parsed.config_groups.items())
        return cls(parsed, tuple(groups), written)

    @classmethod
    def asked(
        cls, scheme: str | Scheme | Mapping[Any, Any], targets: str | Sequence[str], ignore: str | Sequence[str] | None
    ) -> QuantizationSpec:
        """The spec of what a user asks for (see the arguments of FP8Config). Raises ConfigError."""
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
    def fp8_groups(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.scheme is not None)

    @property
    def host_groups(self) -> tuple[Group, ...]:
        """Those whose weights the host runs: not FP8, and not about attention alone."""
        return tuple(group for group in self.groups if group.scheme is None and group.parsed.weights is not None)

    def group_of(self, called: Iterable[str], classes: Iterable[str]) -> Group | None:
        """The group that a module of any of these names and classes belongs to, None if it is dense."""
        called, classes = tuple(called), tuple(classes)
        if match(called, classes, self.ignore):
            return None
        by_target = {target: group for group in self.groups for target in group.targets}
        found = match(called, classes, by_target)
        return by_target[found] if found else None

    def explicit_targets(self, usual: Sequence[tuple[str, ...]]) -> list[str]:
        """Those that ask for the output embedding, or routers: that are about nothing else. usual: names of other Linears."""
        targets = [target for group in self.groups for target in group.targets]
        return [target for target in targets if not any(match(called, ("Linear",), [target]) for called in usual)]

    def unmatched_ignore(self, linears: Sequence[tuple[str, ...]]) -> list[str]:
        """The entries of `ignore` that match nothing: typing errors, as a rule. linears: the names of every Linear."""
        return [entry for entry in self.ignore if not any(match(called, ("Linear",), [entry]) for called in linears)]

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` for `config.json`.

        Its status is always "compressed": that is what the files hold, and readers that find another one, or none, take the
        stored codes for plain weights.
        """
        assert self.json is not None, "only a checkpoint's spec is written"
        return {**plain(self.json), "quant_method": METHOD, "quantization_status": "compressed"}

    def restricted_to(self, used: Iterable[str], dense: Iterable[str]) -> QuantizationSpec:
        """The spec of the checkpoint that this request makes: its groups in `used`, with modules `dense` not quantized."""
        used = set(used)
        written = {g.name: write_group(g.scheme, g.targets) for g in self.groups if g.name in used and g.scheme is not None}
        return self._saying(written_config(written, dense))

    def ignoring(self, dense: Iterable[str], without: Iterable[str] = ()) -> QuantizationSpec:
        """The same for a model whose modules `dense` are not quantized, and which has none of the groups `without`."""
        assert self.json is not None
        gone = set(without)
        groups = {name: group for name, group in self.json["config_groups"].items() if name not in gone}
        ignore = list(dict.fromkeys([*self.ignore, *dense]))
        return self._saying({**self.json, "config_groups": groups, "ignore": ignore})

    def _saying(self, written: Mapping[str, Any]) -> QuantizationSpec:
        new = self.read(written)
        return replace(self, parsed=new.parsed, groups=new.groups, json=new.json)

    def as_int8(self, dense: Iterable[str]) -> QuantizationSpec:
        """The same for a model whose FP8 Linears have become int8, and whose modules `dense` are dense."""
        written = self.to_json()
        written["config_groups"] = with_presets(written["config_groups"])
        for group in self.groups:
            if group.scheme is not None:
                written["config_groups"][group.name] = write_group(INT8_DYNAMIC, group.targets)
            elif group.parsed.weights is not None and self.fp8_groups:
                written["config_groups"][group.name]["format"] = group.format
        written["format"] = "mixed-precision" if self.host_groups else "int-quantized"
        written["ignore"] = list(dict.fromkeys([*self.ignore, *dense]))
        return replace(self._saying(written), origin=self)

    def host_part(self, dense: Iterable[str] = ()) -> dict[str, Any]:
        """What is left to say, as JSON, of a model whose FP8 modules, named `dense`, have been dequantized."""
        written = self.to_json()
        left = {group.name for group in self.host_groups}
        written["config_groups"] = {name: group for name, group in written["config_groups"].items() if name in left}
        written["ignore"] = list(dict.fromkeys([*self.ignore, *dense]))
        formats = {group.format for group in self.host_groups}
        if len(formats) == 1:
            written["format"] = formats.pop()
        return written

    def for_host(self, modules: Mapping[str, Sequence[str]], compressed: bool) -> dict[str, Any]:
        """The groups that are not FP8, as JSON that the host's quantizer takes.

        modules: name of a group -> those that the files hold in its form. compressed: whether the files hold packed weights,
        whatever the status says.
        """
        written = self.host_part()
        groups = with_presets(written["config_groups"])
        # One pattern for each: compressed-tensors holds every module against every target.
        exactly = {name: f"re:(?:{'|'.join(map(re.escape, found))})$" for name, found in modules.items()}
        written["config_groups"] = {name: {**groups[name], "targets": [target]} for name, target in exactly.items()}
        written["ignore"] = []
        written["kv_cache_scheme"] = None  # ours to carry: the host's hooks would quantize the cache its own way
        if not compressed:
            written["quantization_status"] = plain(self.parsed and self.parsed.quantization_status)
        return written


def refuse_two_targets(scheme: Any, targets: str | Sequence[str]) -> None:
    """Raise ConfigError for targets beside a scheme that says its own."""
    if isinstance(scheme, Mapping) and names("targets", targets) != LINEARS:
        raise ConfigError(f"targets={targets!r}: with several groups each says its own targets, as in {{scheme: targets, ...}}")


def names(option: str, given: Any) -> list[str]:
    """A list of names, patterns and classes, of one of them or several. Raises ConfigError."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence | set | frozenset) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"{option}={given!r}: it is a list of names, classes and re: patterns")
    return list(given)


def given_scheme(given: Any) -> str | Scheme | dict[Any, Any]:
    """A scheme as a user passes it, or as `plain` wrote it: a name of SCHEMES, a Scheme, or a dict, of one of them to its
    targets or of a group's name to that group in compressed-tensors' words (JSON, or the library's own class).

    Raises ConfigError for what is none of them.
    """
    if not isinstance(given, Mapping):
        return _one_scheme(given)
    if "config_groups" in given or "quant_method" in given:
        raise ConfigError("scheme is a whole quantization_config: pass that itself, or its config_groups as scheme")
    found: dict[Any, Any] = {}
    for key, value in given.items():
        if isinstance(value, Mapping) or hasattr(value, "model_dump_json"):
            found[str(plain(key))] = plain(value)
        else:
            found[_one_scheme(key)] = names(f"scheme[{str(key)!r}]", value)
    return found


def _one_scheme(given: Any) -> str | Scheme:
    if isinstance(given, str) and "|" in given:
        try:
            return Scheme.parse(given)
        except (ValueError, IndexError):
            pass  # the error below says what there is
    found = scheme_named(given)
    if isinstance(given, str):
        return next(name for name in SCHEMES if name == given.upper())
    return found


def plain(value: Any) -> Any:
    """A copy of `value` in JSON's words: enums by their values, a Scheme by its `text`, the library's classes as dicts."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Scheme | torch.dtype):
        return str(value)
    if hasattr(value, "model_dump_json"):
        return json.loads(value.model_dump_json())
    if isinstance(value, Mapping):
        return {plain(key): plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value))
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value
