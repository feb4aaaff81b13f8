"""What a dialect is: the config and the tensor names of FP8 checkpoints that another library writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...formats.scheme import Scheme
from ...formats.storage import INPUT_SCALE, WEIGHT_SCALE
from ..config_groups import described, written_config
from ..group_schemes import write_group

LINEAR = ("Linear",)
# The `kv_cache_scheme` of one E4M3 scale for keys and one for values, in compressed-tensors' terms.
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@dataclass(frozen=True)
class Target:
    """Modules that have one scheme. targets: as in compressed-tensors. Of several with the same targets the files decide."""

    scheme: Scheme
    targets: Sequence[str] = LINEAR


@dataclass(frozen=True)
class Translation:
    """What a config of a dialect says, in the terms of compressed-tensors.

    groups: name -> its modules and their scheme. ignore: names and "re:" patterns of modules that stay dense. listed: the same
    as the config has it, to be shown. cache: the `kv_cache_scheme`, None without one.
    """

    groups: Mapping[str, Target]
    ignore: Sequence[str] = ()
    listed: Sequence[str] = ()
    cache: Mapping[str, Any] | None = None

    def as_compressed_tensors(self) -> dict[str, Any]:
        """The `quantization_config` of compressed-tensors that says the same, as far as it can (`described`)."""
        groups = {name: write_group(described(each.scheme), each.targets) for name, each in self.groups.items()}
        return {**written_config(groups, self.ignore), "kv_cache_scheme": None if self.cache is None else dict(self.cache)}


@dataclass(frozen=True)
class ConfigFile:
    """Another file than config.json that describes the quantization.

    read: its contents -> a config of the dialect, None if they do not say that weights are quantized; raises ConfigError.
    """

    name: str
    read: Callable[[Mapping[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True)
class Dialect:
    """How another library describes FP8 checkpoints.

    name, words: for messages: what the dialect is called, and which keys of its config say what. methods: values of
    `quant_method`. describes: which of the configs with such a method, None for all. by_default: whether hf_fp8 reads them
    without being asked for, because transformers does not, or takes codes for values; otherwise an FP8Config asks for it. read:
    a config -> its translation; raises ConfigError or UnsupportedError. ignoring: (a config, names of modules that are dense in
    addition, names of all dense modules) -> the config that also says so. file: another file with the config.
    """

    name: str
    words: str
    methods: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Translation]
    ignoring: Callable[[Mapping[str, Any], Sequence[str], Sequence[str]], dict[str, Any]]
    by_default: bool = False
    describes: Callable[[Mapping[str, Any]], bool] | None = None
    file: ConfigFile | None = None


@dataclass(frozen=True)
class Writer:
    """How converted checkpoints are described and their scales named.

    write: (groups, names of all dense modules) -> the `quantization_config`; raises ConfigError for schemes that it cannot
    describe. scale_names: role -> the last part of the name of a scale. stack_suffixes: role -> what follows the name of a
    stack of experts. is_scalar: whether a scale of a whole tensor has the shape (), not (1,). dialect: the one in which they
    are, None for compressed-tensors.
    """

    name: str
    write: Callable[[Mapping[str, Target], Sequence[str]], dict[str, Any]]
    scale_names: Mapping[str, str]
    stack_suffixes: Mapping[str, str]
    is_scalar: bool = False
    dialect: Dialect | None = None


def _write(groups: Mapping[str, Target], dense: Sequence[str]) -> dict[str, Any]:
    return written_config({name: write_group(each.scheme, each.targets) for name, each in groups.items()}, dense)


COMPRESSED_TENSORS = Writer(
    "compressed-tensors",
    _write,
    scale_names={WEIGHT_SCALE: WEIGHT_SCALE, INPUT_SCALE: INPUT_SCALE},
    stack_suffixes={WEIGHT_SCALE: "_scale", INPUT_SCALE: "_input_scale"},
)


def one_of(config: Mapping[str, Any], key: str, allowed: Mapping[Any, Any], default: Any = None) -> Any:
    """What `allowed` gives for the value of a key, which may be missing if there is a default. Strings in lower case.

    Raises ConfigError, naming the key, for other values.
    """
    found = config.get(key, default)
    found = found.lower() if isinstance(found, str) else found
    try:
        return allowed[found]
    except (KeyError, TypeError):
        known = ", ".join(str(one) for one in allowed)
        raise ConfigError(f"quantization_config.{key} is {config.get(key)!r}; hf_fp8 knows {known}") from None


def names_in(config: Mapping[str, Any], *keys: str) -> list[str]:
    """The names under the first of `keys` that is there. Raises ConfigError, naming the key, if any is not a list of names."""
    found = {key: config[key] for key in keys if config.get(key) is not None}
    for key, listed in found.items():
        if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
            raise ConfigError(f"quantization_config.{key} is {str(listed)[:120]!r}: it must be a list of names of modules")
    return list(next(iter(found.values()), ()))


def check_patterns(config: Mapping[str, Any], keys: Iterable[str], patterns: Mapping[str, str]) -> None:
    """Raise ConfigError, naming the key and the entry, for an entry that is no regular expression.

    patterns: entry -> the regular expression that it stands for.
    """
    key = next((key for key in keys if config.get(key) is not None), "")
    for entry, pattern in patterns.items():
        try:
            re.compile(f"(?:{pattern})")
        except re.error as error:
            raise ConfigError(f"quantization_config.{key}: {entry!r} is not a valid regular expression ({error})") from None


def any_of(patterns: Iterable[str]) -> list[str]:
    """One "re:" entry that matches whole names that any of the regular expressions matches; none for no expressions.

    One entry, because compressed-tensors compares every module with every entry, and some configs list each layer.
    """
    patterns = list(dict.fromkeys(patterns))
    joined = "|".join(patterns)
    try:
        re.compile(joined)
    except re.error:  # of two expressions with one name for a group
        return [f"re:(?:{pattern})$" for pattern in patterns]
    return [f"re:(?:{joined})$"] if joined else []


def module_or_inside(name: str) -> str:
    """A regular expression for a module and all modules inside of it."""
    return rf"{re.escape(name)}(?:\..*)?"
