"""How a model family's experts module holds its parameters (`ExpertsLayout`), and one stack of it (`Projection`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..formats.scheme import Scheme
from ..formats.storage import INPUT_SCALE, PACKED, WEIGHT, WEIGHT_SCALE, TensorForm, forms_of_stack
from .grouped import scale_shape_of_experts


@dataclass(frozen=True)
class Projection:
    """One stack of an experts module: the name of its parameter, its shape (E, N, K), and how it is stored.

    parts: number of matrices concatenated along N, each with separate scales (`kernels.ExpertWeights`). across: as in
    `scaled_linear`, if other processes have other columns of the stack.
    """

    name: str
    shape: tuple[int, int, int]
    scheme: Scheme
    parts: int = 1
    across: str = ""

    def parameter(self, role: str) -> str:
        """The name of the parameter for a role of its tensors ("weight_scale")."""
        return self.name + suffix_of(role)

    @property
    def scale(self) -> str:
        return self.parameter(WEIGHT_SCALE)

    @property
    def input_scale(self) -> str:
        return self.parameter(INPUT_SCALE)

    def forms(self, scale_dtype: torch.dtype = torch.float32) -> dict[str, TensorForm]:
        """Role -> dtype and shape of its tensors (`forms_of_stack`); with static inputs, "input_scale" (E, parts) too."""
        forms = forms_of_stack(self.scheme.weight, self.shape, self.parts, scale_dtype)
        if self.scheme.has_static_input:
            forms[INPUT_SCALE] = TensorForm(scale_dtype, (self.shape[0], self.parts))
        return forms

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """tensor (E, parts), channel (E, N, 1), else (E, parts * ceil(N / parts / rows), ceil(K / cols))."""
        return scale_shape_of_experts(self.scheme, *self.shape, self.parts)


def suffix_of(role: str) -> str:
    """The end of a stack's parameter for a role: "" for codes, packed or not, "_scale", "_input_scale"."""
    if role == PACKED:
        return ""  # the family's name, by which adapters are given to it
    return role.removeprefix(WEIGHT) if role.startswith(WEIGHT) else f"_{role}"


@dataclass(frozen=True)
class ExpertsLayout:
    """Parameter layout of a family's experts module, in the terms of the host's `use_experts_implementation`."""

    is_transposed: bool
    is_concatenated: bool
    has_bias: bool
    has_gate: bool = True
    has_post_expert_norm: bool = False
    is_prerouted: bool = False

    @staticmethod
    def of(module: nn.Module | None) -> ExpertsLayout | None:
        """The layout of a merged experts module; None if `module` is not one, or the host gives no layout for it."""
        if module is None or not isinstance(getattr(module, "down_proj", None), nn.Parameter):
            return None
        if type(module).__name__ == "Llama4TextExperts":
            # The only family without the decorator: (E, H, 2I), [gate; up]. Its input is a copy of all tokens for each
            # expert, multiplied by the router's scores.
            return ExpertsLayout(is_transposed=True, is_concatenated=True, has_bias=False, is_prerouted=True)
        names = ("is_transposed", "is_concatenated", "has_bias", "has_gate", "has_post_expert_norm")
        flags = [getattr(module, name, None) for name in names]
        if any(flag is None for flag in flags):
            return None
        layout = ExpertsLayout(*map(bool, flags))
        return layout if isinstance(getattr(module, layout.first, None), nn.Parameter) else None

    @property
    def first(self) -> str:
        """The name of the first stack."""
        return "gate_up_proj" if self.has_gate else "up_proj"
