"""Quantizes transformers models in place: planned by the checkpoint that they would save, so that they can be saved as one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightTransform, revert_weight_conversion

from ..checkpoint.reader import DTYPE_NAMES, Checkpoint, TensorInfo
from ..checkpoint.stored_weight import TensorSlice
from ..errors import ScaleError, UnsupportedError
from ..integrations.config import FP8Config
from ..integrations.quantizer import FP8HfQuantizer
from ..loading.apply import swap_planned
from ..loading.dtypes import DtypePlan, dtype_of
from ..loading.expert_ops import quantize_stack
from ..loading.key_map import PlainMerge
from ..loading.layout import ExpertsPlan, Stack
from ..loading.quantization_plan import Choose
from ..nn.base import holds_codes
from ..nn.swap import share_hooks


def plan_in_place(model: PreTrainedModel, config: FP8Config, choose: Choose) -> FP8HfQuantizer:
    """The quantizer that would have loaded `model` with `config`, with its layout planned but not applied.

    Raises UnsupportedError for a model that is quantized already.
    """
    _refuse_quantized(model)
    conversions = _conversions(model)
    quantizer = FP8HfQuantizer(config, pre_quantized=False)
    dtype = dtype_of(model)
    layout = quantizer.plan(model, conversions, _headers(model), dtype, cast=False, choose=choose)
    # There are no files: record a file dtype only for parameters that transformers holds wider than the rest.
    dtypes = DtypePlan(model, dtype)
    layout.file_dtypes = {name: dtype for name in layout.file_dtypes if dtypes.wanted(name) not in (None, dtype)}
    return quantizer


def _refuse_quantized(model: PreTrainedModel) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None or holds_codes(model):
        method = "" if quantizer is None else quantizer.quantization_config.quant_method
        raise UnsupportedError(
            f"{type(model).__name__} is quantized already ({getattr(method, 'value', method) or 'FP8 layers in it'}): quantize "
            "a transformers model in one call (for several groups: scheme={scheme: targets, ...}). Call "
            "hf_fp8.dequantize_model first, or load the dense checkpoint"
        )


def fill_experts(model: PreTrainedModel, plan: ExpertsPlan, *, backend: str, device: Any) -> None:
    """Replace the dense experts of `plan` by QuantizedExperts; experts are quantized one at a time on `device`."""
    dense = model.get_submodule(plan.name)
    new = swap_planned(model, plan, backend)
    share_hooks(dense, new)

    def part_of(stack: Stack, values: torch.Tensor, part: int, expert: int) -> torch.Tensor:
        is_transposed, is_interleaved = new.layout.is_transposed, not new.layout.is_concatenated
        where = TensorSlice("", expert, part, stack.projection.parts, is_transposed, is_interleaved)
        return where.take(values).to(device or values.device)

    for stack in plan.stacks:
        values: torch.Tensor = getattr(dense, stack.projection.name).detach()
        if values.is_meta:
            continue
        quantized = quantize_stack(stack, partial(part_of, stack, values), broken := list[str]())
        if broken:
            raise ScaleError("; ".join(broken))
        for name, made in quantized.items():
            setattr(new, name.rpartition(".")[2], nn.Parameter(made.to(values.device), requires_grad=False))
        new.original_dtype = values.dtype
        del dense._parameters[stack.projection.name]  # free it before the next one


def attach_quantizer(model: PreTrainedModel, quantizer: FP8HfQuantizer) -> None:
    """Mark `model`, to which the layout of `quantizer` was applied, as quantized by it."""
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, quantizer.quantization_config.quant_method
    if quantizer.layout is not None:
        model._weight_conversions = [c for c in quantizer.conversions if not isinstance(c, PlainMerge) or c.was_used()]
    quantizer.postprocess_model(model)


def _conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """The conversions with which transformers saves `model` (`revert_weight_conversion`)."""
    found = getattr(model, "_weight_conversions", None)
    if found is None:
        found = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    return list(found)


def _headers(model: PreTrainedModel) -> Checkpoint:
    """The headers of the checkpoint that transformers would write for `model`."""
    tied = model.all_tied_weights_keys
    held = model.state_dict()
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in held.items() if tied.get(name) not in held}
    checkpoint = Checkpoint([])
    for name, tensor in revert_weight_conversion(model, state).items():
        dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        checkpoint.tensors[name] = TensorInfo(dtype, tuple(tensor.shape), type(model).__name__)
    return checkpoint


def transformers_models(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """The outermost transformers models in `model`, with their names: `model` itself, or submodules of it."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append(name)
            yield name, module
