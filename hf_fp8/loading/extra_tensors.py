"""Tensors of the files that no module of the model holds: carried along, and written back under the names that they had."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, WeightTransform, apply_renamings, dot_natural_key
from transformers.utils import logging

from ..checkpoint.reader import Checkpoint
from ..checkpoint.validate import Scan
from ..errors import FP8Error
from .conversions import KeyRenaming, RoutedConverter
from .facts import is_of_class
from .keys import KeyMap
from .ops import Reshape

logger = logging.get_logger(__name__)
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
        if key not in placed and key not in cache and (key in left or keymap.resolve(key)[0] not in keymap.shapes)
    ]


@dataclass
class Unplaced:
    """Tensors that the model has no place for: names in the model -> keys of the files, which are read when it is saved."""

    checkpoint: Checkpoint
    keys: dict[str, str]

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors, by their names in the model. None, with a warning, if the files are not what they were."""
        try:
            tensors = self.checkpoint.read(list(self.keys.values()))
        except (FP8Error, OSError) as error:
            logger.warning(f"hf_fp8: {len(self.keys)} tensors ({some(self.keys.values())}) are not saved: {error}")
            return {}
        return {name: tensors[key] for name, key in self.keys.items()}


def belong_to(model: PreTrainedModel, files: Sequence[str]) -> bool:
    """Whether what the model has no place for belongs to what is saved: not, if the checkpoint is of another class that
    shares a part with it, or if somebody made it with fewer layers than it has in the files."""
    if not is_of_class(model):
        return False
    try:
        written = json.loads((Path(files[0]).parent / "config.json").read_text())
        held = model.config.to_dict()
    except (OSError, ValueError, IndexError):
        return True
    return all(written[key] == held.get(key) for key in written.keys() & {"num_hidden_layers", "n_layer", "num_layers"})


def some(keys: Iterable[str]) -> str:
    """For people: the names among `keys`, those of all layers and experts in one."""
    folded = dict.fromkeys(".".join("*" if part.isdigit() else part for part in key.split(".")) for key in keys)
    return ", ".join(list(folded)[:12]) + (", ..." if len(folded) > 12 else "")


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
