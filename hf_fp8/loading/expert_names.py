"""Per-expert names that the host does not map: those that llm-compressor writes.

It takes merged experts apart into ``experts.N.{gate,up,down}_proj`` Linears, whatever the family.
The host maps the names that the Hub had before (Mixtral: w1, w3, w2), or none at all (gpt-oss,
Llama-4, whose merged parameters are transposed, and gpt-oss interleaved with biases).
"""

from __future__ import annotations

import re

from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from ..nn.experts import ExpertsLayout

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


class PlainMerge(WeightConverter):  # type: ignore[misc]
    """A converter of ours from one tensor per expert to the layout of a family's module."""


def converters(layout: ExpertsLayout, stem: str) -> list[WeightConverter]:
    """Converters from ``experts.N.{gate,up,down}_proj`` to this layout. stem: the end of the path of such modules."""
    interleave: list[ConversionOps] = [] if layout.is_concatenated else [Interleave(dim=1, inverse=True)]
    transpose: list[ConversionOps] = [Transpose(1, 2)] if layout.is_transposed else []

    def first(leaf: str, target: str, last: list[ConversionOps]) -> WeightConverter:
        if not layout.has_gate:
            return PlainMerge(f"{stem}.*.up_proj.{leaf}", target, [MergeModulelist(0), *last])
        sources = [f"{stem}.*.gate_proj.{leaf}", f"{stem}.*.up_proj.{leaf}"]
        return PlainMerge(sources, target, [MergeModulelist(0), Concatenate(1), *interleave, *last])

    def down(leaf: str, target: str, last: list[ConversionOps]) -> WeightConverter:
        return PlainMerge(f"{stem}.*.down_proj.{leaf}", target, [MergeModulelist(0), *last])

    made = [first("weight", f"{stem}.{layout.first}", transpose), down("weight", f"{stem}.down_proj", transpose)]
    if layout.has_bias:
        made += [first("bias", f"{stem}.{layout.first}_bias", []), down("bias", f"{stem}.down_proj_bias", [])]
    return made
