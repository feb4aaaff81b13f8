"""Merges and unmerges adapters, always starting from a float copy of the original layer."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import nn

from ...errors import UnsupportedError
from ...loading.serving import describe, torn
from ...nn.base import QuantizedModule
from ...nn.linear import QuantizedLinear
from ..patches import original
from .merge_policy import finalize_merge, forget, reporting
from .state import RECORD, Record, innermost, record_of

logger = logging.getLogger(__name__)
# Set while all adapters of a model are being unmerged: ids of those that already are.
_all: ContextVar[set[int] | None] = ContextVar("hf_fp8_unmerge_all", default=None)


def merge(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """`merge` of an adapter on a quantized layer."""
    record = record_of(layer)
    if record is None:
        original(layer, "merge")(safe_merge=safe_merge, adapter_names=adapter_names)
        return
    names = import_module("peft.tuners.tuners_utils").check_adapters_to_merge(layer, adapter_names)
    if names:
        _rebuild(record, {**_merged(record), id(layer): [*layer.merged_adapters, *names]}, safe_merge)


def unmerge(layer: Any) -> None:
    """`unmerge` of an adapter on a quantized layer; forwards call it, too."""
    record = record_of(layer)
    done = _all.get()
    if record is None or (not layer.merged and id(layer) not in (done or ())):
        original(layer, "unmerge")()
    elif layer.merged:
        _rebuild(record, {**_merged(record), id(layer): []} if done is None else {}, False)
        if done is not None:
            done.update(map(id, record.layers))


def unload_stack(layer: Any, merge: bool, safe_merge: bool, adapter_names: Any) -> Any:
    """`unload_and_optionally_merge_module` of adapters on an expert stack: PEFT's method reads the base layer before it merges,
    but merging replaces the base layer here."""
    if record_of(layer) is None:
        return original(layer, "unload_and_optionally_merge_module")(merge, safe_merge, adapter_names)
    wrapper = layer
    while merge and hasattr(wrapper, "base_layer"):
        wrapper.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        wrapper = wrapper.base_layer
    return layer.get_base_layer()


def unmerge_adapter(tuner: Any) -> Any:
    """`unmerge_adapter` of a tuner: adapters that wrap each other are unmerged together, not one by one."""
    token = _all.set(set())
    try:
        return original(tuner, "unmerge_adapter")()
    finally:
        _all.reset(token)


def reported(method: str, tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """`method` of a tuner, which merges; logs how much of the adapters was kept."""
    before = _schemes(tuner.model)
    with reporting():
        found = original(tuner, method)(*args, **kwargs)
    known = torn(before)
    if news := {name: parts for name, parts in torn(_schemes(tuner.model)).items() if known.get(name) != parts}:
        logger.warning(f"hf_fp8: {describe(news)}")
    return found


def unload_and_optionally_merge(tuner: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
    """`_unload_and_optionally_merge` of a tuner.

    Of adapters that wrap each other, PEFT's mixed model takes the inner ones out before it merges the outer: so all of a layer
    are merged first, and rounded once.
    """
    records = [vars(module)[RECORD] for module in tuner.model.modules() if RECORD in vars(module)]
    for layer in (layer for record in records if len(record.layers) > 1 for layer in record.layers):
        if merge and not hasattr(layer, "parameter_name"):
            layer.merge(**{name: kwargs[name] for name in ("safe_merge", "adapter_names") if name in kwargs})
    return reported("_unload_and_optionally_merge", tuner, merge, *args, **kwargs)


def _merged(record: Record) -> dict[int, list[str]]:
    return {id(layer): list(layer.merged_adapters) for layer in record.layers}


@torch.inference_mode(False)  # tensors that are created here may be used in training later
@torch.no_grad()
def _rebuild(record: Record, wanted: dict[int, list[str]], safe_merge: bool) -> None:
    """Merge exactly the adapters `wanted` (id of an adapter layer -> names) into the original layer.

    Always from the original: nothing is rounded twice, and without adapters the original layer itself is put back. If
    merging raises, nothing is changed.
    """
    holder = innermost(record.layers[0])
    now, merged_now, unmerged_now = holder.base_layer, _merged(record), record.unmerged
    base = record.unmerged or now
    ours = now is base or now is record.merged or isinstance(now, QuantizedModule)  # not replaced by a dense layer meanwhile
    if has_offloaded_params(base):
        raise UnsupportedError(
            f"{record.name} is offloaded, and merging would have to write its offload file: load the model without offloading "
            "(device_map='cpu'; merging needs no GPU), merge there and save"
        )
    record.open, record.unmerged = True, base
    try:
        if any(wanted.values()):
            holder.base_layer = base.to_dense(torch.float32).requires_grad_(False)
        for layer in record.layers:
            layer.merged_adapters.clear()  # in place: shallow copies of the layer share the list
            if wanted.get(id(layer)):
                layer.merge(safe_merge=safe_merge, adapter_names=wanted[id(layer)])
        if any(layer.merged_adapters for layer in record.layers):
            if ours:
                holder.base_layer = record.merged = finalize_merge(record.name, base, holder.base_layer)
            else:
                holder.base_layer = holder.base_layer.to(next(now.parameters()).dtype)
        else:
            holder.base_layer = _as_it_was(base, now, ours)
            record.unmerged = record.merged = None
            forget(record.name)
    except BaseException:
        holder.base_layer, record.unmerged = now, unmerged_now
        for layer in record.layers:
            layer.merged_adapters[:] = merged_now[id(layer)]
        raise
    finally:
        record.open = False


def _as_it_was(base: QuantizedModule, now: nn.Module, ours: bool) -> nn.Module:
    """`base`, the original layer, on the device and in the dtype of `now`, the layer that replaced it.

    ours: whether `now` is a layer that merging put there, or quantized. If the user has replaced it by a dense layer, the
    result is dense, too.
    """
    like = next(now.parameters())
    base = base.to(like.device)
    bias, other = getattr(base, "bias", None), getattr(now, "bias", None)
    if bias is not None and other is not None:
        bias.data = bias.data.to(other.dtype)
    if not base.is_offloaded and base.has_static_input:
        base.see_calibration()  # the scales are shared, and may have been measured meanwhile
    base.original_dtype = now.original_dtype if isinstance(now, QuantizedModule) else like.dtype
    kept = base if ours else base.to_dense(like.dtype).requires_grad_(False)
    return kept.train(now.training)


def _schemes(model: nn.Module) -> dict[str, str | None]:
    """Name of a Linear, as without adapters -> description of its scheme, None if it is dense."""
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            scheme = module.scheme.describe() if isinstance(module, QuantizedLinear) else None
            found[name.removesuffix(".base_layer")] = scheme
    return found
