"""Tensors of the files that no module of the model holds: carried along, and written back under the names that they had."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, WeightTransform, apply_renamings, dot_natural_key

from .checkpoint import Checkpoint
from .conversion import KeyRenaming, Reshape, RoutedConverter
from .keymap import KeyMap
from .scan import Scan

_PASSED = "hf_fp8_extra"


class FileNames(KeyRenaming):
    """Gives tensors back the names of the files where the host's renamings, undone, do not. It stands before all of them, so
    that it comes last when they are undone."""


def unplaced(checkpoint: Checkpoint, scanned: Scan, keymap: KeyMap) -> list[str]:
    """Keys of the files that the model has no parameter for (the layer that predicts a second token, old buffers)."""
    weights = [*scanned.weights, *scanned.host]
    placed = {key for weight in weights if weight.target for key in weight.keys.values()}
    left = {key for weight in weights if not weight.target for key in weight.keys.values()}
    cache = set(scanned.cache)
    return [
        key
        for key in checkpoint.tensors
        if key not in placed and key not in cache and (key in left or keymap.resolve(key)[0] not in keymap.params)
    ]


def is_whole(model: PreTrainedModel) -> bool:
    """Whether a checkpoint is one of this class of model, and not of another that shares a part with it: only then do its
    other tensors belong to what is saved."""
    written = getattr(model.config, "architectures", None)
    return not written or type(model).__name__ in written


def by_pattern(names: Sequence[str]) -> list[str]:
    """Regular expressions that match `names`, one for all that differ in numbers alone."""
    folded = (re.sub(r"(?<=\\.)\d+(?=\\.)", r"\\d+", re.escape(name)) for name in names)
    return [f"^{pattern}$" for pattern in dict.fromkeys(folded)]


def keep_names(model: Any, extra: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
    """See to it that `model` is saved under the names of its files.

    extra: the tensors that are added to the model's own, by the names under which they are handed to the saver. names: such
    a name, or that of a quantized weight's tensor -> the key of the files.
    """
    conversions: list[WeightTransform] = [
        c for c in model._weight_conversions if not isinstance(c, FileNames) and c.source_patterns != [_PASSED]
    ]
    undone = [deepcopy(c).reverse_transform() for c in reversed(conversions) if isinstance(c, WeightRenaming)]
    prefix = f"{model.base_model_prefix}."
    wrong = {}
    for name in sorted(names, key=dot_natural_key):
        key, found = names[name], apply_renamings(name, undone)
        # With or without the base model's prefix is the host's choice, for all tensors alike.
        if found.removeprefix(prefix) != key.removeprefix(prefix):
            wrong[key] = found
    if extra:
        passed = RoutedConverter({name: (name, _PASSED) for name in extra}, [_PASSED], [_PASSED], [Reshape({})])
        conversions.append(RoutedConverter({}, [_PASSED], [_PASSED], [Reshape({})], reverse=passed))
    model._weight_conversions = [FileNames(wrong), *conversions] if wrong else conversions
