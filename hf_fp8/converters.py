"""Transforms for `transformers`' loader and saver that route keys by name.

The host renames keys by regexes. Here the files' headers have been read first, so keys are routed
by name instead: exact, fast for tens of thousands of experts, and exactly reversible.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform


class KeyRenaming(WeightRenaming):  # type: ignore[misc]
    """Renames exactly the given keys; reversed, it gives them back the names of the file.

    prefix: that of the base model, which keys may gain or lose between a loading and a saving.
    """

    def __init__(self, names: Mapping[str, str], prefix: str = "") -> None:
        super().__init__("hf_fp8_key", "hf_fp8_key")
        self.names, self.prefix = dict(names), prefix

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        renamed = self.names.get(source_key)
        if renamed is None:
            return source_key, None
        self._was_used = True
        return renamed, source_key

    def reverse_transform(self) -> KeyRenaming:
        dot = f"{self.prefix}." if self.prefix else ""
        stripped = {new.removeprefix(dot): old.removeprefix(dot) for old, new in self.names.items()}
        added = {dot + new: dot + old for new, old in stripped.items()}
        return KeyRenaming({**stripped, **added, **{new: old for old, new in self.names.items()}}, self.prefix)


class RoutedConverter(WeightConverter):  # type: ignore[misc]
    """Routes the given keys, each to a (target, source pattern); other keys as `base` would, if there is one.

    `reverse` is the transform that undoes this one on saving.
    """

    def __init__(
        self,
        routes: Mapping[str, tuple[str, str]],
        source_patterns: list[str],
        target_patterns: list[str],
        operations: list[ConversionOps],
        base: WeightConverter | None = None,
        reverse: WeightTransform | None = None,
    ) -> None:
        super().__init__(source_patterns, target_patterns, operations, force_cpu=bool(base and base.force_cpu))
        self.routes, self.base, self.reverse = routes, base, reverse
        if base is not None:
            self.scope_prefix, self.base_model_prefix = base.scope_prefix, base.base_model_prefix

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        route = self.routes.get(source_key)
        if route is not None:
            self._was_used = True
            return route
        if self.base is None:
            return source_key, None
        renamed, pattern = self.base.rename_source_key(source_key)
        self._was_used |= pattern is not None
        return renamed, pattern

    def reverse_transform(self) -> WeightTransform:
        assert self.reverse is not None
        return self.reverse

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutedConverter:
        # The loader copies a converter for each parameter it makes; the routes of all keys are shared.
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        for slot in (*WeightTransform.__slots__, *WeightConverter.__slots__):
            if hasattr(self, slot):
                object.__setattr__(copy, slot, getattr(self, slot))
        copy.collected_tensors = defaultdict(list)
        copy.layer_targets = defaultdict(set)
        return copy


class LateConverter(RoutedConverter):
    """Hands its op functions that read the tensors, instead of the tensors: the op reads one at a time."""

    def materialize_tensors(self) -> dict[str, list[Any]]:
        collected = dict(self.collected_tensors)
        self.collected_tensors.clear()
        return collected
