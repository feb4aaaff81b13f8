"""Creates adapters on a float copy of one layer at a time; refuses kinds that would read codes as weights.

Codes are the stored 8-bit values of a quantized layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn

from ...errors import UnsupportedError
from ...nn.base import QuantizedModule, holds_codes
from ...nn.conv import QuantizedConv1x1
from ...nn.experts import QuantizedExperts
from ...nn.linear import QuantizedLinear
from ..patches import bind, bind_once, original
from . import qat
from .forward import activate_lora, dora_forward, move_adapter
from .merge import merge, reported, unload_and_optionally_merge, unload_stack, unmerge, unmerge_adapter
from .merge_policy import finalize_merge, reporting
from .replicated import keep_alike
from .state import RECORD, Record, innermost, record_of

# Kinds of adapters that call the layer, and do not read its weight or read it through this package.
# Measured: outputs and gradients are those of the dequantized model, bit for bit
# (tests/integrations/peft/test_adapter_kinds.py). HRA, FROD and PEANUT gave other outputs without an error or warning; HIRA,
# SHIRA, GLORA and SUPERTUNING raised an error of torch.
SUPPORTED = frozenset(
    {
        "LORA", "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GRALORA", "IA3", "LILY", "LOHA", "LOKR",
        "MISS", "OFT", "OSF", "PSOFT", "PVERA", "RANDLORA", "ROAD", "TINYLORA", "VBLORA", "VERA", "WAVEFT",
    }
)  # fmt: skip
# Kinds that work on a 1x1 convolution in FP8; the others read a kernel size, which it does not have.
ON_CONVOLUTIONS = frozenset({"LORA", "OFT", "IA3"})
# Values of init_lora_weights that do not change the weight.
STARTS_BESIDE = (True, False, "gaussian", "orthogonal", "eva")
# Values of init_lora_weights that analyse the model's weights before the adapters are created.
STARTS_FROM_CODES = ("corda", "lora_ga")
# Methods that are bound, on quantized layers, to tuners, to adapters, and to adapters on expert stacks (`ParamWrapper`).
_OF_TUNERS: dict[str, Callable[..., Any]] = {
    "merge_adapter": partial(reported, "merge_adapter"),
    "unmerge_adapter": unmerge_adapter,
    "_unload_and_optionally_merge": unload_and_optionally_merge,
}
_OF_ADAPTERS: dict[str, Callable[..., Any]] = {"merge": merge, "unmerge": unmerge}
_OF_STACKS: dict[str, Callable[..., Any]] = {
    "_activate_lora": activate_lora,
    "_move_adapter_to_device_of_base_layer": move_adapter,
    "unload_and_optionally_merge_module": unload_stack,
}


def inject_adapter(host: Any, self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """PEFT's method; on quantized layers `_create` creates each adapter, and the tuner logs what it merges into them."""
    if qat.is_prepared(model):
        qat.refuse(self.peft_config[adapter_name])
    found = _inject(host, self, model, adapter_name, *args, **kwargs)
    qat.merge_in_forward(model)
    return found


