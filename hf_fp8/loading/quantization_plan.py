"""Plans the quantization of a dense checkpoint: which tensors are quantized, under which names, and why others are not.

The plan consists of the headers of the quantized checkpoint, which does not exist yet. Quantizing while loading, in place or to
files then loads, builds or writes that checkpoint with the same code as an existing one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from ..checkpoint.config_groups import Group, classes_of, match
from ..checkpoint.dense_by_default import explicit_targets, is_dense_by_default, is_router
from ..checkpoint.quantization_spec import QuantizationSpec
from ..checkpoint.reader import DENSE_DTYPES, DTYPE_NAMES, TORCH_DTYPES, Checkpoint, TensorInfo
from ..checkpoint.scan import module_named
from ..checkpoint.stored_weight import StoredWeight, TensorSlice
from ..errors import ConfigError, MismatchError, by_reason, reasons_of
from ..formats.scheme import Scheme
from ..formats.storage import INPUT_SCALE, WEIGHT, TensorForm, format_of
from ..formats.weights import scale_dtype_of
from ..nn.experts_layout import ExpertsLayout
from .facts import ModelFacts
from .key_map import KeyMap
from .layout import Layout
from .matching import Policy, match_checkpoint
from .serving import describe, torn

# (names of a module in the checkpoint; name in the model of this module or of the experts module it belongs to, None if the
# model lacks it) -> the group that quantizes it, None to leave it dense
Choose = Callable[[tuple[str, ...], str | None], Group | None]


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the planned checkpoint that could be quantized: the weight of a Linear or of an expert.

    key, module: in the checkpoint. owner: the module of the model, as passed to `Choose`. dense_by_default: whether it stays
    dense unless a target matches it explicitly.
    """

    key: str
    module: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    owner: str | None
    is_expert: bool
    dense_by_default: bool


@dataclass
class Plan:
    """The planned quantized checkpoint.

    written: its headers. spec: its quantization config. parts: key in it -> where its values come from. groups: key of a
    quantized weight -> its group. dense: names of modules that its config must list as dense. reasons: name of a module that
    a group matches -> why it is dense nevertheless. names: the possible names of each Linear. unmatched: entries of `ignore`
    that match none of them.
    """

    written: Checkpoint
    spec: QuantizationSpec
    parts: dict[str, TensorSlice] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    names: list[tuple[str, ...]] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """A summary for the log."""
        kinds = {group.scheme.describe(): None for group in self.groups.values() if group.scheme is not None}
        said = f"hf_fp8: {len(self.groups)} matrices are quantized ({'; '.join(kinds)})"
        said = f"{said}. Left dense: {by_reason(self.reasons)}" if self.reasons else said
        if self.torn:
            said = f"{said}. {describe(self.torn)}"
        return f"{said}. In `ignore` {', '.join(map(repr, self.unmatched))} matches no Linear" if self.unmatched else said

    @property
    def torn(self) -> dict[str, list[str]]:
        """Siblings that serving engines fuse into one layer, but that have different schemes (`serving.torn`)."""
        schemes = {key.rpartition(".")[0]: group.scheme for key, group in self.groups.items()}
        kinds = {name: None if scheme is None else scheme.describe() for name, scheme in schemes.items()}
        return torn({**dict.fromkeys(self.dense), **kinds})


