"""Layout: for each tensor of a checkpoint, its parameter in the model and whether it stays in FP8."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..checkpoint.reader import Checkpoint
from ..checkpoint.scan import Scan
from ..checkpoint.stored_weight import DenseTensor, StoredWeight
from ..formats.storage import INPUT_SCALE, format_of
from ..nn.experts_layout import ExpertsLayout, Projection, suffix_of

# Attribute of the model in which the loader stores its decisions: module or parameter name -> (scheme, reason).
NOTES = "_hf_fp8_notes"


@dataclass
class Parameter:
    """A dense parameter of the model that is made from quantized weights of the files.

    sources: the tensors that each source pattern of transformers' converter collects, in its order. others: further parameters
    that the converter makes from the same tensors (such as q, k and v from a fused one), in its order after this one.
    """

    name: str
    dtype: torch.dtype
    sources: dict[str, list[StoredWeight | DenseTensor]] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def weights(self) -> list[StoredWeight]:
        """The sources that are quantized in the files."""
        return [source for part in self.sources.values() for source in part if isinstance(source, StoredWeight)]


@dataclass(frozen=True)
class Stack:
    """One projection of an experts module and the weights that fill it: for each part one per expert, or one stack of all.

    transposed: the stack in the files is (E, K, N).
    """

    target: str
    projection: Projection
    sources: tuple[tuple[StoredWeight, ...], ...]
    transposed: bool = False

    @property
    def is_stacked(self) -> bool:
        return len(self.sources[0][0].shape) == 3

    @property
    def weights(self) -> list[StoredWeight]:
        return [weight for part in self.sources for weight in part]

    @property
    def roles(self) -> list[str]:
        """The roles that the files have; static input scales of single experts may be missing."""
        return [role for role in self.possible_roles if any(role in weight.keys for weight in self.weights)]

    @property
    def possible_roles(self) -> list[str]:
        """The roles that its scheme has, and that of static input scales."""
        scheme = self.projection.scheme.weight
        return [*format_of(scheme).forms(scheme, 1, 1, torch.float32), INPUT_SCALE]

    def name_of(self, role: str) -> str:
        """The parameter of the model for a role of the weights."""
        return self.target + suffix_of(role)


@dataclass
class ExpertsPlan:
    """An experts module that stays in FP8."""

    name: str
    first: Stack
    second: Stack
    interleaved: bool
    scale_dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    @property
    def stacks(self) -> tuple[Stack, Stack]:
        return self.first, self.second


@dataclass
class Layout:
    """For each tensor of the files, its parameter in the model: plain data, from which `conversions` makes the transforms.

    kept: module -> weight that stays in FP8. experts: module -> experts that stay in FP8. dense: parameter -> the weights
    dequantized into it. weights: those of all three.

    reasons: name of a dense weight's module or parameter -> why it is dense. extra: names in the model -> keys in the files,
    of tensors that belong to a module's weights or its KV cache but are not used. unplaced: the same for tensors that match no
    module of this model class. scales: name of a dense weight -> its scales in the files, for writing it back. missing:
    parameters without a tensor in the files. file_dtypes: parameter -> dtype of the dense tensors in the files that fill it.
    source: the files, from which unchanged weights are written back; None if they are not read.
    input_scales: name of a weight -> what is wrong with its static input scale. broken: errors of weights that should have been
    quantized, collected while loading. aliases: keys after transformers' renamings -> the names to use instead. prefix: that of
    the base model, which keys may have or lack. unmapped_experts: layout and end of the module path of experts whose names in
    the files transformers does not map. splits_experts: whether stacks of a dense checkpoint are split into single experts, as
    they are saved.
    """

    kept: dict[str, StoredWeight] = field(default_factory=dict)
    experts: dict[str, ExpertsPlan] = field(default_factory=dict)
    dense: dict[str, Parameter] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    unplaced: dict[str, str] = field(default_factory=dict)
    scan: Scan = field(default_factory=Scan)
    weights: list[StoredWeight] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    unmapped_experts: tuple[ExpertsLayout, str] | None = None
    splits_experts: bool = False
    scales: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    file_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    input_scales: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    source: Checkpoint | None = None

    @property
    def dense_modules(self) -> list[str]:
        """Modules whose weights are quantized in the files and dense in the model, by their names for a config."""
        held = {*self.kept, *(stack.target for plan in self.experts.values() for stack in plan.stacks)}
        merged = [weight for weight in self.scan.host if weight.pattern is not None]
        return [weight.module for weight in self.scan.weights if weight.target and weight.module not in held] + [
            name for weight in merged for name in (weight.name, weight.renamed[weight.primary].rpartition(".")[0])
        ]

    def saves_fp8(self, dense_because: str | None) -> bool:
        """Whether the model is saved as an FP8 checkpoint: some weights stay in FP8, or could."""
        return dense_because is None or bool(self.experts)
