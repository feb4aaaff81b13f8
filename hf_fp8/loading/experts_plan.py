"""Plans which experts modules stay in FP8 and from which tensors they are filled, or gives the reason why they cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from ..checkpoint.reader import TORCH_DTYPES
from ..checkpoint.stored_weight import DenseTensor, StoredWeight
from ..errors import MismatchError, MissingTensorError
from ..formats.scheme import Scheme
from ..nn.experts_layout import ExpertsLayout, Projection
from .facts import ModelFacts
from .key_map import KeyMap, PlainMerge
from .layout import ExpertsPlan, Parameter, Stack


class Unfit(Exception):
    """The reason why a module's experts cannot stay in FP8."""


def plan_experts(
    name: str,
    model: ModelFacts,
    keymap: KeyMap,
    parameters: dict[str, Parameter],
    because: Callable[[Scheme], str | None],
) -> ExpertsPlan:
    """Return the plan for the experts module `name` of a model. Raises Unfit if it must be dense.

    parameters: its parameters by name, with the tensors that fill them. because: as `Policy.experts_because`.
    """
    schemes = {weight.scheme for parameter in parameters.values() for weight in parameter.weights if weight.group.scheme}
    if reason := next(filter(None, map(because, schemes)), None):
        raise Unfit(reason)
    layout = model.experts(name)
    if layout is None:
        kind = model.modules[name].cls.__name__ if name in model.modules else "a module that the model lacks"
        raise Unfit(f"{kind} does not have transformers' interface for experts, so its computation is not known here")
    first = _stack(f"{name}.{layout.first}", keymap, layout, parameters)
    second = _stack(f"{name}.down_proj", keymap, layout, parameters)
    if any(model.params[target].keeps_dtype for target in parameters):
        raise Unfit("the model keeps this module in float32")
    if reader := model.modules[name].read_by:
        raise Unfit(f"{reader} reads its weights instead of calling it")
    dtypes = {}
    for stack in (first, second):
        for role in stack.roles[1:]:
            held = next(weight.dtypes[role] for weight in stack.weights if role in weight.dtypes)
            dtypes[stack.name_of(role).rpartition(".")[2]] = TORCH_DTYPES[held]
    return ExpertsPlan(name, first, second, interleaved=first.is_stacked and not layout.is_concatenated, scale_dtypes=dtypes)


def check_experts(
    layout: ExpertsLayout | None, shapes: Mapping[str, tuple[int, ...]], parameters: dict[str, Parameter]
) -> None:
    """Raise if the experts in the files differ from those of the module in number or shape; the error names the tensor.

    Raises MissingTensorError or MismatchError. layout: the module's; without one nothing is checked. shapes: of the model's
    parameters.
    """
    for target, parameter in parameters.items():
        leaf = target.rpartition(".")[2]
        if layout is None or leaf not in (layout.first, "down_proj"):
            continue
        n_experts, n, k = _sizes(layout, shapes[target])
        for pattern, weights in parameter.sources.items():
            if "*" in pattern and not parameter.others:
                _check_one_by_one(target, weights, n_experts, (n // len(parameter.sources), k))


def _check_one_by_one(target: str, weights: list[StoredWeight | DenseTensor], n_experts: int, shape: tuple[int, int]) -> None:
    known = {place: weight for place, weight in enumerate(weights) if isinstance(weight, StoredWeight)}
    for place, weight in known.items():
        key = weight.keys[weight.primary]
        # From the renamed key: a `key_mapping` may have changed the name.
        number = next(int(part) for part in reversed(weight.renamed[weight.primary].split(".")) if part.isdigit())
        if number >= n_experts:
            raise MismatchError(f"{key} is in the files, but the model's {target} has {n_experts} experts, numbered from 0")
        if number != place:
            raise MissingTensorError(
                f"{key} is in the files, but one of the experts before it is not: the checkpoint is incomplete (a shard may be "
                "missing)"
            )
        if weight.group.scheme is not None and not weight.takes(shape):
            raise MismatchError(
                f"{key} has shape {list(weight.shape)} in the files, but an expert of the model's {target} has {list(shape)}: "
                "the config of the model does not match the checkpoint"
            )
    if len(weights) != n_experts:
        some = next(iter(known.values()), None)
        sample = "" if some is None else f" (such as {some.keys[some.primary]})"
        raise MissingTensorError(
            f"{len(weights)} experts of {target} are in the files{sample}, but the model has {n_experts}: the checkpoint "
            "is incomplete (a shard may be missing)"
        )


def _sizes(layout: ExpertsLayout, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(E, N, K) of a stack that has this shape in the model."""
    experts, rows, cols = shape
    return (experts, cols, rows) if layout.is_transposed else (experts, rows, cols)


def _stack(target: str, keymap: KeyMap, layout: ExpertsLayout, parameters: dict[str, Parameter]) -> Stack:
    leaf = target.rpartition(".")[2]
    parameter = parameters.get(target)
    if parameter is None or not parameter.sources:
        raise Unfit(f"the files hold no quantized weights for {leaf}")
    patterns = list(parameter.sources)
    weights = parameter.weights
    _check_alike(leaf, weights, sum(map(len, parameter.sources.values())))
    sizes = _sizes(layout, keymap.shapes[target])
    first = weights[0]
    if len(first.shape) == 3:
        if first.pattern is not None or first.shape != keymap.shapes[target]:
            raise Unfit(f"the stack of {leaf} in the files has another layout than the model's")
        projection = Projection(leaf, sizes, first.scheme)
        return Stack(target, projection, ((first,),), transposed=layout.is_transposed)
    parts = 2 if leaf == layout.first and layout.has_gate else 1
    merge = keymap.converter(patterns[0])
    if merge is None or len(patterns) != parts or not _is_plain_merge(merge, layout):
        raise Unfit(f"transformers makes {leaf} in a way that is not a plain merge of experts")
    order = sorted(patterns, key=merge.source_patterns.index)
    sources = tuple(tuple(w for w in parameter.sources[pattern] if isinstance(w, StoredWeight)) for pattern in order)
    return Stack(target, Projection(leaf, sizes, first.scheme, parts), sources)


def _check_alike(leaf: str, weights: Sequence[StoredWeight], count: int) -> None:
    """Raise unless there are `count` weights, all FP8 with the same scheme and the same scale dtypes."""
    if len(weights) < count:
        raise Unfit(f"some experts of {leaf} are dense in the files")
    if any(weight.group.scheme is None for weight in weights):
        raise Unfit("its format is one that transformers runs")
    first, *rest = weights
    for weight in rest:
        if weight.scheme != first.scheme:
            raise Unfit(f"experts of {leaf} have two schemes: {first.scheme.describe()} and {weight.scheme.describe()}")
        if any(weight.dtypes[role] != first.dtypes[role] for role in weight.dtypes.keys() & first.dtypes.keys()):
            raise Unfit(f"experts of {leaf} differ in the dtypes of their scales")


def _is_plain_merge(merge: WeightConverter, layout: ExpertsLayout) -> bool:
    """Whether a converter only stacks experts, concatenates gate and up, and does what the layout of the family requires."""
    if len(merge.target_patterns) != 1:
        return False
    if isinstance(merge, PlainMerge):
        return True
    kinds = [(type(op), getattr(op, "dim", None)) for op in merge.operations]
    return (
        not layout.is_transposed
        and layout.is_concatenated
        and kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    )
