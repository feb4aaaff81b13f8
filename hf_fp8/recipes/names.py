"""Every public name of torchao's quantization API: which are hf_fp8's, which are torchao's own, which are refused and why.

`docs/torchao.md` shows these tables; torchao 0.18.0 is what they were compared with.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from ..errors import ConfigError, UnsupportedError
from . import configs
from .fields import Elsewhere, Recipe, fields_of

RECIPES: dict[str, type[Recipe]] = {
    kind.__name__: kind for kind in vars(configs).values() if isinstance(kind, type) and Recipe in kind.__mro__[1:]
}
# Configs that are not recipes, but that `quantize_` takes; in `by_name` and `training`.
BY_NAME = ("FqnToConfig", "ModuleFqnToConfig", "AOPerModuleConfig")
TRAINING = (
    "QATConfig", "IntXQuantizationAwareTrainingConfig", "FromIntXQuantizationAwareTrainingConfig",
    "intx_quantization_aware_training", "from_intx_quantization_aware_training",
)  # fmt: skip
# Config of a fake quantization, which `QATConfig` has.
FAKE = (
    "FakeQuantizeConfigBase", "FakeQuantizeConfig", "IntxFakeQuantizeConfig", "Float8FakeQuantizeConfig",
    "Int4WeightFakeQuantizeConfig",
)  # fmt: skip
MARKERS = (
    "Granularity", "PerTensor", "PerRow", "PerAxis", "PerGroup", "PerToken", "PerBlock", "MappingType", "KernelPreference",
    "Float8PackingFormat", "Int4PackingFormat", "IntxPackingFormat", "Int4ChooseQParamsAlgorithm", "IntxChooseQParamsAlgorithm",
    "Float8MMConfig", "QATStep",
)  # fmt: skip
FUNCTIONS = ("quantize_", "swap_conv2d_1x1_to_linear", "insert_observers_", "fqn_matches_fqn_config")
# Functions of earlier versions of torchao that made what is a config now.
EARLIER = (
    "float8_weight_only", "float8_dynamic_activation_float8_weight", "float8_static_activation_float8_weight",
    "float8_dynamic_activation_int4_weight", "int8_weight_only", "int8_dynamic_activation_int8_weight",
    "int8_dynamic_activation_int4_weight", "int8_dynamic_activation_intx_weight", "int8_static_activation_int8_weight",
    "int4_weight_only", "intx_weight_only",
)  # fmt: skip

OURS: tuple[str, ...] = tuple(
    sorted({*(f"{name}Config" for name in RECIPES), *BY_NAME, *TRAINING, *FAKE, *MARKERS, *FUNCTIONS, *EARLIER})
)
# `hf_fp8.recipes` has torchao's own object under these names once torchao has been imported; `quantize_` passes configs on.
DELEGATED: dict[str, tuple[str, ...]] = {
    "tensor subclasses, whose bytes are not those of compressed-tensors": (
        "Float8Sparse2x4_1DData1DMetadataTensor", "Float8Sparse2x4_2DData2DMetadataTensor", "Float8Tensor",
        "Int4PlainInt32Tensor", "Int4PreshuffledTensor", "Int4Tensor", "Int4TilePackedTo4dTensor", "Int8Tensor",
        "IntxOpaqueTensor", "IntxUnpackedToInt8Tensor", "NF4Tensor", "to_nf4", "QuantizeTensorToFloat8Kwargs",
        "QuantizeTensorToInt8Kwargs", "_get_subclass_inserter",
    ),
    "arithmetic and checks": (
        "choose_qparams_affine", "choose_qparams_affine_with_min_max", "compute_error", "dequantize_affine",
        "int_scaled_matmul", "is_MI300", "is_MI350", "is_sm_at_least_89", "quantize_affine", "safe_int_mm", "FP8Granularity",
        "TorchAODType", "ZeroPointDomain", "e4m3_dtype",
    ),
    "observers, which `insert_observers_` reads": ("AffineQuantizedMinMaxObserver", "AffineQuantizedObserverBase"),
    "configs of one's own": ("AOBaseConfig", "register_quantize_module_handler"),
    "configs of codes that hf_fp8 does not have": (
        "UIntxWeightOnlyConfig", "Int8DynamicActivationUIntxWeightConfig", "MXDynamicActivationMXWeightConfig",
        "NVFP4DynamicActivationNVFP4WeightConfig", "NVFP4WeightOnlyConfig", "CodebookWeightOnlyConfig", "GGUFWeightOnlyConfig",
        "GPTQConfig", "AWQConfig", "SmoothQuantConfig", "SemiSparseWeightConfig", "BlockSparseWeightConfig",
    ),
    "quantizers with a class of their own": (
        "Int4WeightOnlyQuantizer", "Int8DynActInt4WeightLinear", "Int8DynActInt4WeightQuantizer", "ComposableQATQuantizer",
        "Float8ActInt4WeightQATQuantizer", "Int4WeightOnlyEmbeddingQATQuantizer", "Int4WeightOnlyQATQuantizer",
        "Int8DynActInt4WeightQATQuantizer", "TwoStepQuantizer",
    ),
    "modules of torchao's training": (
        "FakeQuantizedEmbedding", "FakeQuantizedLinear", "FakeQuantizer", "FakeQuantizerBase", "Float8FakeQuantizer",
        "Float8Linear", "IntxFakeQuantizer", "initialize_fake_quantizers",
    ),
}  # fmt: skip
_GONE = "torchao 0.18 has it no more"
# Names that no version of torchao with the API of 0.18 has -> what to use.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("fpx_weight_only", "FPXWeightOnlyConfig"), f"{_GONE}: use Float8WeightOnlyConfig"),
    **dict.fromkeys(
        ("gemlite_uintx_weight_only", "GemliteUIntXWeightOnlyConfig"),
        f"{_GONE}: use Int4WeightOnlyConfig or Int8WeightOnlyConfig, or torchao's UIntxWeightOnlyConfig",
    ),
    **dict.fromkeys(
        ("int4_dynamic_activation_int4_weight", "Int4DynamicActivationInt4WeightConfig"),
        f"inputs of 4 bits; {_GONE}: use Int8DynamicActivationIntxWeightConfig(torch.int4) or "
        "Float8DynamicActivationInt4WeightConfig",
    ),
    **dict.fromkeys(
        (
            "float8_dynamic_activation_float8_semi_sparse_weight", "Float8DynamicActivationFloat8SemiSparseWeightConfig",
            "int8_dynamic_activation_int8_semi_sparse_weight",
        ),
        "2:4 sparse weights run only on cuSPARSELt or CUTLASS, on CUDA devices of SM90; the compressed layout could not be "
        "tested on one, and a wrong layout gives wrong numbers without an error. Use the dense "
        "Float8DynamicActivationFloat8Weight, which keeps the zeros of pruned weights, or torchao itself",
    ),
    **dict.fromkeys(
        ("autoquant", "AutoQuantizableLinearWeight"),
        f"{_GONE}: hf_fp8.quality measures which layers a scheme harms, and hf_fp8.explain which kernels run",
    ),
    **dict.fromkeys(
        ("Int4WeightOnlyGPTQQuantizer", "Int8DynActInt4WeightGPTQQuantizer"),
        f"{_GONE}: use torchao.prototype.gptq, or a GPTQ checkpoint of compressed-tensors, which hf_fp8 loads",
    ),
    **dict.fromkeys(
        ("swap_linear_with_smooth_fq_linear", "smooth_fq_linear_to_inference"),
        f"{_GONE}: use torchao.prototype.smoothquant, then hf_fp8.quantize_model(model, 'INT8')",
    ),
    **dict.fromkeys(
        ("change_linear_weights_to_int8_dqtensors", "change_linear_weights_to_int8_woqtensors"),
        f"{_GONE}: use quantize_ with Int8DynamicActivationInt8WeightConfig or Int8WeightOnlyConfig",
    ),
    "change_linear_weights_to_int4_woqtensors": f"{_GONE}: use quantize_ with Int4WeightOnlyConfig",
}  # fmt: skip
# Part of a name, without case and underscores -> why there is no such recipe, for names that are in none of the tables.
_PARTS = {
    "sparse": "2:4 and block sparse weights have kernels of their own (cuSPARSELt), and a wrong layout gives wrong numbers "
    "without an error: use a dense config, which keeps the zeros of pruned weights, or torchao itself",
    "nvfp4": "NVFP4 has 4-bit float codes and two levels of scales: use Float8DynamicActivationInt4Weight, or torchao itself",
    "mx": "microscaling formats have scales that are powers of two, those of hf_fp8 are floats: use "
    "Float8DynamicActivationFloat8Weight, or torchao itself",
    **dict.fromkeys(
        ("uintx", "fpx", "codebook", "gguf"), "weights of hf_fp8 have 4 or 8 bits: use Int4WeightOnly, or torchao itself"
    ),
    **dict.fromkeys(
        ("gptq", "awq", "smoothquant"),
        "it fits weights to data: use torchao itself, or llm-compressor, whose checkpoints hf_fp8 loads",
    ),
}


def _word(name: str) -> str:
    return name.replace("_", "").lower().removesuffix("config")


def kind_of(name: str) -> type[Recipe]:
    """The recipe of a torchao name. Raises UnsupportedError, with the reason, or ConfigError for an unknown name."""
    word = _word(name)
    for known, kind in RECIPES.items():
        if known.lower() == word:
            return kind
    if any(_word(other) == word for other in (*BY_NAME, *TRAINING)):
        raise ConfigError(f"recipe {name!r} is made of other configs: pass the object, hf_fp8.recipes.{name}(...)")
    raise _refusal(name)


def _refusal(name: str) -> UnsupportedError | ConfigError:
    word = _word(name)
    for known, why in REFUSED.items():
        if _word(known) == word:
            return UnsupportedError(f"recipe {name!r}: {why}")
    for why, names in DELEGATED.items():
        if name in names or word in map(_word, names):
            reason = next((found for part, found in _PARTS.items() if part in word), why)
            return Elsewhere(f"recipe {name!r} is torchao's own ({reason}): import torchao first, and pass its object")
    for part, why in _PARTS.items():
        if part in word:
            return Elsewhere(f"recipe {name!r}: {why}")
    return ConfigError(
        f"recipe {name!r}{_near(name)}: must be one of {', '.join(RECIPES)}; names of schemes are for quantize_model"
    )


def _near(name: str) -> str:
    near = get_close_matches(name, OURS, 1, 0.8)
    return f" (did you mean {near[0]}?)" if near else ""


def recipe(name: str, *positional: Any, **fields: Any) -> Recipe:
    """The recipe of a torchao name: a config class with or without "Config", or an old spelling such as float8_weight_only.

    Raises UnsupportedError, with the reason, for recipes that hf_fp8 does not support; ConfigError, with the supported names,
    for unknown names.
    """
    return kind_of(name)(*positional, **fields)


def recipe_of(config: Any) -> Recipe | None:
    """The recipe of a config object, ours or torchao's, by the name of its class and its fields; None if it is none.

    A class of one's own that derives from one of torchao's is none: it may have a meaning of its own.
    """
    if isinstance(config, Recipe):
        return config
    kind = RECIPES.get(type(config).__name__.removesuffix("Config"))
    if kind is None:
        return None
    fields = fields_of(config)
    if kind is configs.Int8DynamicActivationInt4Weight:
        # Int8DynamicActivationInt4WeightConfig of torchao 0.18 (prototype.quantization.int4) has no such field.
        fields.setdefault("mapping_type", "ASYMMETRIC")
    return kind(**fields)


def is_of_torchao(config: Any) -> bool:
    """Whether an object is a config for torchao's `quantize_`: torchao must have been imported."""
    return any(cls.__name__ == "AOBaseConfig" and cls.__module__.startswith("torchao.") for cls in type(config).__mro__)


