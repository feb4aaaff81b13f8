"""Which parameters of a model the files fill; and errors for those that they ought to fill, and do not."""

from __future__ import annotations

import re

from ..checkpoint.reader import Checkpoint
from ..checkpoint.validate import Scan
from ..checkpoint.weights import WEIGHT
from ..errors import MismatchError, MissingTensorError
from .facts import ModelFacts
from .keys import KeyMap

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_LAYER = re.compile(r".*?\.\d+\.")


def check_coverage(model: ModelFacts, keymap: KeyMap, checkpoint: Checkpoint, scanned: Scan) -> tuple[set[str], list[str]]:
    """The parameters that the files fill, and those that they do not.

    Raises MissingTensorError where the host would leave a parameter random that the files ought to fill: all of them, if the
    checkpoint is one of this class of model; else those of whose layer, or kind, they hold a part.
    """
    filled: set[str] = set()
    numbered: dict[tuple[str, str], list[str]] = {}
    for key in checkpoint.tensors:
        target, pattern = keymap.resolve(key)
        if pattern is not None and "*" in pattern and target in model.params:
            numbered.setdefault((target, pattern), []).append(key)
        filled.update((target, *keymap.others(keymap.rename(key), pattern)))
    filled |= {weight.module + f".{WEIGHT}" for weight in scanned.host}
    filled |= {keymap.resolve(f"{weight.name}.{WEIGHT}")[0] for weight in scanned.host}
    missing = _missing(model, filled)
    quantized = {weight.keys[weight.primary] for weight in [*scanned.weights, *scanned.host]}
    for (target, pattern), keys in numbered.items():
        if not quantized.issuperset(keys):  # else `check_experts` says it better
            _check_numbers(target, pattern, keys, keymap, checkpoint)
    _check_siblings(missing, scanned)
    _check_names(model, missing, scanned)
    lacking = [name for name in missing if model.params[name].is_parameter]
    _check_layers(filled, lacking)
    if model.is_of_class and lacking:
        raise MissingTensorError(
            f"no tensor in the files goes into {lacking[0]} ({len(lacking)} parameters of {model.cls} in all): the "
            "checkpoint is incomplete (a shard may be missing), and the host would leave them random"
        )
    return filled, missing


def _missing(model: ModelFacts, filled: set[str]) -> list[str]:
    """Parameters and buffers that the files do not fill, though the class says nothing of that."""
    ignored = [re.compile(pattern) for pattern in model.ignore_missing]
    # Of parameters that are tied, the files need hold one: the host ties either way.
    tied: dict[str, set[str]] = {}
    for name, source in model.tied.items():
        tied.setdefault(source, {source}).add(name)
    held = filled.union(*(group for group in tied.values() if group & filled), model.tied)
    return [name for name in model.params if name not in held and not any(p.search(name) for p in ignored)]


def _check_numbers(target: str, pattern: str, keys: list[str], keymap: KeyMap, checkpoint: Checkpoint) -> None:
    """Tensors that the host stacks in the order of their numbers, such as one bias of each expert: none may be missing."""
    by_number: dict[int, str] = {}
    for key in keys:
        number = next((int(part) for part in reversed(keymap.rename(key).split(".")) if part.isdigit()), -1)
        if number in by_number:
            raise MismatchError(f"{key} and {by_number[number]} both go into place {number} of {target}")
        by_number[number] = key
    count = keymap.shapes[target][0] if keymap.is_stacking(pattern) else len(keys)
    if sorted(by_number) != list(range(count)):
        lost = next((number for number in range(count) if number not in by_number), count)
        raise MissingTensorError(
            f"{len(keys)} tensors such as {keys[0]} go into {target}, which takes those with the numbers 0 to {count - 1}: "
            + (f"number {lost} is not in the files" if lost < count else f"{by_number[max(by_number)]} is one too many")
        )
    first = checkpoint.tensors[by_number[0]]
    for key in keys:
        info = checkpoint.tensors[key]
        if keymap.is_stacking(pattern) and info.shape != first.shape and not info.dtype.startswith("F8_"):
            raise MismatchError(
                f"{key} has shape {list(info.shape)}; {by_number[0]}, with which it goes into {target}, has {list(first.shape)}"
            )


def _check_siblings(missing: list[str], scanned: Scan) -> None:
    siblings = {_NUMBER.sub("*", weight.target): weight.target for weight in scanned.weights if weight.target}
    for name in missing:
        sibling = siblings.get(_NUMBER.sub("*", name))
        if sibling is not None:
            raise MissingTensorError(
                f"no tensor in the files goes into {name}, though its sibling {sibling} is there: the checkpoint is "
                "incomplete (a shard may be missing), and the host would leave it random"
            )


def _check_names(model: ModelFacts, missing: list[str], scanned: Scan) -> None:
    """FP8 weights that find no module while modules find no weights: one of the two has other names."""
    extra = [re.compile(pattern) for pattern in model.ignore_unexpected]
    unmatched = [w.keys[WEIGHT] for w in scanned.weights if not w.target and not any(p.search(w.keys[WEIGHT]) for p in extra)]
    # A head that this class lacks may be unmatched, one that it adds may be missing: not the same names of both.
    if unmatched and missing and not any(weight.target for weight in scanned.weights):
        raise MissingTensorError(
            f"none of the {len(unmatched)} FP8 weights of the files (such as {unmatched[0]}) has a place in "
            f"{model.cls}, of which {len(missing)} parameters find none (such as {missing[0]}): their names do "
            "not fit together, as with another `model_type` in config.json, or another class, than the checkpoint's"
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
                f"{len(unmatched)} FP8 weights of the files have no place in {model.cls} (such as {key}), while "
                f"{len(missing)} of its parameters find none (such as {other}): their names do not fit together"
            )


def _check_layers(filled: set[str], missing: list[str]) -> None:
    """A layer of which the files hold a part is a layer that they ought to hold."""
    begun = {match.group() for name in filled if (match := _LAYER.match(name))}
    for name in missing:
        match = _LAYER.match(name)
        if match and match.group() in begun:
            raise MissingTensorError(
                f"no tensor in the files goes into {name}, though they hold other tensors of {match.group()[:-1]}: the "
                "checkpoint is incomplete, or its names do not fit the model, and the host would leave it random"
            )
