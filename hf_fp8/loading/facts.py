"""The facts about a model that matching a checkpoint needs, collected once as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from ..nn.experts_layout import ExpertsLayout
from .dtypes import DtypePlan
from .model_code import weights_read_by_kernels, weights_read_directly


@dataclass(frozen=True)
class ParameterFacts:
    """A parameter or buffer of the model.

    dtype: in which transformers will hold it. keeps_dtype: whether it is float32 or wider whatever the model's dtype is.
    is_parameter: False for a buffer, and for further names of a shared parameter.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    keeps_dtype: bool = False
    is_parameter: bool = True


@dataclass(frozen=True)
class ModuleFacts:
    """A module of the model.

    experts: layout of its merged experts, None if it has none. has_weight: whether its `weight` is a parameter. read_by: the
    class whose code reads its weight instead of calling it. gives_dtype_to: class of the transformers model that takes its
    dtype from this module's weight, which is its first parameter. Both are "" if there is none.
    """

    cls: type[nn.Module]
    experts: ExpertsLayout | None = None
    has_weight: bool = False
    read_by: str = ""
    gives_dtype_to: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model that matching a checkpoint needs.

    cls: the name of its class. params, modules: by name; shared modules under each of their names. tied: name of a parameter
    -> the one that it is tied to. prefix: that of the base model, which keys of files may have or lack. heads: names of
    the output embedding. ignore_missing, ignore_unexpected: regular expressions of the class for keys that may be missing in
    the files, or extra there. is_of_class: whether config.json names this class, so that the files were saved by it.
    """

    cls: str
    params: Mapping[str, ParameterFacts]
    modules: Mapping[str, ModuleFacts]
    tied: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    heads: tuple[str, ...] = ()
    ignore_missing: tuple[str, ...] = ()
    ignore_unexpected: tuple[str, ...] = ()
    is_of_class: bool = True

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype, *, use_kernels: bool = False) -> ModelFacts:
        """dtype: the model's. use_kernels: whether kernels from the Hub may replace modules, as in `from_pretrained`."""
        head = model.get_output_embeddings()
        modules = dict(model.named_modules(remove_duplicate=False))
        return cls(
            cls=type(model).__name__,
            params=_params(model, dtype),
            modules=_modules(model, modules, use_kernels),
            tied=dict(model.all_tied_weights_keys),
            prefix=model.base_model_prefix,
            heads=tuple(name for name, module in modules.items() if module is head and head is not None),
            ignore_missing=tuple(model._keys_to_ignore_on_load_missing or ()),
            ignore_unexpected=tuple(model._keys_to_ignore_on_load_unexpected or ()),
            is_of_class=is_of_class(model),
        )

    def experts(self, name: str) -> ExpertsLayout | None:
        """The layout of the merged experts of module `name`; None if there is no such module, or it has none."""
        module = self.modules.get(name)
        return None if module is None else module.experts


def is_of_class(model: PreTrainedModel) -> bool:
    """Whether the checkpoint was saved by this model class, according to the `architectures` of its config."""
    return type(model).__name__ in (getattr(model.config, "architectures", None) or ())


def _params(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, ParameterFacts]:
    plan = DtypePlan(model, dtype)
    parameters = {name for name, _ in model.named_parameters()}
    return {
        name: ParameterFacts(tuple(tensor.shape), plan.of(name), plan.widens(name), is_parameter=name in parameters)
        for name, tensor in model.state_dict().items()
    }


def _modules(model: PreTrainedModel, modules: Mapping[str, nn.Module], use_kernels: bool) -> dict[str, ModuleFacts]:
    read = (weights_read_by_kernels(model) if use_kernels else {}) | weights_read_directly(model)
    first = {
        id(next(part.parameters(), None)): type(part).__name__ for part in modules.values() if isinstance(part, PreTrainedModel)
    }
    found = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        found[name] = ModuleFacts(
            type(module),
            ExpertsLayout.of(module),
            has_weight=weight is not None,
            read_by=read.get(name, ""),
            gives_dtype_to="" if weight is None else first.get(id(weight), ""),
        )
    return found
