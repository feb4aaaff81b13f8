"""`quant_method: fbgemm_fp8`, as Meta publishes Llama: a scale for each output channel, inputs per token.

Weights are E4M3 with `weight_scale` (N, 1). The kernels bound the amax of a token by `activation_scale_ub`, so that larger
values are clamped; hf_fp8 does not, and keeps them. Source: transformers' integrations/fbgemm_fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...formats.scheme import FP8_DYNAMIC
from .base import Dialect, Meaning, Target, never
from .fine_grained import SKIPPED, listed, skipped
from .fine_grained import ignoring as ignoring_more


def read(config: Mapping[str, Any]) -> Meaning:
    """What such a config says. Raises ConfigError."""
    bound = config.get("activation_scale_ub")
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0):
        raise ConfigError(f"quantization_config.activation_scale_ub is {bound!r}: it must be a positive number")
    return Meaning({"group_0": Target(FP8_DYNAMIC)}, skipped(config), listed(config))


def ignoring(config: Mapping[str, Any], new: Sequence[str], every: Sequence[str]) -> dict[str, Any]:
    """The config with more dense modules."""
    return ignoring_more({SKIPPED: None, **config}, new, every)


FBGEMM = Dialect(
    name="FBGEMM",
    methods=("fbgemm_fp8",),
    by_default=never,  # transformers reads it, on GPUs
    read=read,
    ignoring=ignoring,
)
