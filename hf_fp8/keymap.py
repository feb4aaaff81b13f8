"""What the host's loader will call the keys of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    rename_source_key,
)


class KeyMap:
    """What the host's loader will call a key of the files: `resolve`, with the same rules in the same order."""

    def __init__(self, model: PreTrainedModel, conversions: Sequence[WeightTransform]) -> None:
        conversions = deepcopy(list(conversions))  # they note which of them were used, and some are stateful
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self.converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.params = model.state_dict()
        self.prefix = model.base_model_prefix
        self.aliases: dict[str, str] = {}

    def rename(self, key: str) -> str:
        """`key` after all renamings, before any converter."""
        renamed: str = apply_renamings(key, self.renamings)
        return self.aliases.get(renamed, renamed)

    def convert(self, renamed: str) -> tuple[str, str | None]:
        """(parameter of the model, source pattern of the converter that makes it or None) of a renamed key."""
        target, pattern = apply_converters(renamed, self.converters)
        return rename_source_key(target, [], [], self.prefix, self.params)[0], pattern

    def resolve(self, key: str) -> tuple[str, str | None]:
        target, pattern = self.convert(self.rename(key))
        if target not in self.params and key in self.params:
            return rename_source_key(key, [], [], self.prefix, self.params)[0], None
        return target, pattern
