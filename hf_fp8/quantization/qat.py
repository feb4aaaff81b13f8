"""Quantization-aware training: `prepare_qat` makes Linears compute as they will when quantized, `convert_qat` quantizes them.

In between, the model is trained as any other: its parameters are the float ones, with the same names. See
`nn.fake_quantized.FakeQuantizedLinear`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..checkpoint.quantization_spec import QuantizationSpec
from ..errors import CalibrationError, ConfigError, ScaleError, UnsupportedError, by_reason, first, reasons_of
from ..formats.scheme import SCHEMES, W4A16_FBGEMM, Scheme, scheme_named
from ..integrations.config import FP8Config
from ..integrations.peft.qat import base_of, refuse_what_cannot_be_merged, trained_weights, with_adapters, without_adapters
from ..loading.layout import ExpertsPlan
from ..nn.fake_quantized import FakeQuantizedLinear, fake_quantized, has_float_offsets
from ..nn.fake_quantized_experts import FakeQuantizedExperts, Prepared, prepared, why_not
from ..nn.linear import ORIGINALS
from ..nn.swap import choose_fused_paths, copy_hooks, replace_module
from .calibration import apply_scales
from .candidates import Choice, Filter, choose
from .model import quantize_chosen, refuse_sharded
from .transformers_model import transformers_models

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
    experts: str = "auto",
) -> nn.Module:
    """Replace the Linears of `model`, and the experts of a transformers MoE model, in place, for training before quantizing.

    By FakeQuantizedLinears and FakeQuantizedExperts: the same layers that `quantize_model` would quantize with these arguments;
    the log names those that it could not. Parameters stay the same objects, so an optimizer may be made before or after.
    Adapters (LoRA) are added afterwards: then the weight with the adapters merged into it is quantized in each forward.

    Args:
        scheme: any of `SCHEMES`, a Scheme or a dict, as in `quantize_model`; and "W4A16_FBGEMM", the numerics of FBGEMM's int4
            kernel for inputs in bfloat16. Static input scales ("FP8") are moving averages over the inputs in training.
        filter_fn, targets, ignore: as in `quantize_model`.
        backend: which kernels train and run: "scaled_mm" quantizes inputs as the scheme says, on every device.
        experts: "dequantize" leaves the experts of an MoE model as they are. So do schemes with static input scales.

    Returns `model` (or the new layer, if `model` is a Linear itself). Raises ConfigError if nothing in it can be quantized;
    UnsupportedError for a model that is quantized, prepared or has adapters already.
    """
    if prepared(model):
        raise UnsupportedError(f"{type(model).__name__} is prepared already: call convert_qat first")
    config = FP8Config(backend=backend, experts=experts)
    known = {**SCHEMES, **TRAINING_ONLY}
    asked = scheme if isinstance(scheme, Mapping) else scheme_named(scheme, known)
    if isinstance(asked, Mapping):
        _refuse_float_offsets(asked)
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
    model = _prepare_experts(model, choice, request, backend)
    if not prepared(model):
        raise ConfigError(f"no layer of {type(model).__name__} can be prepared ({reasons_of(choice.reasons)})")
    choose_fused_paths(model)
    _report(choice)
    return model


def _prepare_experts(model: nn.Module, choice: Choice, request: Request, backend: str) -> nn.Module:
    """Replace the experts of `choice`; those that cannot be trained for their scheme are added to its reasons."""
    asked = request.scheme
    for name, plan in _plans(choice).items():
        schemes = [asked] if isinstance(asked, Scheme) else [stack.projection.scheme for stack in plan.stacks]
        if (reason := next(filter(None, map(why_not, schemes)), None)) is not None:
            choice.reasons[name] = reason
            continue
        old = model.get_submodule(name)
        new = FakeQuantizedExperts(
            old, plan.first.projection, plan.second.projection,
            interleaved=plan.interleaved, backend=backend, name=name,
        )  # fmt: skip
        new.request = request
        model = replace_module(model, name, new)
    return model


def _plans(choice: Choice) -> dict[str, ExpertsPlan]:
    """Name of an experts module -> how it would be quantized."""
    found = {}
    for path, quantizer in choice.quantizers.items():
        for name, plan in quantizer.layout.experts.items() if quantizer.layout is not None else ():
            found[f"{path}.{name}" if path else name] = plan
    return found


def _storable(scheme: str | Scheme | Mapping[Any, Any]) -> str | Scheme | Mapping[Any, Any]:
    """A scheme that a config can describe, with the same groups: it chooses the layers."""
    if isinstance(scheme, Scheme) and has_float_offsets(scheme.weight):
        return SCHEMES["W4A16"] if scheme.weight.granularity == SCHEMES["W4A16"].weight.granularity else _without_recipe(scheme)
    return scheme


def _without_recipe(scheme: Scheme) -> Scheme:
    return Scheme.parse(scheme.text.replace("f", "").replace("z", ""))


def _refuse_float_offsets(groups: Mapping[Any, Any]) -> None:
    for key in groups:
        float_offsets = isinstance(key, Scheme) and has_float_offsets(key.weight)
        if float_offsets or (isinstance(key, str) and key.upper() in TRAINING_ONLY):
            raise UnsupportedError(
                "W4A16_FBGEMM cannot be one scheme of several: its layers become float Linears, which no checkpoint's config "
                "describes. Prepare its layers by themselves, with prepare_qat(model, 'W4A16_FBGEMM', targets=[...])"
            )


def _report(choice: Choice) -> None:
    if choice.reasons:
        logger.warning(f"hf_fp8: not prepared for quantization-aware training: {by_reason(choice.reasons)}")


@torch.inference_mode(False)
@torch.no_grad()
def convert_qat(model: nn.Module, *, backend: str | None = None, originals: str = "discard") -> nn.Module:
    """Quantize the layers that `prepare_qat` has prepared, in place: codes and scales are those of the last forward.

    Adapters are merged first, however they were added, as far as they are active in a forward. A transformers model is saved as
    a checkpoint of compressed-tensors then (`save_pretrained`), other models with `save_quantized`. Layers of "W4A16_FBGEMM"
    become Linears whose float weights are the quantized values, as no checkpoint of compressed-tensors can hold their float
    offsets: torchao packs them without another error.

    Args:
        backend: of the quantized layers; by default that of `prepare_qat`, so that outputs stay the same.
        originals: as in `quantize_model`.

    Returns `model` (or the new layer; without adapters, the model inside of a PeftModel). Raises ConfigError for a model
    without prepared layers; CalibrationError for a layer with static inputs that saw none in training; ScaleError for a weight
    with NaN or infinity; UnsupportedError for a layer that was changed since so that it would not compute the same. Layers stay
    prepared then.
    """
    if originals not in ORIGINALS:
        raise ConfigError(f"originals={originals!r}: it must be one of {', '.join(ORIGINALS)}")
    FP8Config(backend=backend or "auto")  # raises for unknown ones
    outer = with_adapters(model)
    if not outer:
        raise ConfigError(
            f"{type(model).__name__} has no layers that prepare_qat has prepared: call it first, and train. convert_qat "
            "may have converted them already"
        )
    refuse_sharded(model)
    refuse_what_cannot_be_merged(model)
    _input_scales({name: base_of(layer) for name, layer in outer.items()})
    floats = {id(layer): _float(name, layer) for name, layer in outer.items()}  # a shared layer stays shared
    became = {id(floats[id(layer)]): base_of(layer) for layer in outer.values()}
    result = without_adapters(_swap(model, outer, floats))
    modules = result.named_modules(remove_duplicate=False)
    layers = {name: became[id(module)] for name, module in modules if id(module) in became}
    stay = {name: layer for name, layer in layers.items() if has_float_offsets(layer.schemes[0].weight)}
    kept = {name: layer for name, layer in layers.items() if name not in stay}
    try:
        if stay:
            _choice(result, stay, backend)
        choice = _choice(result, kept, backend) if kept else None
    except (ConfigError, ScaleError, UnsupportedError):
        _swap(model, outer, {id(layer): layer for layer in outer.values()})
        raise
    return _quantize(result, choice, stay, kept, backend, originals)


def _float(name: str, layer: nn.Module) -> nn.Module:
    """The float module of a prepared layer, with its adapters merged. Raises for one that cannot be quantized."""
    weights = trained_weights(layer)
    _refuse_unfit(name, base_of(layer), weights)
    found: nn.Module = base_of(layer).to_float(weights)
    return found


def _quantize(
    model: nn.Module,
    choice: Choice | None,
    stay: Mapping[str, Prepared],
    kept: Mapping[str, Prepared],
    backend: str | None,
    originals: str,
) -> nn.Module:
    """Quantize float modules in the place of prepared layers; those that `stay` get the quantized values."""
    scales = _input_scales(kept)
    for name, layer in {id(model.get_submodule(name)): (name, layer) for name, layer in stay.items()}.values():
        weight: Any = model.get_submodule(name).weight
        weight.copy_(fake_quantized(weight, layer.schemes[0].weight))
    if choice is not None:
        model = quantize_chosen(model, choice, {"device": None, "originals": originals, "backend": "auto"}, {})
    for name, layer in kept.items():
        model.get_submodule(name).backend = backend or layer.backend  # type: ignore[assignment]
    apply_scales(model, scales)
    return model


def _swap(model: nn.Module, layers: Mapping[str, nn.Module], by_layer: Mapping[int, nn.Module]) -> nn.Module:
    for name, layer in layers.items():
        model = replace_module(model, name, by_layer[id(layer)])
    choose_fused_paths(model)
    return model


def _refuse_unfit(name: str, layer: Prepared, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise for a layer whose quantized values would not be those it was trained with. weights: those with adapters merged."""
    called, is_linear = name or "the layer", isinstance(layer, FakeQuantizedLinear)
    if is_parametrized(layer) or (is_linear and (set(layer._parameters) != {"weight", "bias"} or layer._modules)):
        raise UnsupportedError(f"{called} was changed after prepare_qat, for example by a weight norm or pruning: undo that")
    if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):
        raise UnsupportedError(f"{called} had its forward replaced after prepare_qat, which would be lost: undo that")
    try:
        layer.refuse_non_finite(weights)
    except ScaleError as error:
        raise ScaleError(f"{called} cannot be quantized: {error}") from error


