"""`enable_fp8_gemm`, a utility that wraps Linears in an FP8 GEMM, and `apply_w8a8_monkey_patch`, one for training adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import ConfigError, UnsupportedError
from ..formats.code_types import FP8
from ..integrations.other_savers import guard_savers
from ..integrations.peft.create import put_under_adapters
from ..integrations.peft.state import adapters
from ..integrations.weight_readers import guard_readers
from ..nn.linear import QuantizedLinear
from ..quantization.candidates import Filter
from ..quantization.model import quantize_model
from .apply import quantized_linears

_ORIGINALS = {"keep": "keep", "cpu_offload": "offload", "discard": "discard"}


@dataclass(frozen=True)
class FP8GemmOptions:
    """Options of `enable_fp8_gemm`.

    cast_inputs: a layer whose weight is neither fp16 nor bf16 casts its inputs to bf16 first; False does not cast them.
        Layers with a 16-bit weight never cast inputs (the original utility checks the dtype of each input instead).
    cast_output_back: such a layer casts its output back to the dtype of its input; False leaves it in bf16.
    fp16_weight_storage: what to do with the float weights: "keep" (in addition to the codes), "cpu_offload", "discard".
    materialize_fp8_on_wrap: weights are quantized when the layer is created in either case. False is for weights that get their
        values later: they have to be kept, and are quantized again at the first call after a change. UnsupportedError for False
        with "discard".
    """

    cast_inputs: bool = True
    cast_output_back: bool = True
    fp16_weight_storage: Literal["keep", "cpu_offload", "discard"] = "discard"
    materialize_fp8_on_wrap: bool = True

    def __post_init__(self) -> None:
        if self.fp16_weight_storage not in _ORIGINALS:
            raise ConfigError(f"fp16_weight_storage={self.fp16_weight_storage!r}: must be one of {', '.join(_ORIGINALS)}")
        if not self.materialize_fp8_on_wrap and self.fp16_weight_storage == "discard":
            raise UnsupportedError(
                "materialize_fp8_on_wrap=False: weights are quantized when the layer is made, and not again after they are "
                'discarded; leave it True, or use fp16_weight_storage="keep"'
            )


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

    Kept weights are tracked: after a change of `layer.original` the next call quantizes it again, as there
    (`QuantizedLinear.follows_original`; compiled code raises StaleError). `layer.invalidate_weight_cache()` and
    `layer.materialize_fp8_weight(device)` exist as well, and as functions for whole models.

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
    quantized, made = quantized_linears(
        model, "FP8_DYNAMIC", module_filter, inplace=inplace, originals=originals, cast_output=cast_output
    )
    # Layer by layer, as a model may mix dtypes: an fp16 layer among float32 ones must not compute in bf16.
    for layer in made.values():
        layer.follows_original = True
        if options.cast_inputs and layer.original_dtype not in (torch.float16, torch.bfloat16):
            layer.compute_dtype = torch.bfloat16
    return quantized


def materialize_fp8_weight(model: nn.Module, device: torch.device | str | None = None) -> None:
    """Quantize the kept weights of `model` (or a layer) that were changed again, and move its quantized layers to `device`."""
    for layer in _layers(model):
        layer.materialize_fp8_weight(device)


def invalidate_weight_cache(model: nn.Module) -> None:
    """Take all codes of `model` (or a layer) to be out of date; with `enable_fp8_gemm` the next call computes them again.

    Raises UnsupportedError, before anything is changed, if a float weight was not kept.
    """
    layers = list(_layers(model))
    for layer in layers:
        if layer.original is None:
            raise UnsupportedError(
                f"the float weight of {layer.name_in_model or 'a layer'} was not kept: use "
                'enable_fp8_gemm(options={"fp16_weight_storage": "keep"})'
            )
    for layer in layers:
        layer.invalidate_weight_cache()


def _layers(model: nn.Module) -> Iterator[QuantizedLinear]:
    found = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no quantized layers: call enable_fp8_gemm first")
    yield from found


_MODES = {"int8": "INT8", "fp8": "FP8_DYNAMIC"}


def apply_w8a8_monkey_patch(model: nn.Module, w8a8_mode: str = "int8", *, module_filter: Filter | None = None) -> nn.Module:
    """8-bit weights and inputs for training adapters: `quantize_model` with "INT8" or "FP8_DYNAMIC"; in place.

    w8a8_mode: "int8" or "fp8". module_filter: as in `enable_fp8_gemm`. Layers that have FP8 weights already (the original
    utility takes only such ones) are re-quantized to int8, or stay as they are. In a model that has adapters of PEFT, the
    Linears under them are quantized, and no others. Gradients go through the dequantized weight, which is not kept, as there;
    weights have none.

    Returns `model`, or the new layer if `model` is a Linear itself. Raises ConfigError for another mode and if no layer is
    quantized; UnsupportedError for kinds of adapters that would read codes as weights, and for "int8" of a transformers model
    that is in FP8 already: load it with `FP8Config(backend="int8")`.
    """
    if w8a8_mode not in _MODES:
        raise ConfigError(f"w8a8_mode={w8a8_mode!r}: must be one of {', '.join(_MODES)}")
    held = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if held:
        return _requantized(model, held, w8a8_mode)
    if adapters(model) is None:
        return quantized_linears(model, _MODES[w8a8_mode], module_filter, experts="dequantize")[0]
    made: dict[str, QuantizedLinear] = {}
    for name, module in list(model.named_modules()):
        base = getattr(module, "base_layer", None)
        if type(base) is nn.Linear and (module_filter is None or module_filter(name, base)):
            new = quantize_model(base, _MODES[w8a8_mode])
            assert isinstance(new, QuantizedLinear)
            new.name_in_model = name
            made[name] = new
    if not made:
        raise ConfigError(f"{type(model).__name__} has adapters, and no plain Linear under one that module_filter chooses")
    put_under_adapters(model, made)
    guard_savers(model)
    guard_readers(model)
    return model


def _requantized(model: nn.Module, layers: list[QuantizedLinear], mode: str) -> nn.Module:
    """`model` with its FP8 layers in int8, or as it is."""
    if mode == "int8":
        if any(getattr(module, "hf_quantizer", None) is not None for module in model.modules()):
            raise UnsupportedError(
                "the model is a transformers model in FP8, and its config says so: load it with FP8Config(backend='int8'), or "
                "quantize the dense model with INT8"
            )
        for layer in layers:
            if layer.scheme.weight.dtype == FP8:
                layer.requantize_int8()
    return model
