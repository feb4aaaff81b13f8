"""Chooses the layers that `quantize_model` quantizes: by targets and the user's filter, with reasons why others cannot be."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.config_groups import Group, classes_of, match
from ..checkpoint.dense_by_default import explicit_targets, is_dense_by_default
from ..errors import ConfigError, ScaleError, UnsupportedError, reasons_of
from ..formats.scheme import Scheme
from ..formats.weights import scale_dtype_of
from ..integrations.config import FP8Config
from ..integrations.linears import Candidate, candidates
from ..integrations.peft.state import adapters
from ..integrations.quantizer import FP8HfQuantizer
from ..loading.quantization_plan import why_unfit
from ..nn.base import QuantizedModule
from ..nn.conv import Convolution
from ..nn.fake_quantized_experts import prepared
from .transformers_model import plan_in_place, transformers_models

Filter = Callable[[str, nn.Module], bool]
logger = logging.getLogger(__name__)


@dataclass
class Choice:
    """The layers to quantize.

    layers: name -> scheme. reasons: name of a matched layer that cannot be quantized -> why. quantizers: name of a transformers
    model in the model -> the quantizer for saving it, with its experts in its layout. names: the possible names of each Linear.
    """

    layers: dict[str, Scheme] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    quantizers: dict[str, FP8HfQuantizer] = field(default_factory=dict)
    names: list[tuple[str, ...]] = field(default_factory=list)


def choose(model: nn.Module, config: FP8Config, filter_fn: Filter | None, conv1x1: bool) -> Choice:
    """Choose the layers of `model` to quantize.

    Raises ConfigError if a group has no layer left; ScaleError for experts that are not finite; UnsupportedError for models
    with adapters, and for those that are prepared for quantization-aware training.
    """
    if (adapter := adapters(model)) is not None:
        raise UnsupportedError(
            f"{adapter} has an adapter, whose Linears must not be quantized: quantize the model first, then add adapters to it"
        )
    if prepared(model):
        raise UnsupportedError(
            f"{type(model).__name__} is prepared for quantization-aware training: hf_fp8.convert_qat(model) quantizes it"
        )
    found = {candidate.name: candidate for candidate in candidates(model, conv1x1=conv1x1)}
    choice = Choice()
    planned: list[str] = []
    used: set[str] = set()

    def accepted(group: Group | None, name: str, module: nn.Module) -> Group | None:
        if group is None or (filter_fn is not None and not filter_fn(name, module)):
            return None
        candidate = found.get(name)
        reason = None if candidate is None else candidate.reason
        if reason is None and candidate is not None and group.scheme is not None:
            weight: nn.Parameter = module.weight  # type: ignore[assignment]
            reason = why_unfit(group.scheme, weight.flatten(1).shape)
            if group.scheme.weight.packed and isinstance(module, Convolution):
                reason = "packed codes are for Linears, and it is a convolution"
        if reason is not None:
            choice.reasons[name] = reason
            return None
        used.add(group.name)
        return group

    parts = dict(transformers_models(model))
    for path, part in parts.items():
        planned.append(path)
        _plan(path, part, config, accepted, choice)
    by_default = {name for name, candidate in found.items() if config.spec.dense_by_default and _stays_dense(candidate, parts)}
    explicit = explicit_targets(config.spec.groups, [(name,) for name in found if name not in by_default])
    rest = {
        name: candidate
        for name, candidate in found.items()
        if not (isinstance(candidate.module, nn.Linear) and any(_within(name, path) for path in planned))
    }
    for called in _names_of_modules(rest):
        module = rest[called[0]].module
        if any(name in by_default for name in called) and not match(called, (), explicit):
            continue
        group = config.spec.group_of(called, {"Linear", *classes_of(type(module))})
        if any(accepted(group, name, module) for name in called) and group is not None and group.scheme is not None:
            choice.layers.update(dict.fromkeys(called, group.scheme))
    _check(model, config, choice, used)
    choice.names += [(name,) for name in found]
    for entry in config.spec.unmatched_ignore(choice.names):
        logger.warning(f"hf_fp8: {entry!r} in `ignore` matches no Linear of {type(model).__name__}")
    return choice


def _names_of_modules(found: Mapping[str, Candidate]) -> list[tuple[str, ...]]:
    """The names of each module: one that has several is one layer, quantized under all of them or none."""
    names: dict[int, tuple[str, ...]] = {}
    for name, candidate in found.items():
        names[id(candidate.module)] = (*names.get(id(candidate.module), ()), name)
    return list(names.values())


def _plan(
    path: str,
    part: PreTrainedModel,
    config: FP8Config,
    accepted: Callable[[Group | None, str, nn.Module], Group | None],
    choice: Choice,
) -> None:
    dot = f"{path}." if path else ""
    names = {id(module): dot + name for name, module in part.named_modules()}
    decided: dict[tuple[int, str | None], Group | None] = {}

    def wanted(called: tuple[str, ...], owner: str | None) -> Group | None:
        if owner is None:
            return None
        name = names[id(module := part.get_submodule(owner))]  # one of the names, if the module has several
        group = config.spec.group_of((*called, name), {"Linear", *classes_of(type(module))})
        key = (id(module), None if group is None else group.name)
        if key not in decided:
            decided[key] = accepted(group, name, module)
        return decided[key]

    quantizer = plan_in_place(part, copy.copy(config), wanted)
    assert quantizer.layout is not None and quantizer.planned is not None
    choice.reasons.update({dot + name: reason for name, reason in quantizer.planned.reasons.items()})
    choice.names += quantizer.planned.names
    if quantizer.layout.kept or quantizer.layout.experts:
        choice.quantizers[path] = quantizer
        choice.layers.update({dot + name: weight.scheme for name, weight in quantizer.layout.kept.items()})


def _check(model: nn.Module, config: FP8Config, choice: Choice, used: set[str]) -> None:
    held = sum(isinstance(module, QuantizedModule) for module in model.modules())
    for group in config.spec.groups:
        if group.name not in used:
            if held:
                choice.reasons.setdefault("", f"{held} layers are quantized already")
            said = reasons_of(choice.reasons)
            raise ConfigError(
                f"no layer of {type(model).__name__} is quantized by targets {list(group.targets)}, ignore "
                f"{list(config.spec.ignore)} and filter_fn{f' ({said})' if said else ''}"
            )
    if not choice.layers and not choice.quantizers:
        raise ConfigError(f"no layer of {type(model).__name__} can be quantized ({reasons_of(choice.reasons)})")
    for path, quantizer in choice.quantizers.items():
        for plan in quantizer.layout.experts.values() if quantizer.layout is not None else ():
            for stack in plan.stacks:
                name = f"{path}.{stack.target}" if path else stack.target
                values = model.get_parameter(name)
                ends = () if values.is_meta else torch.aminmax(values)
                if not all(bool(end.to(scale_dtype_of(values.dtype)).isfinite()) for end in ends):
                    raise ScaleError(f"{name} has NaN or infinite values, which cannot be quantized: add it to `ignore`")


def _stays_dense(candidate: Candidate, parts: dict[str, PreTrainedModel]) -> bool:
    """Whether it is the output embedding or a router of a transformers model."""
    inside = [part for path, part in parts.items() if _within(candidate.name, path)]
    return bool(inside) and is_dense_by_default((candidate.name,), candidate.module is inside[0].get_output_embeddings())


def _within(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")
