"""Other libraries' names for `quantize_model`: `enable_fp8_gemm`, `quantize_` with torchao's configs, and W8A8 under adapters.

Names and the meaning of parameters are the same as there, the stored bytes are not: scales and codes (values of 8 or 4 bits)
are those of compressed-tensors. ``quantize_model(model, recipe.scheme)`` does the same and has more options. `docs/torchao.md`
has every public name of torchao's quantization API.
"""

from __future__ import annotations

from typing import Any

from .apply import insert_observers_, quantize_, swap_conv2d_1x1_to_linear
from .by_name import AOPerModuleConfig, FqnToConfig, ModuleFqnToConfig, fqn_matches_fqn_config
from .configs import (
    Float8DynamicActivationFloat8Weight,
    Float8DynamicActivationInt4Weight,
    Float8StaticActivationFloat8Weight,
    Float8WeightOnly,
    Int4WeightOnly,
    Int8DynamicActivationInt4Weight,
    Int8DynamicActivationInt8Weight,
    Int8DynamicActivationIntxWeight,
    Int8StaticActivationInt8Weight,
    Int8WeightOnly,
    IntxWeightOnly,
)
from .fields import Recipe
from .fp8_gemm import (
    FP8GemmOptions,
    apply_w8a8_monkey_patch,
    enable_fp8_gemm,
    invalidate_weight_cache,
    materialize_fp8_weight,
)
from .markers import (
    Float8MMConfig,
    Float8PackingFormat,
    Granularity,
    Int4ChooseQParamsAlgorithm,
    Int4PackingFormat,
    IntxChooseQParamsAlgorithm,
    IntxPackingFormat,
    KernelPreference,
    MappingType,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
)
from .names import RECIPES, attribute, recipe
from .training import (
    FakeQuantizeConfig,
    FakeQuantizeConfigBase,
    Float8FakeQuantizeConfig,
    FromIntXQuantizationAwareTrainingConfig,
    Int4WeightFakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    IntXQuantizationAwareTrainingConfig,
    QATConfig,
    QATStep,
    from_intx_quantization_aware_training,
    intx_quantization_aware_training,
)

__all__ = [
    "RECIPES", "AOPerModuleConfig", "FP8GemmOptions", "FakeQuantizeConfig", "FakeQuantizeConfigBase",
    "Float8DynamicActivationFloat8Weight", "Float8DynamicActivationInt4Weight", "Float8FakeQuantizeConfig",
    "Float8MMConfig", "Float8PackingFormat", "Float8StaticActivationFloat8Weight", "Float8WeightOnly", "FqnToConfig",
    "FromIntXQuantizationAwareTrainingConfig", "Granularity", "Int4ChooseQParamsAlgorithm", "Int4PackingFormat",
    "Int4WeightFakeQuantizeConfig", "Int4WeightOnly", "Int8DynamicActivationInt4Weight", "Int8DynamicActivationInt8Weight",
    "Int8DynamicActivationIntxWeight", "Int8StaticActivationInt8Weight", "Int8WeightOnly",
    "IntXQuantizationAwareTrainingConfig", "IntxChooseQParamsAlgorithm", "IntxFakeQuantizeConfig", "IntxPackingFormat",
    "IntxWeightOnly", "KernelPreference", "MappingType", "ModuleFqnToConfig", "PerAxis", "PerBlock", "PerGroup", "PerRow",
    "PerTensor", "PerToken", "QATConfig", "QATStep", "Recipe", "apply_w8a8_monkey_patch", "enable_fp8_gemm",
    "fqn_matches_fqn_config", "from_intx_quantization_aware_training", "insert_observers_",
    "intx_quantization_aware_training", "invalidate_weight_cache", "materialize_fp8_weight", "quantize_", "recipe",
    "swap_conv2d_1x1_to_linear",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """torchao's other names (`names.attribute`): recipes with "Config", earlier functions, and torchao's own objects."""
    return attribute(name)
