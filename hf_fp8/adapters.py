"""PEFT over quantized layers: adapters are made, and merged, on a float copy of one layer at a time.

PEFT reads and writes `base_layer.weight`, which here holds codes. So while it makes an adapter, or merges one, the layer is
replaced by what it stands for. Forwards and gradients call the layer, and need nothing; but for DoRA, which reads the
weight, and for adapters on stacks of experts, which FP8Experts multiplies itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .convert import swap_back
from .errors import UnsupportedError
from .experts import FP8Experts
from .linear import FP8Linear
from .low_rank import LowRank
from .merging import close, reporting
from .quantized_module import QuantizedModule

# Kinds of adapters that call the layer, and leave its weight alone or come through here for it.
# Measured: outputs and gradients are those of the dequantized model, bit for bit (tests/test_adapter_kinds.py). HRA, FROD and
# PEANUT gave other outputs without a word, HIRA, SHIRA, GLORA and SUPERTUNING torch's error.
SUPPORTED = frozenset(
    {
        "LORA", "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GRALORA", "IA3", "LILY", "LN_TUNING", "LOHA",
        "LOKR", "MISS", "OFT", "OSF", "PSOFT", "PVERA", "RANDLORA", "ROAD", "TINYLORA", "TRAINABLE_TOKENS", "VBLORA", "VERA",
        "WAVEFT",
    }
)  # fmt: skip
# Ways to start LoRA from an analysis of the model's weights, made before adapters are.
STARTS_FROM_CODES = ("corda", "lora_ga")
_RECORD = "_hf_fp8"
_all: ContextVar[set[int] | None] = ContextVar("hf_fp8_unmerge_all", default=None)  # while all are unmerged: those that are
_patched: list[tuple[Any, str, Any]] = []  # (owner, name, what was there before)


@dataclass
class Record:
    """Of a quantized layer with adapters on it, kept by the innermost of them. name: its own in the model. layers: its
    adapters, which for experts wrap each other. unmerged: what it was before adapters were merged into it, None if it is.
    open: whether a float copy stands in its place."""

    name: str
    layers: list[Any] = field(default_factory=list)
    unmerged: QuantizedModule | None = None
    open: bool = False


def install() -> None:
    """Teach PEFT, if it is there, what quantized layers are. Harmless when repeated."""
    if _patched or find_spec("peft") is None:
        return
    tuners = import_module("peft.tuners.tuners_utils")
    lora = import_module("peft.tuners.lora.layer")
    for cls in _subclasses(tuners.BaseTunerLayer):
        for name, wrapper in (("merge", _merge), ("unmerge", _unmerge)):
            if name in vars(cls):
                _patch(cls, name, wrapper)
    _patch(tuners.BaseTuner, "inject_adapter", _inject)
    _patch(tuners.BaseTuner, "merge_adapter", _reported)
    _patch(tuners.BaseTuner, "unmerge_adapter", _unmerge_all)
    _patch(tuners.BaseTuner, "_unload_and_optionally_merge", _reported)
    _patch(lora.ParamWrapper, "_activate_lora", _activate)
    _patch(import_module("peft.utils.other").ModulesToSaveWrapper, "update", _copy_to_train)
    for module in ("peft.utils.other", "peft.utils", "peft"):
        _patch(import_module(module), "prepare_model_for_kbit_training", _prepare)
    for module in ("peft.utils.integrations", "peft.tuners.lora.dora", "peft.tuners.lora.variants"):
        _patch(import_module(module), "dequantize_module_weight", _float_weight)
    _patch(import_module("peft.tuners.lora.dora").DoraLinearLayer, "forward", _dora)


def uninstall() -> None:
    """Give PEFT its own behaviour back."""
    while _patched:
        owner, name, before = _patched.pop()
        setattr(owner, name, before)


def _patch(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    before = vars(owner)[name]
    _patched.append((owner, name, before))
    setattr(owner, name, wraps(before)(wrapper(before)))


def _subclasses(cls: Any) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


# -- making adapters --


def _inject(host: Any) -> Any:
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(module, QuantizedModule) for module in model.modules()):
            return host(self, model, adapter_name, *args, **kwargs)
        create = self._create_and_replace

        def on_a_float_copy(config: Any, adapter: str, target: Any, name: str, parent: Any, *rest: Any, **more: Any) -> None:
            _create(create, config, adapter, target, name, parent, *rest, **more)

        self._create_and_replace = on_a_float_copy
        try:
            with reporting():
                return host(self, model, adapter_name, *args, **kwargs)
        finally:
            del self._create_and_replace

    return inject_adapter


def _create(create: Any, config: Any, adapter: str, target: Any, name: str, parent: Any, *rest: Any, **more: Any) -> None:
    """PEFT's `_create_and_replace`, for a target that is a quantized layer or has adapters on one."""
    holder = _innermost(target)
    base: Any = target if holder is None else holder.base_layer
    if not isinstance(base, QuantizedModule):
        create(config, adapter, target, name, parent, *rest, **more)
        return
    key = more.get("current_key") or (rest[0] if rest else name)
    _refuse(config, base, key, more.get("parameter_name"))
    # PEFT may be making all that is new on the meta device (low_cpu_mem_usage): not the copy.
    here = import_module("peft.utils.integrations").skip_init_on_device
    stand_in = here(_copy_to_read)(base)
    if holder is None:
        create(config, adapter, stand_in, name, parent, *rest, **more)
    else:
        holder.base_layer = stand_in
        try:
            create(config, adapter, target, name, parent, *rest, **more)
        finally:
            holder.base_layer = base
    layer = getattr(parent, name)
    holder = _innermost(layer)
    holder.base_layer = base if _is_untouched(base, stand_in) else here(close)(key, base, stand_in, nearest=True)
    record = vars(holder).setdefault(_RECORD, Record(key))
    while hasattr(layer, "base_layer"):
        if not any(layer is known for known in record.layers):
            record.layers.append(layer)
        layer = layer.base_layer


