"""Plans what a dense checkpoint is to become: which tensors are quantized, under which names, and why others are not.

The plan is a checkpoint that does not exist yet, by its headers. Loading while quantizing, quantizing in place and writing
files are then loading, building and writing that checkpoint, by the mechanisms that serve those that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from ..checkpoint.config_groups import Group, match
from ..checkpoint.reader import DENSE_DTYPES, DTYPE_NAMES, TORCH_DTYPES, Checkpoint, TensorInfo
from ..checkpoint.slices import Part
from ..checkpoint.spec import QuantizationSpec
from ..checkpoint.validate import ROUTER, module_named, names_of
from ..checkpoint.weights import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, StoredWeight
from ..errors import ConfigError, MismatchError, by_reason
from ..formats.numerics import scale_dtype_of
from ..formats.scheme import scale_shape
from ..nn.experts import ExpertsLayout
from .keys import KeyMap
from .layout import Layout
from .matching import map_experts, match_checkpoint, module_of, owner_of
from .serving import describe, torn


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the checkpoint to be that could be quantized: one of a Linear, or of an expert."""

    key: str
    module: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    owner: nn.Module | None
    is_expert: bool
    spared: bool


# (names of a module, itself or the experts that it is one of, if the model has it) -> the group that is to quantize it
Choice = Callable[[tuple[str, ...], nn.Module | None], Group | None]


@dataclass
class Plan:
    """What a dense checkpoint is to become.

    written: its headers. spec: what it says of itself. parts: key in it -> where its values come from. groups: key of a
    quantized weight -> its group. dense: names of modules that the config has to say are dense. reasons: name of a module
    that a group speaks of -> why it is dense all the same. names: what each Linear may be called. unmatched: entries of
    `ignore` that match none of them.
    """

    written: Checkpoint
    spec: QuantizationSpec
    parts: dict[str, Part] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    names: list[tuple[str, ...]] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """A line for the log."""
        kinds = {group.scheme.describe(): None for group in self.groups.values() if group.scheme is not None}
        said = f"hf_fp8: {len(self.groups)} matrices are quantized ({'; '.join(kinds)})"
        said = f"{said}. Left dense: {by_reason(self.reasons)}" if self.reasons else said
        if self.torn:
            said = f"{said}. {describe(self.torn)}"
        return f"{said}. In `ignore` {', '.join(map(repr, self.unmatched))} matches no Linear" if self.unmatched else said

    @property
    def torn(self) -> dict[str, list[str]]:
        """Siblings that serving engines run as one layer, and that are not all quantized in one way (`serving.torn`)."""
        schemes = {key.rpartition(".")[0]: group.scheme for key, group in self.groups.items()}
        kinds = {name: None if scheme is None else scheme.describe() for name, scheme in schemes.items()}
        return torn({**dict.fromkeys(self.dense), **kinds})


def plan_quantization(
    model: PreTrainedModel,
    conversions: Sequence[WeightTransform],
    checkpoint: Checkpoint,
    spec: QuantizationSpec,
    *,
    dense_experts: bool,
    dtype: torch.dtype,
    cast: bool = True,
    use_kernels: bool = False,
    choose: Choice | None = None,
) -> tuple[Plan, Layout]:
    """The plan of quantizing `checkpoint`, which is dense, as `spec` asks; and how it is laid out on `model`.

    dtype: the model's. cast: whether weights are cast to it before they are quantized. choose: decides instead of the
    groups' targets, and may leave nothing. dense_experts: whether experts stay dense.

    What the model could not hold in FP8 (layers whose weight its code reads, tied ones, experts that it merges in its own
    way) is not quantized. Raises ConfigError if nothing is left, MismatchError for a checkpoint that is quantized already.
    """
    for key, info in checkpoint.tensors.items():
        if info.dtype.startswith("F8_") or key.endswith((".weight_packed", ".weight_scale", ".weight_scale_inv")):
            raise MismatchError(
                f"{key} is stored as {info}: the checkpoint is quantized already, and FP8 made of it would be rounded twice. "
                "Quantize the dense checkpoint that it was made of, or `hf-fp8 dequantize` it first"
            )
    wanted = choose or (lambda names, module: _by_target(spec, names, module))
    excluded: dict[str, str] = {}
    while True:
        plan = _plan(model, conversions, checkpoint, spec, dense_experts, wanted, excluded, dtype if cast else None)
        used = {group.name for group in plan.groups.values()}
        if choose is not None and not used:
            return plan, Layout()
        if choose is None:
            _check_use(model, spec, plan, [group for group in spec.groups if group.name not in used])
            plan.unmatched = spec.unmatched_ignore(plan.names)
        plan.spec = spec.restricted_to(used, plan.dense)
        layout = match_checkpoint(
            model, conversions, plan.written, plan.spec, dense_because=None, experts_because=lambda scheme: None,
            use_kernels=use_kernels, dtype=dtype, parts=plan.parts,
        )  # fmt: skip
        unfit = {weight.name: reason for weight in layout.scan.weights if (reason := _why_unfit(weight, layout))}
        if not unfit:
            return plan, layout
        excluded |= unfit


