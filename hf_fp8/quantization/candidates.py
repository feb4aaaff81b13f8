"""Which layers of any PyTorch model can be quantized in place, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..formats.scheme import FP8_DYNAMIC, Scheme
from ..loading.model_code import weights_read_directly
from ..nn.base import QuantizedModule, foreign_attributes
from ..nn.conv import Convolution, FP8PointwiseConv

# Names that mean something on a quantized layer.
_OURS = {*dir(FP8PointwiseConv), *vars(FP8PointwiseConv(1, 1, FP8_DYNAMIC, device="meta"))}


@dataclass(frozen=True)
class Candidate:
    """A layer by its name. reason: why it cannot be quantized, None if it can."""

    name: str
    module: nn.Module
    reason: str | None


def candidates(model: nn.Module, *, conv1x1: bool) -> Iterator[Candidate]:
    """Every Linear of `model`, and on request every convolution, once for each place where it sits."""
    users = _users(model)
    read = weights_read_directly(model)
    layers = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, QuantizedModule)
        and (isinstance(module, nn.Linear) or (conv1x1 and isinstance(module, Convolution)))
    ]
    reasons: dict[int, str] = {}  # of a layer, wherever it sits
    for name, module in layers:
        direct = f"{read[name]} reads its weight instead of calling it" if name in read else None
        if reason := _own_code(module) or direct or _weight(module, users):
            reasons[id(module)] = reason
    for name, module in layers:
        yield Candidate(name, module, reasons.get(id(module)))


def why_unfit(module: nn.Module, scheme: Scheme) -> str | None:
    """Why the layer cannot be held in `scheme`."""
    granularity = scheme.weight.granularity
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    inputs = weight.flatten(1).shape[1]
    if granularity.rows == 1 and granularity.cols > 1 and inputs % granularity.cols:
        return f"K = {inputs} is no multiple of the group of {granularity.cols}"
    return None


def _own_code(module: nn.Module) -> str | None:
    kind = type(module)
    if kind not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return f"{kind.__name__} is a subclass of {kind.__mro__[1].__name__}, and may compute something else"
    if isinstance(module, Convolution) and (reason := FP8PointwiseConv.why_not(module)):
        return reason
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules or module.weight is None:
        return "it holds more than a weight and a bias (a weight norm, or the like, makes the weight anew)"
    # Notes of other libraries are carried over; what can be computed with may be part of what the layer does.
    extra = [name for name in foreign_attributes(module) if not _is_note(name, getattr(module, name))]
    if extra or ("forward" in vars(module) and not hasattr(module, "_hf_hook")):
        return f"it was changed: {', '.join(sorted(extra)) or 'forward'} was set on it"
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
        return "it is offloaded, and its weight is not here to be read"
    others = [name for name, user in users[id(weight)] if type(user) is not type(module)]
    return f"its weight is also {others[0]}" if others else None


def _users(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """id of a parameter -> where it sits."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((f"{name}.{leaf}" if name else leaf, module))
    return users
