"""torchao's configs as recipes: a class each, with torchao's name, with or without "Config"."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch

from ..errors import ConfigError
from ..formats.code_types import FP8, INT4, INT8
from ..formats.scheme import ROW, TENSOR, Scheme, TensorScheme
from ..formats.scheme import Granularity as Extent
from .fields import Recipe, number, per_group, spellings
from .markers import PerAxis, PerGroup, extent_of

_FP8_TOKEN, _INT8_TOKEN = (TensorScheme(ROW, dynamic=True, dtype=dtype) for dtype in (FP8, INT8))
_CHANNEL, _GROUP_OF_32 = PerAxis(0), PerGroup(32)


class Float8WeightOnly(Recipe):
    """FP8 weights, inputs not quantized: FP8_WEIGHT_ONLY. granularity: `PerRow()` (the default), `PerTensor()`, or
    `PerGroup(size)`.
    """

    order = ("weight_dtype", "set_inductor_config", "version", "granularity")

    def _read(self, granularity: Any = None) -> None:
        found = ROW if granularity is None else self._extent("granularity", granularity, ("PerRow", "PerTensor", "PerGroup"))
        self.scheme = Scheme(TensorScheme(found))


class Float8DynamicActivationFloat8Weight(Recipe):
    """FP8 weights and inputs, with input scales computed from each input.

    granularity: `PerTensor()` (the default, as in torchao) is a scale per tensor for both, FP8_TENSOR; `PerRow()` is per
    channel and per token, FP8_DYNAMIC, and more exact; torchao's (PerBlock((1, 128)), PerBlock((128, 128))) is FP8_BLOCK.
    mm_config: a `Float8MMConfig`; use_fast_accum=False switches fast accumulation off on CUDA devices.
    """

    order = ("activation_dtype", "weight_dtype", "granularity", "packing_format", "mm_config")

    def _read(
        self, granularity: Any = None, mm_config: Any = None, kernel_preference: Any = "AUTO", packing_format: Any = None
    ) -> None:
        supported = "PerTensor(), PerRow() or (PerBlock((1, 128)), PerBlock((128, 128)))"
        if any("sparse" in spelling.lower() for spelling in spellings(packing_format)):
            raise self.elsewhere("packing_format", packing_format, "2:4 sparse: hf_fp8 supports PLAIN, which keeps zeros")
        self._check("packing_format", packing_format)
        self.scheme = self._of(granularity, supported, "FP8_TENSOR", "FP8_DYNAMIC", "FP8_BLOCK")
        self._take_mm_config(mm_config, kernel_preference)


class Float8StaticActivationFloat8Weight(Recipe):
    """FP8 weights and inputs with a scale per tensor each, the input scale static: FP8_STATIC.

    By position: (scale, activation_dtype, weight_dtype, granularity, mm_config), as in earlier versions of torchao, or, if the
    first is a step or None and no dtype follows, (step, act_quant_scale, activation_dtype, ...), as in 0.18.

    scale, act_quant_scale: amax / 448 of the inputs, the factor that dequantizes, one positive number for all layers that
    `quantize_` makes. torchao's is the same (quant_primitives._quantize_affine_float8 divides by it); the scale of
    torchao.float8, for training, is its inverse. Held in the dtype of weight scales, so rounded to bf16 in a bf16 model. None:
    the layers need `hf_fp8.calibrate`. step: "prepare" makes the layers and observes their inputs, "convert" sets their scales
    from these (`hf_fp8.calibrate` with "amax"). Raises ConfigError if more than one of these is given, or if the scale is not
    valid.
    """

    order = (
        "step", "act_quant_scale", "activation_dtype", "weight_dtype", "granularity", "mm_config", "kernel_preference",
        "set_inductor_config", "quantize_and_dequantize_output", "output_act_quant_scale",
    )  # fmt: skip
    earlier = ("scale", "activation_dtype", "weight_dtype", "granularity", "mm_config", "set_inductor_config")

    def __init__(self, *positional: Any, **named: Any) -> None:
        if positional and not _is_step(positional[0]) and (positional[0] is not None or _is_dtype_second(positional)):
            if len(positional) > len(self.earlier):
                raise ConfigError(f"{self.name} takes {', '.join(self.earlier)} by position, got {len(positional)}")
            named = {**dict(zip(self.earlier, positional, strict=False)), **named}
            positional = ()
        super().__init__(*positional, **named)

    def _read(
        self,
        step: Any = None,
        scale: Any = None,
        act_quant_scale: Any = None,
        granularity: Any = None,
        mm_config: Any = None,
        kernel_preference: Any = "AUTO",
    ) -> None:
        self.scheme = self._of(granularity, "PerTensor()", "FP8_STATIC")
        self._take_mm_config(mm_config, kernel_preference)
        _take_static(self, step, scale, act_quant_scale)


def _is_step(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Enum) and isinstance(value.value, str))


def _is_dtype_second(positional: tuple[Any, ...]) -> bool:
    return len(positional) > 1 and isinstance(positional[1], torch.dtype)


def _take_static(made: Recipe, step: Any, scale: Any, act_quant_scale: Any) -> None:
    """Set `step` and `input_scale`."""
    given = {"scale": scale, "act_quant_scale": act_quant_scale, "step": step}
    said = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    if sum(value is not None for value in given.values()) > 1:
        raise ConfigError(f"{made.name}({said}): give one finite positive number, or a step, or none of them")
    if step is not None:
        found = {word.lower() for word in spellings(step)} & {"prepare", "convert"}
        if not found:
            raise made.refusal("step", step, '"prepare" or "convert"')
        made.step = found.pop()
    made.input_scale = number(scale if act_quant_scale is None else act_quant_scale, f"{made.name}: {said.partition('=')[0]}")


class Int8WeightOnly(Recipe):
    """int8 weights, inputs not quantized: INT8_WEIGHT_ONLY. A scale per channel, or per `group_size` values of a channel, or
    as `granularity` says: `PerRow()`, `PerTensor()`, or `PerGroup(size)`. Layers whose in_features are not a multiple of the
    group size stay dense.
    """

    order = ("group_size", "granularity", "set_inductor_config", "version")

    def _read(self, group_size: int | None = None, granularity: Any = None) -> None:
        found = ROW if granularity is None else extent_of(granularity, ("PerRow", "PerTensor", "PerGroup"))
        if group_size is not None:
            # An object of torchao's has a granularity, whatever was given: None of its versions takes both.
            found = per_group(group_size) if granularity is None else None
        if found is None:
            raise self.refusal("granularity", granularity, "PerRow(), PerTensor() or PerGroup(size), or a group_size alone")
        self.scheme = Scheme(TensorScheme(found, dtype=INT8))


def _int8_pair(made: Recipe, granularity: Any) -> tuple[Extent, Extent]:
    """Granularities (of inputs, of weights) of torchao's int8: a marker for both, or a pair; per row for None."""
    pair = granularity if isinstance(granularity, (tuple, list)) else (granularity, granularity)
    found = [ROW if marker is None else extent_of(marker, ("PerRow", "PerTensor")) for marker in pair]
    if len(found) != 2 or not all(one in (ROW, TENSOR) for one in found):
        raise made.refusal("granularity", granularity, "PerRow() or PerTensor(), for both or as a pair (inputs, weights)")
    inputs, weight = found
    assert inputs is not None and weight is not None
    return inputs, weight


