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
from .base import QuantizedModule
from .dtensors import local
from .expert_weights import LowRank, product
from .experts_layout import Projection
from .grouped import scaled_grouped_linear
from .parameters import plain_scale
from .routed_experts import RoutedExperts
from .shard import Shard


class QuantizedExperts(RoutedExperts, QuantizedModule):
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
        self._stand_in_for(experts, first, second, interleaved)
        self.backend = backend
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
        self._take_over(experts)

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
        """As in `RoutedExperts`.

        Raises UnsupportedError for parametrized stacks (`refuse_parametrized`), too; CalibrationError if the kernel quantizes
        inputs with static scales and no expert of a stack has one. If only some experts have none, their outputs are NaN.
        """
        self.refuse_parametrized()
        return super().forward(hidden_states, top_k_index, top_k_weights)

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
