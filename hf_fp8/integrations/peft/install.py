"""PEFT over quantized layers: adapters are made, and merged, on a float copy of one layer at a time.

PEFT reads and writes `base_layer.weight`, which here holds codes. So while it makes an adapter, or merges one, the layer is
replaced by what it stands for. Forwards and gradients call the layer, and need nothing; but for DoRA, which reads the
weight, and for adapters on stacks of experts, which FP8Experts multiplies itself.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from packaging import version

from .create import inject_adapter, refuse_all
from .forward import activate_lora, dora_forward, float_weight, move_adapter
from .merge import cover, reported, unload_stack, unmerge_all
from .patches import is_patched, patch, restore
from .prepare import prepare, reduce_intruders, update_copy, with_float_heads

# What transformers 5.23 asks for, too.
OLDEST_PEFT = "0.20.0"


def install() -> None:
    """Teach PEFT, if it is there, what quantized layers are. Harmless when repeated."""
    if is_patched() or find_spec("peft") is None:
        return
    try:
        tuners: Any = import_module("peft.tuners.tuners_utils")
    except Exception:  # one that does not go with this transformers: whoever uses it will see its own error
        return
    found = import_module("peft").__version__
    try:
        if version.parse(found) < version.parse(OLDEST_PEFT):
            raise ImportError(f"{OLDEST_PEFT} or newer is needed")
        _wrap()
    except (ImportError, AttributeError, KeyError) as error:
        uninstall()
        patch(tuners.BaseTuner, "inject_adapter", refuse_all(f"PEFT {found} is not one that hf_fp8 knows: {error}"))


def _wrap() -> None:
    tuners = import_module("peft.tuners.tuners_utils")
    lora = import_module("peft.tuners.lora.layer")
    for kind in tuners.BaseTunerLayer.__subclasses__():
        for cls in _with_subclasses(kind):
            cover(cls)
    patch(tuners.BaseTuner, "inject_adapter", inject_adapter)
    patch(tuners.BaseTuner, "merge_adapter", reported)
    patch(tuners.BaseTuner, "unmerge_adapter", unmerge_all)
    patch(tuners.BaseTuner, "_unload_and_optionally_merge", reported)
    patch(lora.ParamWrapper, "_activate_lora", activate_lora)
    patch(lora.ParamWrapper, "_move_adapter_to_device_of_base_layer", move_adapter)
    patch(lora.ParamWrapper, "unload_and_optionally_merge_module", unload_stack)
    patch(import_module("peft.utils.other").ModulesToSaveWrapper, "update", update_copy)
    _patch_everywhere("peft.utils.other", "prepare_model_for_kbit_training", prepare)
    _patch_everywhere("peft.utils.save_and_load", "get_peft_model_state_dict", with_float_heads)
    _patch_everywhere("peft.tuners.lora.intruders", "reduce_intruder_dimension", reduce_intruders)
    for name in ("peft.utils.integrations", "peft.tuners.lora.dora", "peft.tuners.lora.variants"):
        module = import_module(name)
        if hasattr(module, "dequantize_module_weight"):  # variants: from 0.21 on
            patch(module, "dequantize_module_weight", float_weight)
    patch(import_module("peft.tuners.lora.dora").DoraLinearLayer, "forward", dora_forward)


def _patch_everywhere(module: str, name: str, wrapper: Any) -> None:
    """Patch a function where it is defined and wherever PEFT has imported it to; one that this PEFT has not is left out."""
    if find_spec(module) is None:
        return
    function = vars(import_module(module))[name]
    for known, owner in list(sys.modules.items()):
        if known.partition(".")[0] == "peft" and vars(owner).get(name) is function:
            patch(owner, name, wrapper)


def _with_subclasses(cls: Any) -> list[Any]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _with_subclasses(sub))]


def uninstall() -> None:
    """Give PEFT its own behaviour back."""
    restore()
