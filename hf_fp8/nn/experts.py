"""QuantizedExperts: the merged experts of an MoE layer in FP8, in place of the dense module of transformers ("the host")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..formats.quantized_weight.casts import codes_for_certain
from ..formats.quantized_weight.source import Decoder
from ..formats.storage import COLUMN_GROUPS, SHAPE, ZERO_POINT, format_of
from ..formats.weights import Change
from ..kernels import Routing
from . import expert_weights as stacks
from .base import OF_AN_INSTANCE, QuantizedModule
from .dtensors import local
from .expert_weights import LowRank, product
from .experts_layout import ExpertsLayout, Projection
from .grouped import known, route, scaled_grouped_linear
from .parameters import plain_scale
from .shard import Shard

# Few tokens are not sorted by expert: sorting costs five kernel launches, and only avoids reading an expert again for each
# further token that chose it. If the k experts of each token are random, (T - 1) * k / 2E of the bytes are read again;
# this limit allows an eighth. Not measured.
UNSORTED = 1 / 4
# Supported values of `config._experts_implementation`; the forward is the same for all. In the host, `generate` switches
# between one for prefill and one for decode; here the number of tokens decides.
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")


class QuantizedExperts(QuantizedModule):
    """Merged experts with stacked E4M3 weights: `gate_up_proj` (or `up_proj`) (E, N, K) and `down_proj` (E, H, I).

    Or with integers: int8, or packed ones (with `gate_up_proj_shape` and the others of `formats.storage.PackedCodes`).
    Each stack has `<name>_scale` (see `Projection.scale_shape`) and, for static schemes, `<name>_input_scale` (E, parts), NaN
    for experts that were not calibrated: kernels that quantize inputs return NaN for their rows.
    For every family, rows are outputs, and gate rows come before up rows; they are interleaved only if the file stores them so
    (`interleaved`). Biases, activation, gating and norms are those of the family. Created by the loader (docs/formats.md,
    "Experts"); not meant to be constructed directly.

    Args:
        experts: the host's module, whose attributes, biases and submodules are taken over.
        first, second: its two stacks.
        interleaved: gate and up rows are interleaved instead of concatenated.
        scale_dtypes: name of a scale -> its dtype.
        backend: "auto", "scaled_mm" or "weight_only"; see `kernels.select_grouped`.

    Other attributes:
        observer: called with a projection, its input, and the routing of its rows to experts, while the layer is being
            calibrated; inputs are not quantized then.
        low_rank: name of a stack -> low-rank updates of adapters (`adapted`).
        wholes: name of a stack -> the stack of which this process holds a part, if it does (`take_part`).
    """

    def __init__(
        self,
        experts: nn.Module,
        first: Projection,
        second: Projection,
        *,
        interleaved: bool = False,
        scale_dtypes: dict[str, torch.dtype] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        layout = ExpertsLayout.of(experts)
        assert layout is not None
        own = {*vars(self), *OF_AN_INSTANCE}
        self.attributes = tuple(name for name in vars(experts) if name not in own)
        vars(self).update({name: getattr(experts, name) for name in self.attributes})
        self.train(experts.training)
        self.family, self.layout = type(experts), layout
        self.first, self.second, self.interleaved, self.backend = first, second, interleaved, backend
        self.observer: Callable[[Projection, torch.Tensor, Routing], Any] | None = None
        self.low_rank: dict[str, tuple[LowRank, ...]] = {}
        self.wholes: dict[str, Projection] = {}
        dtypes = scale_dtypes or {}
        for projection in (first, second):
            for role, form in projection.forms().items():
                name = projection.parameter(role)
                data = torch.empty(form.shape, dtype=dtypes.get(name, form.dtype), device=device)
                self.register_parameter(name, nn.Parameter(data, requires_grad=False))
            if not projection.scheme.has_static_input:
                self.register_parameter(projection.input_scale, None)
        for name, parameter in experts.named_parameters(recurse=False):
            if name not in self._parameters:
                self.register_parameter(name, parameter)
        for name, child in experts.named_children():
            self.add_module(name, child)
        for name, buffer in experts.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in experts._non_persistent_buffers_set)

    @property
    def projections(self) -> tuple[Projection, Projection]:
        """Both stacks, in the order in which they are used."""
        return self.first, self.second

    @property
    def holds(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        return {p.name: (p.scale, p.input_scale) for p in self.projections}

    @property
    def beside(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        names = ((p, [p.parameter(role) for role in (SHAPE, ZERO_POINT, COLUMN_GROUPS)]) for p in self.projections)
        return {p.name: tuple(n for n in each if n in self._parameters) for p, each in names if p.scheme.weight.packed}

    def _projection(self, name: str) -> Projection:
        """The stack called `name`."""
        return self.first if name == self.first.name else self.second

    def take_part(self, name: str, shard: Shard) -> None:
        """Hold only a part of the stack called `name`. Sharding the parameters is up to the caller."""
        projection = self._projection(name)
        n_experts = projection.shape[0] if shard.experts is None else shard.experts.length
        n, k = shard.part.shape
        part = replace(projection, shape=(n_experts, projection.parts * n, k), scheme=shard.scheme, across=shard.across)
        self.first, self.second = (part if p is projection else p for p in self.projections)
        self.shards = {**self.shards, name: shard}
        self.wholes = {**self.wholes, name: projection}

    def form_of(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        projection = self._projection(name)
        return projection.forms()[format_of(projection.scheme.weight).codes]

    def scale_count(self, name: str) -> int:
        shard, projection = self.shards.get(name), self._projection(name)
        if shard is not None and shard.experts is None and not shard.cuts_scale:
            projection = self.wholes[name]
        return prod(projection.scale_shape)

    def decoder(self, name: str) -> Decoder:
        projection = self.wholes.get(name) or self._projection(name)  # codes that are gathered are the whole
        decode = partial(stacks.decode, self.family, self.layout, projection, stacks.is_interleaved(self, projection))
        return Decoder(decode, getattr(self, projection.scale), self.float_dtype, self.called(name))

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (T, H), top_k_index (T, k), top_k_weights (T, k) -> (T, H); an index of E or more means no expert.

        Families that route beforehand (Llama-4) pass only (E * T, H) and get the same shape. Raises UnsupportedError
        for parametrized stacks (`refuse_parametrized`); CalibrationError if the kernel quantizes inputs with static scales
        and no expert of a stack has one. If only some experts have none, their outputs are NaN.
        """
        self.refuse_parametrized()
        dtype = hidden_states.dtype
        if not hidden_states.is_meta and dtype != torch.float64 and torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(hidden_states.device.type))
        if self.layout.is_prerouted:
            return self._prerouted(hidden_states).to(dtype)
        assert top_k_index is not None and top_k_weights is not None
        name = getattr(getattr(self, "config", None), "_experts_implementation", None) or "eager"
        if name not in IMPLEMENTATIONS:
            raise UnsupportedError(
                f"experts_implementation={name!r} does not support FP8 experts: use one of "
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

    def _multiply(self, projection: Projection, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        if self.observer is not None:
            self.observer(projection, x, routing)
        y = scaled_grouped_linear(
            x,
            self.held_codes(projection.name),
            self.held_scale(projection.name),
            projection.scheme,
            routing,
            input_scale=None
            if projection.input_scale in self.unmeasured
            else plain_scale(local(getattr(self, projection.input_scale))),
            parts=projection.parts,
            backend=self.backend if self.observer is None else "weight_only",
            across=projection.across,
            zero_point=self._parameters.get(projection.parameter(ZERO_POINT)),
            column_groups=self._parameters.get(projection.parameter(COLUMN_GROUPS)),
        )
        for factors in self.low_rank.get(projection.name, ()):
            y = y + product(x, factors, routing)
        return y

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

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """The family's module, in its own layout, with dequantized weights on the same device.

        Raises UnsupportedError for offloaded experts, as their codes cannot be read, and for parts of stacks.
        """
        self.refuse_sharded("made dense")
        if self.is_offloaded:
            raise UnsupportedError(
                "offloaded QuantizedExperts cannot be dequantized in place: load the model with FP8Config(dequantize=True)"
            )
        return stacks.rebuilt(self, dtype, empty=False)

    def outline(self, dtype: torch.dtype) -> nn.Module:
        """As `to_dense`, with NaN weights that take no memory."""
        return stacks.rebuilt(self, dtype, empty=True)

    def requantized(self, dense: nn.Module, generator: torch.Generator | None = None) -> tuple[QuantizedExperts, Change]:
        """As in `QuantizedModule`; dense: the family's module."""
        self.refuse_sharded("changed")
        found, change = stacks.requantized(self, dense, generator)
        new = self._twin()
        with codes_for_certain():
            for name, parameter in found.items():
                setattr(new, name, parameter)
        new.low_rank = {}
        return new, change

    @contextmanager
    def adapted(self, name: str, factors: Sequence[LowRank]) -> Iterator[None]:
        """Context manager that adds ``scaling * b @ a`` to the stack called `name`; rows of b are in the family's order."""
        projection = next((p for p in self.projections if p.name == name), None)
        if projection is None:
            raise UnsupportedError(
                f"{name} of {self.family.__name__} is not a stack of weights: adapters are supported on {_stacks(self)}"
            )
        if stacks.is_interleaved(self, projection):
            factors = [f._replace(b=torch.cat([f.b[:, ::2], f.b[:, 1::2]], 1)) for f in factors]
        self.low_rank[name] = tuple(factors)
        try:
            yield
        finally:
            del self.low_rank[name]

    def extra_repr(self) -> str:
        stacks = ", ".join(f"{p.name}={tuple(p.shape)} {p.scheme.describe()}" for p in self.projections)
        return f"{self.family.__name__}, {stacks}, backend={self.backend}"


def _stacks(experts: QuantizedExperts) -> str:
    return " and ".join(projection.name for projection in experts.projections)
