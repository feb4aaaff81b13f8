"""Conversion ops for experts that stay in FP8: one tensor per expert in the files, stacks in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..checkpoint.stored_weight import companion
from ..errors import UnsupportedError
from ..formats.storage import COLUMN_GROUPS, INPUT_SCALE, PACKED, SHAPE, WEIGHT, WEIGHT_SCALE, ZERO_POINT
from ..nn.experts_layout import suffix_of
from .key_map import plain_weight
from .layout import Stack
from .ops import SharedOp, only, quantize_or_note

ROLES = (WEIGHT, PACKED, WEIGHT_SCALE, SHAPE, ZERO_POINT, COLUMN_GROUPS, INPUT_SCALE)


def pattern(part: int, role: str) -> str:
    """The source pattern under which the loader collects the tensors of one part and role."""
    return f"hf_fp8_experts.{part}.{role}"


PATTERNS = [pattern(part, role) for part in (0, 1) for role in ROLES]


class StackExperts(SharedOp):
    """Fills a stack and its scales expert by expert.

    Each expert's tensor is freed once copied, so no stack is held twice.
    """

    def __init__(self, stacks: Mapping[str, Stack]) -> None:
        self.stacks = stacks

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        stack = self.stacks[full_layer_name]
        if stack.is_stacked:
            return {stack.name_of(r): from_stack(stack, r, only(input_dict.pop(pattern(0, r)))) for r in stack.roles}
        found: dict[str, torch.Tensor] = {}
        for role in stack.roles:
            for part, weights in enumerate(stack.sources):
                tensors = input_dict.pop(pattern(part, role), [])
                experts = [expert for expert, weight in enumerate(weights) if role in weight.keys]
                if len(tensors) != len(experts):
                    raise RuntimeError(f"{full_layer_name}: {len(tensors)} of {len(experts)} tensors arrived for {role}")
                for index, expert in enumerate(experts):
                    tensor, tensors[index] = tensors[index], None
                    _put(found, stack, role, part, expert, tensor)
        return found


class QuantizeExperts(SharedOp):
    """Fills a stack and its scales from dense experts: each is read, quantized and freed before the next one is read.

    Its inputs are functions that read a tensor (`conversions.LazyConverter`): one per expert, or one for a whole stack.
    """

    def __init__(self, stacks: Mapping[str, Stack], broken: list[str]) -> None:
        self.stacks, self.broken = stacks, broken

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        stack = self.stacks[full_layer_name]
        whole = stack.weights[0].part is not None and stack.weights[0].part.expert is not None
        readers = [input_dict.pop(pattern(part, WEIGHT), []) for part in range(len(stack.sources))]
        tensor = readers[0].pop()() if whole else None
        if not whole and any(len(found) != stack.projection.shape[0] for found in readers):
            raise RuntimeError(f"{full_layer_name}: {[len(found) for found in readers]} tensors arrived for its experts")

        def read(part: int, expert: int) -> torch.Tensor:
            weight = stack.sources[part][expert]
            assert weight.part is not None
            return weight.part.take(readers[part][expert]() if tensor is None else tensor)

        return quantize_stack(stack, read, self.broken)


def quantize_stack(stack: Stack, read: Callable[[int, int], torch.Tensor], broken: list[str]) -> dict[str, torch.Tensor]:
    """Quantize the dense matrices (N, K) that `read(part, expert)` returns; return a stack's tensors by their model names.

    Errors are appended to `broken`.
    """
    projection = stack.projection
    n_experts, parts = projection.shape[0], len(stack.sources)
    found: dict[str, torch.Tensor] = {}
    for part in range(parts):
        for expert in range(n_experts):
            stored = stack.sources[part][expert]
            made = quantize_or_note(stored.name, read(part, expert), stored.scheme.weight, broken)
            for role, values in made.items():
                _put(found, stack, role, part, expert, values)
    if projection.scheme.has_static_input:
        like = found[stack.name_of(WEIGHT_SCALE)]
        unknown = torch.full((n_experts, parts), torch.nan, dtype=like.dtype, device=like.device)
        found[stack.name_of(INPUT_SCALE)] = unknown
    return found


class SplitExperts(SharedOp):
    """Splits a stack into the tensors of the files, with their names, shapes and bytes."""

    def __init__(self, stacks: Mapping[str, Stack]) -> None:
        self.stacks = stacks

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        stack = self.stacks[full_layer_name]
        found = {}
        for role in ROLES:
            if pattern(0, role) not in input_dict:
                continue
            tensor = only(input_dict[pattern(0, role)])
            if stack.is_stacked:
                weight = stack.sources[0][0]
                if role in weight.keys:
                    found[weight.saved[role]] = _to_stack(stack, role, tensor)
                elif tensor.isfinite().all():
                    found[weight.saved[WEIGHT] + suffix_of(role)] = tensor  # calibrated since
                continue
            for part, weights in enumerate(stack.sources):
                for expert, weight in enumerate(weights):
                    values = _place(stack, tensor, part, expert)
                    if role in weight.keys:
                        found[weight.saved[role]] = values.reshape(weight.shapes[role])
                    elif values.isfinite().all():
                        found[companion(plain_weight(weight.saved[weight.primary]), role)] = values.reshape(
                            1
                        )  # calibrated since
        return found


def _shape(stack: Stack, role: str) -> tuple[int, ...]:
    return stack.projection.forms()[role].shape


def _put(found: dict[str, torch.Tensor], stack: Stack, role: str, part: int, expert: int, values: torch.Tensor) -> None:
    """Copy the values of one expert's part into the stack in `found`, which the first of them allocates."""
    name = stack.name_of(role)
    if name not in found:
        found[name] = torch.empty(_shape(stack, role), dtype=values.dtype, device=values.device)
        if role == INPUT_SCALE:
            found[name].fill_(torch.nan)  # stays NaN for experts whose scale is not in the files
    place = _place(stack, found[name], part, expert)
    place.copy_(values.reshape(place.shape))