def _by_target(spec: QuantizationSpec, names: tuple[str, ...], module: nn.Module | None) -> Group | None:
    return spec.group_of(names, {"Linear", *(cls.__name__ for cls in type(module).__mro__)})


def _check_use(model: PreTrainedModel, spec: QuantizationSpec, plan: Plan, unused: list[Group]) -> None:
    for group in unused:
        if said := [f"{name}: {reason}" for name, reason in plan.reasons.items()][:5]:
            raise ConfigError(f"nothing of {type(model).__name__} can be quantized by targets {list(group.targets)}: {said}")
        raise ConfigError(
            f"targets {list(group.targets)}, ignore {list(spec.ignore)}: they leave no Linear of {type(model).__name__} to "
            f"be quantized; it has {', '.join(names[0] for names in plan.names[:3]) or 'none'}, ..."
        )


def _why_unfit(weight: StoredWeight, layout: Layout) -> str | None:
    if not weight.target:
        return "this class of model does not have it"
    return layout.reasons.get(weight.module) or layout.reasons.get(weight.target)


def _plan(
    model: PreTrainedModel,
    conversions: Sequence[WeightTransform],
    checkpoint: Checkpoint,
    spec: QuantizationSpec,
    dense_experts: bool,
    choose: Choice,
    excluded: dict[str, str],
    dtype: torch.dtype | None,
) -> Plan:
    map_experts(model, keymap := KeyMap(model, conversions), checkpoint)
    head = model.get_output_embeddings()
    plan = Plan(Checkpoint([]), spec)
    found: list[_Matrix] = []
    for key, info in checkpoint.tensors.items():
        stack = _stack_of(model, keymap, key, info)
        experts = module_of(model, keymap.resolve(key)[0].rpartition(".")[0]) if stack is not None else None
        if stack is not None and not (key.endswith(f".{stack[1]}") and keymap.keeps(key, info.shape)):
            if experts is not None and choose(names_of(key, key, keymap.prefix), experts):
                plan.reasons[key] = "experts stacked under a name that llm-compressor has no other for"
            stack = None
        taken = list(_experts_of(key, info, stack)) if stack is not None else [(key, Part(key))]
        dense = dense_experts or not _any_chosen(taken, experts, choose, keymap.prefix, excluded)
        if stack is not None and dense and type(experts).__name__ not in MODULES_TO_PATCH_FOR_QUANTIZATION:
            # As it is, since nothing of it is quantized; but the host takes Llama-4's apart wherever it loads codes.
            taken = [(key, Part(key))]
            plan.dense.append(key.rpartition(".")[0])
        for name, part in taken:
            shape = part.shape(info.shape)
            plan.parts[name] = part
            plan.written.tensors[name] = TensorInfo(info.dtype, shape, info.file)
            module = module_named(name, info.dtype, len(shape))
            if module is None or len(shape) != 2 or info.dtype not in DENSE_DTYPES:
                continue
            place, owner = (module, experts) if part.expert is not None else _linear(model, keymap, name)
            if place is not None:
                is_expert = part.expert is not None or "experts." in name
                names = names_of(module, place, keymap.prefix)
                found.append(_Matrix(name, module, names, shape, owner, is_expert, is_spared(names, owner, head)))
    plan.names = [matrix.names for matrix in found]
    explicit = spec.explicit_targets([matrix.names for matrix in found if not matrix.spared])
    for matrix in found:
        info = checkpoint.tensors[plan.parts[matrix.key].key]
        spared = matrix.spared and spec.dense_by_default and not match(matrix.names, (), explicit)
        group = None if spared else choose(matrix.names, matrix.owner)
        reason = "experts='dequantize'" if dense_experts and matrix.is_expert else None
        if group is not None and reason is None:
            reason = excluded.get(matrix.module) or _unfit(group, matrix.shape)
            if reason is not None:
                plan.reasons[matrix.module] = reason
        if group is None or reason is not None:
            plan.dense.append(matrix.module)
            continue
        plan.groups[matrix.key] = group
        plan.written.tensors |= _quantized(matrix.module, info, matrix.shape, group, dtype)
    if head is not None:
        name = next(name for name, module in model.named_modules() if module is head)
        if f"{name}.{WEIGHT}" not in plan.groups and name not in plan.dense:
            plan.dense.append(name)  # tied, and not in the files: others look for it all the same
            if match((name,), (), explicit):
                plan.reasons[name] = "it is tied to another parameter, and has no weight of its own"
    return plan


