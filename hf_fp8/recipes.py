"""Other libraries' words for what `quantize_model` does: `enable_fp8_gemm`, and `quantize_` with torchao's recipe names.

Names and the meaning of parameters are the same, bytes are not: scales and codes are compressed-tensors' (`numerics`), as
everywhere in hf_fp8. With a recipe, ``quantize_model(model, recipe.scheme)`` does the same and has more options.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from .calibration import apply_scales
from .choice import Filter
from .errors import ConfigError, UnsupportedError
from .in_place import quantize_model
from .linear import FP8Linear
from .quantized_module import QuantizedModule
from .scheme import (
    FP8, FP8_BLOCK, FP8_STATIC, FP8_WEIGHT_ONLY, INT8, ROW, TENSOR, Granularity, Scheme, TensorScheme,
)  # fmt: skip

_ORIGINALS = {"keep": "keep", "cpu_offload": "offload", "discard": "discard"}


@dataclass(frozen=True)
class FP8GemmOptions:
    """The options of `enable_fp8_gemm`.

    cast_inputs: a layer whose weight is neither fp16 nor bf16 casts its inputs to bf16 first; False leaves them as they are.
        Layers with a 16-bit weight take inputs as they come either way.
    cast_output_back: such a layer casts its output back to the dtype of its input; False leaves it in bf16.
    fp16_weight_storage: what becomes of the float weights: "keep" beside the codes, "cpu_offload", "discard".
    materialize_fp8_on_wrap: True; weights are quantized when the layer is made.

    Raises ConfigError for another storage, UnsupportedError for weights that are to be quantized later.
    """

    cast_inputs: bool = True
    cast_output_back: bool = True
    fp16_weight_storage: Literal["keep", "cpu_offload", "discard"] = "discard"
    materialize_fp8_on_wrap: bool = True

    def __post_init__(self) -> None:
        if self.fp16_weight_storage not in _ORIGINALS:
            raise ConfigError(f"fp16_weight_storage={self.fp16_weight_storage!r}: it is one of {', '.join(_ORIGINALS)}")
        if not self.materialize_fp8_on_wrap:
            raise UnsupportedError(
                f"materialize_fp8_on_wrap={self.materialize_fp8_on_wrap!r}: weights are quantized when the layer is made, on "
                "any device; leave it True"
            )


_DEFAULTS = FP8GemmOptions()


def enable_fp8_gemm(
    model: nn.Module,
    *,
    options: FP8GemmOptions | Mapping[str, Any] = _DEFAULTS,
    module_filter: Filter | None = None,
    inplace: bool = True,
) -> nn.Module:
    """`quantize_model(model, "FP8_DYNAMIC")` by the name and options of a utility that wraps Linears in vLLM's FP8 GEMM.

    module_filter: called with (name, module) for Linears; only those for which it gives True are quantized. options: may be a
    dict of the fields of `FP8GemmOptions`.

    Differences: weights have a scale per channel, not per tensor; CPUs compute with the codes, and need no float weight, so
    that every storage goes with every `cast_inputs`; what `quantize_model` leaves alone (subclasses of Linear, a transformers
    model's output embedding and routers) stays, with a line in the log. A mixture's merged experts are no Linears and stay.

    Returns `model`, the copy, or the new layer if `model` is a Linear itself. Raises ConfigError for unknown options and if
    no layer is left.
    """
    if isinstance(options, Mapping):
        known = [field.name for field in dataclasses.fields(FP8GemmOptions)]
        if unknown := [name for name in options if name not in known]:
            raise ConfigError(f"options have no {', '.join(map(repr, unknown))}; they have {', '.join(known)}")
        options = FP8GemmOptions(**options)
    if not isinstance(options, FP8GemmOptions):
        raise ConfigError(f"options={options!r}: it is FP8GemmOptions, or a dict of its fields")
    # Layer by layer, as a model may mix dtypes: an fp16 layer beside float32 ones is not to compute in bf16.
    cast = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if options.cast_inputs and _is_dense_linear(module) and module.weight.dtype not in (torch.float16, torch.bfloat16)
    }
    quantized = quantize_model(
        model,
        "FP8_DYNAMIC",
        filter_fn=lambda name, module: _is_dense_linear(module) and (module_filter is None or module_filter(name, module)),
        inplace=inplace,
        originals=_ORIGINALS[options.fp16_weight_storage],
        cast_output=options.cast_output_back,
        experts="dequantize",
    )
    for name, module in quantized.named_modules(remove_duplicate=False):
        if name in cast and isinstance(module, FP8Linear):
            module.compute_dtype = torch.bfloat16
    return quantized


def _is_dense_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, QuantizedModule)


@dataclass(frozen=True)
class PerTensor:
    """torchao's marker: one scale for a whole matrix, of weights and of inputs."""


@dataclass(frozen=True)
class PerRow:
    """torchao's marker: one scale for each output channel of a weight, and for each token of an input."""

    dim: int = -1


def _granularity(marker: Any) -> Granularity | None:
    """Of a marker of ours or torchao's (quantization/granularity.py), known by its class's name; None of another."""
    kind = type(marker).__name__
    if kind == "PerRow" and getattr(marker, "dim", -1) == -1:
        return ROW
    if kind == "PerGroup":
        return Granularity(1, marker.group_size)
    if kind == "PerBlock" and len(marker.block_size) == 2:
        return Granularity(*marker.block_size)
    return TENSOR if kind == "PerTensor" else None


def _word(value: Any) -> str:
    return str(getattr(value, "name", value)).lower()  # torchao's enums, and the strings that name their members


def _mm_as_ours(config: Any) -> bool:
    given = (getattr(config, "emulate", None), getattr(config, "use_fast_accum", None))
    return config is None or given == (False, True)


# Parameters of torchao's recipes that choose nothing here: whether a value means what hf_fp8 does, and which one does.
_FIXED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "weight_dtype": (lambda v: v == FP8, f"{FP8}"),
    "activation_dtype": (lambda v: v == FP8, f"{FP8}"),
    "packing_format": (lambda v: _word(v) in ("none", "plain"), "None and PLAIN"),
    "layout": (lambda v: v is None or type(v).__name__ == "PlainLayout", "None and PlainLayout"),
    "mm_config": (_mm_as_ours, "None and Float8MMConfig(emulate=False, use_fast_accum=True)"),
    "kernel_preference": (lambda v: _word(v) == "auto", "AUTO; quantize_model(model, recipe.scheme, backend=...) has others"),
    "activation_value_lb": (lambda v: v is None, "None: scales of inputs have no bounds"),
    "activation_value_ub": (lambda v: v is None, "None: scales of inputs have no bounds"),
    "act_mapping_type": (lambda v: _word(v) in ("none", "symmetric"), "SYMMETRIC: there are no zero points"),
    "weight_only_decode": (lambda v: not v, "False; quantize_model(model, recipe.scheme, backend='weight_only') is for all"),
    "reduce_range": (lambda v: not v, "False: codes go to 127"),
    "set_inductor_config": (lambda v: not v, "False: hf_fp8 changes no settings of the compiler"),
    "step": (lambda v: v is None, "None: quantize without a scale, then run data under hf_fp8.calibrate(model)"),
    "quantize_and_dequantize_output": (lambda v: not v, "False: outputs are not quantized"),
    "output_act_quant_scale": (lambda v: v is None, "None: outputs are not quantized"),
    # Which of its tensor classes torchao takes; ours are neither.
    "version": (lambda v: v in (1, 2), "1 and 2, which are the same here"),
}


