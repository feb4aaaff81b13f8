"""Replacing a Linear or an experts module by an empty FP8 module, and back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from torch import nn

from ..formats.scheme import Scheme
from .base import QuantizedModule, foreign_attributes, is_ours
from .dense import release
from .experts import QuantizedExperts
from .experts_layout import Projection
from .linear import QuantizedLinear, refuse_torn
from .packed_linear import linear_of

# Attributes in which nn.Module stores hooks and flags of hooks.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_is_full_backward_hook",
)  # fmt: skip
# (class, attribute, value that disables its fused path)
_FUSED: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def swap_linear(
    model: nn.Module,
    name: str,
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype,
    input_scale_dtype: torch.dtype | None,
    backend: str,
) -> QuantizedLinear:
    """Replace the `nn.Linear` called `name` by an empty QuantizedLinear on the meta device."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = linear_of(scheme)(
        old.in_features,
        old.out_features,
        scheme,
        bias=old.bias is not None,
        bias_dtype=old.weight.dtype if old.bias is None else old.bias.dtype,
        scale_dtype=scale_dtype,
        input_scale_dtype=input_scale_dtype,
        backend=backend,
        device="meta",
    )
    new.train(old.training)
    new.name_in_model = name
    model.set_submodule(name, new)
    return new


def untie(model: Any, weight: str) -> None:
    """Untie `weight` of a transformers model, as `tie_weights()` would overwrite it (codes with values)."""
    if weight in model.all_tied_weights_keys:
        del model.all_tied_weights_keys[weight]
        if model.get_output_embeddings() is not model.get_submodule(weight.rpartition(".")[0]):
            return
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def untie_what_differs(model: Any) -> None:
    """Untie parameters for which the files have separate tensors, although the model class ties them.

    A later `tie_weights()`, which evaluation harnesses call, would replace one by the other.
    """
    held = dict(model.named_parameters(remove_duplicate=False))
    # The pairs that `tie_weights()` finds: loading only removes pairs that the files fill from `all_tied_weights_keys`.
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if target in held and source in held and held[target] is not held[source]:
            model.all_tied_weights_keys.setdefault(target, source)
            untie(model, target)


def swap_experts(
    model: nn.Module,
    name: str,
    first: Projection,
    second: Projection,
    *,
    interleaved: bool,
    scale_dtypes: dict[str, torch.dtype],
    backend: str,
) -> QuantizedExperts:
    """Replace the experts module of transformers called `name` by empty QuantizedExperts on the meta device."""
    new = QuantizedExperts(
        model.get_submodule(name), first, second,
        interleaved=interleaved, scale_dtypes=scale_dtypes, backend=backend, device="meta",
    )  # fmt: skip
    new.name_in_model = name
    model.set_submodule(name, new)
    return new


def let_siblings_share(model: nn.Module) -> None:
    """Mark QuantizedLinears that may receive the same input, so that it is quantized once (`shared_input`).

    They are children of one parent with the same in_features and input scheme (q, k and v; gate and up).
    """
    for name, parent in model.named_modules():
        layers = [layer for layer in parent.children() if isinstance(layer, QuantizedLinear)]
        alike = Counter((layer.in_features, layer.scheme.input) for layer in layers)
        for layer in layers:
            shares = layer.scheme.input is not None and alike[layer.in_features, layer.scheme.input] > 1
            layer.shares_input = name if shares else None


