"""The transforms that carry out a layout: handed to the host's loader, reversed by its saver."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from zlib import crc32

import torch
from transformers.core_model_loading import WeightConverter, WeightTransform

from .conversion import (
    AsInBase,
    Dequantize,
    Parameter,
    QuantizeWeights,
    Requantize,
    Reshape,
    companion,
    plain_pattern,
)
from .converters import KeyRenaming, LateConverter, RoutedConverter
from .expert_conversion import PATTERNS, ROLES, QuantizeExperts, SplitExperts, StackExperts, pattern
from .expert_plan import ExpertsPlan, Stack
from .scan import Scan
from .scheme import scale_shape
from .stored import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, StoredWeight


@dataclass
class Layout:
    """kept: module -> weight that stays in FP8. experts: module -> experts that do. dense: parameter -> the weights
    multiplied out into it.

    reasons: name of a dense weight's module or parameter -> why it is dense. extra: names in the model -> keys in the files,
    of tensors that no module uses though they belong to its weights or its cache. unplaced: the same of those that this
    class of model has no place for. scales: name of a dense weight -> what its codes were multiplied by, for writing it
    back. missing: parameters that nothing in the files goes into. file_dtypes: parameter -> dtype of the dense tensors in
    the files that it is made of. input_scales: name of a weight -> what is wrong with its static input scale. broken: while
    loading, what was wrong with weights that were to be quantized.
    """

    kept: dict[str, StoredWeight] = field(default_factory=dict)
    experts: dict[str, ExpertsPlan] = field(default_factory=dict)
    dense: dict[str, Parameter] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    unplaced: dict[str, str] = field(default_factory=dict)
    conversions: list[WeightTransform] = field(default_factory=list)
    scan: Scan = field(default_factory=Scan)
    scales: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    file_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    input_scales: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def saves_fp8(self, dense_because: str | None) -> bool:
        """Whether the model saves as an FP8 checkpoint: something stays in FP8, or could."""
        return dense_because is None or bool(self.experts)


def transforms(
    layout: Layout,
    weights: list[StoredWeight],
    host: Sequence[WeightTransform],
    extra: list[WeightConverter],
    late: KeyRenaming,
) -> list[WeightTransform]:
    op, back = Dequantize(layout.dense), Requantize(layout.dense, layout.scales)
    stacks = {stack.target: stack for plan in layout.experts.values() for stack in plan.stacks}
    converters = [*_plain_converters(layout, op, back), *_scale_converters(layout)]
    converters += [*_fresh_converters(layout), *_experts_converters(layout, stacks)]
    for transform in extra:
        # Not used for loading what is stacked in the files; but what is written is one tensor per expert, its bias too.
        transform._was_used |= any(weight.part is not None and weight.part.expert is not None for weight in weights)
    for transform in [*host, *extra]:
        if isinstance(transform, WeightConverter):
            transform = _merged_converter(transform, layout, weights, op, back)
        converters.append(transform)
    # Of converters the first match wins: ours stand before the host's (see `for_saving`). Renamings all run: ours is the last.
    return [*converters, late] if late.names else converters


def for_saving(conversions: Sequence[WeightTransform]) -> list[WeightTransform]:
    """The same, such that the host's saver, which goes through them from the end, asks ours first: they know names."""
    last = [c for c in conversions if isinstance(c, RoutedConverter)]
    return [*(c for c in conversions if c not in last), *last]


def _plain_converters(layout: Layout, op: Dequantize, back: Requantize) -> list[WeightTransform]:
    """For weights that fill one parameter each."""
    routes, targets, roles = {}, {}, {WEIGHT}
    for parameter in layout.dense.values():
        if set(parameter.sources) != {WEIGHT}:
            continue
        (weight,) = parameter.weights
        # The host adds or strips the base model's prefix after this.
        target = weight.renamed[weight.primary].removesuffix("_packed")
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
    """`base`, dequantizing first, if any FP8 weight passes through it."""
    through = [w for w in weights if w.pattern in base.source_patterns and w.target in layout.dense]
    if not through:
        return base
    probe = deepcopy(base)
    routes: dict[str, tuple[str, str]] = {}
    roles: dict[str, None] = {}
    for weight in through:
        assert weight.pattern is not None
        renamed = probe.rename_source_key(weight.renamed[weight.primary].removesuffix("_packed"))[0]
        for role, key in weight.renamed.items():
            if role != WEIGHT:
                routes[key] = (renamed, companion(weight.pattern, role))
                roles[companion(weight.pattern, role)] = None
    reverse = _taken_apart(base, layout, back)
    operations = [op, *(AsInBase(operation, list(base.source_patterns)) for operation in base.operations)]
    sources = [*base.source_patterns, *roles]
    return RoutedConverter(routes, sources, list(base.target_patterns), operations, base=base, reverse=reverse)


def _taken_apart(base: WeightConverter, layout: Layout, back: Requantize) -> RoutedConverter:
    """The reverse of `base`: its operations undone, last to first, for the parameters that are made through it, by their
    names. The patterns of `base` are regular expressions, and no names."""
    sources = [plain_pattern(p) for p in base.source_patterns]
    # The host finds a converter by its pattern: two that make parameters of the same name, in two parts of a model, differ.
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
    """For Linears that are quantized while they are loaded. A converter, not a renaming: what the host offloads to disk
    would else stay what it is in the files."""
    fresh = {f"{name}.{WEIGHT}": weight for name, weight in layout.kept.items() if weight.part is not None}
    if not fresh:
        return []
    routes = {weight.part.key: (weight.part.key, WEIGHT) for weight in fresh.values() if weight.part is not None}
    nothing = RoutedConverter({}, [WEIGHT], [WEIGHT], [Reshape({})])  # saved under the names that they have
    return [RoutedConverter(routes, [WEIGHT], [WEIGHT], [QuantizeWeights(fresh, layout.broken)], reverse=nothing)]


def _experts_converters(layout: Layout, stacks: dict[str, Stack]) -> list[WeightTransform]:
    """For experts that stay in FP8."""
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
        back.update({stack.name_of(role): (target, pattern(0, role)) for role in stack.roles})
    patterns = [pattern(0, role) for role in ROLES]
    reverse = RoutedConverter(back, patterns, ["hf_fp8_experts"], [SplitExperts(stacks)])
    if fresh:
        return [LateConverter(routes, PATTERNS, ["hf_fp8_experts"], [QuantizeExperts(stacks, layout.broken)], reverse=reverse)]
    return [RoutedConverter(routes, PATTERNS, ["hf_fp8_experts"], [StackExperts(stacks)], reverse=reverse)]


def _scale_converters(layout: Layout) -> list[WeightTransform]:
    """For scales that the file holds in another shape than the module does."""
    forth, back, routes = {}, {}, {}
    for module, weight in layout.kept.items():
        shapes = {WEIGHT_SCALE: scale_shape(weight.scheme.weight.granularity, *weight.shape), INPUT_SCALE: (1,)}
        for role, shape in shapes.items():
            if role in weight.keys and weight.shapes[role] != shape:
                name = f"{module}.{role}"
                forth[name], back[name] = shape, weight.shapes[role]
                routes[weight.renamed[role]] = (weight.renamed[role], "hf_fp8_scale")
    if not routes:
        return []
    reverse = RoutedConverter({n: (n, "hf_fp8_scale") for n in back}, ["hf_fp8_scale"], ["hf_fp8_scale"], [Reshape(back)])
    return [RoutedConverter(routes, ["hf_fp8_scale"], ["hf_fp8_scale"], [Reshape(forth)], reverse=reverse)]