def _choice(model: nn.Module, layers: Mapping[str, Prepared], backend: str | None) -> Choice:
    """The choice that gives each of `layers`, now float modules of `model`, its own scheme.

    By the request that they were prepared with, if there is one and it still chooses them (it reads as the user wrote it in
    the checkpoint); else by their names. Raises UnsupportedError if one cannot be quantized any more.
    """
    wanted = {id(model.get_submodule(name)): tuple(map(_storable, layer.schemes)) for name, layer in layers.items()}
    called = {id(model.get_submodule(name)): name for name in layers}
    one = next(iter(layers.values()))
    asked = one.request
    for request in (Request(_storable(asked.scheme), asked.targets, asked.ignore), _by_name(model, layers)):
        config, reasons = FP8Config(backend=backend or one.backend), {}
        config.spec = QuantizationSpec.asked(request.scheme, request.targets, request.ignore)
        try:
            choice = choose(model, config, lambda _, module: id(module) in wanted, False)
        except ConfigError as error:
            reasons = {"": str(error)}
            continue
        reasons = choice.reasons
        schemes = {name: (scheme,) for name, scheme in choice.layers.items()}
        stacks = {name: tuple(s.projection.scheme for s in plan.stacks) for name, plan in _plans(choice).items()}
        if wanted == {id(model.get_submodule(name)): found for name, found in {**schemes, **stacks}.items()}:
            return choice
    why = reasons_of(reasons) or "here they would not be chosen; convert the model that was prepared, not a part of it"
    raise UnsupportedError(
        f"{first(list(called.values()))} cannot be quantized as in training, and nothing was converted: {why}"
    )


