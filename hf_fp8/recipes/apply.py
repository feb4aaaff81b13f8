"""`quantize_` with torchao's arguments, and the functions that belong to it; each is `quantize_model` with other words."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import ConfigError, UnsupportedError, first
from ..formats.scheme import Scheme
from ..nn.base import QuantizedModule
from ..nn.conv import Convolution
from ..nn.linear import QuantizedLinear
from ..quantization.calibration import apply_scales
from ..quantization.candidates import Filter
from ..quantization.model import quantize_model
from . import observing, training
from .by_name import AS_LINEAR, DEFAULT, keys_of_layers, table_of
from .fields import Elsewhere, Recipe
from .names import BY_NAME, RECIPES, TRAINING, in_torchao, is_of_torchao, recipe, recipe_of

logger = logging.getLogger(__name__)
TheirFilter = Callable[[nn.Module, str], bool]


def quantized_linears(
    model: nn.Module, scheme: str | Scheme | Mapping[Any, Any], wanted: Filter | None, **options: Any
) -> tuple[nn.Module, dict[str, QuantizedLinear]]:
    """Quantize Linears of `model`, and convolutions that were chosen for that, and no experts.

    Returns what `quantize_model` returns, and the new layers by name.
    """
    held = {name for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    convolutions = any(getattr(module, AS_LINEAR, False) for module in model.modules())

    def chosen(name: str, module: nn.Module) -> bool:
        is_layer = isinstance(module, nn.Linear) or bool(getattr(module, AS_LINEAR, False))
        return is_layer and (wanted is None or wanted(name, module))

    quantized = quantize_model(model, scheme, filter_fn=chosen, conv1x1=convolutions, **options)
    layers = ((name, module) for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear))
    return quantized, {name: layer for name, layer in layers if name not in held}


def quantize_(
    model: nn.Module,
    config: Any,
    filter_fn: TheirFilter | None = None,
    device: torch.device | str | int | None = None,
) -> None:
    """`quantize_model(model, config.scheme)`, in place, with torchao's order of arguments.

    config: a recipe, its name, or a config object of torchao; `FqnToConfig` with such configs by name; or a config of training
    (`QATConfig`). torchao's own objects that hf_fp8 has no recipe for (`names.DELEGATED`), or whose weights have other numbers
    of bits, are passed on to torchao's `quantize_`, and the log says so; torchao is never imported.
    filter_fn: called with (module, name), as in torchao, not (name, module); by default all Linears. Layers that
    `quantize_model` does not quantize stay dense, whatever it returns, and are logged; merged experts and other weights with
    three dimensions stay dense, too. device: Linears are quantized there one by one, and then all of `model` is moved there;
    torchao moves each module first.

    Raises ConfigError if `config` is not a recipe or no layer is quantized, UnsupportedError if `model` is a Linear itself, or
    for values of fields with a meaning that hf_fp8 does not support.
    """
    there = None if device is None else torch.device(device)
    if type(config).__name__ in BY_NAME:
        if filter_fn is not None:
            raise ConfigError("filter_fn and FqnToConfig are both given: leave filter_fn out, and give names a config or None")
        _by_name(model, config, there)
    elif type(config).__name__ in TRAINING:
        _refuse_itself(model)
        training.train(model, config, None if filter_fn is None else _turned(filter_fn))
    else:
        made = _recipe_or_torchao(config)
        if made is None:
            return _delegate(model, config, filter_fn, device)
        _refuse_itself(model)
        _apply(model, made, filter_fn, there)
    if there is not None:
        model.to(there)


def _turned(filter_fn: TheirFilter) -> Filter:
    return lambda name, module: filter_fn(module, name)


def _refuse_itself(model: nn.Module) -> None:
    if isinstance(model, nn.Linear) and not isinstance(model, QuantizedModule):
        raise UnsupportedError("a Linear cannot be replaced in place: use the layer that quantize_model(model, ...) returns")


def _recipe_or_torchao(config: Any) -> Recipe | None:
    """The recipe for a config or its name; None if torchao is to run it."""
    try:
        made = recipe(config) if isinstance(config, str) else recipe_of(config)
    except Elsewhere:
        if not (is_of_torchao(config) or (isinstance(config, str) and in_torchao(config) is not None)):
            raise
        return None
    if made is None and not is_of_torchao(config):
        raise ConfigError(f"config is a {type(config).__name__}: must be one of {', '.join(RECIPES)} of hf_fp8, or its name")
    return made


def _delegate(model: nn.Module, config: Any, filter_fn: TheirFilter | None, device: Any) -> None:
    """torchao's `quantize_`, of a torchao that somebody has imported."""
    if isinstance(config, str):
        config = in_torchao(config)()
    logger.warning(
        f"hf_fp8: {type(config).__name__} is passed on to torchao: its layers are torchao's, and hf_fp8 does not save them"
    )
    options = {} if filter_fn is None else {"filter_fn": filter_fn}
    sys.modules["torchao.quantization"].quantize_(model, config, device=device, **options)


