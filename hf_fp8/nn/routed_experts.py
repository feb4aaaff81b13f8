"""The forward of merged experts of an MoE layer, whatever multiplies their stacks; "the host" is transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..kernels import Routing
from .base import OF_AN_INSTANCE
from .experts_layout import ExpertsLayout, Projection
from .grouped import known, route

# Few tokens are not sorted by expert: sorting costs five kernel launches, and only avoids reading an expert again for each
# further token that chose it. If the k experts of each token are random, (T - 1) * k / 2E of the bytes are read again;
# this limit allows an eighth. Not measured.
UNSORTED = 1 / 4
# Supported values of `config._experts_implementation`; the forward is the same for all. In the host, `generate` switches
# between one for prefill and one for decode; here the number of tokens decides.
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")


class RoutedExperts(nn.Module):
    """Merged experts in place of the host's module: routing, biases, activation, gating and norms are those of the family.

    A subclass says how a stack is multiplied (`_multiply`).

    Attributes:
        family, layout: the host's class, and how it holds its parameters.
        attributes: names of those of the host's module that were taken over.
        first, second: the two stacks. interleaved: whether gate and up rows are interleaved in the first.
    """

    family: type[nn.Module]
    layout: ExpertsLayout
    attributes: tuple[str, ...]
    first: Projection
    second: Projection
    interleaved: bool

    @property
    def projections(self) -> tuple[Projection, Projection]:
        """Both stacks, in the order in which they are used."""
        return self.first, self.second

    def _stand_in_for(self, experts: nn.Module, first: Projection, second: Projection, interleaved: bool) -> None:
        """Take over the attributes of the host's module."""
        layout = ExpertsLayout.of(experts)
        assert layout is not None
        own = {*vars(self), *OF_AN_INSTANCE}
        self.attributes = tuple(name for name in vars(experts) if name not in own)
        vars(self).update({name: getattr(experts, name) for name in self.attributes})
        self.train(experts.training)
        self.family, self.layout = type(experts), layout
        self.first, self.second, self.interleaved = first, second, interleaved

    def _take_over(self, experts: nn.Module) -> None:
        """Take over its parameters but for those that this module has under their names, its buffers and submodules."""
        for name, parameter in experts.named_parameters(recurse=False):
            if name not in self._parameters:
                self.register_parameter(name, parameter)
        for name, child in experts.named_children():
            self.add_module(name, child)
        for name, buffer in experts.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in experts._non_persistent_buffers_set)

    def of_family(self) -> nn.Module:
        """A module of the host's class with the same attributes, buffers and submodules, without parameters."""
        dense: nn.Module = self.family.__new__(self.family)
        nn.Module.__init__(dense)
        vars(dense).update({name: getattr(self, name) for name in self.attributes})
        for name, child in self.named_children():
            dense.add_module(name, child)
        for name, buffer in self.named_buffers(recurse=False):
            dense.register_buffer(name, buffer, persistent=name not in self._non_persistent_buffers_set)
        return dense.train(self.training)

    def _multiply(self, projection: Projection, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """x (R, K) times the weights of a stack (E, N, K), each row by its experts: (S, N)."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (T, H), top_k_index (T, k), top_k_weights (T, k) -> (T, H); an index of E or more means no expert.

        Families that route beforehand (Llama-4) pass only (E * T, H) and get the same shape. Raises UnsupportedError for
        implementations of the host that it does not stand in for.
        """
        dtype = hidden_states.dtype
        if not hidden_states.is_meta and dtype != torch.float64 and torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(hidden_states.device.type))
        if self.layout.is_prerouted:
            return self._prerouted(hidden_states).to(dtype)
        assert top_k_index is not None and top_k_weights is not None
        name = getattr(getattr(self, "config", None), "_experts_implementation", None) or "eager"
        if name not in IMPLEMENTATIONS:
            raise UnsupportedError(
                f"experts_implementation={name!r} does not support quantized experts: use one of "
                f"{', '.join(map(repr, IMPLEMENTATIONS))}, or load with FP8Config(experts='dequantize')"
            )
        return self.routed(hidden_states, top_k_index, top_k_weights).to(dtype)

    def routed(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum of the chosen experts' outputs for tokens x (T, H), weighted by `weights` (T, k): (T, H)."""
        ids, found = known(ids, self.first.shape[0])
        out = self._each(x, ids)  # (T, k, H)
        weights = torch.where(found, weights, 0.0)
        # The sum over k has a fixed order, so results are the same bits on every run.
        total: torch.Tensor = (out * weights.unsqueeze(-1)).sum(1)
        return total.to(x.dtype)

    def _prerouted(self, x: torch.Tensor) -> torch.Tensor:
        """Experts of Llama-4: rows of zeros are tokens that were not routed to an expert; they are skipped and stay zero."""
        n_experts = self.first.shape[0]
        x = x.reshape(-1, self.first.shape[2])
        expert = torch.arange(n_experts, device=x.device).repeat_interleave(x.shape[0] // n_experts)
        ids = torch.where((x != 0).any(1), expert, n_experts)
        return self._each(x, ids.unsqueeze(1)).squeeze(1)

    def _each(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(T, k, H): the output of each chosen expert for each token."""
        n_experts = self.first.shape[0]
        count, k = ids.shape
        expected = None
        if self.layout.is_prerouted:
            expected = count // n_experts  # one expert per token, as in all Llama-4 models
        elif getattr(self, "_is_expert_parallel", False):
            expected = count * k
        sort = x.device.type == "cpu" or (count - 1) * k > n_experts * UNSORTED
        to_first, to_second = route(ids, n_experts, sort=sort, expected=expected)
        y = self._multiply(self.first, x, to_first)
        if not self.layout.is_concatenated and not self.interleaved:
            y = torch.stack(y.chunk(2, -1), -1).flatten(-2)  # interleaved, as the family's gate expects
        y = self._gate(self._with_bias(y, self.first, to_first.experts))
        y = self._multiply(self.second, y, to_second)
        y = self._with_bias(y, self.second, ids.reshape(-1))
        if self.layout.has_post_expert_norm:
            norm: Any = self.post_expert_norm
            y = norm(y)
        each: torch.Tensor = y.view(count, k, y.shape[-1])
        return each

    def _with_bias(self, y: torch.Tensor, projection: Projection, expert: torch.Tensor) -> torch.Tensor:
        if not self.layout.has_bias:
            return y
        bias = getattr(self, f"{projection.name}_bias")
        with_bias: torch.Tensor = y + bias[expert.clamp(0, bias.shape[0] - 1)].to(y.dtype)
        return with_bias

    def _gate(self, y: torch.Tensor) -> torch.Tensor:
        family: Any = self.family
        if self.layout.has_gate and not self.layout.is_prerouted:
            gated: torch.Tensor = family._apply_gate(self, y)
            return gated
        act: Any = self.act_fn
        if not self.layout.has_gate:
            activated: torch.Tensor = act(y)
            return activated
        gate, up = y.chunk(2, -1)
        product: torch.Tensor = up * act(gate)
        return product
