"""Matches a checkpoint with a model: to which parameter each quantized weight goes, and whether it stays in FP8.

Works on plain data: the facts of the model, and the keys of the files after the renamings and converters of transformers ("the
host" in comments).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.core_model_loading import dot_natural_key

from ..checkpoint.quantization_spec import QuantizationSpec
from ..checkpoint.reader import DENSE_DTYPES, INTEGER_DTYPES, TORCH_DTYPES, Checkpoint
from ..checkpoint.scan import scan, weights_of
from ..checkpoint.stored_weight import (
    DenseTensor,
    StoredWeight,
    TensorSlice,
    check_scale_values,
    companion,
    name_beside,
    wrong_input_scales,
)
from ..errors import CheckpointError, MismatchError, MissingTensorError, ScaleError
from ..formats.scheme import Scheme
from ..formats.storage import INPUT_SCALE, WEIGHT
from .coverage import check_coverage
from .experts_plan import Unfit, check_experts, plan_experts
from .extra_tensors import unplaced
from .facts import ModelFacts
from .key_map import KeyMap, plain_weight
from .layout import Layout, Parameter


@dataclass(frozen=True)
class Policy:
    """Options of a match.

    dense_because: why no Linear can stay in FP8, None if they can. experts_because: the same for merged experts of a scheme.
    dequantize: whether weights of other formats are dequantized, too. needs_input_scales: whether layers in FP8 use static
    input scales. other_sizes: whether transformers initializes Linears whose size differs from the files, instead of an error.
    read_values: whether to read the scales, to check them and to write weights back; False if only the layout is needed.
    """

    dense_because: str | None = None
    experts_because: Callable[[Scheme], str | None] = lambda scheme: None
    dequantize: bool = False
    needs_input_scales: bool = True
    other_sizes: bool = False
    read_values: bool = True


def match_checkpoint(
    model: ModelFacts,
    keymap: KeyMap,
    checkpoint: Checkpoint,
    spec: QuantizationSpec,
    policy: Policy,
    parts: Mapping[str, TensorSlice] | None = None,
) -> Layout:
    """Return the layout of `checkpoint` on the model.

    keymap: of the keys of the checkpoint. parts: for a planned checkpoint, to be quantized from a dense one: key of a weight ->
    where its values come from.

    Raises a subclass of CheckpointError if files, config and model contradict each other.
    """
    try:
        return _match(model, keymap, checkpoint, spec, policy, parts)
    except CheckpointError as error:
        if (said := spec.in_dialect) is None:
            raise
        # These errors speak of compressed-tensors' keys, into which the config was translated.
        raise type(error)(
            f"{str(error).rstrip('.')}. (The config is in the format of {said.dialect.name}: {said.dialect.words}.)"
        ) from error


def _match(
    model: ModelFacts,
    keymap: KeyMap,
    checkpoint: Checkpoint,
    spec: QuantizationSpec,
    policy: Policy,
    parts: Mapping[str, TensorSlice] | None,
) -> Layout:
    owners = {key: keymap.owner(key, name, model) for key, name in weights_of(checkpoint).items()}
    scanned = scan(checkpoint, spec, owners, model.params.keys())
    layout = Layout(
        scan=scanned,
        aliases=dict(keymap.aliases),
        prefix=model.prefix,
        unmapped_experts=keymap.unmapped_experts,
        splits_experts=any(part.expert is not None for part in (parts or {}).values()),
    )
    for weight in [*scanned.weights, *scanned.host]:
        _place(weight, keymap, layout.aliases)
        weight.transposed = _is_transposed(model, weight, keymap)
    for weight in scanned.weights if parts is not None else ():
        part = parts[plain_weight(weight.keys[weight.primary])]  # type: ignore[index]
        weight.part = replace(part, key=keymap.rename(part.key))
    # The host runs weights of its formats in its own modules; those merged into one parameter are dequantized here.
    layout.weights = scanned.weights + [w for w in scanned.host if policy.dequantize or w.pattern is not None]
    for weight in scanned.weights:
        weight.check()
        if weight.pattern is None and weight.target:
            weight.takes(model.params[weight.target].shape)
        if weight.target or len(weight.shape) != 3:  # otherwise the orientation of a stack is unknown
            weight.check_shapes()
    reads = policy.read_values and parts is None
    layout.source = checkpoint if reads else None
    scales = check_scale_values(scanned.weights, checkpoint) if reads else {}
    filled, layout.missing = check_coverage(model, keymap, checkpoint, scanned)
    _sort_out(layout, model, keymap, policy, filled)
    _collect(layout, model, keymap, checkpoint, policy.other_sizes)
    _keep_experts(layout, model, keymap, policy)
    if reads:
        layout.input_scales = wrong_input_scales([weight for weight in scanned.weights if weight.target], scales)
        if policy.needs_input_scales:
            _check_input_scales(layout)
        if layout.saves_fp8(policy.dense_because):
            layout.scales = _scales_of_dense(layout, checkpoint, scales)
    _carry_extra(layout, keymap, checkpoint)
    return layout


def _sort_out(layout: Layout, model: ModelFacts, keymap: KeyMap, policy: Policy, filled: set[str]) -> None:
    """Fill `Layout.kept`, `dense` and `reasons`. filled: parameters that the files fill."""
    for weight in layout.weights:
        if not weight.target:
            continue  # this class of model has no such module: the host reports the key as unexpected
        resized = None
        if weight.group.scheme is not None and weight.pattern is None:
            resized = _why_resized(weight, tuple(model.params[weight.target].shape), policy.other_sizes)
        tied = _why_tied(model.tied, weight.target, filled)
        reason = policy.dense_because or resized or tied or _why_not_kept(model, weight)
        if reason is None:
            layout.kept[weight.module] = weight
            continue
        layout.reasons[weight.module] = reason
        if weight.target not in layout.dense:
            renamed = plain_weight(weight.renamed[weight.primary])
            layout.dense[weight.target] = _dense(weight.target, model, keymap.others(renamed, weight.pattern))


def _dense(target: str, model: ModelFacts, others: tuple[str, ...]) -> Parameter:
    return Parameter(target, model.params[target].dtype, others=others)


def _keep_experts(layout: Layout, model: ModelFacts, keymap: KeyMap, policy: Policy) -> None:
    """Move experts modules that can stay in FP8 from `Layout.dense` to `experts`; note in `reasons` why others cannot."""
    names = dict.fromkeys(w.target.rpartition(".")[0] for w in layout.weights if w.is_expert and w.target in layout.dense)
    for name in names:
        mine = {target: p for target, p in layout.dense.items() if target.rpartition(".")[0] == name}
        check_experts(model.experts(name), keymap.shapes, mine)
        try:
            plan = layout.experts[name] = plan_experts(name, model, keymap, mine, policy.experts_because)
        except Unfit as reason:
            layout.reasons.update({target: str(reason) for target in mine if target in layout.reasons})
            continue
        for target in (stack.target for stack in plan.stacks):
            del layout.dense[target]
            layout.reasons.pop(target, None)
    # Dense tensors merged by a converter that now has nothing to dequantize are left to the host.
    merging = {pattern for p in layout.dense.values() if p.weights for pattern in p.sources}
    for target in [target for target, p in layout.dense.items() if not merging & set(p.sources)]:
        del layout.dense[target]


def _scales_of_dense(
    layout: Layout, checkpoint: Checkpoint, scales: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """`Layout.scales`: the scales of weights that are dequantized. scales: those already read."""
    in_experts = {stack.target for plan in layout.experts.values() for stack in plan.stacks}
    dense = [w for w in layout.weights if w.module not in layout.kept and w.target not in in_experts]
    host = [key for w in dense if w.group.scheme is None for role, key in w.keys.items() if role != w.primary]
    found = {**scales, **checkpoint.read(host)}  # those of the other weights have been read
    return {w.name: {role: found[key] for role, key in w.keys.items() if role != w.primary} for w in dense}


def _carry_extra(layout: Layout, keymap: KeyMap, checkpoint: Checkpoint) -> None:
    """Fill `Layout.extra` and `unplaced`."""
    layout.extra = {keymap.rename(key): key for key in layout.scan.cache}
    layout.unplaced = {keymap.rename(key): key for key in unplaced(checkpoint, layout.scan, keymap)}
    for name, weight in layout.kept.items():
        layout.extra.update({f"{name}.{role}": weight.keys[role] for role in weight.zeros})
    for weight in (weight for plan in layout.experts.values() for stack in plan.stacks for weight in stack.weights):
        layout.extra.update({weight.renamed[role]: weight.keys[role] for role in weight.zeros})


def _place(weight: StoredWeight, keymap: KeyMap, late: dict[str, str]) -> None:
    """Set the parameter and the renamed keys of a weight; add to `late` the keys whose renaming differs from the weight's."""
    if WEIGHT in weight.keys or weight.group.scheme is not None:
        target, weight.pattern = keymap.resolve(plain_weight(weight.keys[weight.primary]))
        weight.renamed = _renamed(weight, keymap, late if target in keymap.shapes else {})
    else:
        weight.renamed = {role: keymap.rename(key) for role, key in weight.keys.items()}
        target, weight.pattern = keymap.convert(plain_weight(weight.renamed[weight.primary]))
    weight.target = target if target in keymap.shapes else ""
    weight.saved = {role: name_beside(target, name, keymap.prefix) for role, name in weight.renamed.items()}


