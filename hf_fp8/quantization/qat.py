"""Quantization-aware training: `prepare_qat` makes Linears compute as they will when quantized, `convert_qat` quantizes them.

In between, the model is trained as any other: its parameters are the float ones, with the same names. See
`nn.fake_quantized.FakeQuantizedLinear`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint.quantization_spec import QuantizationSpec
from ..errors import CalibrationError, ConfigError, UnsupportedError, by_reason, first
from ..formats.scheme import SCHEMES, W4A16_FBGEMM, Scheme
from ..integrations.config import FP8Config
from ..nn.fake_quantized import FakeQuantizedLinear, fake_quantized, has_float_offsets
from ..nn.swap import choose_fused_paths, copy_hooks, replace_module
from .calibration import apply_scales
from .candidates import Choice, Filter, choose
from .model import quantize_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What `prepare_qat` was asked for, which `convert_qat` does: each prepared layer has it."""

    scheme: str | Scheme | Mapping[Any, Any]
    targets: str | Sequence[str]
    ignore: str | Sequence[str] | None


# Schemes that are for training only: what they train for is not a checkpoint of compressed-tensors.
TRAINING_ONLY = {"W4A16_FBGEMM": W4A16_FBGEMM}


def prepare_qat(
    model: nn.Module,
    scheme: str | Scheme | Mapping[Any, Any] = "W4A16",
    *,
    filter_fn: Filter | None = None,
    targets: str | Sequence[str] = ("Linear",),
    ignore: str | Sequence[str] | None = None,
    backend: str = "scaled_mm",
) -> nn.Module:
    """Replace the Linears of `model` by FakeQuantizedLinears, in place, for training before it is quantized.

    The same layers that `quantize_model` would quantize with these arguments; the log names those that it could not. Parameters
    stay the same objects, so an optimizer may be made before or after. Adapters (LoRA) are added afterwards: then the weight
    with the adapters merged into it is quantized in each forward. Experts of MoE models stay as they are.

    Args:
        scheme: any of `SCHEMES`, a Scheme or a dict, as in `quantize_model`; and "W4A16_FBGEMM", the numerics of FBGEMM's int4
            kernel for inputs in bfloat16. Static input scales ("FP8") are moving averages over the inputs in training.
        filter_fn, targets, ignore: as in `quantize_model`.
        backend: which kernels train and run: "scaled_mm" quantizes inputs as the scheme says, on every device.

    Returns `model` (or the new layer, if `model` is a Linear itself). Raises ConfigError if nothing in it can be quantized;
    UnsupportedError for a model that is quantized, prepared or has adapters already.
    """
    if any(isinstance(module, FakeQuantizedLinear) for module in model.modules()):
        raise UnsupportedError(f"{type(model).__name__} is prepared already: call convert_qat first")
    config = FP8Config(backend=backend, experts="dequantize")
    asked = TRAINING_ONLY.get(scheme.upper(), scheme) if isinstance(scheme, str) else scheme
    request = Request(asked, targets, ignore)
    config.spec = QuantizationSpec.asked(_storable(asked), targets, ignore)
    choice = choose(model, config, filter_fn, False)
    made: dict[int, nn.Module] = {}
    for name, found in choice.layers.items():
        old = model.get_submodule(name)
        if isinstance(old, FakeQuantizedLinear):
            continue  # in a module that occurs twice in the model
        assert isinstance(old, nn.Linear)
        wanted = asked if isinstance(asked, Scheme) else found
        new = made.get(id(old))
        if new is None:
            new = made[id(old)] = FakeQuantizedLinear(old, wanted, backend=backend, name=name)
            new.request = request
            copy_hooks(old, new)
        model = replace_module(model, name, new)
    choose_fused_paths(model)
    _report(choice)
    return model


def _storable(scheme: str | Scheme | Mapping[Any, Any]) -> str | Scheme | Mapping[Any, Any]:
    """A scheme that a config can describe, with the same groups: it chooses the layers."""
    if isinstance(scheme, Scheme) and has_float_offsets(scheme.weight):
        return SCHEMES["W4A16"] if scheme.weight.granularity == SCHEMES["W4A16"].weight.granularity else _without_recipe(scheme)
    return scheme


def _without_recipe(scheme: Scheme) -> Scheme:
    return Scheme.parse(scheme.text.replace("f", "").replace("z", ""))


def _report(choice: Choice) -> None:
    if choice.reasons:
        logger.warning(f"hf_fp8: not prepared for quantization-aware training: {by_reason(choice.reasons)}")


@torch.no_grad()
def convert_qat(model: nn.Module, *, backend: str | None = None, originals: str = "discard") -> nn.Module:
    """Quantize the layers that `prepare_qat` has prepared, in place: codes and scales are those of the last forward.

    Adapters are merged first. A transformers model is then saved as a checkpoint of compressed-tensors (`save_pretrained`),
    other models with `save_quantized`. Layers of "W4A16_FBGEMM" become Linears whose float weights are the quantized values, as
    no checkpoint of compressed-tensors can hold their float offsets: torchao packs them without another error.

    Args:
        backend: of the quantized layers; by default that of `prepare_qat`, so that outputs stay the same.
        originals: as in `quantize_model`.

    Returns `model` (or the new layer; without adapters, the model inside of a PeftModel). Raises ConfigError for a model
    without prepared layers; CalibrationError for a layer with static inputs that saw none in training; ScaleError for NaN or
    infinity.
    """
    if not any(isinstance(module, FakeQuantizedLinear) for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} has no layers that prepare_qat has prepared")
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()  # type: ignore[operator]
    modules = list(model.named_modules(remove_duplicate=False))
    layers = {name: module for name, module in modules if isinstance(module, FakeQuantizedLinear)}
    scales = _input_scales(layers)
    request, backends = next((layer.request, layer.backend) for layer in layers.values())
    made: dict[int, nn.Linear] = {}  # a shared layer stays shared
    for name, layer in layers.items():
        if id(layer) not in made:
            made[id(layer)] = layer.to_linear()
            if has_float_offsets(layer.scheme.weight):
                layer.weight.copy_(fake_quantized(layer.weight, layer.scheme.weight))
        model = replace_module(model, name, made[id(layer)])
    choose_fused_paths(model)
    if all(has_float_offsets(layer.scheme.weight) for layer in layers.values()):
        return model
    model = quantize_model(
        model, request.scheme, targets=request.targets, ignore=request.ignore, filter_fn=lambda name, _: name in layers,
        backend=backend or backends, experts="dequantize", originals=originals,
    )  # fmt: skip
    apply_scales(model, scales)
    return model


def _input_scales(layers: Mapping[str, FakeQuantizedLinear]) -> dict[str, torch.Tensor]:
    """Name -> static input scale."""
    static = {name: layer.input_scale() for name, layer in layers.items() if layer.input_amax is not None}
    if unseen := [name for name, scale in static.items() if scale is None]:
        raise CalibrationError(
            f"{first(unseen)} quantize their inputs with static scales, and have seen none in training: train the model in "
            "training mode (model.train()), or prepare it with a dynamic scheme, for example FP8_DYNAMIC"
        )
    return {name: scale for name, scale in static.items() if scale is not None}
