"""The dtype in which transformers holds each parameter of a model."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from ..nn.base import QuantizedModule

WIDE = (torch.float32, torch.float64)


class DtypePlan:
    """The dtypes that transformers' loader gives to parameters.

    Parameters that the class lists for float32 are float32. Parameters that the class itself creates in float32 or float64
    keep that dtype. model: on the meta device or loaded. dtype: the model's.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._wanted = model._get_dtype_plan(dtype)
        self._pattern, self._groups, _ = build_glob_alternation(list(self._wanted)) if self._wanted else (None, {}, None)
        self._own = {name: p.dtype for name, p in model.named_parameters() if p.dtype in WIDE and p.dtype != dtype}

    def wanted(self, name: str) -> torch.dtype | None:
        """The dtype that the class requires for the parameter `name` by a name pattern, or None."""
        found = self._pattern.search(name) if self._pattern is not None else None
        if not found or not found.lastgroup:
            return None
        dtype: torch.dtype = self._wanted[self._groups[found.lastgroup]]
        return dtype

    def of(self, name: str) -> torch.dtype:
        """The dtype of the parameter `name`."""
        return self.wanted(name) or self._own.get(name, self.dtype)

    def widens(self, name: str) -> bool:
        """Whether the parameter `name` is in float32 whatever the model's dtype is."""
        return self.wanted(name) == torch.float32 or name in self._own


def dtype_of(model: PreTrainedModel) -> torch.dtype:
    """The dtype of the model's parameters, except codes and scales, and those for which its class requires another.

    `PreTrainedModel.dtype` is that of the first parameter, whichever it is.
    """
    found = float_parameter(model)
    return model.dtype if found is None else found.dtype


def float_parameter(model: PreTrainedModel) -> torch.nn.Parameter | None:
    """The first parameter that has the dtype of the model, as `dtype_of` finds it."""
    plan = DtypePlan(model, torch.bfloat16)
    quantized = {id(p) for module in model.modules() if isinstance(module, QuantizedModule) for p in module.of_codes()}
    held = ((name, p) for name, p in model.named_parameters() if p.is_floating_point() and id(p) not in quantized)
    return next((p for name, p in held if plan.wanted(name) is None), None)
