"""Per-expert names that the host does not map: those that llm-compressor writes.

It takes merged experts apart into ``experts.N.{gate,up,down}_proj`` Linears, whatever the family.
The host maps the names that the Hub had before (Mixtral: w1, w3, w2), or none at all (gpt-oss,
Llama-4, whose merged parameters are transposed, and gpt-oss interleaved with biases).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

EXPERT = re.compile(
    r"^(?P<experts>(?:.*\.)?experts)\.(?P<index>\d+)\.(?P<projection>gate_proj|up_proj|down_proj)\.(?P<rest>.+)$"
)
HUB_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def hub_name(key: str) -> str | None:
    """`key` with its projection under the name that the Hub's Mixtral checkpoints have, or None."""
    found = EXPERT.match(key)
    if found is None:
        return None
    return f"{found['experts']}.{found['index']}.{HUB_NAMES[found['projection']]}.{found['rest']}"


@dataclass(frozen=True)
class ExpertsLayout:
    """How a merged experts module holds its parameters, in the words of the host's `use_experts_implementation`."""

    is_transposed: bool
    is_concatenated: bool
    has_bias: bool

    @staticmethod
    def of(module: nn.Module | None) -> ExpertsLayout | None:
        """The layout of a merged experts module; None if `module` is none, or has no gate."""
        if module is None or not isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            return None
        if type(module).__name__ == "Llama4TextExperts":  # the one family without the decorator: (E, H, 2I), [gate; up]
            return ExpertsLayout(is_transposed=True, is_concatenated=True, has_bias=False)
        flags = [getattr(module, name, None) for name in ("is_transposed", "is_concatenated", "has_bias")]
        if any(flag is None for flag in flags):
            return None
        return ExpertsLayout(*map(bool, flags))

    def converters(self) -> list[WeightConverter]:
        """Converters from ``experts.N.{gate,up,down}_proj`` to this layout."""
        interleave: list[ConversionOps] = [] if self.is_concatenated else [Interleave(dim=1, inverse=True)]
        transpose: list[ConversionOps] = [Transpose(1, 2)] if self.is_transposed else []

        def gate_up(leaf: str, target: str, last: list[ConversionOps]) -> WeightConverter:
            sources = [f"experts.*.gate_proj.{leaf}", f"experts.*.up_proj.{leaf}"]
            return WeightConverter(sources, target, [MergeModulelist(0), Concatenate(1), *interleave, *last])

        def down(leaf: str, target: str, last: list[ConversionOps]) -> WeightConverter:
            return WeightConverter(f"experts.*.down_proj.{leaf}", target, [MergeModulelist(0), *last])

        made = [
            gate_up("weight", "experts.gate_up_proj", transpose),
            down("weight", "experts.down_proj", transpose),
        ]
        if self.has_bias:
            made += [gate_up("bias", "experts.gate_up_proj_bias", []), down("bias", "experts.down_proj_bias", [])]
        return made
