"""Conversion transforms that carry out a layout: run by transformers' loader, reversed by its saver.

transformers ("the host" in comments) renames keys by regexes. Here the headers of the files are known first, so keys are
routed by exact name: this is fast for tens of thousands of experts, and exactly reversible.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from typing import Any
from zlib import crc32

from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform

from ..checkpoint.stored_weight import StoredWeight, companion
from ..formats.storage import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, format_of
from .expert_ops import PATTERNS, ROLES, QuantizeExperts, SplitExperts, StackExperts, pattern
from .key_map import converters, plain_weight
from .layout import Layout, Stack
from .ops import AsInBase, Dequantize, QuantizeWeights, Requantize, Reshape, plain_pattern


def build_conversions(layout: Layout, host: Sequence[WeightTransform]) -> list[WeightTransform]:
    """Return the transforms that transformers' loader runs for `layout`. host: its own transforms, used in the matching."""
    weights, extra = layout.weights, converters(*layout.unmapped_experts) if layout.unmapped_experts is not None else []
    op, back = Dequantize(layout.dense), Requantize(layout.dense, layout.scales, layout.source)
    stacks = {stack.target: stack for plan in layout.experts.values() for stack in plan.stacks}
    found = [*_plain_converters(layout, op, back), *_scale_converters(layout)]
    found += [*_fresh_converters(layout), *_experts_converters(layout, stacks)]
    for transform in extra:
        # Loading experts that are stacked in the files does not use these; but saving writes one tensor per expert, biases too.
        transform._was_used |= layout.splits_experts
    for transform in [*host, *extra]:
        if isinstance(transform, WeightConverter):
            transform = _merged_converter(transform, layout, weights, op, back)
        found.append(transform)
    # The first matching converter wins, so ours precede the host's (see `for_saving`). All renamings run; ours is the last.
    return [*found, KeyRenaming(layout.aliases, layout.prefix)] if layout.aliases else found


def for_saving(conversions: Sequence[WeightTransform]) -> list[WeightTransform]:
    """Move our converters to the end: transformers' saver tries the last first, and ours match exact names."""
    return sorted(conversions, key=lambda conversion: isinstance(conversion, RoutedConverter))


def _plain_converters(layout: Layout, op: Dequantize, back: Requantize) -> list[WeightTransform]:
    """Converters for weights that fill one parameter each."""
    routes, targets, roles = {}, {}, {WEIGHT}
    for parameter in layout.dense.values():
        if set(parameter.sources) != {WEIGHT}:
            continue
        (weight,) = parameter.weights
        # The host adds or strips the base model's prefix after this.
        target = plain_weight(weight.renamed[weight.primary])
        for role, key in weight.renamed.items():
            routes[key] = (target, companion(WEIGHT, role))
            roles.add(role)
        targets[parameter.name] = (parameter.name, WEIGHT)
    if not routes:
        return []
    sources = [companion(WEIGHT, role) for role in sorted(roles)]
    reverse = RoutedConverter(targets, [WEIGHT], [WEIGHT], [back])
    return [RoutedConverter(routes, sources, [WEIGHT], [op], reverse=reverse)]


def _merged_converter(
    base: WeightConverter, layout: Layout, weights: list[StoredWeight], op: Dequantize, back: Requantize
) -> WeightConverter:
    """Return `base` with dequantization as its first operation, or `base` itself if no quantized weight goes through it."""
    through = [w for w in weights if w.pattern in base.source_patterns and w.target in layout.dense]
    if not through:
        return base
    probe = deepcopy(base)
    routes: dict[str, tuple[str, str]] = {}
    roles: dict[str, None] = {}
    for weight in through:
        assert weight.pattern is not None
        renamed = probe.rename_source_key(plain_weight(weight.renamed[weight.primary]))[0]
        for role, key in weight.renamed.items():
            if role != WEIGHT:
                routes[key] = (renamed, companion(weight.pattern, role))
                roles[companion(weight.pattern, role)] = None
    reverse = _taken_apart(base, layout, back)
    operations = [op, *(AsInBase(operation, list(base.source_patterns)) for operation in base.operations)]
    sources = [*base.source_patterns, *roles]
    return RoutedConverter(routes, sources, list(base.target_patterns), operations, base=base, reverse=reverse)