def plan_quantization(
    model: ModelFacts,
    conversions: Sequence[WeightTransform],
    checkpoint: Checkpoint,
    spec: QuantizationSpec,
    *,
    dense_experts: bool,
    cast_to: torch.dtype | None,
    choose: Choose | None = None,
) -> tuple[Plan, Layout]:
    """Return the plan for quantizing the dense `checkpoint` as `spec` says, and its layout on the model.

    conversions: those of transformers. dense_experts: whether experts stay dense. cast_to: the dtype to which weights are cast
    before they are quantized, None for no cast. choose: decides instead of the groups' targets, and may choose nothing.

    Weights that the model cannot hold in FP8 (read directly by its code, tied, or experts merged in a way of the model family)
    are not quantized. Raises ConfigError if nothing is left, MismatchError for a checkpoint that is quantized already.
    """
    _refuse_quantized(checkpoint)
    keymap = KeyMap.of(model, conversions, checkpoint.tensors)
    wanted = choose or (lambda names, owner: spec.group_of(names, {"Linear", *_classes(model, owner)}))
    planner = _Planner(model, keymap, checkpoint, spec, wanted, dense_experts, cast_to)
    while True:
        plan = planner.plan()
        used = {group.name for group in plan.groups.values()}
        if choose is not None and not used:
            return plan, Layout()
        if choose is None:
            _check_use(model, spec, plan, [group for group in spec.groups if group.name not in used])
            plan.unmatched = spec.unmatched_ignore(plan.names)
        plan.spec = spec.restricted_to(used, plan.dense)
        written = KeyMap.of(model, conversions, plan.written.tensors)
        layout = match_checkpoint(model, written, plan.written, plan.spec, Policy(), plan.parts)
        unfit = {weight.name: reason for weight in layout.scan.weights if (reason := _why_not_kept(weight, layout))}
        if not unfit:
            return plan, layout
        planner.excluded |= unfit  # each round excludes more, so this ends


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    for key, info in checkpoint.tensors.items():
        if info.dtype.startswith("F8_") or key.endswith((".weight_packed", ".weight_scale", ".weight_scale_inv")):
            raise MismatchError(
                f"{key} is stored as {info}: the checkpoint is quantized already, and FP8 made from it would be rounded twice. "
                "Quantize the dense checkpoint that it was made from, or run `hf-fp8 dequantize` first"
            )


def _classes(model: ModelFacts, module: str | None) -> tuple[str, ...]:
    return () if module is None else classes_of(model.modules[module].cls)


def _check_use(model: ModelFacts, spec: QuantizationSpec, plan: Plan, unused: list[Group]) -> None:
    for group in unused:
        if said := reasons_of(plan.reasons):
            raise ConfigError(f"targets {list(group.targets)} match nothing in {model.cls} that can be quantized: {said}")
        raise ConfigError(
            f"targets {list(group.targets)}, ignore {list(spec.ignore)}: they leave no Linear of {model.cls} to "
            f"be quantized; it has {', '.join(names[0] for names in plan.names[:3]) or 'none'}, ..."
        )


def _why_not_kept(weight: StoredWeight, layout: Layout) -> str | None:
    if not weight.target:
        return "this model class does not have it"
    return layout.reasons.get(weight.module) or layout.reasons.get(weight.target)


