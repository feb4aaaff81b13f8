"""Swapping modules: a Linear or experts for the FP8 module that awaits its tensors, and back."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from torch import nn

from ..formats.scheme import Scheme
from .base import QuantizedModule, foreign_attributes
from .experts import Projection, QuantizedExperts
from .linear import QuantizedLinear, refuse_torn

# Where a module keeps hooks, and what is said of some of them.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_is_full_backward_hook",
)  # fmt: skip
# (class, attribute, its value without a fused path)
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
    """Put an empty QuantizedLinear on the meta device in the place of the `nn.Linear` called `name`."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = QuantizedLinear(
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
    """Let a weight of a transformers model be its own: tying would overwrite it, codes with values."""
    if weight in model.all_tied_weights_keys:
        del model.all_tied_weights_keys[weight]
        if model.get_output_embeddings() is not model.get_submodule(weight.rpartition(".")[0]):
            return
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def untie_what_differs(model: Any) -> None:
    """Parameters that the files fill by themselves, beside those that the class would tie them to, stay their own:
    `tie_weights()`, which evaluation harnesses call, would make them one."""
    held = dict(model.named_parameters(remove_duplicate=False))
    # As `tie_weights()` finds them: loading leaves out of `all_tied_weights_keys` what the files fill, and changes no more.
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
    """Put empty QuantizedExperts on the meta device in the place of the host's experts module called `name`."""
    new = QuantizedExperts(
        model.get_submodule(name), first, second,
        interleaved=interleaved, scale_dtypes=scale_dtypes, backend=backend, device="meta",
    )  # fmt: skip
    new.name_in_model = name
    model.set_submodule(name, new)
    return new


def let_siblings_share(model: nn.Module) -> None:
    """Tell QuantizedLinears of one parent with the same in_features and input scheme (q, k and v; gate and up) of each other.

    They are the ones that may quantize an input once for all (`shared_input`).
    """
    for name, parent in model.named_modules():
        layers = [layer for layer in parent.children() if isinstance(layer, QuantizedLinear)]
        for layer in layers:
            family = [
                other for other in layers if (other.in_features, other.scheme.input) == (layer.in_features, layer.scheme.input)
            ]
            layer.shares_input = name if len(family) > 1 and layer.scheme.input is not None else None


def dequantize_model(model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
    """Replace every QuantizedLinear and QuantizedExperts of `model` by what it stands for, weights multiplied out, in place.

    dtype: of the new weights and biases; by default that of the model's dense parameters (without
    any, what the layers were made of, else bfloat16), and layers that kept their float weights
    (`quantize_model(originals=...)`) get those back, to the bit. One layer is held twice at a time,
    never the model. Returns `model` (or, if `model` is such a layer itself, the new layer). A
    transformers model that was loaded in FP8 is also told that it is dense now, so that it saves as
    such: it is the same as `model.dequantize()`.

    Raises UnsupportedError, before anything is changed, if a layer is offloaded.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        dequantize: Any = model.dequantize
        dequantized: nn.Module = dequantize(dtype)
        return dequantized
    for module in list(model.modules()):
        if module is not model and getattr(module, "hf_quantizer", None) is not None:
            dequantize_model(module, dtype)  # a transformers model in one of another kind
    return swap_back(model, dtype)


@torch.inference_mode(False)  # what is made here may be trained
@torch.no_grad()
def swap_back(model: nn.Module, dtype: torch.dtype | str | None = None, default: torch.dtype | None = None) -> nn.Module:
    """`dequantize_model`, without a word to transformers. default: the dtype where none is given and none was kept."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    asked: torch.dtype | None = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if default is None:
        frozen = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
        dense = (p.dtype for p in model.parameters() if id(p) not in frozen and p.is_floating_point())
        original_dtype = next((layer.original_dtype for layer in layers if layer.original_dtype), torch.bfloat16)
        default = next(dense, original_dtype)

    def dense_of(layer: QuantizedModule) -> nn.Module:
        original = getattr(layer, "original", None)
        new = layer.to_dense(asked or (default if original is None else original.dtype))
        if isinstance(layer, QuantizedLinear):
            layer.original = None  # of which `new` has a copy
        copy_hooks(layer, new)
        return new

    for layer in layers:
        if layer.is_offloaded:
            layer.to_dense(default)  # raises
    linears = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    refuse_torn(linears)
    changed = {id(layer) for layer in linears if layer.is_stale}
    made: dict[int, nn.Module] = {}  # a module that sits in two places stays one module
    weights: dict[int, nn.Parameter] = {}  # and a weight of two modules one weight
    modules = list(model.named_modules(remove_duplicate=False))
    for name, module in sorted(modules, key=lambda found: id(found[1]) not in changed):  # a changed weight is all twins'
        if isinstance(module, QuantizedModule):
            if id(module) not in made:
                made[id(module)] = new = dense_of(module)
                if isinstance(module, QuantizedLinear):
                    new.weight = weights.setdefault(id(module.weight), new.weight)  # type: ignore[arg-type]
            model = replace_module(model, name, made[id(module)])
    restore_fused_paths(model)
    return model


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` in the place of the module called `name`. Returns `model`, or `new` if that is the model itself."""
    if not name:
        return new
    model.set_submodule(name, new)
    return model


def leave_fused_paths(model: nn.Module) -> None:
    """Switch off what torch's own encoder does without calling its Linears, where those hold codes.

    `restore_fused_paths` undoes it. In torch.nn.modules.transformer, an activation of 0 is one without a fused kernel.
    """
    for module in model.modules():
        for kind, name, off in _FUSED:
            if isinstance(module, kind) and any(isinstance(part, QuantizedModule) for part in module.modules()):
                vars(module).setdefault(f"_hf_fp8_{name}", getattr(module, name))
                setattr(module, name, off)


def restore_fused_paths(model: nn.Module) -> None:
    """Undo `leave_fused_paths` where no codes are left."""
    for module in model.modules():
        for kind, name, _ in _FUSED:
            holds_codes = any(isinstance(part, QuantizedModule) for part in module.modules())
            if isinstance(module, kind) and not holds_codes and f"_hf_fp8_{name}" in vars(module):
                setattr(module, name, vars(module).pop(f"_hf_fp8_{name}"))


def copy_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new` what was put on `old`: attributes; hooks, its users' and accelerate's, which brings inputs to its device."""
    for name in (foreign := foreign_attributes(old)):
        setattr(new, name, getattr(old, name))
    if isinstance(new, QuantizedModule):
        new.foreign = foreign
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))  # the very dicts: handles remove hooks from those
    if (hook := getattr(old, "_hf_hook", None)) is not None:
        add_hook_to_module(new, hook)