def _renamed(weight: StoredWeight, keymap: KeyMap, late: dict[str, str]) -> dict[str, str]:
    renamed = keymap.rename(plain_weight(weight.keys[weight.primary]))
    found = {WEIGHT: renamed} if weight.primary == WEIGHT else {}
    for role, key in weight.keys.items():
        if role == WEIGHT:
            continue
        plain = keymap.plain(key)
        if renamed == WEIGHT or renamed.endswith(f".{WEIGHT}"):
            wanted = companion(renamed, role)
        else:
            wanted = keymap.aliases.get(plain, plain)
        found[role] = wanted
        if plain != wanted:
            late[plain] = wanted
    return found


def _check_input_scales(layout: Layout) -> None:
    """Raise for a missing or invalid static input scale that is used: by a Linear in FP8, or by a whole stack of experts.

    Single experts of a stack may lack it, if calibration routed no token to them.
    """
    wrong = layout.input_scales
    stacks = [part for plan in layout.experts.values() for stack in plan.stacks for part in stack.sources]
    needed = [weight for weight in layout.kept.values() if weight.name in wrong]
    needed += [part[0] for part in stacks if all(weight.name in wrong for weight in part)]
    for weight in needed:
        kind = ScaleError if INPUT_SCALE in weight.keys else MissingTensorError
        raise kind(
            f"{wrong[weight.name]}, but config group {weight.group.name!r} quantizes inputs with static scales: the "
            "checkpoint is incomplete, damaged or badly calibrated. FP8Config(backend='weight_only') and dequantize=True do "
            "not need these scales"
        )


