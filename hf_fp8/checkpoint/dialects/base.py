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
class Meaning:
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


def always(config: Mapping[str, Any]) -> bool:
    """True: a function with a name, as configs are pickled with their dialect."""
    return True


def never(config: Mapping[str, Any]) -> bool:
    """False."""
    return False


@dataclass(frozen=True)
class Sidecar:
    """A file beside config.json that describes the quantization.

    read: its contents -> a config, None if they do not say that weights are quantized. write: a config -> its contents, as
    text.
    """

    file: str
    read: Callable[[Mapping[str, Any]], dict[str, Any] | None]
    write: Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class Dialect:
    """How another library describes FP8 checkpoints.

    name: for messages. methods: values of `quant_method`. describes: which of the configs with such a method. by_default:
    whether hf_fp8 reads a config without being asked for, because transformers does not, or takes codes for values; otherwise
    an FP8Config asks for it. read: a config -> its meaning; raises ConfigError or UnsupportedError. ignoring: (a config, names
    of modules that are dense in addition, names of all dense modules) -> the config that also says so. sidecar: another file
    that describes the quantization, None if there is none.
    """

    name: str
    methods: tuple[str, ...]
    by_default: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], Meaning]
    ignoring: Callable[[Mapping[str, Any], Sequence[str], Sequence[str]], dict[str, Any]]
    describes: Callable[[Mapping[str, Any]], bool] = always
    sidecar: Sidecar | None = None


@dataclass(frozen=True)
class Writer:
    """How converted checkpoints are described and their scales named.

    write: (groups, names of all dense modules) -> the `quantization_config`; raises ConfigError for schemes that it cannot
    describe. leaves: role -> the last part of the name of a scale. of_stack: the same for stacks of experts, after the name of
    the stack. is_scalar: whether a scale of a whole tensor has the shape (), not (1,). dialect: the one in which they then
    are, None for compressed-tensors.
    """

    name: str
    write: Callable[[Mapping[str, Target], Sequence[str]], dict[str, Any]]
    leaves: Mapping[str, str]
    of_stack: Mapping[str, str]
    is_scalar: bool = False
    dialect: Dialect | None = None


def _write(groups: Mapping[str, Target], dense: Sequence[str]) -> dict[str, Any]:
    return written_config({name: write_group(each.scheme, each.targets) for name, each in groups.items()}, dense)


COMPRESSED_TENSORS = Writer(
    "compressed-tensors",
    _write,
    leaves={WEIGHT_SCALE: WEIGHT_SCALE, INPUT_SCALE: INPUT_SCALE},
    of_stack={WEIGHT_SCALE: "_scale", INPUT_SCALE: "_input_scale"},
)


def value(config: Mapping[str, Any], key: str, allowed: Mapping[Any, Any], default: Any = None) -> Any:
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
    """The names under the first of `keys` that is there. Raises ConfigError, naming it, if it is not a list of names."""
    key = next((key for key in keys if config.get(key) is not None), None)
    found = [] if key is None else config[key]
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"quantization_config.{key} is {str(found)[:120]!r}: it must be a list of names of modules")
    return list(found)


def any_of(patterns: Iterable[str]) -> list[str]:
    """One "re:" entry that matches whole names that any of the regular expressions matches; none for no expressions.

    One entry, because compressed-tensors compares every module with every entry, and some configs list each layer.
    """
    joined = "|".join(dict.fromkeys(patterns))
    return [f"re:(?:{joined})$"] if joined else []


def module_or_inside(name: str) -> str:
    """A regular expression for a module and all modules inside of it."""
    return rf"{re.escape(name)}(?:\..*)?"