@dataclass
class _Planner:
    """State of `plan_quantization`.

    excluded: modules of the checkpoint that turned out to be unfit -> why. unsplit: names of experts that stay in one stack.
    """

    model: ModelFacts
    keymap: KeyMap
    checkpoint: Checkpoint
    spec: QuantizationSpec
    choose: Choose
    dense_experts: bool
    cast_to: torch.dtype | None
    excluded: dict[str, str] = field(default_factory=dict)
    unsplit: list[tuple[str, ...]] = field(default_factory=list)

    def plan(self) -> Plan:
        plan = Plan(Checkpoint([]), self.spec)
        found = [matrix for key in self.checkpoint.tensors for matrix in self._take(key, plan)]
        plan.names = [matrix.names for matrix in found] + self.unsplit
        explicit = explicit_targets(self.spec.groups, [matrix.names for matrix in found if not matrix.dense_by_default])
        for matrix in found:
            self._decide(matrix, explicit, plan)
        self._note_head(explicit, plan)
        return plan

    def _take(self, key: str, plan: Plan) -> Iterator[_Matrix]:
        """Add a tensor of the dense checkpoint, or each expert's part of it; yield the matrices that can be quantized."""
        info = self.checkpoint.tensors[key]
        experts, taken = self._take_apart(key, info, plan)
        for name, part in taken:
            shape = part.shape(info.shape)
            plan.parts[name] = part
            plan.written.tensors[name] = TensorInfo(info.dtype, shape, info.file)
            module = module_named(name, info.dtype, len(shape))
            if module is None or info.dtype not in DENSE_DTYPES:
                continue
            if part.expert is None and self._is_targeted_in_vain(name, module):
                plan.dense.append(module)
            if len(shape) != 2:
                continue
            if part.expert is not None:
                names, owner = self.keymap.names_of(module, module, experts), experts
            else:
                names, owner = self._linear(name, module)
            if names:
                is_expert = part.expert is not None or "experts." in name
                stays = is_dense_by_default(names, owner in self.model.heads)
                yield _Matrix(name, module, names, shape, owner, is_expert, stays)

    def _take_apart(self, key: str, info: TensorInfo, plan: Plan) -> tuple[str | None, list[tuple[str, TensorSlice]]]:
        """(experts module of which `key` is a stack, or None; (key, part) of each tensor into which it is split)."""
        whole = [(key, TensorSlice(key))]
        stack = self._stack_of(key, info)
        if stack is None:
            return None, whole
        experts, layout, leaf = stack
        if not (key.endswith(f".{leaf}") and self.keymap.keeps(key, info.shape)):
            if self.choose(self.keymap.names_of(key, key, experts), experts):
                plan.reasons[key] = "experts stacked under a name for which llm-compressor has no per-expert names"
            return experts, whole
        taken = list(_experts_of(key, info, layout, leaf))
        is_patched = self.model.modules[experts].cls.__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION
        if not is_patched and (self.dense_experts or not self._any_chosen(taken, experts)):
            # Not split, since nothing of it is quantized; but transformers splits Llama-4's experts whenever it loads codes.
            plan.dense.append(key.rpartition(".")[0])
            modules = dict.fromkeys((experts, *(name.rpartition(".")[0] for name, _ in taken)))
            self.unsplit += [self.keymap.names_of(module, module, experts) for module in modules]
            return experts, whole
        return experts, taken

    def _stack_of(self, key: str, info: TensorInfo) -> tuple[str, ExpertsLayout, str] | None:
        """(module, layout, leaf) of a tensor that holds a projection, or its bias, of all experts; None for any other."""
        if not 2 <= len(info.shape) <= 3 or info.dtype not in DENSE_DTYPES:
            return None
        target = self.keymap.resolve(key)[0]
        name, _, leaf = target.rpartition(".")
        layout = self.model.experts(name)
        if layout is None:
            return None
        known = (layout.first, "down_proj") if len(info.shape) == 3 else (f"{layout.first}_bias", "down_proj_bias")
        return (name, layout, leaf) if leaf in known and target in self.model.params else None

    def _any_chosen(self, taken: list[tuple[str, TensorSlice]], experts: str) -> bool:
        """Whether any expert of a stack is quantized; for a stack of biases, whether any of their weights is."""
        modules = (name.rpartition(".")[0] for name, _ in taken)
        return any(self.choose(self.keymap.names_of(m, m, experts), experts) and m not in self.excluded for m in modules)

    def _is_targeted_in_vain(self, key: str, called: str) -> bool:
        """Whether a target matches an embedding or a convolution, which stays dense: others would look for its scale."""
        owner = self.keymap.owner(key, called, self.model)
        return owner.is_a(nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d) and bool(
            self.spec.group_of(owner.names, owner.classes)
        )

    def _linear(self, key: str, called: str) -> tuple[tuple[str, ...], str | None]:
        """(names in a config, module) of a matrix of a Linear: of a layer, of an expert, or of one that the model lacks.

        ((), None) for any other matrix. called: the name of its module in the files.
        """
        owner = self.keymap.owner(key, called, self.model)
        target, pattern = self.keymap.resolve(key)
        if pattern is not None:
            experts = target.rpartition(".")[0]
            layout = self.model.experts(experts)
            if layout is None and ("experts." in key or owner.is_a(nn.Linear)):
                # Merged or split in a way of the model family: matching gives the reason.
                return owner.names, owner.module if owner.is_a(nn.Linear) else None
            is_expert = layout is not None and target.rpartition(".")[2] in (layout.first, "down_proj")
            return (owner.names, experts) if is_expert else ((), None)
        if not (owner.module is None or owner.is_a(nn.Linear)):
            # A router may hold its matrix itself. Other loaders make it a Linear, so the config must list it as dense.
            return (owner.names, owner.module) if is_router(owner.names) else ((), None)
        return owner.names, owner.module

    def _decide(self, matrix: _Matrix, explicit: Sequence[str], plan: Plan) -> None:
        """Add a matrix to the plan, quantized or dense. explicit: targets that may match what is dense by default."""
        stays = matrix.dense_by_default and self.spec.dense_by_default and not match(matrix.names, (), explicit)
        group = None if stays else self.choose(matrix.names, matrix.owner)
        if group is None or (self.dense_experts and matrix.is_expert):
            plan.dense.append(matrix.module)
            return
        assert group.scheme is not None
        if (reason := self.excluded.get(matrix.module) or why_unfit(group.scheme, matrix.shape)) is not None:
            plan.reasons[matrix.module] = reason
            plan.dense.append(matrix.module)
        else:
            info = self.checkpoint.tensors[plan.parts[matrix.key].key]
            plan.groups[matrix.key] = group
            if group.scheme.weight.packed:
                del plan.written.tensors[matrix.key]  # its codes have another name
            plan.written.tensors |= _quantized(matrix.module, info, matrix.shape, group, self.cast_to)

    def _note_head(self, explicit: Sequence[str], plan: Plan) -> None:
        """List a tied head as dense: it has no tensor in the files, but other loaders expect it in `ignore`."""
        for name in self.model.heads[:1]:
            if f"{name}.{WEIGHT}" not in plan.groups and name not in plan.dense:
                plan.dense.append(name)
                if match((name,), (), explicit):
                    plan.reasons[name] = "it is tied to another parameter, and has no separate weight"