class Int8DynamicActivationInt8Weight(Recipe):
    """int8 weights per channel and inputs per token: INT8_DYNAMIC. `granularity`: `PerRow()` or `PerTensor()`, for both or as a
    pair (inputs, weights).
    """

    order = ("act_mapping_type", "weight_only_decode", "granularity", "set_inductor_config", "version", "reduce_range")

    def _read(self, granularity: Any = None) -> None:
        inputs, weight = _int8_pair(self, granularity)
        self.scheme = Scheme(TensorScheme(weight, dtype=INT8), TensorScheme(inputs, dynamic=True, dtype=INT8))


class Int8StaticActivationInt8Weight(Recipe):
    """int8 weights, and int8 inputs with one static scale.

    act_quant_scale: amax / 127 of the inputs, the factor that dequantizes, for all layers; None: they need `hf_fp8.calibrate`,
    with which torchao's two steps of FP8 (`step`) work as well. granularity: of the weights, `PerRow()` (the default) or
    `PerTensor()`; or a pair (inputs, weights). Inputs have one scale per tensor in either case: a static scale for each row
    would be for inputs of one shape.
    """

    order = (
        "act_quant_scale", "act_quant_zero_point", "granularity", "act_mapping_type", "set_inductor_config", "version",
        "reduce_range",
    )  # fmt: skip

    def _read(self, act_quant_scale: Any = None, granularity: Any = None, step: Any = None) -> None:
        inputs, weight = _int8_pair(self, granularity)
        if act_quant_scale is not None and torch.as_tensor(act_quant_scale).numel() != 1:
            raise self.refusal("act_quant_scale", act_quant_scale, "one number: static inputs have one scale per tensor")
        if inputs == ROW and granularity is not None:
            self.ignores("granularity", granularity, "static inputs have one scale per tensor; it is that of the weights")
        self.scheme = Scheme(TensorScheme(weight, dtype=INT8), TensorScheme(TENSOR, dtype=INT8))
        _take_static(self, step, None, act_quant_scale)