def _apply(model: nn.Module, made: Recipe, filter_fn: TheirFilter | None, there: torch.device | None) -> None:
    """Quantize with one recipe, or do one of its steps."""
    if made.step == "convert":
        if filter_fn is not None:
            logger.info('hf_fp8: filter_fn is not called with step="convert": all layers that were prepared are converted')
        return observing.convert(model, made.scheme)
    if made.step == "prepare":
        observing.refuse_twice(model)
    wanted = None if filter_fn is None else _turned(filter_fn)
    _, layers = quantized_linears(model, made.scheme, wanted, device=there, experts="dequantize")
    _settle(model, dict.fromkeys(layers, made), layers)
    if made.step == "prepare":
        observing.prepare(model, made.scheme, layers)
    _name_stacks(model)


def _settle(model: nn.Module, recipes: Mapping[str, Recipe], layers: Mapping[str, QuantizedLinear]) -> None:
    """Give new layers the backend and the input scale of their recipes."""
    for name, layer in layers.items():
        layer.backend = recipes[name].backend
    scales = {name: made.input_scale for name in layers if (made := recipes[name]).input_scale is not None}
    apply_scales(model, {name: scale for name, scale in scales.items() if scale is not None})


def _by_name(model: nn.Module, config: Any, there: torch.device | None) -> None:
    """Quantize with a config for each name, in one call, so that a transformers model is saved with all of them."""
    _refuse_itself(model)
    table = table_of(config)
    keys = keys_of_layers(model, table)
    made: dict[str, Recipe | None] = {}
    for key in dict.fromkeys(keys.values()):
        if type(table[key]).__name__ in (*BY_NAME, *TRAINING):
            raise UnsupportedError(f"{key!r} has a {type(table[key]).__name__}: hf_fp8 supports recipes and None by name")
        made[key] = found = _recipe_or_torchao(table[key])
        if found is not None and found.step is not None:
            raise UnsupportedError(f"{key!r}: step={found.step!r} by name is not supported; use a filter_fn instead")
    ours = {name: found for name, key in keys.items() if (found := made[key]) is not None}
    targets: dict[Scheme, list[str]] = {}
    for name, found in ours.items():
        # By class, output embeddings and routers stay dense; by name they are quantized.
        target = "Linear" if keys[name] == DEFAULT else name
        listed = targets.setdefault(found.scheme, [])
        if target not in listed:
            listed.append(target)
    if ours:
        wanted = ours.keys()
        _, layers = quantized_linears(model, targets, lambda name, _: name in wanted, device=there, experts="dequantize")
        _settle(model, ours, layers)
    for key in (key for key, found in made.items() if found is None):
        names = {name for name, own in keys.items() if own == key}
        _delegate(model, table[key], lambda _, name, names=names: name in names, there)  # type: ignore[misc]
    if not made:
        raise ConfigError(f"no Linear of {type(model).__name__} has a config by name: {first(list(table))}")
    _name_stacks(model)


def _name_stacks(model: nn.Module) -> None:
    """Log the weights with three dimensions, which torchao quantizes if a filter or a name chooses them."""
    stacks = [
        f"{name}.{leaf}".lstrip(".")
        for name, module in model.named_modules()
        if not isinstance(module, (QuantizedModule, _ConvNd))
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.is_floating_point()
    ]
    if stacks:
        logger.warning(
            f"hf_fp8: weights with three dimensions stay dense: {first(stacks)}. For experts of a transformers model use "
            "hf_fp8.quantize_model(model, scheme), which quantizes them, too"
        )


def swap_conv2d_1x1_to_linear(model: nn.Module, filter_fn: Callable[..., bool] | None = None) -> None:
    """Let `quantize_` quantize 1x1 convolutions of `model`, too (`quantize_model(conv1x1=True)`); the convolutions stay.

    filter_fn: called with (module, name); by default all Conv2d with a kernel of size 1. `quantize_`, too, calls its filter
    with the convolution and its name, while torchao has a Linear called "mod" in its place.
    """
    for name, module in model.named_modules():
        is_pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        if is_pointwise if filter_fn is None else filter_fn(module, name):
            if not isinstance(module, Convolution):
                raise ConfigError(f"filter_fn chooses {name}, a {type(module).__name__}: it must choose convolutions")
            setattr(module, AS_LINEAR, True)


def insert_observers_(
    model: nn.Module, input_observer: Any, weight_observer: Any = None, *, filter_fn: TheirFilter | None = None
) -> None:
    """Quantize Linears with a static scheme, and observe their inputs until `quantize_` with `step="convert"`; in place.

    The same as `quantize_` with a static recipe and `step="prepare"`, or as a block of `hf_fp8.calibrate`; weights are
    quantized here already, while torchao observes a float model.

    input_observer: torchao's AffineQuantizedMinMaxObserver ("amax" of `calibrate`) or AffineQuantizedMSEObserver ("mse"), or
    what its `with_args` returns; per tensor, symmetric, for torch.float8_e4m3fn or torch.int8. weight_observer: its
    granularity is that of weights. filter_fn: as in `quantize_`. Raises UnsupportedError for other observers.
    """
    _refuse_itself(model)
    observing.refuse_twice(model)
    scheme, name = observing.observed_scheme(input_observer, weight_observer)
    wanted = None if filter_fn is None else _turned(filter_fn)
    _, layers = quantized_linears(model, scheme, wanted, experts="dequantize")
    observing.prepare(model, scheme, layers, name)
