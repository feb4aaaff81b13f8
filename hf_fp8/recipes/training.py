"""torchao's configs of quantization-aware training: `QATConfig` and its fake quantizations, by `prepare_qat`, `convert_qat`."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, UnsupportedError
from ..formats.code_types import FP8, INT4, INT8
from ..formats.scheme import FBGEMM, ROW, Scheme, TensorScheme
from ..nn.fake_quantized import FakeQuantizedLinear
from ..nn.swap import replace_module
from ..quantization.candidates import Filter
from ..quantization.qat import convert_qat, prepare_qat
from .fields import Recipe, spellings
from .markers import MappingType, PerAxis, PerGroup, PerRow, PerToken, extent_of
from .names import recipe, recipe_of

# The scheme for which a model was prepared.
_prepared: weakref.WeakKeyDictionary[nn.Module, Scheme] = weakref.WeakKeyDictionary()


class QATStep(str, Enum):
    """The steps of `QATConfig`."""

    PREPARE = "prepare"
    CONVERT = "convert"


class FakeQuantizeConfigBase:
    """Base class of torchao's configs of fake quantizations."""


@dataclass
class Float8FakeQuantizeConfig(FakeQuantizeConfigBase):
    """FP8, with scales per row or per tensor."""

    dtype: torch.dtype = FP8
    granularity: Any = field(default_factory=PerRow)
    hp_value_lb: float | None = None
    hp_value_ub: float | None = None


@dataclass
class Int4WeightFakeQuantizeConfig(FakeQuantizeConfigBase):
    """int4 weights in groups, with zero points for inputs in bf16, without for FP8 inputs."""

    group_size: int = 128
    activation_dtype: torch.dtype = FP8


class IntxFakeQuantizeConfig(FakeQuantizeConfigBase):
    """Integers of up to 8 bits. granularity: a marker, or "per_token", "per_channel", "per_group" (with `group_size`)."""

    def __init__(
        self,
        dtype: Any,
        granularity: Any = None,
        mapping_type: Any = None,
        scale_precision: torch.dtype | None = torch.float32,
        zero_point_precision: torch.dtype = torch.int32,
        zero_point_domain: Any = "INT",
        is_dynamic: bool = True,
        range_learning: bool = False,
        eps: float | None = None,
        *,
        group_size: int | None = None,
        is_symmetric: bool | None = None,
    ) -> None:
        if group_size is not None and granularity not in (None, "per_group"):
            raise ConfigError(f"group_size={group_size} and granularity={granularity!r}: give one of them")
        if mapping_type is not None and is_symmetric is not None:
            raise ConfigError("mapping_type and is_symmetric are both given: give one of them")
        markers: dict[Any, Any] = {"per_token": PerToken(), "per_channel": PerAxis(0)}
        if granularity in (None, "per_group"):
            if group_size is None:
                raise ConfigError("IntxFakeQuantizeConfig needs a granularity, or a group_size")
            granularity = PerGroup(group_size)
        if mapping_type is None:
            mapping_type = MappingType.ASYMMETRIC if is_symmetric is False else MappingType.SYMMETRIC
        self.dtype = dtype
        self.granularity = markers.get(granularity, granularity) if isinstance(granularity, str) else granularity
        self.mapping_type, self.zero_point_domain = mapping_type, zero_point_domain
        self.scale_precision, self.zero_point_precision = scale_precision, zero_point_precision
        self.is_dynamic, self.range_learning, self.eps = is_dynamic, range_learning, eps


FakeQuantizeConfig = IntxFakeQuantizeConfig


class QATConfig:
    """Training for a config: `step="prepare"` before it, "convert" after it. Or with configs of fake quantizations instead.

    Raises ConfigError for a step that is none of these, and for contradictions.
    """

    def __init__(
        self,
        base_config: Any = None,
        activation_config: Any = None,
        weight_config: Any = None,
        *,
        step: QATStep | str = "prepare",
    ) -> None:
        self.base_config, self.activation_config, self.weight_config = base_config, activation_config, weight_config
        self.step = _step(step)
        fakes = activation_config is not None or weight_config is not None
        if base_config is not None and fakes:
            raise ConfigError("QATConfig: give a base_config, or a weight_config and an activation_config, not both")
        if self.step == "prepare" and base_config is None and not fakes:
            raise ConfigError("QATConfig(step='prepare'): give a base_config, or a weight_config")
        if self.step == "convert" and fakes:
            raise ConfigError("QATConfig(step='convert') takes a base_config only")


class IntXQuantizationAwareTrainingConfig:
    """The earlier name of `QATConfig(activation_config=..., weight_config=..., step="prepare")`."""

    def __init__(self, activation_config: Any = None, weight_config: Any = None) -> None:
        self.activation_config, self.weight_config = activation_config, weight_config


class FromIntXQuantizationAwareTrainingConfig:
    """The earlier name of `QATConfig(step="convert")`: the float Linears come back, and are not quantized."""


intx_quantization_aware_training = IntXQuantizationAwareTrainingConfig
from_intx_quantization_aware_training = FromIntXQuantizationAwareTrainingConfig


def _step(step: Any) -> str:
    found = {word.lower() for word in spellings(step)} & {"prepare", "convert"}
    if not found:
        raise ConfigError(f'QATConfig(step={step!r}): must be "prepare" or "convert"')
    return found.pop()