class Int4WeightOnly(Recipe):
    """int4 weights in groups with zero points, inputs not quantized: W4A16_ASYM, with any group size that divides K.

    torchao computes scales and zero points from the range of a group, too; its zero points are floats, these are integers of
    4 bits (the range then always contains 0). FBGEMM's preshuffled kernel has no zero points in FP8 only.
    """

    order = ("group_size", "set_inductor_config", "int4_packing_format", "int4_choose_qparams_algorithm")

    def _read(self, group_size: int = 128, packing_format: Any = None) -> None:
        if packing_format is not None:  # the name of `int4_packing_format` in 0.13
            self._check("int4_packing_format", packing_format)
        self.scheme = Scheme(TensorScheme(per_group(group_size), dtype=INT4, has_zero_points=True))


class Float8DynamicActivationInt4Weight(Recipe):
    """int4 weights in groups of 128 without zero points, FP8 inputs per token: W4AFP8."""

    order = ("int4_packing_format",)

    def _read(self, group_size: int = 128, packing_format: Any = None) -> None:
        if packing_format is not None:
            self._check("int4_packing_format", packing_format)
        self.scheme = Scheme(TensorScheme(per_group(group_size), dtype=INT4), _FP8_TOKEN)


class Int8DynamicActivationInt4Weight(Recipe):
    """int4 weights in groups, int8 inputs per token: W4A8; a config of earlier versions of torchao.

    mapping_type: ASYMMETRIC gives weights zero points. act_mapping_type: inputs are symmetric in either case, and the log says
    so.
    """

    order = ("group_size", "layout", "mapping_type", "act_mapping_type", "set_inductor_config")

    def _read(self, group_size: int = 32, mapping_type: Any = "SYMMETRIC", act_mapping_type: Any = None) -> None:
        self._check_inputs_mapping(act_mapping_type)
        points = self._has_zero_points("mapping_type", mapping_type)
        self.scheme = Scheme(TensorScheme(per_group(group_size), dtype=INT4, has_zero_points=points), _INT8_TOKEN)


class IntxWeightOnly(Recipe):
    """int4 or int8 weights, packed, inputs not quantized: W4A16, W8A16 and the like.

    weight_dtype: torch.int8 (the default) or torch.int4; `quantize_` passes torchao's own configs with other ones on to
    torchao.
    granularity: `PerAxis(0)` (the default) or `PerGroup(size)`. mapping_type: ASYMMETRIC gives zero points.
    """

    order = ("weight_dtype", "granularity", "mapping_type", "scale_dtype", "intx_packing_format")

    def _read(self, weight_dtype: Any = INT8, granularity: Any = _CHANNEL, mapping_type: Any = "SYMMETRIC") -> None:
        dtype = self._integers("weight_dtype", weight_dtype)
        extent = self._extent("granularity", granularity, ("PerAxis", "PerGroup"))
        points = self._has_zero_points("mapping_type", mapping_type)
        self.scheme = Scheme(TensorScheme(extent, dtype=dtype, packed=True, has_zero_points=points))


class Int8DynamicActivationIntxWeight(Recipe):
    """int4 or int8 weights, int8 inputs per token: W4A8, and the same with int8 weights.

    weight_dtype: torch.int8 (the default) or torch.int4; `quantize_` passes torchao's own configs with other ones on to
    torchao.
    weight_granularity: `PerGroup(32)` (the default), another group or `PerAxis(0)`. weight_mapping_type: ASYMMETRIC gives
    weights zero points. act_mapping_type: torchao has inputs with zero points only; here inputs are symmetric, and the log
    says so.
    """

    order = (
        "weight_dtype", "weight_granularity", "weight_mapping_type", "weight_scale_dtype", "act_mapping_type",
        "intx_packing_format",
    )  # fmt: skip

    def _read(
        self,
        weight_dtype: Any = INT8,
        weight_granularity: Any = _GROUP_OF_32,
        weight_mapping_type: Any = "SYMMETRIC",
        act_mapping_type: Any = None,
    ) -> None:
        self._check_inputs_mapping(act_mapping_type)
        dtype = self._integers("weight_dtype", weight_dtype)
        extent = self._extent("weight_granularity", weight_granularity, ("PerAxis", "PerGroup"))
        points = self._has_zero_points("weight_mapping_type", weight_mapping_type)
        weight = TensorScheme(extent, dtype=dtype, packed=points or dtype == INT4, has_zero_points=points)
        self.scheme = Scheme(weight, _INT8_TOKEN)
