"""Where the host itself looks for experts that llm-compressor took apart, in a dense checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.core_model_loading import WeightTransform

from ..checkpoint.reader import Checkpoint
from ..checkpoint.slices import Part
from .expert_names import EXPERT, converters, hub_name
from .facts import ModelFacts
from .keys import KeyMap


def host_form(
    model: ModelFacts, conversions: Sequence[WeightTransform], checkpoint: Checkpoint
) -> tuple[dict[str, Part], dict[str, tuple[int, ...]]]:
    """(key -> where its values go in a dense checkpoint, name of a stack of experts -> its shape), for keys that the host
    would not find a place for: to other names (Mixtral), or into stacks (gpt-oss, Llama-4)."""
    keymap = KeyMap.of(model, conversions, checkpoint.tensors)
    merges = converters(*keymap.unmapped_experts) if keymap.unmapped_experts is not None else []
    sources = {pattern: converter.source_patterns for converter in merges for pattern in converter.source_patterns}
    homes: dict[str, Part] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key in checkpoint.tensors:
        plain = key.removesuffix("_packed")
        target, pattern = keymap.resolve(plain)
        called = EXPERT.match(plain)
        if called is None or called["rest"] not in ("weight", "bias"):
            continue
        if pattern in sources:
            experts, _, leaf = target.rpartition(".")
            layout = model.experts(experts)
            if layout is None:
                continue  # of a layer that this class of model does not have: as they are
            patterns, stack = sources[pattern], f"{called['experts']}.{leaf}"
            homes[key] = Part(
                stack, int(called["index"]), patterns.index(pattern), len(patterns),
                layout.is_transposed, not layout.is_concatenated,
            )  # fmt: skip
            shapes[stack] = keymap.shapes[target]
        elif keymap.plain(plain) in keymap.aliases:
            homes[key] = Part(hub_name(plain) or plain)
    return homes, shapes
