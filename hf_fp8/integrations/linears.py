"""Which Linears of a model can be replaced by quantized ones, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..formats.scheme import FP8_DYNAMIC
from ..loading.model_code import weights_read_directly
from ..nn.base import QuantizedModule, foreign_attributes
from ..nn.conv import Convolution, QuantizedConv1x1
from ..nn.dense import DenseLinear

# Names of attributes that a quantized layer uses.
_OURS = {*dir(QuantizedConv1x1), *vars(QuantizedConv1x1(1, 1, FP8_DYNAMIC, device="meta"))}


@dataclass(frozen=True)
class Candidate:
    """A layer by its name. reason: why it cannot be quantized, None if it can."""

    name: str
    module: nn.Module
    reason: str | None


def candidates(model: nn.Module, *, conv1x1: bool) -> Iterator[Candidate]:
    """Every Linear of `model`, and with conv1x1 every convolution, once under each of its names."""
    users = _users(model)
    read = weights_read_directly(model)
    wide = _kept_wide(model)
    layers = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, QuantizedModule)
        and (isinstance(module, nn.Linear) or (conv1x1 and isinstance(module, Convolution)))
    ]
    reasons: dict[int, str] = {}  # by id of the layer, for all its names
    for name, module in layers:
        direct = f"{read[name]} reads its weight instead of calling it" if name in read else None
        if reason := _own_code(module) or direct or _weight(module, users) or wide.get(name):
            reasons[id(module)] = reason
    for name, module in layers:
        yield Candidate(name, module, reasons.get(id(module)))


def _kept_wide(model: nn.Module) -> dict[str, str]:
    """Name of a module that a diffusers model holds in float32 (`_keep_in_fp32_modules`) -> why it stays dense."""
    found = {}
    for path, part in model.named_modules():
        listed = getattr(type(part), "_keep_in_fp32_modules", None)
        if not listed or isinstance(part, PreTrainedModel):
            continue
        wanted = {listed} if isinstance(listed, str) else set(listed)
        for name, _ in part.named_modules(prefix=path, remove_duplicate=False):
            if met := wanted.intersection(name.removeprefix(path).split(".")):
                found[name] = f"{type(part).__name__} holds {min(met)} in float32"
    return found


def _own_code(module: nn.Module) -> str | None:
    kind = type(module)
    if kind not in (nn.Linear, DenseLinear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return f"{kind.__name__} is a subclass of {kind.__mro__[1].__name__}, and may compute something else"
    if isinstance(module, Convolution) and (reason := QuantizedConv1x1.why_not(module)):
        return reason
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules or module.weight is None:
        return "it has more than a weight and a bias (for example a weight norm, which recomputes the weight)"
    # Plain attributes set by other libraries are copied; tensors, modules and callables may change what the layer computes.
    extra = [name for name in foreign_attributes(module) if not _is_note(name, getattr(module, name))]
    if extra or ("forward" in vars(module) and not hasattr(module, "_hf_hook")):
        return f"it was modified: {', '.join(sorted(extra)) or 'forward'} was set on it"
    return None


def _is_note(name: str, value: object) -> bool:
    return not (callable(value) or isinstance(value, torch.Tensor | nn.Module) or name in _OURS)


def _weight(module: nn.Module, users: dict[int, list[tuple[str, nn.Module]]]) -> str | None:
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if not weight.is_floating_point() or weight.itemsize == 1:
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return f"it has no values: its weight has shape {list(weight.shape)}"
    if weight.is_meta and hasattr(module, "_hf_hook"):
        return "it is offloaded, and its weight cannot be read"
    others = [name for name, user in users[id(weight)] if type(user) is not type(module)]
    return f"its weight is also {others[0]}" if others else None


def _users(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """id of a parameter -> its names and modules."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((f"{name}.{leaf}" if name else leaf, module))
    return users