def _modules_of_torchao() -> Iterator[ModuleType]:
    """The modules in which torchao has its API, of those that somebody has imported; hf_fp8 never imports torchao."""
    for name in (
        "torchao.quantization", "torchao.quantization.quant_api", "torchao.quantization.qat", "torchao.sparsity.sparse_api",
        "torchao.prototype.quantization.quant_api", "torchao.prototype.mx_formats", "torchao.prototype.gptq",
        "torchao.prototype.awq", "torchao.prototype.smoothquant", "torchao.prototype.quantization.codebook_coreml.api",
        "torchao.prototype.quantization.codebook_groupwise.api", "torchao.prototype.quantization.gguf.api",
    ):  # fmt: skip
        if "torchao" in sys.modules and (module := sys.modules.get(name)) is not None:
            yield module


def in_torchao(name: str) -> Any:
    """torchao's own object of a name of `DELEGATED`, with or without "Config" for configs; None if it is not there."""
    for module in _modules_of_torchao():
        for spelling in (name, f"{name}Config", name.removesuffix("Config")):
            if (found := getattr(module, spelling, None)) is not None:
                return found
    word = _word(name)
    for module in _modules_of_torchao():
        for other in dir(module):
            if other.endswith("Config") and _word(other) == word:
                return getattr(module, other)
    return None


def attribute(name: str) -> Any:
    """What `hf_fp8.recipes.<name>` is for a name that is not defined there. Raises AttributeError for an unknown one.

    The recipes with "Config" and their earlier functions; torchao's own objects, if torchao has been imported. Raises
    UnsupportedError, with the reason, for other names of torchao.
    """
    with suppress(ConfigError):  # not a name of torchao
        if name in EARLIER:
            return kind_of(name)
        if name == "_get_subclass_inserter" or not name.startswith("_"):
            if name.removesuffix("Config") in RECIPES:
                return RECIPES[name.removesuffix("Config")]
            refusal = _refusal(name)
            if isinstance(refusal, Elsewhere) and (found := in_torchao(name)) is not None:
                return found
            raise refusal
    raise AttributeError(f"module hf_fp8.recipes has no attribute {name!r}{_near(name)}")
