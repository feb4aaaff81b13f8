"""Matches a checkpoint with a model: where each quantized weight goes, kept in FP8 or multiplied out.

The host's own renamings and converters are run over the keys of the files, so that names are
matched as they will be when loading, whatever the model is called inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightTransform,
    dot_natural_key,
)

from ..checkpoint.reader import DENSE_DTYPES, INTEGER_DTYPES, TORCH_DTYPES, Checkpoint
from ..checkpoint.slices import Part
from ..checkpoint.spec import QuantizationSpec
from ..checkpoint.validate import Owner, scan
from ..checkpoint.weights import (
    INPUT_SCALE,
    WEIGHT,
    ZERO_POINTS,
    DenseTensor,
    StoredWeight,
    check_scale_values,
    companion,
    name_beside,
    wrong_input_scales,
)
from ..errors import MismatchError, MissingTensorError, ScaleError
from ..formats.scheme import Scheme
from ..nn.experts import ExpertsLayout
from .coverage import check_coverage
from .dtypes import DtypePlan
from .expert_names import converters, hub_name
from .experts import check_experts, plan_experts
from .extra_tensors import unplaced
from .keys import KeyMap
from .layout import Layout, Parameter
from .model_code import weights_read_by_kernels, weights_read_directly


def match_checkpoint(
    model: PreTrainedModel,
    conversions: Sequence[WeightTransform],
    checkpoint: Checkpoint,
    spec: QuantizationSpec,
    *,
    dense_because: str | None,
    experts_because: Callable[[Scheme], str | None],
    use_kernels: bool,
    dtype: torch.dtype,
    parts: Mapping[str, Part] | None = None,
    read_values: bool = True,
    dequantize: bool = False,
    needs_input_scales: bool = True,
    other_sizes: bool = False,
) -> Layout:
    """The plan of loading `checkpoint` into `model`, which is on the meta device.

    conversions: the host's. dense_because: why no Linear can stay in FP8, None if they can; experts_because: the same
    of merged experts of a scheme. use_kernels: whether kernels from the Hub may replace modules. dtype: the model's.
    parts: for a checkpoint that is yet to be made of a dense one, key of a weight -> where its values come from.
    dequantize: whether weights of other formats are multiplied out, too. needs_input_scales: whether what stays in FP8 uses
    static ones. read_values: whether to read the scales, to check them and to write weights back; not, if only the layout is
    wanted.
    other_sizes: whether Linears of other sizes than in the files are left to the host to make anew. Raises
    CheckpointError of the fitting kind for files, config and model that contradict each other.
    """
    unmapped = map_experts(model, keymap := KeyMap(model, conversions), checkpoint)
    scanned = scan(checkpoint, spec, lambda key: owner_of(model, keymap, key), set(keymap.params), keymap.prefix)
    layout = Layout(scan=scanned, aliases=dict(keymap.aliases), prefix=keymap.prefix, unmapped_experts=unmapped)
    for weight in scanned.weights:
        if parts is not None:
            part = parts[weight.keys[WEIGHT]]
            weight.part = replace(part, key=keymap.rename(part.key))
    for weight in [*scanned.weights, *scanned.host]:
        _place(weight, keymap, layout.aliases)
        weight.transposed = _is_transposed(model, weight, keymap)
    # The host runs its own formats module by module; merged into one parameter they are ours to multiply out.
    weights = layout.weights = scanned.weights + [w for w in scanned.host if dequantize or w.pattern is not None]
    for weight in scanned.weights:
        if weight.target or len(weight.shape) != 3:  # else nobody knows which way a stack lies
            weight.check()
    scales = check_scale_values(scanned.weights, checkpoint) if parts is None and read_values else {}
    filled, layout.missing = check_coverage(model, keymap, checkpoint, scanned)
    dtypes = DtypePlan(model, dtype)
    # PreTrainedModel.dtype is that of the first parameter, and models cast their inputs to it.
    first = {id(next(part.parameters(), None)): part for part in model.modules() if isinstance(part, PreTrainedModel)}
    read = weights_read_by_kernels(model) if use_kernels else {}
    read |= weights_read_directly(model) if dense_because is None else {}
    for weight in weights:
        if not weight.target:
            continue  # this class of model has no such module: the host reports the key as unexpected
        resized = None
        if weight.group.scheme is not None and weight.pattern is None:
            resized = _why_resized(weight, tuple(keymap.params[weight.target].shape), other_sizes)
        module = module_of(model, weight.module)
        tie = _why_tied(model.all_tied_weights_keys, weight.target, filled)
        reason = dense_because or resized or tie or _why_not_kept(first, read, module, weight, dtypes)
        if reason is None:
            layout.kept[weight.module] = weight
            continue
        layout.reasons[weight.module] = reason
        if weight.target not in layout.dense:
            renamed = weight.renamed[weight.primary].removesuffix("_packed")
            others = keymap.others(renamed, weight.pattern)
            layout.dense[weight.target] = Parameter(weight.target, dtypes.of(weight.target), others=others)
    _collect(layout, weights, keymap, checkpoint, dtypes, other_sizes)
    merges = [*conversions, *(converters(*unmapped) if unmapped is not None else ())]
    _keep_experts(layout, model, weights, merges, experts_because, dtypes, read)
    if read_values and parts is None:
        placed = [weight for weight in scanned.weights if weight.target]
        layout.input_scales = wrong_input_scales(placed, scales)
        if needs_input_scales:
            _check_input_scales(layout)
    if layout.saves_fp8(dense_because) and read_values and parts is None:
        in_experts = {stack.target for plan in layout.experts.values() for stack in plan.stacks}
        dense = [weight for weight in weights if weight.module not in layout.kept and weight.target not in in_experts]
        host = [key for w in dense if w.group.scheme is None for role, key in w.keys.items() if role != w.primary]
        scales |= checkpoint.read(host)
        layout.scales = {w.name: {r: scales[key] for r, key in w.keys.items() if r != w.primary} for w in dense}
    layout.extra = {keymap.rename(key): key for key in scanned.cache}
    layout.unplaced = {keymap.rename(key): key for key in unplaced(checkpoint, scanned, keymap)}
    for name, weight in layout.kept.items():
        layout.extra.update({f"{name}.{r}": weight.keys[r] for r in ZERO_POINTS if r in weight.keys})
    for weight in (weight for plan in layout.experts.values() for stack in plan.stacks for weight in stack.weights):
        layout.extra.update({weight.renamed[r]: weight.keys[r] for r in ZERO_POINTS if r in weight.keys})
    return layout


def _keep_experts(
    layout: Layout,
    model: PreTrainedModel,
    weights: list[StoredWeight],
    conversions: Sequence[WeightTransform],
    because: Callable[[Scheme], str | None],
    dtypes: DtypePlan,
    read: dict[str, str],
) -> None:
    """Move the experts modules that can stay in FP8 from the dense parameters to `Layout.experts`; say why others cannot."""
    names = dict.fromkeys(w.target.rpartition(".")[0] for w in weights if w.is_expert and w.target in layout.dense)
    for name in names:
        mine = {target: p for target, p in layout.dense.items() if target.rpartition(".")[0] == name}
        module = module_of(model, name)
        check_experts(module, mine)
        schemes = {weight.scheme for parameter in mine.values() for weight in parameter.weights if weight.group.scheme}
        reasons = (because(scheme) for scheme in schemes)
        plan = next(filter(None, reasons), None) or plan_experts(name, module, mine, conversions)
        if not isinstance(plan, str) and any(dtypes.widens(target) for target in mine):
            plan = "the model keeps this module in float32"
        if not isinstance(plan, str) and name in read:
            plan = f"{read[name]} reads its weights instead of calling it"
        if isinstance(plan, str):
            layout.reasons.update({target: plan for target in mine if target in layout.reasons})
            continue
        layout.experts[name] = plan
        for target in (stack.target for stack in plan.stacks):
            del layout.dense[target]
            layout.reasons.pop(target, None)
    # What is dense in the files and merged by a converter that now has nothing to multiply out is the host's again.
    merging = {pattern for p in layout.dense.values() if p.weights for pattern in p.sources}
    for target in [target for target, p in layout.dense.items() if not merging & set(p.sources)]:
        del layout.dense[target]


def map_experts(model: PreTrainedModel, keymap: KeyMap, checkpoint: Checkpoint) -> tuple[ExpertsLayout, str] | None:
    """See to the keys of experts that the host's mapping leaves without a home: by aliases in `keymap`, or by converters, for
    which (layout, end of the path) of such modules is returned."""
    found: tuple[ExpertsLayout, str] | None = None
    for key in checkpoint.tensors:
        renamed = keymap.rename(key)
        other = hub_name(renamed)
        if other is None:
            continue
        # A scale goes where its weight does, which it knows by its name.
        home = renamed if renamed.endswith(".bias") else renamed.rpartition(".")[0] + f".{WEIGHT}"
        if keymap.convert(home)[0] in keymap.params:
            continue
        weight = other.rpartition(".")[0] + f".{WEIGHT}"
        if keymap.convert(weight)[0] in keymap.params:
            keymap.aliases[renamed] = other
        elif found is None:
            path = renamed[: renamed.index("experts.") + len("experts")]
            # The base model's prefix may be in the file, in the model, in both or in none.
            paths = (path, f"{keymap.prefix}.{path}", path.removeprefix(f"{keymap.prefix}."))
            layout = next(filter(None, (ExpertsLayout.of(module_of(model, name)) for name in paths)), None)
            if layout is not None:
                # With the name of its parent: `experts` alone is also the end of `shared_experts`.
                found = layout, ".".join(path.split(".")[-2:])
                keymap.add(converters(*found))
    return found


def module_of(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def owner_of(model: PreTrainedModel, keymap: KeyMap, key: str) -> Owner:
    if key.endswith("weight_packed"):
        key = key.removesuffix("_packed")
    target, pattern = keymap.resolve(key)
    name = target.removesuffix(f".{WEIGHT}")
    module = module_of(model, name)
    if module is None and target in keymap.params:
        module = module_of(model, name.rpartition(".")[0])
    if pattern is not None:
        name = keymap.rename(key).removesuffix(f".{WEIGHT}")  # experts are spoken of one by one
    return Owner(name, module)


def _place(weight: StoredWeight, keymap: KeyMap, late: dict[str, str]) -> None:
    """Fill in what the host's renamings make of a weight's keys; note those that do not follow their weight."""
    if WEIGHT in weight.keys:
        target, weight.pattern = keymap.resolve(weight.keys[WEIGHT])
        weight.renamed = _renamed(weight, keymap, late if target in keymap.params else {})
    else:
        weight.renamed = {role: keymap.rename(key) for role, key in weight.keys.items()}
        target, weight.pattern = keymap.convert(weight.renamed[weight.primary].removesuffix("_packed"))
    weight.target = target if target in keymap.params else ""
    weight.saved = {role: name_beside(target, name, keymap.prefix) for role, name in weight.renamed.items()}


def _renamed(weight: StoredWeight, keymap: KeyMap, late: dict[str, str]) -> dict[str, str]:
    renamed = keymap.rename(weight.keys[WEIGHT])
    found = {WEIGHT: renamed}
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
    """Raise for a static input scale that is missing, or no scale, if something uses it: a Linear that stays in FP8, or the
    experts of a stack, of which none has one. One expert may lack it, as no token came its way in calibration."""
    wrong = layout.input_scales
    stacks = [part for plan in layout.experts.values() for stack in plan.stacks for part in stack.sources]
    needed = [weight for weight in layout.kept.values() if weight.name in wrong]
    needed += [part[0] for part in stacks if all(weight.name in wrong for weight in part)]
    for weight in needed:
        kind = ScaleError if INPUT_SCALE in weight.keys else MissingTensorError
        raise kind(
            f"{wrong[weight.name]}, though config group {weight.group.name!r} quantizes inputs with static scales: the "
            "checkpoint is incomplete, damaged or badly calibrated. FP8Config(backend='weight_only') and dequantize=True do "
            "without it"
        )


def _is_transposed(model: PreTrainedModel, weight: StoredWeight, keymap: KeyMap) -> bool:
    """Whether a stack of experts is (experts, in, out) in the files: as it is in the model, or the other way round where
    the host transposes it."""
    layout = ExpertsLayout.of(module_of(model, weight.target.rpartition(".")[0]))
    if layout is None or len(weight.shapes.get(WEIGHT, ())) != 3:
        return False
    return layout.is_transposed is not keymap.turns(weight.target, weight.pattern, weight.shape)


def _why_resized(weight: StoredWeight, expected: tuple[int, ...], other_sizes: bool) -> str | None:
    """A reason for a weight of another shape than the model's parameter to be dense: the host makes that one anew.

    Raises MismatchError unless that was asked for.
    """
    if weight.shape == expected:
        return None
    if other_sizes:
        return "the model gives it another size than the files (ignore_mismatched_sizes)"
    raise MismatchError(
        f"{weight.keys[WEIGHT]} has shape {list(weight.shape)} in the files, the model's {weight.target} has "
        f"{list(expected)}: the config of the model is not that of the checkpoint"
    )


def _why_tied(tied: dict[str, str], target: str, filled: set[str]) -> str | None:
    """A reason for the parameters of a tie to be dense: the host makes them one, and only one of them has a scale.

    A target that the files fill beside its source is on its own, and is untied.
    """
    if target in tied.values() or (target in tied and tied[target] not in filled):
        return "other parameters of the model are tied to it"
    return None


def _why_not_kept(
    first: dict[int, PreTrainedModel],
    read: dict[str, str],
    module: nn.Module | None,
    weight: StoredWeight,
    dtypes: DtypePlan,
) -> str | None:
    if weight.group.scheme is None:
        return "not an FP8 group"
    if weight.pattern is not None or module is None:
        return "merged with others into one parameter of the model"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not a plain nn.Linear"
    if dtypes.widens(weight.target):
        return "the model keeps this module in float32"
    if weight.module in read:
        return f"{read[weight.module]} reads its weight instead of calling it"
    if id(module.weight) in first:
        return f"{type(first[id(module.weight)]).__name__} reads its dtype off this weight"
    return None


def _collect(
    layout: Layout,
    weights: list[StoredWeight],
    keymap: KeyMap,
    checkpoint: Checkpoint,
    dtypes: DtypePlan,
    other_sizes: bool,
) -> None:
    """Fill `Parameter.sources`: what the loader will collect for each dense parameter, in its order; and `file_dtypes`."""
    by_key = {weight.keys[weight.primary]: weight for weight in weights}
    for stored in weights:
        if stored.target in layout.dense and stored.pattern is None:
            layout.dense[stored.target].sources = {WEIGHT: [stored]}
    merging = {weight.pattern for weight in weights if weight.target and weight.pattern is not None}
    read: dict[str, set[str]] = {}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        weight = by_key.get(key)
        target, pattern = keymap.resolve(key) if weight is None else (weight.target, weight.pattern)
        if target not in keymap.params:
            continue
        if pattern in merging:
            # Also where all that is merged is dense, in a layer that was left out: the converter is the same.
            renamed = keymap.rename(key)
            if target not in layout.dense:
                layout.dense[target] = Parameter(target, dtypes.of(target), others=keymap.others(renamed, pattern))
            dense = DenseTensor(name_beside(target, renamed, keymap.prefix), checkpoint.tensors[key].dtype)
            layout.dense[target].sources.setdefault(str(pattern), []).append(weight or dense)
        elif weight is None:
            for name in (target, *keymap.others(keymap.rename(key), pattern)):
                read.setdefault(name, set()).add(checkpoint.tensors[key].dtype)
            expected = tuple(keymap.params[target].shape)
            if pattern is None and not other_sizes and checkpoint.tensors[key].shape != expected:
                raise MismatchError(
                    f"{key} has shape {list(checkpoint.tensors[key].shape)} in the files, the model's {target} has "
                    f"{list(expected)}: the config of the model is not that of the checkpoint"
                )
    found = {target: names.pop() for target, names in read.items() if len(names) == 1}
    layout.file_dtypes = {t: TORCH_DTYPES[name] for t, name in found.items() if name in (*DENSE_DTYPES, *INTEGER_DTYPES)}
