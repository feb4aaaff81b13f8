"""Determines which parameters of a model the files fill, and raises if they lack tensors that they should have."""

from __future__ import annotations

import re

from ..checkpoint.reader import Checkpoint
from ..checkpoint.scan import Scan
from ..errors import MismatchError, MissingTensorError
from ..formats.storage import WEIGHT
from .facts import ModelFacts
from .key_map import KeyMap, plain_weight

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_LAYER = re.compile(r".*?\.\d+\.")


def check_coverage(model: ModelFacts, keymap: KeyMap, checkpoint: Checkpoint, scanned: Scan) -> tuple[set[str], list[str]]:
    """Return the parameters that the files fill, and those that they do not.

    Raises MissingTensorError for a missing parameter, which transformers would initialize randomly: for any, if config.json
    names this model class; otherwise only if the files hold other tensors of the same layer or of the same kind.
    """
    filled: set[str] = set()
    numbered: dict[tuple[str, str], list[str]] = {}
    for key in checkpoint.tensors:
        target, pattern = keymap.resolve(key)
        if pattern is not None and "*" in pattern and target in model.params:
            numbered.setdefault((target, pattern), []).append(key)
        filled.update((target, *keymap.others(keymap.rename(key), pattern)))
    filled |= {weight.target for weight in scanned.weights if weight.target}  # packed codes have another name
    filled |= {weight.module + f".{WEIGHT}" for weight in scanned.host}
    filled |= {keymap.resolve(f"{weight.name}.{WEIGHT}")[0] for weight in scanned.host}
    missing = _missing(model, filled)
    quantized = {weight.keys[weight.primary] for weight in [*scanned.weights, *scanned.host]}
    for (target, pattern), keys in numbered.items():
        if not quantized.issuperset(keys):  # otherwise `check_experts` raises a more precise error
            _check_numbers(target, pattern, keys, keymap, checkpoint)
    _check_siblings(missing, scanned)
    _check_names(model, missing, scanned)
    lacking = [name for name in missing if model.params[name].is_parameter]
    _check_layers(filled, lacking)
    if model.is_of_class and lacking:
        raise MissingTensorError(
            f"{lacking[0]} has no tensor in the files ({len(lacking)} such parameters of {model.cls}): the checkpoint is "
            "incomplete (a shard may be missing), and transformers would initialize them randomly"
        )
    return filled, missing


def _missing(model: ModelFacts, filled: set[str]) -> list[str]:
    """Parameters and buffers that the files do not fill and that the model class does not allow to be missing."""
    ignored = [re.compile(pattern) for pattern in model.ignore_missing]
    # Of tied parameters the files need only one: transformers ties in both directions.
    tied: dict[str, set[str]] = {}
    for name, source in model.tied.items():
        tied.setdefault(source, {source}).add(name)
    held = filled.union(*(group for group in tied.values() if group & filled), model.tied)
    return [name for name in model.params if name not in held and not any(p.search(name) for p in ignored)]


def _check_numbers(target: str, pattern: str, keys: list[str], keymap: KeyMap, checkpoint: Checkpoint) -> None:
    """Check tensors that transformers stacks in order of their numbers, such as one bias per expert: none may be missing."""
    by_number: dict[int, str] = {}
    for key in keys:
        number = next((int(part) for part in reversed(keymap.rename(key).split(".")) if part.isdigit()), -1)
        if number in by_number:
            raise MismatchError(f"{key} and {by_number[number]} both map to index {number} of {target}")
        by_number[number] = key
    count = keymap.shapes[target][0] if keymap.is_stacking(pattern) else len(keys)
    if sorted(by_number) != list(range(count)):
        lost = next((number for number in range(count) if number not in by_number), count)
        raise MissingTensorError(
            f"{target} needs {count} tensors numbered from 0, the files have {len(keys)} for it (such as {keys[0]}): "
            + (f"number {lost} is not in the files" if lost < count else f"{by_number[max(by_number)]} is one too many")
        )
    first = checkpoint.tensors[by_number[0]]
    for key in keys:
        info = checkpoint.tensors[key]
        if keymap.is_stacking(pattern) and info.shape != first.shape and not info.dtype.startswith("F8_"):
            raise MismatchError(
                f"{key} has shape {list(info.shape)}; {by_number[0]}, with which it is stacked into {target}, has "
                f"{list(first.shape)}"
            )


def _check_siblings(missing: list[str], scanned: Scan) -> None:
    siblings = {_NUMBER.sub("*", weight.target): weight.target for weight in scanned.weights if weight.target}
    for name in missing:
        sibling = siblings.get(_NUMBER.sub("*", name))
        if sibling is not None:
            raise MissingTensorError(
                f"{name} has no tensor in the files, but {sibling} of another layer or expert has one: the checkpoint is "
                "incomplete (a shard may be missing), and transformers would initialize it randomly"
            )


def _check_names(model: ModelFacts, missing: list[str], scanned: Scan) -> None:
    """Raise if FP8 weights match no module while modules lack weights: then their names do not correspond."""
    extra = [re.compile(pattern) for pattern in model.ignore_unexpected]
    keys = [plain_weight(weight.keys[weight.primary]) for weight in scanned.weights if not weight.target]
    unmatched = [key for key in keys if not any(pattern.search(key) for pattern in extra)]
    # Not an error by itself: a head in the files that this class lacks, or a head that it adds.
    if unmatched and missing and not any(weight.target for weight in scanned.weights):
        raise MissingTensorError(
            f"none of the {len(unmatched)} quantized weights of the files (such as {unmatched[0]}) matches a module of "
            f"{model.cls}, and {len(missing)} of its parameters have no tensor in the files (such as {missing[0]}): their "
            "names do not fit together. Check the `model_type` in config.json and the model class"
        )
    prefix = f"{model.prefix}."
    inside = [name for name in missing if name.startswith(prefix)]
    ends = {tuple(parameter.split(".")[-3:]): parameter for parameter in missing}
    for key in unmatched:
        other = ends.get(tuple(key.split(".")[-3:]))
        if other is None and key.startswith(prefix) and inside:
            other = inside[0]
        if other is not None:
            raise MissingTensorError(
                f"{len(unmatched)} quantized weights of the files match no module of {model.cls} (such as {key}), and "
                f"{len(missing)} of its parameters have no tensor in the files (such as {other}): their names do not fit "
                "together"
            )


def _check_layers(filled: set[str], missing: list[str]) -> None:
    """Raise if the files hold only a part of a layer."""
    begun = {match.group() for name in filled if (match := _LAYER.match(name))}
    for name in missing:
        match = _LAYER.match(name)
        if match and match.group() in begun:
            raise MissingTensorError(
                f"{name} has no tensor in the files, but other parameters of {match.group()[:-1]} have: the checkpoint is "
                "incomplete, or its names do not fit the model, and transformers would initialize it randomly"
            )
