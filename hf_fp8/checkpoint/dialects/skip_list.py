"""`modules_to_not_convert`: the list of dense modules in configs that transformers reads, and what its entries match."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .base import any_of, check_patterns, names_in

KEY = "modules_to_not_convert"
KEYS = (KEY, "ignored_layers")  # the second is MiniMax's, and AutoFP8's
# Where a match of an entry must end: transformers' `should_convert_module`.
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$)).*"


def listed(config: Mapping[str, Any]) -> list[str]:
    """The list of a config. Raises ConfigError if it is none."""
    return names_in(config, *KEYS)


def skipped(config: Mapping[str, Any]) -> list[str]:
    """The `ignore` that means the same: each entry is a regular expression that matches from the start of a name to the end of
    one of its parts, or the end of a name. Raises ConfigError."""
    entries = listed(config)
    check_patterns(config, KEYS, {entry: entry for entry in entries})
    starts = [f"(?:{entry}){_BOUNDARY}" for entry in entries]
    return any_of([*starts, *(f".*{re.escape(entry)}" for entry in entries)])


def ignoring(config: Mapping[str, Any], new: Sequence[str], every: Sequence[str]) -> dict[str, Any]:
    """The config with more dense modules.

    Without a list transformers skips the output embedding: a new list has all dense modules.
    """
    key = next((key for key in KEYS if config.get(key) is not None), KEY)
    before = config[key] if config.get(key) is not None else every
    return {**config, key: list(dict.fromkeys([*before, *(name.removeprefix("re:") for name in new)]))}
