"""`quantize_model`: replaces the Linears of any PyTorch model by QuantizedLinears, one after the other."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoint.quantization_spec import QuantizationSpec
from ..errors import ConfigError, ScaleError, UnsupportedError, by_reason, reasons_of
from ..formats.scheme import Scheme
from ..integrations.config import FP8Config
from ..integrations.other_savers import guard_savers
from ..integrations.weight_readers import guard_readers
from ..nn.base import QuantizedModule
from ..nn.conv import QuantizedConv1x1
from ..nn.dtensors import is_dtensor
from ..nn.linear import ORIGINALS, QuantizedLinear, refuse_torn
from ..nn.packed_linear import linear_of
from ..nn.swap import choose_fused_paths, copy_hooks, let_siblings_share, replace_module
from .candidates import Choice, Filter, choose
from .transformers_model import attach_quantizer, fill_experts

logger = logging.getLogger(__name__)


@torch.inference_mode(False)  # the new parameters may be used in training later
@torch.no_grad()
def quantize_model(
    model: nn.Module,
    scheme: str | Scheme | Mapping[Any, Any] = "FP8_DYNAMIC",
    *,
    filter_fn: Filter | None = None,
    targets: str | Sequence[str] = ("Linear",),
    ignore: str | Sequence[str] | None = None,
    device: torch.device | str | None = None,
    inplace: bool = True,
    originals: str = "discard",
    conv1x1: bool = False,
    compute_dtype: torch.dtype | None = None,
    cast_output: bool = True,
    backend: str = "auto",
    experts: str = "auto",
    backward: str = "exact",
) -> nn.Module:
    """Replace the Linears of `model`, and the experts of a transformers MoE model, by FP8 (or int8) ones, layer by layer.

    Args:
        scheme, targets, ignore: as in `FP8Config`; int8 schemes as well ("INT8", "INT8_WEIGHT_ONLY").
        filter_fn: of the layers chosen by these, quantize only those for which it returns True for (name, module).
        device: where weights are quantized, one layer at a time; the results go to the device of the original weight.
        inplace: if False, change and return a copy; the weights of quantized layers are not copied.
        originals: "discard" the float weights, "keep" them next to the codes (the quantized values), or "offload" them to the
            CPU. With the last two, `requantize_model` quantizes again after an update of `layer.original` (before that, running
            and saving the layer raise StaleError), and `dequantize_model` restores them bit for bit. Experts keep none.
        conv1x1: also quantize convolutions with a kernel of size 1, which the target "Linear" matches, too.
        compute_dtype: cast inputs to it first (for a float32 model on a GPU whose kernels return 16 bits); None for no cast.
        cast_output: cast outputs back to the dtype of the input.
        backend, backward: see `FP8Config`. experts: "dequantize" leaves the experts of an MoE model dense.

    Layers that do not fit the scheme, subclasses of Linear, and modified layers stay dense, and the log says why. Shared layers
    and weights stay shared. On the meta device only the structure changes. A transformers model is then saved as a
    compressed-tensors checkpoint (`save_pretrained`), other models with `save_quantized`.

    Returns `model` (or the copy; or the new layer, if `model` is a Linear itself). Raises ConfigError if nothing in it can
    be quantized and for unknown options, ScaleError for experts that are not finite, UnsupportedError for a model that is
    sharded over processes; nothing is changed then.
    """
    if originals not in ORIGINALS:
        raise ConfigError(f"originals={originals!r}: it must be one of {', '.join(ORIGINALS)}")
    if device is not None and torch.device(device).type == "meta":
        raise ConfigError("device='meta': weights cannot be quantized there; build the model on meta to change its structure")
    refuse_sharded(model)
    config = FP8Config(backend=backend, experts=experts, backward=backward)
    config.spec = QuantizationSpec.asked(scheme, targets, ignore)
    how = {"device": device, "originals": originals, "backend": backend}
    settings = {"compute_dtype": compute_dtype, "cast_output": cast_output, "backward": backward}
    return quantize_chosen(model, choose(model, config, filter_fn, conv1x1), how, settings, inplace)


def quantize_chosen(
    model: nn.Module, choice: Choice, how: dict[str, Any], settings: dict[str, Any], inplace: bool = True
) -> nn.Module:
    """Quantize the layers of `choice`, as `quantize_model`.

    how: arguments for creating them ("device", "originals", "backend"). settings: attributes to set on them.
    """
    root = _replace(model, choice, how, settings, inplace)
    _finish(root, choice, how["device"])
    return root


def refuse_sharded(model: nn.Module) -> None:
    """Raise UnsupportedError, naming it, if a parameter is sharded over processes."""
    sharded = next((name for name, parameter in model.named_parameters() if is_dtensor(parameter)), None)
    if sharded is not None:
        raise UnsupportedError(
            f"{sharded} is sharded over processes, and its scales would be those of a part: quantize while loading "
            "(from_pretrained with quantization_config=FP8Config(scheme) and the distributed_config), or before sharding"
        )


def _replace(model: nn.Module, choice: Choice, how: dict[str, Any], settings: dict[str, Any], inplace: bool) -> nn.Module:
    """Replace the layers of `choice` by quantized ones; return the model, copy or layer that `quantize_model` returns."""
    made, by_weight = dict[int, nn.Module](), dict[tuple[int, Scheme], QuantizedLinear]()
    root = model
    for name, scheme in choice.layers.items():
        old = model.get_submodule(name)
        if isinstance(old, QuantizedModule):
            continue  # in a module that occurs twice in the model
        if id(old) not in made:
            try:
                new = _layer(old, scheme, by_weight, how)
            except ScaleError as error:
                choice.reasons[name] = str(error)
                continue
            for attribute, value in {**settings, "name_in_model": name}.items():
                setattr(new, attribute, value)
            made[id(old)] = new
        if inplace:
            root = replace_module(root, name, made[id(old)])
        del old  # free its weight before the next one is quantized
    if not made and choice.layers:
        raise ConfigError(f"no layer of {type(model).__name__} can be quantized ({reasons_of(choice.reasons)})")
    if not inplace:
        root = _copy(model, made)
        for name in choice.layers:
            if id(old := model.get_submodule(name)) in made:
                root = replace_module(root, name, made[id(old)])
    return root


@torch.inference_mode(False)
def requantize_model(model: nn.Module) -> nn.Module:
    """Quantize the kept float weights (`originals="keep"` or "offload") again, in place.

    Raises, before anything is changed: UnsupportedError for a layer whose original was not kept or has another shape, and for
    layers that share a weight but whose originals were changed to different values; ScaleError for NaN or infinity.
    """
    named = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    layers = list(named.values())
    refuse_torn(layers)
    for name, layer in named.items():
        if layer.original is not None and layer.original.shape != (layer.out_features, layer.in_features):
            raise UnsupportedError(
                f"the original of {name or 'the layer'} has shape {[*layer.original.shape]}, and must have "
                f"{[layer.out_features, layer.in_features]}"
            )
        if layer.original is not None and not layer.original.is_meta and not bool(layer.original.isfinite().all()):
            raise ScaleError(f"the original of {name or 'the layer'} has values that are NaN or infinite")
    done: dict[int, QuantizedLinear] = {}
    keep: list[torch.Tensor] = []  # so that no id is reused
    # Layers without an original come first, and raise; of layers that share codes, the one with a changed original comes first.
    for layer in sorted(layers, key=lambda layer: (layer.original is not None, not layer.is_stale)):
        before = layer.coded
        twin = done.setdefault(id(before), layer)
        if twin is layer:
            layer.requantize()
        else:
            layer.share_weight(twin)
        keep.append(before)
    return model


def _layer(
    old: nn.Module, scheme: Scheme, by_weight: dict[tuple[int, Scheme], QuantizedLinear], how: dict[str, Any]
) -> QuantizedLinear:
    kind = linear_of(scheme) if isinstance(old, nn.Linear) else QuantizedConv1x1
    twin = by_weight.get((id(old.weight), scheme))
    if twin is None:
        new = by_weight[id(old.weight), scheme] = kind.from_linear(old, scheme, **how)
    else:
        new = kind.like(old, scheme, backend=how["backend"])
        new.share_weight(twin)
    copy_hooks(old, new)
    return new


def _copy(model: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A copy of `model` with the new layers in `made` (by id of the old one); only unchanged parts are copied."""
    memo: dict[int, Any] = {}
    for new in made.values():
        for held in new.of_codes():  # type: ignore[operator]
            memo[id(held)] = held  # created for the copy: not copied again
    for old, new in made.items():
        memo[old] = copy.deepcopy(new, memo)  # biases, kept originals
        made[old] = memo[old]
    return copy.deepcopy(model, memo)


def _finish(root: nn.Module, choice: Choice, device: torch.device | str | None) -> None:
    for path, quantizer in choice.quantizers.items():
        part: Any = root.get_submodule(path)
        for plan in quantizer.layout.experts.values() if quantizer.layout is not None else ():
            fill_experts(part, plan, backend=quantizer.quantization_config.backend, device=device)
        attach_quantizer(part, quantizer)
    let_siblings_share(root)
    choose_fused_paths(root)
    guard_savers(root)
    guard_readers(root)
    if choice.reasons:
        logger.warning(f"hf_fp8: not quantized: {by_reason(choice.reasons)}")