@dataclass(frozen=True)
class Recipe:
    """What torchao calls a config. `scheme` is what it stands for.

    Raises UnsupportedError, with the parameter, for values of torchao's parameters that hf_fp8 has nothing for.
    """

    set_inductor_config: bool = dataclasses.field(default=False, kw_only=True)
    version: int = dataclasses.field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _FIXED and not _FIXED[field.name][0](value):
                raise self._refusal(field.name, _FIXED[field.name][1])
        _ = self.scheme  # raises for granularities

    def _refusal(self, parameter: str, supported: str) -> UnsupportedError:
        value = getattr(self, parameter)
        return UnsupportedError(f"{type(self).__name__}({parameter}={value!r}): hf_fp8 supports {supported}")

    def _granularities(self, supported: str, default: Granularity) -> tuple[Granularity | None, Granularity | None]:
        """(of inputs, of weights), from a marker for both or a pair of them in torchao's order."""
        given: Any = getattr(self, "granularity", None)
        if given is None:
            return default, default
        pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
        if len(pair) != 2:
            raise self._refusal("granularity", supported)
        return _granularity(pair[0]), _granularity(pair[1])

    @property
    def scheme(self) -> Scheme:
        raise NotImplementedError


@dataclass(frozen=True)
class Float8WeightOnly(Recipe):
    """FP8 weights with a scale per channel, inputs as they are: FP8_WEIGHT_ONLY."""

    weight_dtype: torch.dtype = FP8

    @property
    def scheme(self) -> Scheme:
        return FP8_WEIGHT_ONLY