def _place(stack: Stack, tensor: torch.Tensor, part: int, expert: int) -> torch.Tensor:
    """The view of one expert's part."""
    height = tensor.shape[1] // len(stack.sources)
    return tensor[expert, part * height : (part + 1) * height]


def from_stack(stack: Stack, role: str, tensor: torch.Tensor) -> torch.Tensor:
    shape = _shape(stack, role)
    if role == WEIGHT or (tensor.ndim == 3 and not _is_scalar(stack, role)):
        return tensor.transpose(1, 2).contiguous() if stack.transposed else tensor.reshape(shape)
    # One scale for all experts, or one per expert, or one per row of an expert.
    return tensor.reshape(-1, 1).expand(shape).contiguous() if tensor.numel() == 1 else tensor.reshape(shape)


def _to_stack(stack: Stack, role: str, tensor: torch.Tensor) -> torch.Tensor:
    weight = stack.sources[0][0]
    shape = weight.shapes[role]
    if role == WEIGHT or (len(shape) == 3 and not _is_scalar(stack, role)):
        return tensor.transpose(1, 2).contiguous() if stack.transposed else tensor.reshape(shape)
    if tensor.numel() > 1 and shape.count(1) == len(shape):
        if not bool((tensor == tensor.flatten()[0]).all()):
            raise UnsupportedError(
                f"{weight.keys[role]} is one scale for all experts, but the scales of the model's experts now differ, so they "
                "cannot be saved in the checkpoint's layout. Call model.dequantize() first to save a dense checkpoint"
            )
        return tensor.flatten()[:1].reshape(shape)
    return tensor.reshape(shape)


def _is_scalar(stack: Stack, role: str) -> bool:
    return role == INPUT_SCALE or stack.projection.scheme.weight.granularity.is_tensor