def _copy_to_read(base: QuantizedModule) -> nn.Module:
    """What PEFT takes for the layer while it makes an adapter. Of experts it reads shapes alone."""
    dtype = base.made_of or torch.bfloat16
    hook = getattr(base, "_hf_hook", None) if _is_offloaded(base) else None
    if hook is not None:
        hook.pre_forward(base)
    copied = base.outline(dtype) if isinstance(base, FP8Experts) else base.to_dense(dtype)
    if hook is not None:
        hook.post_forward(base, torch.empty(0))
    return copied.requires_grad_(False)


def _is_untouched(base: QuantizedModule, stand_in: Any) -> bool:
    """Whether making the adapter left the weight as it was: some (PiSSA, OLoRA) take out of it what they start with."""
    if not isinstance(base, FP8Linear) or _is_offloaded(base):
        return True
    return torch.equal(stand_in.weight.flatten(1), base.restored_weight(stand_in.weight.dtype))


def _refuse(config: Any, base: QuantizedModule, name: str, parameter: str | None) -> None:
    """Raise UnsupportedError for adapters that would take codes for weights."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in SUPPORTED:
        raise UnsupportedError(
            f"{kind} adapters compute with the weights of {name} themselves, which are codes in a {type(base).__name__}. "
            f"{', '.join(sorted(SUPPORTED))} work; for others load with FP8Config(dequantize=True)"
        )
    start = getattr(config, "init_lora_weights", True)
    if start in STARTS_FROM_CODES:
        raise UnsupportedError(
            f"init_lora_weights={start!r} looks at the model's weights before the adapters are made, and would take the codes "
            f"of {name} for weights: choose another, or load with FP8Config(dequantize=True)"
        )
    if parameter is not None and isinstance(base, FP8Linear):
        leaf = name.removesuffix(f".{parameter}").rpartition(".")[2]
        raise UnsupportedError(
            f"target_parameters names {name}, the weight of a Linear: PEFT would add to its codes. "
            f"target_modules=[{leaf!r}] is the same adapter, and works"
        )


# -- merging --


def _innermost(layer: Any) -> Any:
    """The adapter that holds the base layer itself; None if `layer` is no adapter."""
    holder = None
    while hasattr(layer, "base_layer"):
        holder, layer = layer, layer.base_layer
    return holder


def _record(layer: Any) -> Record | None:
    """The record of the layer that `layer` is an adapter on; None if it is not quantized, or a float copy just now."""
    holder = _innermost(layer)
    record: Record | None = vars(holder).get(_RECORD)
    is_quantized = isinstance(holder.base_layer, QuantizedModule)
    if record is None and is_quantized:
        record = vars(holder)[_RECORD] = Record(type(holder.base_layer).__name__, [layer])  # made without `install`
    return record if record is not None and not record.open and (is_quantized or record.unmerged is not None) else None


def _merge(host: Any) -> Any:
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        record = _record(self)
        if record is None:
            host(self, safe_merge=safe_merge, adapter_names=adapter_names)
            return
        names = import_module("peft.tuners.tuners_utils").check_adapters_to_merge(self, adapter_names)
        if names:
            _rebuild(record, {**_merged(record), id(self): [*self.merged_adapters, *names]}, safe_merge)

    return merge


def _unmerge(host: Any) -> Any:
    def unmerge(self: Any) -> None:
        record = _record(self)
        done = _all.get()
        if record is None or (not self.merged and id(self) not in (done or ())):
            host(self)
        elif self.merged:
            _rebuild(record, {**_merged(record), id(self): []} if done is None else {}, False)
            if done is not None:
                done.update(map(id, record.layers))

    return unmerge


def _unmerge_all(host: Any) -> Any:
    def unmerge_adapter(self: Any) -> Any:
        token = _all.set(set())  # adapters that wrap each other need not be unmerged one by one
        try:
            return host(self)
        finally:
            _all.reset(token)

    return unmerge_adapter


def _merged(record: Record) -> dict[int, list[str]]:
    return {id(layer): list(layer.merged_adapters) for layer in record.layers}


@torch.no_grad()
def _rebuild(record: Record, wanted: dict[int, list[str]], safe_merge: bool) -> None:
    """Merge the adapters `wanted` (id of a layer -> names) into the layer as it was before any, and no others.

    Always from there: what was rounded is not rounded again, and without adapters it is the very layer that it was. If
    merging raises, all is as before.
    """
    holder = _innermost(record.layers[0])
    now, merged_now, unmerged_now = holder.base_layer, _merged(record), record.unmerged
    base = record.unmerged or now
    if _is_offloaded(base):
        raise UnsupportedError(
            f"{record.name} is offloaded, and merging would have to write its file: load the model without offloading "
            "(device_map='cpu'; merging needs no GPU), merge there and save"
        )
    record.open, record.unmerged = True, base
    try:
        if any(wanted.values()):
            holder.base_layer = base.to_dense(torch.float32).requires_grad_(False)
        for layer in record.layers:
            layer.merged_adapters = []
            if wanted.get(id(layer)):
                layer.merge(safe_merge=safe_merge, adapter_names=wanted[id(layer)])
        if any(layer.merged_adapters for layer in record.layers):
            holder.base_layer = close(record.name, base, holder.base_layer)
        else:
            holder.base_layer = base.to(next(now.parameters()).device).train(now.training)
            record.unmerged = None
    except BaseException:
        holder.base_layer, record.unmerged = now, unmerged_now
        for layer in record.layers:
            layer.merged_adapters = merged_now[id(layer)]
        raise
    finally:
        record.open = False


def _is_offloaded(base: nn.Module) -> bool:
    return bool(getattr(getattr(base, "_hf_hook", None), "offload", False))


def _reported(host: Any) -> Any:
    def reported(*args: Any, **kwargs: Any) -> Any:
        with reporting():
            return host(*args, **kwargs)

    return reported


# -- forwards --


def _activate(host: Any) -> Any:
    @contextmanager
    def activate(self: Any, active_adapters: list[str]) -> Iterator[None]:
        """Adapters on a stack of experts, which PEFT would add to its codes."""
        base = self.get_base_layer()
        names = [name for name in active_adapters if name in self.lora_A]
        how = host(self, active_adapters)
        if isinstance(base, FP8Experts):
            how = base.adapted(self.parameter_name, [_factors(self, base, name) for name in names])
        with how:
            yield

    return activate


def _factors(layer: Any, base: FP8Experts, name: str) -> LowRank:
    """The matrices of an adapter on a stack, as PEFT's `ParamWrapper.get_delta_factors` reads them.

    It multiplies them in the family's layout, (E, N, K) or its transpose, and takes Llama-4's for the other one.
    """
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    a = a.reshape(layer.num_experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)
    if layer._did_swap_in_out_features == base.layout.is_transposed:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return LowRank(a, b, layer.scaling[name])


def _float_weight(host: Any) -> Any:
    def dequantize_module_weight(module: nn.Module) -> Any:
        if isinstance(module, FP8Linear):
            return module.dequantized_weight(module.made_of or torch.bfloat16)
        return host(module)

    return dequantize_module_weight


def _dora(host: Any) -> Any:
    def forward(self: Any, x: torch.Tensor, *, base_layer: Any, base_result: torch.Tensor | None = None, **rest: Any) -> Any:
        if base_result is None and isinstance(base_layer, FP8Linear):
            base_result = base_layer(x)  # else the dequantized weight would be kept for the backward pass
        return host(self, x, base_layer=base_layer, base_result=base_result, **rest)

    return forward


# -- training --


def _copy_to_train(host: Any) -> Any:
    def update(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """`modules_to_save` trains a copy of a module: of a quantized one a float copy."""
        module = self.original_module
        if adapter_name in self.modules_to_save or not any(isinstance(part, QuantizedModule) for part in module.modules()):
            return host(self, adapter_name, *args, **kwargs)
        self.original_module = swap_back(copy.deepcopy(module))
        try:
            return host(self, adapter_name, *args, **kwargs)
        finally:
            self.original_module = module.requires_grad_(False)

    return update


def _prepare(host: Any) -> Any:
    def prepare_model_for_kbit_training(model: Any, *args: Any, **kwargs: Any) -> Any:
        """PEFT's, which knows quantized models by such an attribute; scales stay in their dtype."""
        layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
        if not layers or getattr(model, "is_loaded_in_8bit", False):
            return host(model, *args, **kwargs)
        held = [getattr(layer, name) for layer in layers for name in layer.quantized]
        dtypes = [(parameter, parameter.dtype) for parameter in held if parameter is not None]
        model.is_loaded_in_8bit = True
        try:
            return host(model, *args, **kwargs)
        finally:
            del model.is_loaded_in_8bit
            for parameter, dtype in dtypes:
                parameter.data = parameter.data.to(dtype)

    return prepare_model_for_kbit_training
