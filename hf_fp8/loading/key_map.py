"""Maps keys of checkpoint files to parameter names as transformers' loader does, plus per-expert names that it does not map.

llm-compressor splits merged experts into ``experts.N.{gate,up,down}_proj`` Linears, for every model family. transformers ("the
host" in comments) maps only the older names on the Hub (Mixtral: w1, w3, w2), or none at all (gpt-oss and Llama-4, whose merged
parameters are transposed; those of gpt-oss are also interleaved and have biases).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy, deepcopy

from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    rename_source_key,
)

from ..checkpoint.scan import Owner, names_of
from ..formats.storage import PACKED, WEIGHT
from ..nn.experts_layout import ExpertsLayout
from .facts import ModelFacts

EXPERT = re.compile(
    r"^(?P<experts>(?:.*\.)?experts)\.(?P<index>\d+)\.(?P<projection>gate_proj|up_proj|down_proj)\.(?P<rest>.+)$"
)
HUB_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class KeyMap:
    """Maps keys of the files to parameters (`resolve`), by the rules of transformers' loader in the same order.

    shapes: of the model's parameters and buffers, by name. prefix: that of its base model. aliases: a key after transformers'
    renamings -> the name to use instead. unmapped_experts: layout and end of the module path of experts whose names
    transformers does not map; our `converters` do.

    Results are cached: a large MoE model has a hundred thousand keys, and some of transformers' renamings are stateful.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], prefix: str, conversions: Sequence[WeightTransform]) -> None:
        conversions = deepcopy(list(conversions))  # they record whether they were used
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.shapes = shapes
        self.prefix = prefix
        self._is_base = not any(name.startswith(f"{prefix}.") for name in shapes)
        self.aliases: dict[str, str] = {}
        self.unmapped_experts: tuple[ExpertsLayout, str] | None = None
        self._plain: dict[str, str] = {}
        self._converted: dict[str, tuple[str, str | None]] = {}

    @classmethod
    def of(cls, model: ModelFacts, conversions: Sequence[WeightTransform], keys: Iterable[str]) -> KeyMap:
        """The KeyMap of a checkpoint with these keys, which also maps llm-compressor's names of experts."""
        keymap = cls({name: parameter.shape for name, parameter in model.params.items()}, model.prefix, conversions)
        for key in keys:
            keymap._map_expert(key, model)
        return keymap

    def _map_expert(self, key: str, model: ModelFacts) -> None:
        """Map the key of an expert for which transformers' mapping finds no parameter: by an alias, or by converters."""
        renamed = self.rename(key)
        other = hub_name(renamed)
        if other is None:
            return
        # A scale is mapped like its weight, whose name follows from that of the scale.
        home = renamed if renamed.endswith(".bias") else renamed.rpartition(".")[0] + f".{WEIGHT}"
        if self.convert(home)[0] in self.shapes:
            return
        weight = other.rpartition(".")[0] + f".{WEIGHT}"
        if self.convert(weight)[0] in self.shapes:
            self.aliases[renamed] = other
        elif self.unmapped_experts is None:
            path = renamed[: renamed.index("experts.") + len("experts")]
            # The base model's prefix may be in the file, in the model, in both or in none.
            paths = (path, f"{self.prefix}.{path}", path.removeprefix(f"{self.prefix}."))
            layout = next(filter(None, map(model.experts, paths)), None)
            if layout is not None:
                self.unmapped_experts = layout, _stem(path)
                self._converters += converters(*self.unmapped_experts)
                self._converted.clear()

    def plain(self, key: str) -> str:
        """`key` after transformers' renamings, without our aliases."""
        renamed = self._plain.get(key)
        if renamed is None:
            renamed = self._plain[key] = apply_renamings(key, self._renamings)
        return renamed

    def rename(self, key: str) -> str:
        """`key` after all renamings, before any converter."""
        renamed = self.plain(key)
        return self.aliases.get(renamed, renamed)

    def convert(self, renamed: str) -> tuple[str, str | None]:
        """(parameter of the model, source pattern of the converter that makes it, or None) of a renamed key."""
        found = self._converted.get(renamed)
        if found is None:
            target, pattern = apply_converters(renamed, self._converters)
            found = self._converted[renamed] = (self._with_prefix(target), pattern)
        return found

    def converter(self, pattern: str | None) -> WeightConverter | None:
        """The converter with the source `pattern`."""
        return next((c for c in self._converters if pattern in c.source_patterns), None)

    def others(self, renamed: str, pattern: str | None) -> tuple[str, ...]:
        """The other parameters that the converter with the source `pattern` makes together with the one from `convert`."""
        used = self.converter(pattern)
        if used is None or len(used.target_patterns) == 1:
            return ()
        found = []
        for pattern in used.target_patterns[1:]:
            probe = copy(used)
            object.__setattr__(probe, "target_patterns", [pattern])  # the class forbids setting it
            found.append(self._with_prefix(probe.rename_source_key(renamed)[0]))
        return tuple(found)

    def is_stacking(self, pattern: str) -> bool:
        """Whether the converter with the source `pattern` stacks its numbered tensors into one parameter."""
        used = self.converter(pattern)
        return used is not None and len(used.target_patterns) == 1 and isinstance(used.operations[0], MergeModulelist)

    def turns(self, target: str, pattern: str | None, shape: tuple[int, ...]) -> bool:
        """Whether the converter with the source `pattern` transposes a stack of this shape for the parameter `target`.

        Some converters always transpose, others only if the shapes differ.
        """
        used = self.converter(pattern)
        turning = [op for op in used.operations if isinstance(op, Transpose)] if used is not None else []
        if any(op.check_dims for op in turning):
            return shape != self.shapes[target]
        return len(turning) % 2 == 1

    def keeps(self, key: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of the files goes into its parameter unchanged: without a converter, or through one that could only
        transpose it, and does not."""
        target, pattern = self.resolve(key)
        used = self.converter(pattern)
        turns_only = used is None or all(isinstance(op, Transpose) for op in used.operations)
        return turns_only and target in self.shapes and not self.turns(target, pattern, shape)

    def resolve(self, key: str) -> tuple[str, str | None]:
        """(parameter of the model, source pattern or None) of a key of the files."""
        target, pattern = self.convert(self.rename(key))
        if target not in self.shapes and key in self.shapes:
            return self._with_prefix(key), None
        return target, pattern

    def names_of(self, name: str, place: str, module: str | None = None) -> tuple[str, ...]:
        """`scan.names_of` of a module that is called `name` in the files and `place` in the model.

        module: the existing module that it is, or is merged into, if that is not `place`.
        """
        inside = self._is_base or (module or place).startswith(f"{self.prefix}.")
        return names_of(name, place, self.prefix, inside)

    def owner(self, key: str, called: str, model: ModelFacts) -> Owner:
        """The module of the model to which the weight `key` of the files belongs. called: the name of its module there."""
        key = plain_weight(key)
        target, pattern = self.resolve(key)
        name = target.removesuffix(f".{WEIGHT}")
        places = (name, name.rpartition(".")[0]) if target in self.shapes else (name,)
        place = next((place for place in places if place in model.modules), None)
        if pattern is not None:
            name = self.rename(key).removesuffix(f".{WEIGHT}")  # each expert is named separately
        if place is None:  # the model lacks it, so nothing is known of it but its name
            return Owner(names_of(called, name, self.prefix, inside=False))
        module = model.modules[place]
        return Owner(self.names_of(called, name, place), place, module.cls, module.has_weight)

    def _with_prefix(self, name: str) -> str:
        completed: str = rename_source_key(name, [], [], self.prefix, self.shapes)[0]
        return completed


def plain_weight(key: str) -> str:
    """The name that a weight would have if its codes were not packed; other keys are returned unchanged."""
    return key.removesuffix(PACKED) + WEIGHT if key.endswith(PACKED) else key


def _stem(path: str) -> str:
    """The end of the path of an experts module, by which converters find it in every layer.

    With the parent's name, as `experts` alone also matches the end of `shared_experts`; if that is the number of a layer, with
    the dot before it.
    """
    *_, parent, name = ("", *path.split("."))
    return rf"\.{name}" if parent.isdigit() else f"{parent}.{name}" if parent else name  # regular expressions


def hub_name(key: str) -> str | None:
    """`key` with its projection named as in Mixtral checkpoints on the Hub; None if `key` is not one of an expert."""
    found = EXPERT.match(key)
    if found is None:
        return None
    return f"{found['experts']}.{found['index']}.{HUB_NAMES[found['projection']]}.{found['rest']}"


class PlainMerge(WeightConverter):  # type: ignore[misc]
    """Our converter from one tensor per expert to the layout of a model family."""


def converters(layout: ExpertsLayout, stem: str) -> list[WeightConverter]:
    """Converters from ``experts.N.{gate,up,down}_proj`` to this layout. stem: the end of the path of the experts modules."""
    interleave: list[ConversionOps] = [] if layout.is_concatenated else [Interleave(dim=1, inverse=True)]
    transpose: list[ConversionOps] = [Transpose(1, 2)] if layout.is_transposed else []

    def first(leaf: str, target: str, last: list[ConversionOps]) -> WeightConverter:
        if not layout.has_gate:
            return PlainMerge(f"{stem}.*.up_proj.{leaf}", target, [MergeModulelist(0), *last])
        sources = [f"{stem}.*.gate_proj.{leaf}", f"{stem}.*.up_proj.{leaf}"]
        return PlainMerge(sources, target, [MergeModulelist(0), Concatenate(1), *interleave, *last])

    def down(leaf: str, target: str, last: list[ConversionOps]) -> WeightConverter:
        return PlainMerge(f"{stem}.*.down_proj.{leaf}", target, [MergeModulelist(0), *last])

    made = [first("weight", f"{stem}.{layout.first}", transpose), down("weight", f"{stem}.down_proj", transpose)]
    if layout.has_bias:
        made += [first("bias", f"{stem}.{layout.first}_bias", []), down("bias", f"{stem}.down_proj_bias", [])]
    return made