def _by_name(model: nn.Module, layers: Mapping[str, Prepared]) -> Request:
    """Layers by their names, also those within transformers models in `model`, whose configs they are written to."""
    paths = [path for path, _ in transformers_models(model) if path]
    schemes: dict[Scheme, list[str]] = {}
    for name, layer in layers.items():
        names = [name, *(name.removeprefix(f"{path}.") for path in paths if name.startswith(f"{path}."))]
        if isinstance(layer, FakeQuantizedExperts):  # whose matrices have names of their own in files
            names += [rf"re:{re.escape(one)}\..*" for one in names]
        scheme = _storable(layer.schemes[0])
        assert isinstance(scheme, Scheme)
        schemes.setdefault(scheme, []).extend(names)
    return Request(schemes, ("Linear",), ())


def _input_scales(layers: Mapping[str, Prepared]) -> dict[str, torch.Tensor]:
    """Name -> static input scale."""
    linears = {name: layer for name, layer in layers.items() if isinstance(layer, FakeQuantizedLinear)}
    static = {name: layer.input_scale() for name, layer in linears.items() if layer.input_amax is not None}
    if unseen := [name for name, scale in static.items() if scale is None]:
        raise CalibrationError(
            f"{first(unseen)} quantize their inputs with static scales, and have seen none in training: train the model in "
            "training mode (model.train()), or prepare it with a dynamic scheme, for example FP8_DYNAMIC"
        )
    return {name: scale for name, scale in static.items() if scale is not None}