def _quantized(
    module: str, info: TensorInfo, shape: tuple[int, ...], group: Group, dtype: torch.dtype | None
) -> dict[str, TensorInfo]:
    """What a dense matrix becomes. dtype: to which it is cast before it is quantized, None as it is."""
    assert group.scheme is not None
    scale = DTYPE_NAMES[scale_dtype_of(dtype or TORCH_DTYPES[info.dtype])]
    dot = f"{module}." if module else ""
    made = {
        dot + WEIGHT: TensorInfo("F8_E4M3", shape, info.file),
        dot + WEIGHT_SCALE: TensorInfo(scale, scale_shape(group.scheme.weight.granularity, *shape), info.file),
    }
    if group.scheme.has_static_input:
        made[dot + INPUT_SCALE] = TensorInfo(scale, (1,), info.file)
    return made


def _linear(model: PreTrainedModel, keymap: KeyMap, key: str) -> tuple[str | None, nn.Module | None]:
    """(name in the model, module) of a matrix that is one of a Linear: a layer's, an expert's, or one that the model lacks.

    (None, None) for one that is something else.
    """
    owner = owner_of(model, keymap, key)
    target, pattern = keymap.resolve(key)
    if pattern is not None:
        experts = module_of(model, target.rpartition(".")[0])
        layout = ExpertsLayout.of(experts)
        if layout is None and ("experts." in key or isinstance(owner.module, nn.Linear)):
            # Merged or taken apart in the family's own way: it will be told so.
            return owner.name, owner.module if isinstance(owner.module, nn.Linear) else None
        is_expert = layout is not None and target.rpartition(".")[2] in (layout.first, "down_proj")
        return (owner.name, experts) if is_expert else (None, None)
    if isinstance(owner.module, nn.Embedding) or not (owner.module is None or isinstance(owner.module, nn.Linear)):
        # A router may hold its matrix itself. Others, who make it a Linear, have to be told that it is dense.
        return (owner.name, owner.module) if ROUTER.search(owner.name) else (None, None)
    return owner.name, owner.module


def is_spared(names: tuple[str, ...], module: nn.Module | None, head: nn.Module | None) -> bool:
    """Whether it is what stays dense unless a target asks for it: the output embedding, or a router."""
    return (module is not None and module is head) or any(ROUTER.search(name) for name in names)


def _unfit(group: Group, shape: tuple[int, ...]) -> str | None:
    assert group.scheme is not None
    cols = group.scheme.weight.granularity.cols
    if 0 in shape:
        return f"it has no values: its shape is {list(shape)}"
    if group.scheme.weight.granularity.rows == 1 and cols > 1 and shape[1] % cols:
        return f"K = {shape[1]} is no multiple of the group of {cols}, which compressed-tensors asks for"
    return None


def _stack_of(model: PreTrainedModel, keymap: KeyMap, key: str, info: TensorInfo) -> tuple[ExpertsLayout, str] | None:
    """(layout, leaf) of a tensor that holds a projection, or its bias, of all experts of a module; None for any other."""
    if not 2 <= len(info.shape) <= 3 or info.dtype not in DENSE_DTYPES:
        return None
    target = keymap.resolve(key)[0]
    name, _, leaf = target.rpartition(".")
    layout = ExpertsLayout.of(module_of(model, name))
    if layout is None:
        return None
    known = (layout.first, "down_proj") if len(info.shape) == 3 else (f"{layout.first}_bias", "down_proj_bias")
    return (layout, leaf) if leaf in known and target in keymap.params else None


def _experts_of(key: str, info: TensorInfo, stack: tuple[ExpertsLayout, str]) -> Iterator[tuple[str, Part]]:
    """(key, part) of each expert, under the names that llm-compressor gives them."""
    layout, leaf = stack
    is_first = leaf.removesuffix("_bias") == layout.first
    projections = ("gate_proj", "up_proj") if is_first and layout.has_gate else ("up_proj",) if is_first else ("down_proj",)
    role = "bias" if leaf.endswith("_bias") else WEIGHT
    stem = key.rpartition(".")[0]
    for expert in range(info.shape[0]):
        for index, projection in enumerate(projections):
            part = Part(key, expert, index, len(projections), layout.is_transposed, not layout.is_concatenated)
            yield f"{stem}.{expert}.{projection}.{role}", part


def _any_chosen(
    taken: list[tuple[str, Part]], experts: nn.Module | None, choose: Choice, prefix: str, excluded: dict[str, str]
) -> bool:
    """Whether any expert of a stack is quantized; of the names of a bias, whether its weight is."""
    modules = (name.rpartition(".")[0] for name, _ in taken)
    return any(choose(names_of(module, module, prefix), experts) and module not in excluded for module in modules)
