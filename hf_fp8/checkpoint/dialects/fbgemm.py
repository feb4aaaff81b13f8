"""`quant_method: fbgemm_fp8`, as Meta publishes Llama: a scale for each output channel, inputs per token.

Weights are E4M3 with `weight_scale` (N, 1). The kernels bound the amax of a token by `activation_scale_ub`, so that larger
values are clamped; hf_fp8 does not, and keeps them. Source: transformers' integrations/fbgemm_fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...formats.scheme import FP8_DYNAMIC
from . import skip_list
from .base import Dialect, Target, Translation


def read(config: Mapping[str, Any]) -> Translation:
    """What such a config says. Raises ConfigError."""
    bound = config.get("activation_scale_ub")
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0):
        raise ConfigError(f"quantization_config.activation_scale_ub is {bound!r}: it must be a positive number")
    return Translation({"group_0": Target(FP8_DYNAMIC)}, skip_list.skipped(config), skip_list.listed(config))


FBGEMM = Dialect(
    name="FBGEMM",
    words="modules_to_not_convert lists dense modules",
    methods=("fbgemm_fp8",),
    read=read,
    ignoring=skip_list.ignoring,
)