@dataclass(frozen=True)
class Float8DynamicActivationFloat8Weight(Recipe):
    """FP8 weights and inputs, scales of inputs computed from each.

    granularity: `PerTensor()` (torchao's default, too) is a scale per tensor for both, FP8_TENSOR; `PerRow()` is per channel
    and per token, FP8_DYNAMIC, and more exact. torchao's pair (PerBlock((1, 128)), PerBlock((128, 128))) is FP8_BLOCK.
    """

    activation_dtype: torch.dtype = FP8
    weight_dtype: torch.dtype = FP8
    granularity: Any = None
    packing_format: Any = dataclasses.field(default="plain", kw_only=True)
    mm_config: Any = dataclasses.field(default=None, kw_only=True)
    activation_value_lb: float | None = dataclasses.field(default=None, kw_only=True)
    activation_value_ub: float | None = dataclasses.field(default=None, kw_only=True)
    kernel_preference: Any = dataclasses.field(default="auto", kw_only=True)

    _supported: ClassVar[str] = "PerTensor(), PerRow(), or (PerBlock((1, 128)), PerBlock((128, 128))), for inputs and weights"

    @property
    def scheme(self) -> Scheme:
        inputs, weights = self._granularities(self._supported, TENSOR)
        if inputs in (TENSOR, ROW) and inputs == weights:
            return Scheme(TensorScheme(inputs), TensorScheme(inputs, dynamic=True))
        assert FP8_BLOCK.input is not None
        if (inputs, weights) == (FP8_BLOCK.input.granularity, FP8_BLOCK.weight.granularity):
            return FP8_BLOCK
        raise self._refusal("granularity", self._supported)


@dataclass(frozen=True)
class Float8StaticActivationFloat8Weight(Recipe):
    """FP8 weights and inputs with a scale per tensor each, that of inputs fixed: FP8_STATIC.

    scale: what stored inputs are multiplied by, amax / 448, one positive number, for all layers that `quantize_` makes. It is
    torchao's own convention (quant_primitives: ``clamp(x / scale)``), not that of torch's older "scale" to multiply by. It is
    held in the dtype of the weight's scale, that is rounded to bf16 in a bf16 model. None: layers wait for
    `hf_fp8.calibrate`. act_quant_scale: the same, as torchao calls it now.
    """

    scale: float | torch.Tensor | None = None
    activation_dtype: torch.dtype = FP8
    weight_dtype: torch.dtype = FP8
    granularity: Any = None
    act_quant_scale: float | torch.Tensor | None = dataclasses.field(default=None, kw_only=True)
    step: Any = dataclasses.field(default=None, kw_only=True)
    mm_config: Any = dataclasses.field(default=None, kw_only=True)
    kernel_preference: Any = dataclasses.field(default="auto", kw_only=True)
    quantize_and_dequantize_output: bool = dataclasses.field(default=False, kw_only=True)
    output_act_quant_scale: Any = dataclasses.field(default=None, kw_only=True)

    @property
    def scheme(self) -> Scheme:
        if self._granularities("PerTensor()", TENSOR) != (TENSOR, TENSOR):
            raise self._refusal("granularity", "PerTensor()")
        return FP8_STATIC
