"""Applies a layout to a model on the meta device: replaces its Linears and experts by quantized modules, not yet loaded."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..checkpoint.reader import TORCH_DTYPES
from ..formats.storage import INPUT_SCALE, WEIGHT_SCALE
from ..nn.experts import QuantizedExperts
from ..nn.swap import swap_experts, swap_linear, untie
from .layout import ExpertsPlan, Layout


def apply_layout(model: PreTrainedModel, layout: Layout, *, backend: str, needs_input_scales: bool) -> None:
    """Replace the Linears and experts of `model` that stay in FP8.

    backend: of the new modules. needs_input_scales: whether static input scales that the files lack will be calibrated. If not,
    nothing that runs here uses them, and they get no parameter.
    """
    for name, weight in layout.kept.items():
        dtypes = {role: TORCH_DTYPES[dtype] for role, dtype in weight.dtypes.items()}
        layer = swap_linear(
            model, name, weight.scheme,
            scale_dtype=dtypes[WEIGHT_SCALE], input_scale_dtype=dtypes.get(INPUT_SCALE), backend=backend,
        )  # fmt: skip
        if weight.name in layout.input_scales and INPUT_SCALE not in weight.keys:
            layer.register_parameter(INPUT_SCALE, None)
        untie(model, weight.target)
    for plan in layout.experts.values():
        swap_planned(model, plan, backend, needs_input_scales)


def swap_planned(model: PreTrainedModel, plan: ExpertsPlan, backend: str, needs_input_scales: bool = True) -> QuantizedExperts:
    """Replace the dense experts of `plan` by empty QuantizedExperts. The other arguments are those of `apply_layout`."""
    experts = swap_experts(
        model, plan.name, plan.first.projection, plan.second.projection,
        interleaved=plan.interleaved, scale_dtypes=plan.scale_dtypes, backend=backend,
    )  # fmt: skip
    for stack in plan.stacks:
        if stack.projection.scheme.has_static_input and INPUT_SCALE not in stack.roles and not needs_input_scales:
            experts.register_parameter(stack.projection.input_scale, None)
    return experts