def dequantize_model(model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
    """Replace every QuantizedLinear and QuantizedExperts of `model` by its float module with dequantized weights, in place.

    dtype: of the new weights and biases; by default that of the model's dense parameters (if there are none, that of the
    original weights, else bfloat16), and layers that kept their float weights (`quantize_model(originals=...)`) get exactly
    those back. Only one layer at a time is in memory twice. Returns `model` (or, if `model` is itself a quantized layer, the
    new layer). A transformers model that was loaded in FP8 is also marked as dense, so that it is saved as such; this is the
    same as `model.dequantize()`.

    Raises UnsupportedError, before anything is changed, if a layer is offloaded.
    """
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        dequantized: nn.Module = quantizer.dequantize(model, dtype=dtype)
        return dequantized
    for module in list(model.modules()):
        if module is not model and getattr(module, "hf_quantizer", None) is not None:
            dequantize_model(module, dtype)  # a transformers model inside another module
    return swap_back(model, dtype)


@torch.inference_mode(False)  # the new parameters may be trained
@torch.no_grad()
def swap_back(model: nn.Module, dtype: torch.dtype | str | None = None, default: torch.dtype | None = None) -> nn.Module:
    """`dequantize_model` without updating transformers' state.

    default: the dtype of layers of which it is not known in which dtype they were, if none is given.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    asked: torch.dtype | None = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if default is None:
        frozen = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
        dense = (p.dtype for p in model.parameters() if id(p) not in frozen and p.is_floating_point())
        default = next(dense, torch.bfloat16)

    def dense_of(layer: QuantizedModule) -> nn.Module:
        original = getattr(layer, "original", None)
        own = layer.original_dtype if original is None else original.dtype
        new = layer.to_dense(asked or own or default)
        if isinstance(layer, QuantizedLinear):
            layer.original = None  # `new` has a copy of it
            if (bias := layer.bias) is not None and not bias.is_inference() and (asked is None or bias.dtype == asked):
                new.bias = bias  # it was never quantized, and others may share it
        copy_hooks(layer, new)
        return new

    for layer in layers:
        if layer.is_offloaded:
            layer.to_dense(default)  # raises
    linears = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    refuse_torn(linears)
    changed = {id(layer) for layer in linears if layer.is_stale}
    made: dict[int, nn.Module] = {}  # a shared module stays shared
    weights: dict[int, nn.Parameter] = {}  # and so does a shared weight
    modules = list(model.named_modules(remove_duplicate=False))
    # Changed originals first: all layers that share the weight get the changed one.
    for name, module in sorted(modules, key=lambda found: id(found[1]) not in changed):
        if isinstance(module, QuantizedModule):
            if id(module) not in made:
                made[id(module)] = new = dense_of(module)
                if isinstance(module, QuantizedLinear):
                    new.weight = weights.setdefault(id(module.coded), new.weight)  # type: ignore[arg-type]
            model = replace_module(model, name, made[id(module)])
    choose_fused_paths(model)
    release(model)
    return model


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Replace the module called `name` by `new`. Returns `model`, or `new` if `name` is empty (the model itself)."""
    if not name:
        return new
    model.set_submodule(name, new)
    return model


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """The module called `name` (the model itself if it is empty), None if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def choose_fused_paths(model: nn.Module) -> None:
    """Disable the fused paths of torch's encoder, which do not call its Linears, where those are ours; else undo that.

    In torch.nn.modules.transformer, an activation of 0 means that no fused kernel exists.
    """
    for module in model.modules():
        for kind, name, off in _FUSED:
            if not isinstance(module, kind):
                continue
            before = f"_hf_fp8_{name}"
            if any(map(is_ours, module.modules())):
                vars(module).setdefault(before, getattr(module, name))
                setattr(module, name, off)
            elif before in vars(module):
                setattr(module, name, vars(module).pop(before))


def copy_hooks(old: nn.Module, new: nn.Module) -> None:
    """Copy from `old` to `new`: user attributes, hooks, and accelerate's hook, which moves inputs to the device."""
    for name in (foreign := foreign_attributes(old)):
        setattr(new, name, getattr(old, name))
    if is_ours(new):
        new.foreign = foreign  # type: ignore[assignment]
    share_hooks(old, new)


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the hooks of `old`."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))  # the same dicts, as hook handles remove from them
    if (hook := getattr(old, "_hf_hook", None)) is not None:
        add_hook_to_module(new, hook)
