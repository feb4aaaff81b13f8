"""What the host's loader will call the keys of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy

from transformers import PreTrainedModel
from transformers.core_model_loading import (
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    rename_source_key,
)


class KeyMap:
    """What the host's loader will call a key of the files: `resolve`, with the same rules in the same order.

    aliases: a key after the host's renamings -> what it is to be called instead. Each key is looked up
    once: a large mixture of experts has a hundred thousand, and some of the host's renamings are stateful.
    """

    def __init__(self, model: PreTrainedModel, conversions: Sequence[WeightTransform]) -> None:
        conversions = deepcopy(list(conversions))  # they note which of them were used
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.params = model.state_dict()
        self.prefix = model.base_model_prefix
        self.aliases: dict[str, str] = {}
        self._plain: dict[str, str] = {}
        self._converted: dict[str, tuple[str, str | None]] = {}

    def add(self, converters: Sequence[WeightConverter]) -> None:
        """Converters that the host does not have, to be tried after its own."""
        self._converters += converters
        self._converted.clear()

    def plain(self, key: str) -> str:
        """`key` after the host's renamings, without our aliases."""
        renamed = self._plain.get(key)
        if renamed is None:
            renamed = self._plain[key] = apply_renamings(key, self._renamings)
        return renamed

    def rename(self, key: str) -> str:
        """`key` after all renamings, before any converter."""
        renamed = self.plain(key)
        return self.aliases.get(renamed, renamed)

    def convert(self, renamed: str) -> tuple[str, str | None]:
        """(parameter of the model, source pattern of the converter that makes it or None) of a renamed key."""
        found = self._converted.get(renamed)
        if found is None:
            target, pattern = apply_converters(renamed, self._converters)
            found = self._converted[renamed] = (self._with_prefix(target), pattern)
        return found

    def others(self, renamed: str, pattern: str | None) -> tuple[str, ...]:
        """The parameters, beside the one that `convert` gives, that the converter with the source `pattern` makes with it."""
        used = next((c for c in self._converters if pattern in c.source_patterns), None)
        if used is None or len(used.target_patterns) == 1:
            return ()
        found = []
        for pattern in used.target_patterns[1:]:
            probe = copy(used)
            object.__setattr__(probe, "target_patterns", [pattern])  # the class lets nobody change it
            found.append(self._with_prefix(probe.rename_source_key(renamed)[0]))
        return tuple(found)

    def is_stacking(self, pattern: str) -> bool:
        """Whether the converter with the source `pattern` stacks its tensors, one for each number, into one parameter."""
        used = next((c for c in self._converters if pattern in c.source_patterns), None)
        return used is not None and len(used.target_patterns) == 1 and isinstance(used.operations[0], MergeModulelist)

    def turns(self, target: str, pattern: str | None, shape: tuple[int, ...]) -> bool:
        """Whether the converter with the source `pattern` swaps the sides of the matrices in a stack of this shape that goes
        into the parameter `target`: always, or only where they lie the other way."""
        used = next((c for c in self._converters if pattern in c.source_patterns), None)
        turning = [op for op in used.operations if isinstance(op, Transpose)] if used is not None else []
        if any(op.check_dims for op in turning):
            return shape != tuple(self.params[target].shape)
        return len(turning) % 2 == 1

    def keeps(self, key: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of the files goes into its parameter as it is: through no converter, or through one that turns what
        lies the other way, and does nothing more."""
        target, pattern = self.resolve(key)
        used = next((c for c in self._converters if pattern in c.source_patterns), None)
        turns_only = used is None or all(isinstance(op, Transpose) for op in used.operations)
        return turns_only and target in self.params and not self.turns(target, pattern, shape)

    def resolve(self, key: str) -> tuple[str, str | None]:
        """(parameter of the model, source pattern or None) of a key of the files."""
        target, pattern = self.convert(self.rename(key))
        if target not in self.params and key in self.params:
            return self._with_prefix(key), None
        return target, pattern

    def _with_prefix(self, name: str) -> str:
        completed: str = rename_source_key(name, [], [], self.prefix, self.params)[0]
        return completed