def _quantized(
    module: str, info: TensorInfo, shape: tuple[int, ...], group: Group, dtype: torch.dtype | None
) -> dict[str, TensorInfo]:
    """The tensors that replace a dense matrix. dtype: to which it is cast before it is quantized, None for no cast."""
    assert group.scheme is not None
    scheme = group.scheme.weight
    scale = scale_dtype_of(dtype or TORCH_DTYPES[info.dtype], scheme.mx)
    n, k = shape
    forms = format_of(scheme).forms(scheme, n, k, scale)
    if group.scheme.has_static_input:
        forms[INPUT_SCALE] = TensorForm(scale, (1,))
    dot = f"{module}." if module else ""
    return {dot + role: TensorInfo(DTYPE_NAMES[form.dtype], form.shape, info.file) for role, form in forms.items()}


def why_unfit(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """Why a weight of this shape (N, K) cannot be quantized with `scheme`, None if it can."""
    if 0 in shape:
        return f"it has no values: its shape is {list(shape)}"
    granularity = scheme.weight.granularity
    if granularity.rows == 1 and granularity.cols > 1 and shape[1] % granularity.cols:
        return f"K = {shape[1]} is not a multiple of the group size {granularity.cols}"
    return None


def _experts_of(key: str, info: TensorInfo, layout: ExpertsLayout, leaf: str) -> Iterator[tuple[str, TensorSlice]]:
    """(key, part) of each expert, under llm-compressor's names."""
    is_first = leaf.removesuffix("_bias") == layout.first
    projections = ("gate_proj", "up_proj") if is_first and layout.has_gate else ("up_proj",) if is_first else ("down_proj",)
    role = "bias" if leaf.endswith("_bias") else WEIGHT
    stem = key.rpartition(".")[0]
    for expert in range(info.shape[0]):
        for index, projection in enumerate(projections):
            part = TensorSlice(key, expert, index, len(projections), layout.is_transposed, not layout.is_concatenated)
            yield f"{stem}.{expert}.{projection}.{role}", part