class _Fake(Recipe):
    """Reads the fields of one config of a fake quantization, as those of recipes."""

    def __init__(self, config: Any, is_weight: bool) -> None:
        self.of, self.is_weight, self.fields = config, is_weight, {}

    @property
    def name(self) -> str:
        return type(self.of).__name__

    def operand(self) -> TensorScheme:
        kind = self.name
        if kind == "Int4WeightFakeQuantizeConfig" and self.is_weight:
            # FBGEMM's kernel for bf16 inputs has offsets of groups, that for FP8 inputs does not.
            points = self.of.activation_dtype == torch.bfloat16
            extent = self._extent("granularity", PerGroup(self.of.group_size), ("PerGroup",))
            return TensorScheme(extent, dtype=INT4, has_zero_points=points, recipe=FBGEMM)
        if kind == "Float8FakeQuantizeConfig":
            for limit in ("hp_value_lb", "hp_value_ub"):
                if (value := getattr(self.of, limit)) is not None:
                    raise self.refusal(limit, value, "None")
            if self.of.dtype != FP8:
                raise self.refusal("dtype", self.of.dtype, "torch.float8_e4m3fn")
            extent = self._extent("granularity", self.of.granularity, ("PerRow", "PerTensor"))
            return TensorScheme(extent, dynamic=not self.is_weight)
        if kind in ("IntxFakeQuantizeConfig", "FakeQuantizeConfig"):
            return self._intx()
        raise UnsupportedError(
            f"{kind} as a config of {'weights' if self.is_weight else 'activations'}: hf_fp8 supports IntxFakeQuantizeConfig, "
            "Float8FakeQuantizeConfig and, for weights, Int4WeightFakeQuantizeConfig"
        )

    def _intx(self) -> TensorScheme:
        config = self.of
        dtype = self._integers("dtype", config.dtype)
        if config.range_learning:
            raise self.refusal("range_learning", True, "False: scales are computed from weights and inputs")
        if config.eps is not None:
            raise self.refusal("eps", config.eps, "None")
        if config.scale_precision not in (None, torch.float32):
            raise self.refusal("scale_precision", config.scale_precision, "None or torch.float32")
        if "FLOAT" in spellings(config.zero_point_domain):
            raise self.refusal("zero_point_domain", config.zero_point_domain, "INT or NONE")
        points = self._has_zero_points("mapping_type", config.mapping_type)
        if self.is_weight:
            extent = self._extent("granularity", config.granularity, ("PerGroup", "PerAxis"))
            return TensorScheme(extent, dtype=dtype, packed=points or dtype == INT4, has_zero_points=points)
        if dtype != INT8 or extent_of(config.granularity) != ROW or not config.is_dynamic:
            raise self.refusal("granularity", config.granularity, "torch.int8 inputs, PerToken(), is_dynamic=True")
        self._check_inputs_mapping(config.mapping_type)
        return TensorScheme(ROW, dynamic=True, dtype=INT8)


def scheme_of(config: Any) -> Scheme:
    """The scheme that a config of training is for. Raises UnsupportedError for one that hf_fp8 does not support."""
    base = getattr(config, "base_config", None)
    if base is not None:
        made = recipe(base) if isinstance(base, str) else recipe_of(base)
        if made is None:
            raise UnsupportedError(
                f"base_config is a {type(base).__name__}, which is not a recipe of hf_fp8: use torchao itself"
            )
        return made.scheme
    if config.weight_config is None:
        raise UnsupportedError(f"{type(config).__name__} without a weight_config: hf_fp8 does not quantize inputs alone")
    weight = _Fake(config.weight_config, True).operand()
    inputs = None if config.activation_config is None else _Fake(config.activation_config, False).operand()
    return Scheme(weight, inputs)


def train(model: nn.Module, config: Any, wanted: Filter | None) -> nn.Module:
    """Do the step of a config of training on `model`, in place; returns what `prepare_qat` or `convert_qat` return."""
    step = _step(getattr(config, "step", "convert" if type(config).__name__.lower().startswith("from") else "prepare"))
    if step == "prepare":
        return prepare(model, scheme_of(config), wanted)
    if hasattr(model, "merge_and_unload"):
        raise UnsupportedError(
            f"a {type(model).__name__} cannot be converted in place: use the model that convert_qat (hf_fp8.quantization.qat) "
            "returns"
        )
    base = getattr(config, "base_config", None)
    if base is None:
        return restored(model)
    asked, before = scheme_of(config), _prepared.get(model)
    if before is not None and before != asked:
        raise ConfigError(
            f"the model was prepared for {before.describe()}, and base_config is {asked.describe()}: convert with the config "
            "that it was prepared with"
        )
    return convert(model)


def prepare(model: nn.Module, scheme: Scheme, wanted: Filter | None) -> nn.Module:
    """`prepare_qat(model, scheme, filter_fn=wanted)`, of Linears only, as torchao's."""
    found = prepare_qat(model, scheme, filter_fn=wanted, experts="dequantize")
    _prepared[model] = scheme
    return found


def convert(model: nn.Module) -> nn.Module:
    """`convert_qat(model)`."""
    found = convert_qat(model)
    _prepared.pop(model, None)
    return found


def restored(model: nn.Module) -> nn.Module:
    """`model` with plain Linears, which have the trained parameters, in place of the prepared ones."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FakeQuantizedLinear):
            model = replace_module(model, name, layer.to_float())
    _prepared.pop(model, None)
    return model
