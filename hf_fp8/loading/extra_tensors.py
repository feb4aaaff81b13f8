"""Tensors of the files that no module of the model uses: kept, and saved again under their original names."""

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
from ..checkpoint.scan import Scan
from ..errors import FP8Error
from .conversions import KeyRenaming, RoutedConverter
from .facts import is_of_class
from .key_map import KeyMap
from .ops import Reshape

logger = logging.get_logger(__name__)
_PASSED = "hf_fp8_extra"


class FileNames(KeyRenaming):
    """Restores the file names of tensors where reversing transformers' renamings does not.

    It is the first of the transforms, so that it runs last when they are reversed.
    """


def unplaced(checkpoint: Checkpoint, scanned: Scan, keymap: KeyMap) -> list[str]:
    """Keys of the files for which the model has no parameter, such as a multi-token prediction layer or obsolete buffers."""
    weights = [*scanned.weights, *scanned.host]
    placed = {key for weight in weights if weight.target for key in weight.keys.values()}
    placed.update(scanned.cache)
    return [key for key in checkpoint.tensors if key not in placed and keymap.resolve(key)[0] not in keymap.shapes]


@dataclass
class Unplaced:
    """Tensors for which the model has no parameter, read from the files only on saving. keys: name for saving -> key."""

    checkpoint: Checkpoint
    keys: dict[str, str]

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors by name; an empty dict, with a warning, if the files have changed or cannot be read."""
        try:
            tensors = self.checkpoint.read(list(self.keys.values()))
        except (FP8Error, OSError) as error:
            logger.warning(f"hf_fp8: {len(self.keys)} tensors ({some(self.keys.values())}) are not saved: {error}")
            return {}
        return {name: tensors[key] for name, key in self.keys.items()}


def belong_to(model: PreTrainedModel, files: Sequence[str]) -> bool:
    """Whether tensors of the files without a parameter in the model are saved with it.

    They are not if the checkpoint is of another model class, or if the model was loaded with fewer layers than the files have.
    """
    if not is_of_class(model):
        return False
    try:
        written = json.loads((Path(files[0]).parent / "config.json").read_text())
        held = model.config.to_dict()
    except (OSError, ValueError, IndexError):
        return True
    return all(written[key] == held.get(key) for key in written.keys() & {"num_hidden_layers", "n_layer", "num_layers"})


def some(keys: Iterable[str]) -> str:
    """The first 12 of `keys` for a message, with numbers replaced by `*`, so that layers and experts share one entry."""
    folded = dict.fromkeys(".".join("*" if part.isdigit() else part for part in key.split(".")) for key in keys)
    return ", ".join(list(folded)[:12]) + (", ..." if len(folded) > 12 else "")


def any_number(name: str) -> str:
    """A regular expression that matches `name` with any layer and expert number."""
    return re.sub(r"(?<=\\.)\d+(?=\\.)", r"\\d+", re.escape(name)) + "$"


def by_pattern(names: Sequence[str]) -> list[str]:
    """Regular expressions that match `names`: one for all names that differ only in numbers."""
    return list(dict.fromkeys(f"^{any_number(name)}" for name in names))


def keep_names(model: Any, extra: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
    """Make `model` save its tensors under the names they have in its files.

    extra: tensors saved in addition to those of the model, by the names passed to the saver. names: such a name, or that of a
    quantized weight's tensor -> key in the files.
    """
    conversions: list[WeightTransform] = [
        c for c in model._weight_conversions if not isinstance(c, FileNames) and c.source_patterns != [_PASSED]
    ]
    undone = [deepcopy(c).reverse_transform() for c in reversed(conversions) if isinstance(c, WeightRenaming)]
    prefix = f"{model.base_model_prefix}."
    wrong = {}
    for name in sorted(names, key=dot_natural_key):
        key, found = names[name], apply_renamings(name, undone)
        # transformers adds or strips the base model's prefix, for all tensors alike.
        if found.removeprefix(prefix) != key.removeprefix(prefix):
            wrong[key] = found
    if extra:
        passed = RoutedConverter({name: (name, _PASSED) for name in extra}, [_PASSED], [_PASSED], [Reshape({})])
        conversions.append(RoutedConverter({}, [_PASSED], [_PASSED], [Reshape({})], reverse=passed))
    model._weight_conversions = [FileNames(wrong), *conversions] if wrong else conversions
