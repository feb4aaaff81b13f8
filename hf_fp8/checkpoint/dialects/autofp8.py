"""`quant_method: fp8` of AutoFP8, the predecessor of llm-compressor: one scale per tensor, static or dynamic inputs.

It has no `weight_block_size`, for which transformers assumes blocks, so that it would load codes as values. Weights are E4M3
with `weight_scale`, and with `activation_scheme: static` with `input_scale` (`act_scale` in older files); `kv_scale` for the
KV cache. Source: https://github.com/neuralmagic/AutoFP8 (README.md, auto_fp8/quantize.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...formats.scheme import FP8_BLOCK, FP8_DYNAMIC, TENSOR, Scheme, TensorScheme
from .base import CACHE, Dialect, Target, Translation, any_of, check_patterns, module_or_inside, names_in, one_of

KEYS = ("ignored_layers", "modules_to_not_convert")


def read(config: Mapping[str, Any]) -> Translation:
    """What such a config says; whether weights have a scale per tensor, channel or block of 128, the files decide.

    Raises ConfigError.
    """
    is_static = one_of(config, "activation_scheme", {"static": True, "dynamic": False}, "dynamic")
    groups = {"group_0": Target(Scheme(TensorScheme(TENSOR), TensorScheme(TENSOR, dynamic=not is_static)))}
    if not is_static:
        # The default of transformers, in configs that leave it out; and scales per channel, of which no config says anything.
        groups |= {"group_1": Target(FP8_BLOCK), "group_2": Target(FP8_DYNAMIC)}
    one_of(config, "fmt", {"e4m3": None, "float8_e4m3fn": None}, "e4m3")
    listed = names_in(config, *KEYS)
    patterns = {name: name.removeprefix("re:") if name.startswith("re:") else module_or_inside(name) for name in listed}
    check_patterns(config, KEYS, patterns)
    has_cache = one_of(config, "kv_cache_scheme", {None: False, "static": True})
    return Translation(groups, any_of(patterns.values()), listed, CACHE if has_cache else None)


def ignoring(config: Mapping[str, Any], new: Sequence[str], every: Sequence[str]) -> dict[str, Any]:
    """The config with more dense modules."""
    return {**config, KEYS[0]: list(dict.fromkeys([*names_in(config, *KEYS), *new]))}


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a config with this method is AutoFP8's, not transformers' own."""
    return "weight_block_size" not in config


AUTOFP8 = Dialect(
    name="AutoFP8",
    words="ignored_layers lists dense modules, and activation_scheme says whether inputs have static scales",
    methods=("fp8",),
    describes=describes,
    by_default=True,
    read=read,
    ignoring=ignoring,
)