def _inject(host: Any, self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    if not any(isinstance(module, QuantizedModule) or RECORD in vars(module) for module in model.modules()):
        return host(self, model, adapter_name, *args, **kwargs)
    for name, method in _OF_TUNERS.items():
        bind(self, name, method)
    bind(self, "_create_and_replace", _create)
    before = {id(parameter) for parameter in model.parameters()}
    try:
        with reporting():
            found = host(self, model, adapter_name, *args, **kwargs)
    finally:
        del self._create_and_replace
    keep_alike(model, [parameter for parameter in model.parameters() if id(parameter) not in before])
    return found


def _create(tuner: Any, config: Any, adapter: str, target: Any, name: str, parent: Any, *rest: Any, **more: Any) -> None:
    """`_create_and_replace` of a tuner, for a target that is a plain module or already has adapters."""
    create = partial(original(tuner, "_create_and_replace"), config, adapter)
    holder = innermost(target)
    base: Any = target if holder is None else holder.base_layer
    key = more.get("current_key") or (rest[0] if rest else name)
    new = base
    if isinstance(base, QuantizedModule):
        parameter = more.get("parameter_name")
        key = key if parameter is None else key.removesuffix(f".{parameter}")
        _refuse(config, base, key, parameter)
        new = _create_on_copy(create, config, key, base, target, name, parent, *rest, **more)
    else:
        if holder is not None and not _starts_beside(config):
            _refuse_while_merged(holder, key)  # the layer became dense by merging
        create(target, name, parent, *rest, **more)
    layer = getattr(parent, name)
    if not hasattr(layer, "base_layer"):
        layer = target  # a wrapper of experts that got another adapter: `parent` is then the innermost wrapper
    holder = innermost(layer)
    if isinstance(base, QuantizedModule):
        holder.base_layer = new
        vars(holder).setdefault(RECORD, Record(key))
    if holder is not None and RECORD in vars(holder):
        _keep(vars(holder)[RECORD], layer)


def _create_on_copy(
    create: Any, config: Any, key: str, base: QuantizedModule, target: Any, name: str, parent: Any, *rest: Any, **more: Any
) -> nn.Module:
    """Create an adapter on a float copy of `base`, whose name is `key`. Returns the layer for the adapter to wrap: `base`, or
    a new layer if the copy was changed. If it raises, nothing is changed."""
    # PEFT may create new modules on the meta device (low_cpu_mem_usage), but the copy has to hold values.
    here = import_module("peft.utils.integrations").skip_init_on_device
    holder = innermost(target)
    stand_in = here(_copy_to_read)(base)
    try:
        if holder is not None:
            holder.base_layer = stand_in
        create(stand_in if holder is None else target, name, parent, *rest, **more)
        if _is_untouched(config, base, stand_in):
            return base
        if holder is not None:
            _refuse_while_merged(holder, key)
        changed: nn.Module = here(finalize_merge)(key, base, stand_in, nearest=True)
        return changed
    except BaseException:
        if holder is None:
            setattr(parent, name, target)
        else:
            holder.base_layer = base
        raise


def put_under_adapters(model: nn.Module, made: dict[str, QuantizedLinear]) -> None:
    """Replace the base layers of adapters, which exist already, by the quantized layers `made`: name of the adapter -> layer.

    Raises UnsupportedError, before anything is changed, for kinds of adapters that would read codes as weights, and for merged
    ones.
    """
    tuners: list[Any] = [module for module in model.modules() if hasattr(module, "_create_and_replace")]
    holders: dict[str, Any] = {name: model.get_submodule(name) for name in made}
    for name, holder in holders.items():
        for tuner in tuners:
            for config in getattr(tuner, "peft_config", {}).values():
                _refuse(config, made[name], name, None)
        if getattr(holder, "merged", False):
            raise UnsupportedError(f"an adapter is merged into {name}: call unmerge_adapter() first")
    for tuner in tuners:
        for bound, method in _OF_TUNERS.items():
            bind_once(tuner, bound, method)
    for name, holder in holders.items():
        holder.base_layer = made[name].requires_grad_(False)
        vars(holder).setdefault(RECORD, Record(name))
        _keep(vars(holder)[RECORD], holder)


def _keep(record: Record, layer: Any) -> None:
    """Record the adapters from `layer` inwards, and bind this package's methods to them."""
    while hasattr(layer, "base_layer"):
        if not any(layer is known for known in record.layers):
            record.layers.append(layer)
        for name, method in (_OF_ADAPTERS | (_OF_STACKS if hasattr(layer, "parameter_name") else {})).items():
            bind_once(layer, name, method)
        for dora in getattr(layer, "lora_magnitude_vector", {}).values():
            bind_once(dora, "forward", dora_forward)
        layer = layer.base_layer


def _copy_to_read(base: QuantizedModule) -> nn.Module:
    """The float copy on which PEFT creates an adapter. Of experts PEFT reads only shapes, so they get no values, nor do Linears
    that are sharded."""
    with align_module_device(base):
        if isinstance(base, QuantizedExperts) or base.is_sharded:
            return base.outline(base.float_dtype).requires_grad_(False)
        return base.to_dense(base.float_dtype).requires_grad_(False)


def _is_untouched(config: Any, base: QuantizedModule, stand_in: Any) -> bool:
    """Whether creating the adapter left the weight unchanged: some (PiSSA, OLoRA) subtract their initial values from it.

    Raises UnsupportedError if the weight of an offloaded layer was changed.
    """
    if not isinstance(base, QuantizedLinear) or _starts_beside(config):
        return True
    with align_module_device(base):
        untouched = torch.equal(stand_in.weight.flatten(1), base.restored_weight(stand_in.weight.dtype))
    if not untouched and has_offloaded_params(base):
        raise UnsupportedError(
            "this initialisation of the adapter changes the weights, which are offloaded, and would have to be written back: "
            "load the model without offloading, or use init_lora_weights=True"
        )
    return untouched


def _starts_beside(config: Any) -> bool:
    return config.peft_type == "LORA" and config.init_lora_weights in STARTS_BESIDE


def _refuse_while_merged(holder: Any, name: str) -> None:
    """Raise UnsupportedError if adapters are merged into the layer: unmerging would restore its original weight."""
    record = record_of(holder)
    if record is not None and record.unmerged is not None:
        raise UnsupportedError(
            f"{name}: this initialisation changes the weight, into which other adapters are merged: unmerge them first"
        )


def _refuse(config: Any, base: QuantizedModule, name: str, parameter: str | None) -> None:
    """Raise UnsupportedError for adapters that would read codes as weights."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in SUPPORTED:
        raise UnsupportedError(
            f"{kind} adapters read the weight of {name}, which holds codes (it is a {type(base).__name__}). "
            f"Supported are {', '.join(sorted(SUPPORTED))}; for others load with FP8Config(dequantize=True)"
        )
    if base.shards:
        raise UnsupportedError(
            f"{name} is sharded by tensor or expert parallelism, and its adapters would have to be sharded like it, which PEFT "
            "does not do: train with FSDP (fsdp_size), DDP or a device_map"
        )
    reads = None
    if getattr(config, "kasa_config", None) is not None:
        reads = "kasa_config truncates the weight, possibly in the first forward"
    elif kind == "MISS" and config.init_weights not in (True, False):
        reads = f"init_weights={config.init_weights!r} computes with the weight"
    elif isinstance(base, QuantizedConv1x1) and (kind not in ON_CONVOLUTIONS or getattr(config, "use_dora", False)):
        reads = f"only {', '.join(sorted(ON_CONVOLUTIONS))} (no DoRA) work on convolutions in FP8"
    elif getattr(config, "use_dora", False) and has_offloaded_params(base):
        reads = "DoRA reads the weight in each forward, and it is offloaded"
    elif base.is_sharded and (kind != "LORA" or getattr(config, "use_dora", False) or not _starts_beside(config)):
        raise UnsupportedError(
            f"{name} is a {type(base).__name__}: FSDP has sharded its weight, which these adapters read. Use LoRA without DoRA "
            "that starts beside the weight (init_lora_weights=True); or load the model without fsdp_size, create the adapters, "
            "and let accelerate (fsdp_version: 2) or fully_shard shard it then"
        )
    if reads is not None:
        raise UnsupportedError(f"{name} is a {type(base).__name__}: {reads}. Load with FP8Config(dequantize=True) for that")
    start = getattr(config, "init_lora_weights", True)
    if start in STARTS_FROM_CODES:
        raise UnsupportedError(
            f"init_lora_weights={start!r} looks at the model's weights before the adapters are created, and would read the "
            f"codes of {name} as weights: choose another value, or load with FP8Config(dequantize=True)"
        )
    if parameter is not None and isinstance(base, QuantizedLinear):
        leaf = name.removesuffix(f".{parameter}").rpartition(".")[2]
        raise UnsupportedError(
            f"target_parameters names {name}, the weight of a Linear: PEFT would add to its codes. "
            f"Use target_modules=[{leaf!r}], which is the same adapter"
        )


def refuse_all(why: str, host: Any, self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """PEFT's `inject_adapter`, which refuses quantized layers. why: the reason."""
    if holds_codes(model):
        raise UnsupportedError(f"{why}. Its adapters could read codes as weights: load with FP8Config(dequantize=True)")
    return host(self, model, *args, **kwargs)