def _taken_apart(base: WeightConverter, layout: Layout, back: Requantize) -> RoutedConverter:
    """Return the reverse of `base` for the parameters it makes: its operations undone, last to first.

    It routes by parameter name, since the patterns of `base` are regular expressions.
    """
    sources = [plain_pattern(p) for p in base.source_patterns]
    # The host finds a converter by its pattern, so two that make parameters of the same name, in two submodels, must differ.
    of_this = f"of_{crc32(repr(base.source_patterns).encode()):08x}"
    targets = [f"{plain_pattern(p)}.{of_this}" for p in base.target_patterns]
    assert len(set(sources)) == len(sources) and len(set(targets)) == len(targets), base
    through = [p for p in layout.dense.values() if not p.sources.keys().isdisjoint(base.source_patterns)]
    routes = {
        name: (parameter.name, target)
        for parameter in through
        for name, target in zip((parameter.name, *parameter.others), targets, strict=True)
    }
    operations = [operation.reverse_op for operation in reversed(base.operations)]
    return RoutedConverter(routes, targets, sources, [*operations, back])


def _fresh_converters(layout: Layout) -> list[WeightTransform]:
    """Converters for Linears that are quantized while loading.

    Not renamings: with those, weights that transformers offloads to disk would stay unquantized.
    """
    fresh = {f"{name}.{weight.primary}": weight for name, weight in layout.kept.items() if weight.part is not None}
    if not fresh:
        return []
    parts = [(weight.part.key, weight.primary) for weight in fresh.values() if weight.part is not None]
    routes = {key: (companion(key, role), WEIGHT) for key, role in parts}
    nothing = RoutedConverter({}, [WEIGHT], [WEIGHT], [Reshape({})])  # saved under their current names
    return [RoutedConverter(routes, [WEIGHT], [WEIGHT], [QuantizeWeights(fresh, layout.broken)], reverse=nothing)]


def _experts_converters(layout: Layout, stacks: dict[str, Stack]) -> list[WeightTransform]:
    """Converters for experts that stay in FP8."""
    if not stacks:
        return []
    routes, back = {}, {}
    fresh = any(weight.part for stack in stacks.values() for weight in stack.weights)
    for target, stack in stacks.items():
        for part, weights in enumerate(stack.sources):
            for weight in weights:
                if weight.part is not None:
                    routes[weight.part.key] = (target, pattern(0 if weight.part.expert is not None else part, WEIGHT))
                    continue
                routes |= {weight.renamed[role]: (target, pattern(part, role)) for role in ROLES if role in weight.keys}
        back.update({stack.name_of(role): (target, pattern(0, role)) for role in stack.possible_roles})
    patterns = [pattern(0, role) for role in ROLES]
    reverse = RoutedConverter(back, patterns, ["hf_fp8_experts"], [SplitExperts(stacks)])
    if fresh:
        return [LazyConverter(routes, PATTERNS, ["hf_fp8_experts"], [QuantizeExperts(stacks, layout.broken)], reverse=reverse)]
    return [RoutedConverter(routes, PATTERNS, ["hf_fp8_experts"], [StackExperts(stacks)], reverse=reverse)]


def _scale_converters(layout: Layout) -> list[WeightTransform]:
    """Converters for scales whose shape in the files differs from that in the module."""
    forth, back, routes = {}, {}, {}
    for module, weight in layout.kept.items():
        scheme, (n, k) = weight.scheme.weight, weight.shape
        own = format_of(scheme).accepted(scheme, WEIGHT_SCALE, n, k)[0]
        for role, shape in ((WEIGHT_SCALE, own), (INPUT_SCALE, (1,))):
            if role in weight.keys and weight.shapes[role] != shape:
                name = f"{module}.{role}"
                forth[name], back[name] = shape, weight.shapes[role]
                routes[weight.renamed[role]] = (weight.renamed[role], "hf_fp8_scale")
    if not routes:
        return []
    reverse = RoutedConverter({n: (n, "hf_fp8_scale") for n in back}, ["hf_fp8_scale"], ["hf_fp8_scale"], [Reshape(back)])
    return [RoutedConverter(routes, ["hf_fp8_scale"], ["hf_fp8_scale"], [Reshape(forth)], reverse=reverse)]


class KeyRenaming(WeightRenaming):  # type: ignore[misc]
    """Renames exactly the given keys; the reverse restores their names in the files.

    prefix: that of the base model, which keys may gain or lose between loading and saving.
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
    """Routes each given key to a (target, source pattern); other keys go through `base`, if given.

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
        # The loader copies a converter for each parameter it makes; the copies share the routes.
        new = copy(self)
        new.collected_tensors, new.layer_targets = defaultdict(list), defaultdict(set)
        return new


class LazyConverter(RoutedConverter):
    """Passes functions that read the tensors to its op, instead of the tensors, so that the op reads one at a time."""

    def materialize_tensors(self) -> dict[str, list[Any]]:
        collected = dict(self.collected_tensors)
        self.collected_tensors.clear()
        return collected
