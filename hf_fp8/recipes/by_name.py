"""`FqnToConfig`: other configs for other layers, by their names, by names of their weights, or by regular expressions."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import ConfigError, UnsupportedError, first

logger = logging.getLogger(__name__)
DEFAULT, REGEX = "_default", "re:"
# The attribute of convolutions that `swap_conv2d_1x1_to_linear` chose.
AS_LINEAR = "hf_fp8_as_linear"


class FqnToConfig:
    """Names -> configs (ours, torchao's, names of recipes, or None for layers that stay dense), as torchao's class.

    A key is, in order of precedence: the full name of a parameter ("layers.0.q_proj.weight"), of a module ("layers.0.q_proj"),
    a regular expression of Python's `re` for names of parameters or of modules, after "re:", which has to match all of the
    name (the first that does is used), or "_default", for all other Linears.

    module_fqn_to_config: the earlier name of `fqn_to_config`. Raises ConfigError if both are given and differ, or if neither
    is.
    """

    def __init__(
        self,
        fqn_to_config: Mapping[str, Any] | None = None,
        module_fqn_to_config: Mapping[str, Any] | None = None,
        version: int = 1,
    ) -> None:
        if fqn_to_config and module_fqn_to_config and fqn_to_config != module_fqn_to_config:
            raise ConfigError("fqn_to_config and module_fqn_to_config are both given, and differ: give one of them")
        self.fqn_to_config = dict(fqn_to_config or module_fqn_to_config or {})
        self.module_fqn_to_config = self.fqn_to_config
        if version != 1:
            raise UnsupportedError(f"FqnToConfig(version={version!r}): hf_fp8 supports 1")

    def __repr__(self) -> str:
        return f"FqnToConfig({self.fqn_to_config!r})"


ModuleFqnToConfig = AOPerModuleConfig = FqnToConfig


def table_of(config: Any) -> dict[str, Any]:
    """Name -> config of a FqnToConfig, ours or torchao's. Raises ConfigError if it is empty."""
    found = dict(getattr(config, "fqn_to_config", None) or getattr(config, "module_fqn_to_config", None) or {})
    if not found:
        raise ConfigError(f"{type(config).__name__} has no names: give it a dict, {{name of a layer: config}}")
    return found


def fqn_matches_fqn_config(fqn: str, config: Any) -> bool:
    """Whether the full name of a module or parameter is a key of `config`, or matches one of its regular expressions."""
    table = table_of(config)
    return fqn in table or _regex(fqn, table) is not None


def _regex(name: str, table: Mapping[str, Any]) -> str | None:
    """The first key that is a regular expression and matches all of `name`."""
    patterns = (key for key in table if key.startswith(REGEX))
    return next((key for key in patterns if re.fullmatch(key.removeprefix(REGEX), name)), None)


def keys_of_layers(model: nn.Module, table: Mapping[str, Any]) -> dict[str, str]:
    """Name of a Linear (or convolution) of `model` -> the key of `table` by which torchao would find its config.

    Layers without a config are left out. Keys that match nothing are logged. Raises UnsupportedError for keys that name
    something else, such as an embedding or a bias; of weights with three dimensions only the log says that they stay dense.
    """
    found: dict[str, str] = {}
    used: set[str] = {DEFAULT}
    for name, module in model.named_modules():
        is_layer = isinstance(module, nn.Linear) or bool(getattr(module, AS_LINEAR, False))
        own = {f"{name}.{leaf}".lstrip("."): p.ndim for leaf, p in module.named_parameters(recurse=False)}
        exact = [parameter for parameter in own if parameter in table]
        used.update(exact, {name} & table.keys())
        for parameter in exact:
            _refuse_other(parameter, table, own[parameter], is_layer and parameter.endswith("weight"))
        if name in table and own:
            _refuse_other(name, table, max(own.values()), is_layer)
        weight = f"{name}.weight".lstrip(".")
        key = _key(name, weight, exact, table, [p for p in own if p not in exact or table[p] is not None])
        if key is not None:
            used.add(key)
        if is_layer and key is not None:
            found[name] = key
        elif is_layer and DEFAULT in table and not exact:
            found[name] = DEFAULT
    if unused := [key for key in table if key not in used]:
        logger.warning(f"hf_fp8: {first(unused)} in {type(model).__name__}'s configs by name match nothing")
    return {name: key for name, key in found.items() if table[key] is not None}


def _key(name: str, weight: str, exact: list[str], table: Mapping[str, Any], left: list[str]) -> str | None:
    """The key of a module: of its weight, of itself, a pattern for its weight, a pattern for itself."""
    if exact:
        if weight in exact:
            return weight
        return _regex(weight, table) if weight in left else None
    if name in table:
        return name
    patterns = {parameter: _regex(parameter, table) for parameter in left}
    if any(patterns.values()):
        return patterns.get(weight)
    return _regex(name, table)


def _refuse_other(name: str, table: Mapping[str, Any], ndim: int, is_weight_of_layer: bool) -> None:
    if table[name] is None or is_weight_of_layer or ndim == 3:
        return
    raise UnsupportedError(
        f"{name} has a config, and is not a Linear or its weight: hf_fp8 quantizes Linears, and 1x1 convolutions after "
        "swap_conv2d_1x1_to_linear. Give it None, or leave it out"
    )
