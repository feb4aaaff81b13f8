"""Other libraries' names for `quantize_model`: `enable_fp8_gemm`, and `quantize_` with torchao's recipe names.

Names and the meaning of parameters are the same as there, the stored bytes are not: scales and codes (8-bit values) are those
of compressed-tensors (`numerics`). ``quantize_model(model, recipe.scheme)`` does the same and has more options.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .errors import ConfigError, UnsupportedError
from .formats.code_types import FP8, INT8
from .formats.scheme import ROW, TENSOR, Granularity, Scheme, TensorScheme, scheme_named
from .nn.base import QuantizedModule
from .nn.linear import QuantizedLinear
from .quantization.calibration import apply_scales
from .quantization.candidates import Filter
from .quantization.model import quantize_model

_ORIGINALS = {"keep": "keep", "cpu_offload": "offload", "discard": "discard"}


@dataclass(frozen=True)
class FP8GemmOptions:
    """Options of `enable_fp8_gemm`.

    cast_inputs: a layer whose weight is neither fp16 nor bf16 casts its inputs to bf16 first; False does not cast them.
        Layers with a 16-bit weight never cast inputs (the original utility checks the dtype of each input instead).
    cast_output_back: such a layer casts its output back to the dtype of its input; False leaves it in bf16.
    fp16_weight_storage: what to do with the float weights: "keep" (in addition to the codes), "cpu_offload", "discard".
    materialize_fp8_on_wrap: True; weights are quantized when the layer is created. UnsupportedError for False.
    """

    cast_inputs: bool = True
    cast_output_back: bool = True
    fp16_weight_storage: Literal["keep", "cpu_offload", "discard"] = "discard"
    materialize_fp8_on_wrap: bool = True

    def __post_init__(self) -> None:
        if self.fp16_weight_storage not in _ORIGINALS:
            raise ConfigError(f"fp16_weight_storage={self.fp16_weight_storage!r}: must be one of {', '.join(_ORIGINALS)}")
        if not self.materialize_fp8_on_wrap:
            raise UnsupportedError("materialize_fp8_on_wrap=False: weights are quantized when the layer is made; leave it True")


def enable_fp8_gemm(
    model: nn.Module,
    *,
    options: FP8GemmOptions | Mapping[str, Any] = FP8GemmOptions(),
    module_filter: Filter | None = None,
    inplace: bool = True,
) -> nn.Module:
    """`quantize_model(model, "FP8_DYNAMIC")` with the name and options of a utility that wraps Linears in vLLM's FP8 GEMM.

    module_filter: called with (name, module) for Linears; only those for which it returns True are quantized. options: may be
    a dict of the fields of FP8GemmOptions.

    Differences: weights have a scale per channel, not per tensor; CPUs compute with the codes and need no float weight, so
    every `fp16_weight_storage` works with every `cast_inputs`; layers that `quantize_model` does not quantize (subclasses of
    Linear, a transformers model's output embedding and routers) stay dense, and are logged. Merged experts of MoE models are
    not Linears and stay dense.

    Returns `model`, the copy, or the new layer if `model` is a Linear itself. Raises ConfigError for unknown options and if
    no layer is quantized.
    """
    if isinstance(options, Mapping):
        known = [field.name for field in dataclasses.fields(FP8GemmOptions)]
        if unknown := [name for name in options if name not in known]:
            raise ConfigError(f"options have no {', '.join(map(repr, unknown))}; they have {', '.join(known)}")
        options = FP8GemmOptions(**options)
    elif not isinstance(options, FP8GemmOptions):
        raise ConfigError(f"options={options!r}: must be FP8GemmOptions, or a dict of their fields")
    originals, cast_output = _ORIGINALS[options.fp16_weight_storage], options.cast_output_back
    quantized, made = _quantized(
        model, "FP8_DYNAMIC", module_filter, inplace=inplace, originals=originals, cast_output=cast_output
    )
    # Layer by layer, as a model may mix dtypes: an fp16 layer among float32 ones must not compute in bf16.
    for layer in made.values():
        if options.cast_inputs and layer.original_dtype not in (torch.float16, torch.bfloat16):
            layer.compute_dtype = torch.bfloat16
    return quantized


def _quantized(
    model: nn.Module, scheme: str | Scheme, wanted: Filter | None, **options: Any
) -> tuple[nn.Module, dict[str, QuantizedLinear]]:
    """Quantize Linears of `model`, and no experts. Returns what `quantize_model` returns, and the new layers by name."""
    held = {name for name, module in model.named_modules() if isinstance(module, QuantizedModule)}

    def chosen(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and (wanted is None or wanted(name, module))

    quantized = quantize_model(model, scheme, filter_fn=chosen, **options)
    layers = ((name, module) for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear))
    return quantized, {name: layer for name, layer in layers if name not in held}


@dataclass(frozen=True)
class PerTensor:
    """torchao's marker: one scale for a whole matrix, of weights and of inputs."""


@dataclass(frozen=True)
class PerRow:
    """torchao's marker: one scale for each output channel of a weight, and for each token of an input."""

    dim: int = -1


def _granularity(marker: Any) -> Granularity | None:
    """The granularity of a marker of hf_fp8 or torchao (quantization/granularity.py), by class name; None if unknown."""
    kind = type(marker).__name__
    if kind == "PerRow" and getattr(marker, "dim", -1) == -1:
        return ROW
    if kind == "PerGroup":
        return Granularity(1, marker.group_size)
    if kind == "PerBlock" and len(marker.block_size) == 2:
        return Granularity(*marker.block_size)
    return TENSOR if kind == "PerTensor" else None


# Parameters of torchao for which hf_fp8 supports one meaning -> the spellings of the values with that meaning.
_ONE_MEANING = {
    **dict.fromkeys(("weight_dtype", "activation_dtype"), ("torch.float8_e4m3fn",)),
    "packing_format": ("None", "PLAIN", "plain"),
    "layout": ("None", "PlainLayout()"),
    "mm_config": ("None", "Float8MMConfig(emulate=False, use_fast_accum=True, pad_inner_dim=False)"),  # `kernels/torch_fp8`
    "kernel_preference": ("AUTO", "auto"),
    "act_mapping_type": ("None", "SYMMETRIC"),
    **dict.fromkeys(("reduce_range", "weight_only_decode", "quantize_and_dequantize_output"), ("None", "False")),
    "set_inductor_config": ("False",),  # hf_fp8 changes no settings of the compiler
    # `hf_fp8.calibrate` replaces torchao's two steps.
    **dict.fromkeys(("step", "activation_value_lb", "activation_value_ub", "output_act_quant_scale"), ("None",)),
    "version": ("1", "2"),  # selects one of torchao's tensor classes, which hold the same values
}


class Recipe:
    """A config of torchao, translated to `scheme`.

    Every recipe accepts, by name, torchao's parameters in `_ONE_MEANING`, and raises UnsupportedError for values with a
    meaning that hf_fp8 does not support.
    """

    scheme: Scheme
    input_scale: float | None = None

    def __init__(self, **parameters: Any) -> None:
        for name, value in parameters.items():
            accepted = _ONE_MEANING.get(name, ())
            if not {str(value), repr(value), getattr(value, "name", "")} & set(accepted):
                raise self._refusal(name, value, " or ".join(accepted) or "no such parameter")

    def _refusal(self, parameter: str, value: object, supported: str) -> UnsupportedError:
        return UnsupportedError(f"{type(self).__name__}({parameter}={value!r}): hf_fp8 supports {supported}")

    def _of(self, granularity: Any, supported: str, *schemes: str | Scheme) -> Scheme:
        """The scheme for a marker, or for a pair (inputs, weights), as in torchao; the first of `schemes` for None."""
        given = granularity if isinstance(granularity, (tuple, list)) else (granularity, granularity)
        found = [_granularity(marker) for marker in given]
        for scheme in map(scheme_named, schemes):
            if granularity is None or found == [scheme.input and scheme.input.granularity, scheme.weight.granularity]:
                return scheme
        raise self._refusal("granularity", granularity, supported)


class Float8WeightOnly(Recipe):
    """FP8 weights with a scale per channel, inputs not quantized: FP8_WEIGHT_ONLY."""

    def __init__(self, weight_dtype: torch.dtype = FP8, **parameters: Any) -> None:
        super().__init__(weight_dtype=weight_dtype, **parameters)
        self.scheme = scheme_named("FP8_WEIGHT_ONLY")


class Float8DynamicActivationFloat8Weight(Recipe):
    """FP8 weights and inputs, with input scales computed from each input.

    granularity: `PerTensor()` (the default, as in torchao) is a scale per tensor for both, FP8_TENSOR; `PerRow()` is per
    channel and per token, FP8_DYNAMIC, and more exact; torchao's (PerBlock((1, 128)), PerBlock((128, 128))) is FP8_BLOCK.
    """

    def __init__(self, activation_dtype: Any = FP8, weight_dtype: Any = FP8, granularity: Any = None, **parameters: Any):
        super().__init__(activation_dtype=activation_dtype, weight_dtype=weight_dtype, **parameters)
        supported = "PerTensor(), PerRow() or (PerBlock((1, 128)), PerBlock((128, 128)))"
        self.scheme = self._of(granularity, supported, "FP8_TENSOR", "FP8_DYNAMIC", "FP8_BLOCK")


class Float8StaticActivationFloat8Weight(Recipe):
    """FP8 weights and inputs with a scale per tensor each, the input scale static: FP8_STATIC.

    scale: amax / 448 of the inputs, the factor that dequantizes, one positive number for all layers that `quantize_` makes.
    torchao's is the same (quant_primitives._quantize_affine_float8 divides by it); the scale of torchao.float8, for training,
    is its inverse. Held in the dtype of weight scales, so rounded to bf16 in a bf16 model. None: the layers need
    `hf_fp8.calibrate`. act_quant_scale: torchao's current name of `scale`. Raises ConfigError if both are given, or if the
    scale is not valid.
    """

    def __init__(self, scale: Any = None, *, act_quant_scale: Any = None, granularity: Any = None, **parameters: Any) -> None:
        super().__init__(**parameters)
        self.scheme = self._of(granularity, "PerTensor()", "FP8_STATIC")
        given = [torch.as_tensor(s, dtype=torch.float64) for s in (scale, act_quant_scale) if s is not None]
        if len(given) > 1 or not all(s.numel() == 1 and 0 < s.item() < math.inf for s in given):
            raise ConfigError(f"scale={scale!r}, act_quant_scale={act_quant_scale!r}: give one finite positive number, or none")
        self.input_scale = given[0].item() if given else None


class Int8WeightOnly(Recipe):
    """int8 weights, inputs not quantized: INT8_WEIGHT_ONLY. A scale per channel, or per `group_size` values of a channel, or
    as `granularity` says: `PerRow()`, `PerTensor()`, or torchao's PerGroup. Layers whose in_features are not a
    multiple of the group size stay dense.
    """

    def __init__(self, group_size: int | None = None, *, granularity: Any = None, **parameters: Any) -> None:
        super().__init__(**parameters)
        found = ROW if granularity is None else _granularity(granularity)
        if group_size is not None:
            found = Granularity(1, group_size) if granularity is None else None
        if found is None or found.rows > 1:
            raise self._refusal("granularity", granularity, "PerRow(), PerTensor() or PerGroup(size), or a group_size alone")
        self.scheme = Scheme(TensorScheme(found, dtype=INT8))


class Int8DynamicActivationInt8Weight(Recipe):
    """int8 weights per channel and inputs per token: INT8_DYNAMIC. `granularity`: `PerRow()`, or `PerTensor()` for both."""

    def __init__(self, *, granularity: Any = None, **parameters: Any) -> None:
        super().__init__(**parameters)
        whole = Scheme(TensorScheme(TENSOR, dtype=INT8), TensorScheme(TENSOR, dynamic=True, dtype=INT8))
        self.scheme = self._of(granularity, "PerRow() or PerTensor()", "INT8", whole)


RECIPES: dict[str, type[Recipe]] = {kind.__name__: kind for kind in Recipe.__subclasses__()}
_BITS = "weights of hf_fp8 have 8 bits: use Float8WeightOnly or Int8WeightOnly, or torchao itself"
# Part of a name, without case and underscores -> why there is no such recipe. The first that matches is used.
_UNSUPPORTED = {
    "sparse": "2:4 sparse weights run only on cuSPARSELt or CUTLASS, on CUDA devices of SM90; the compressed layout could not "
    "be tested on one, and a wrong layout gives wrong numbers without an error. Use the dense "
    "Float8DynamicActivationFloat8Weight, which keeps the zeros of pruned weights, or torchao itself",
    "nvfp4": f"NVFP4 has 4-bit codes and two levels of scales; {_BITS}",
    "mx": "microscaling formats have scales that are powers of two, those of hf_fp8 are floats: use "
    "Float8DynamicActivationFloat8Weight, or torchao itself",
    **dict.fromkeys(("int4", "intx", "fpx"), _BITS),
    "int8static": "hf_fp8 has no static int8 inputs: use Int8DynamicActivationInt8Weight",
}


def _kind(name: str) -> type[Recipe]:
    word = name.replace("_", "").lower().removesuffix("config")
    for known, kind in RECIPES.items():
        if known.lower() == word:
            return kind
    for part, why in _UNSUPPORTED.items():
        if part in word:
            raise UnsupportedError(f"recipe {name!r}: {why}")
    raise ConfigError(f"recipe {name!r}: must be one of {', '.join(RECIPES)}; names of schemes are for quantize_model")


def recipe(name: str, **parameters: Any) -> Recipe:
    """The recipe of a torchao name: a config class with or without "Config", or an old spelling such as float8_weight_only.

    Raises UnsupportedError, with the reason, for recipes that hf_fp8 does not support; ConfigError, with the supported names,
    for unknown names.
    """
    return _kind(name)(**parameters)


def __getattr__(name: str) -> Any:
    """The recipes' names with "Config". Raises UnsupportedError, with the reason, for torchao's names that have no recipe."""
    with suppress(ConfigError):  # not a name of torchao
        if not name.startswith("_") and (kind := _kind(name)).__name__ == name.removesuffix("Config"):
            return kind
    raise AttributeError(f"module {__name__} has no attribute {name!r}")


def quantize_(
    model: nn.Module,
    config: Recipe | str,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.device | str | int | None = None,
) -> None:
    """`quantize_model(model, config.scheme)`, in place, with torchao's order of arguments.

    config: a recipe, or its name. filter_fn: called with (module, name), as in torchao, not (name, module); by default all
    Linears. Layers that `quantize_model` does not quantize stay dense, whatever it returns, and are logged; merged experts
    stay dense, too. device: Linears are quantized there one by one, and then all of `model` is moved there; torchao moves each
    module first.

    Raises ConfigError if `config` is not a recipe or no layer is quantized, UnsupportedError if `model` is a Linear itself.
    """
    config = recipe(config) if isinstance(config, str) else config
    if not isinstance(config, Recipe):
        raise ConfigError(f"config is a {type(config).__name__}: must be one of {', '.join(RECIPES)} of hf_fp8, or its name")
    if isinstance(model, nn.Linear) and not isinstance(model, QuantizedModule):
        raise UnsupportedError("a Linear cannot be replaced in place: use the layer that quantize_model(model, ...) returns")
    there = None if device is None else torch.device(device)
    wanted = None if filter_fn is None else lambda name, module: filter_fn(module, name)
    _, made = _quantized(model, config.scheme, wanted, device=there, experts="dequantize")
    if config.input_scale is not None:
        apply_scales(model, dict.fromkeys(made, config.input_scale))
    if there is not None:
        model.to(there)