def _is_transposed(model: ModelFacts, weight: StoredWeight, keymap: KeyMap) -> bool:
    """Whether a stack of experts is (experts, in, out) in the files: as in the model, or not, if transformers transposes it."""
    layout = model.experts(weight.target.rpartition(".")[0])
    if layout is None or len(weight.shapes[weight.primary]) != 3:
        return False
    return layout.is_transposed is not keymap.turns(weight.target, weight.pattern, weight.shape)


def _why_resized(weight: StoredWeight, expected: tuple[int, ...], other_sizes: bool) -> str | None:
    """The reason why a weight is dense if its shape differs from the model's parameter, which transformers then initializes.

    Raises MismatchError unless `other_sizes`.
    """
    if weight.takes(expected):
        return None
    if other_sizes:
        return "the model gives it another size than the files (ignore_mismatched_sizes)"
    raise _mismatch(weight.keys[weight.primary], weight.shape, weight.target, expected)


def _why_tied(tied: Mapping[str, str], target: str, filled: set[str]) -> str | None:
    """The reason why a tied parameter is dense: transformers makes tied ones the same, and only one of them has a scale.

    A target for which the files have a separate tensor next to that of its source is untied instead.
    """
    if target in tied.values() or (target in tied and tied[target] not in filled):
        return "other parameters of the model are tied to it"
    return None


def _why_not_kept(model: ModelFacts, weight: StoredWeight) -> str | None:
    module = model.modules.get(weight.module)
    if weight.group.scheme is None:
        return "its format is one that transformers runs"
    if weight.pattern is not None or module is None:
        return "merged with others into one parameter of the model"
    if module.cls is not nn.Linear:
        return f"{module.cls.__name__} is not a plain nn.Linear"
    if model.params[weight.target].keeps_dtype:
        return "the model keeps this module in float32"
    if module.read_by:
        return f"{module.read_by} reads its weight instead of calling it"
    if module.gives_dtype_to:
        return f"{module.gives_dtype_to} reads its dtype from this weight"
    return None


def _collect(layout: Layout, model: ModelFacts, keymap: KeyMap, checkpoint: Checkpoint, other_sizes: bool) -> None:
    """Fill `Parameter.sources`, the tensors that the loader collects for each dense parameter in order; and `file_dtypes`."""
    by_key = {weight.keys[weight.primary]: weight for weight in layout.weights}
    for stored in layout.weights:
        if stored.target in layout.dense and stored.pattern is None:
            layout.dense[stored.target].sources = {WEIGHT: [stored]}
    merging = {weight.pattern for weight in layout.weights if weight.target and weight.pattern is not None}
    read: dict[str, set[str]] = {}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        weight, info = by_key.get(key), checkpoint.tensors[key]
        target, pattern = keymap.resolve(key) if weight is None else (weight.target, weight.pattern)
        if target not in model.params:
            continue
        if pattern in merging:
            # Also if all merged tensors are dense, in a layer that was not quantized: it uses the same converter.
            renamed = keymap.rename(key)
            if target not in layout.dense:
                layout.dense[target] = _dense(target, model, keymap.others(renamed, pattern))
            dense = DenseTensor(name_beside(target, renamed, keymap.prefix), info.dtype)
            layout.dense[target].sources.setdefault(str(pattern), []).append(weight or dense)
        elif weight is None:
            for name in (target, *keymap.others(keymap.rename(key), pattern)):
                read.setdefault(name, set()).add(info.dtype)
            if pattern is None and not other_sizes and info.shape != model.params[target].shape:
                raise _mismatch(key, info.shape, target, model.params[target].shape)
    found = {target: names.pop() for target, names in read.items() if len(names) == 1}
    layout.file_dtypes = {t: TORCH_DTYPES[name] for t, name in found.items() if name in (*DENSE_DTYPES, *INTEGER_DTYPES)}


def _mismatch(key: str, shape: tuple[int, ...], target: str, expected: tuple[int, ...]) -> MismatchError:
    return MismatchError(
        f"{key} has shape {list(shape)} in the files, the model's {target} has {list(expected)}: the config of the model does "
        "not match the checkpoint"
    )
